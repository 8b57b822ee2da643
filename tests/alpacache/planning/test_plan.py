"""The plan: pinned numbers of the released model, bytes against a real store, what is refused."""

import pytest

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.driving.cameras import CAMERAS, SLOTS, sort_cameras
from alpacache.driving.sample import SampleRef, split_of
from alpacache.driving.splits import parse_split
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.planning import plan as planning
from alpacache.planning.config import PlanConfig
from alpacache.planning.machine import DiskSpeed
from alpacache.planning.plan import plan
from alpacache.planning.sample_size import planned_prompt, sample_bytes
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from cache_store import CODECS, CacheReader, info

ASK = {"samples": 1000, "codec": "int8", "epochs": 10.0, "batch_size": 4, "gpu": "4090", "memory_budget": "24GB"}


@pytest.mark.parametrize(("cameras", "tokens", "megabytes"), [(CAMERAS[1:2], 809, 119.3), (SLOTS, 2993, 441.3)])
def test_tokens_and_kv_of_the_released_model(cameras, tokens, megabytes):
    found = plan(PlanConfig(samples=10, cameras=cameras))
    assert (found.tokens, found.tokens_an_image, found.images) == (tokens, 180, 4 * len(cameras))
    assert 0 < found.bytes_by_field["kv"] - tokens * 147_456 < 2000  # checksums and metadata
    assert found.kv_bytes_by_codec["bf16"] / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert 0 < found.bytes_by_field["hidden"] - tokens * 8192 < 10_000  # a row of padding
    assert found.store_bytes == 10 * sum(found.bytes_by_field.values())


@pytest.mark.parametrize(
    ("family", "cameras", "tokens", "token_bytes"),
    [
        ("1.5", CAMERAS[1:2], 828, 147_456),
        ("1.5", SLOTS, 3073, 147_456),
        ("2", CAMERAS[1:2], 825, 262_144),
        ("2", SLOTS, 3070, 262_144),
        ("2", (*CAMERAS[:4], *CAMERAS[5:]), 4568, 262_144),
        ("2", CAMERAS, 5316, 262_144),
    ],
)
def test_tokens_and_kv_of_the_other_released_models(family, cameras, tokens, token_bytes):
    found = plan(PlanConfig(samples=10, family=family, cameras=cameras))
    assert (found.tokens, found.tokens_an_image) == (tokens, 180)
    assert 0 < found.bytes_by_field["kv"] - tokens * token_bytes < 2000


@pytest.mark.parametrize(("count", "codec", "batch"), [(1, "int8", 16), (6, "int8", 4), (6, "int4", 8)])
def test_all_parameters_of_2_super_train_on_24_gb(count, codec, batch):
    cameras = CAMERAS[1:2] if count == 1 else (*CAMERAS[:4], *CAMERAS[5:])
    found = plan(PlanConfig(samples=10, family="2", cameras=cameras, codec=codec, batch_size=batch, gpu="4090"))
    assert found.memory_bytes <= 23.5 * 2**30
    assert not found.memory.streamed_layers
    assert found.extract.weights_bytes == 2 * 33_396_711_664
    assert any("scaled by its parameters" in note for note in found.notes)


def test_a_family_is_for_plans_without_a_model(tiny_checkpoint_2):
    with pytest.raises(UsageError, match="family 2 is for plans without a model; leave --family or --model out"):
        plan(PlanConfig(samples=1, family="2", model=str(tiny_checkpoint_2)))


def test_pictures_of_any_usual_size_are_180_tokens():
    for picture in ((1080, 1920), (900, 1600), (720, 1280)):
        assert plan(PlanConfig(samples=1, picture=picture)).tokens == 809
    with pytest.raises(UsageError, match="picture is"):
        PlanConfig(samples=1, picture=(1, 1000))


@pytest.mark.parametrize(
    ("codec", "hidden_states", "family", "cameras"),
    [("bf16", "last", "r1", CAMERAS[1:2]), ("int8", "none", "r1", SLOTS), ("int4", "last", "1.5", CAMERAS[:2])],
)
def test_bytes_are_those_of_a_real_store(
    codec, hidden_states, family, cameras, tiny_checkpoint, tiny_checkpoint_15, tmp_path
):
    model = str(tiny_checkpoint if family == "r1" else tiny_checkpoint_15)
    store = tmp_path / "store"
    settings = {"model": model, "cameras": cameras, "frames": 2, "codec": codec, "hidden_states": hidden_states}
    alpacache.extract(ExtractConfig(source="synthetic:1", store=str(store), device="cpu", **settings))
    reader, written = CacheReader(store), info(store)
    (sample_id,) = reader.sample_ids
    config = PlanConfig(samples=1, picture=(128, 256), **settings)
    found = plan(config)
    assert found.tokens == int(reader.read(sample_id, fields=["prefix_len"])["prefix_len"])
    loose = {"front_jpeg", "(metadata)"}
    same = {name: size for name, size in written.size_by_field.items() if size and name not in loose}
    assert same == {name: size for name, size in found.bytes_by_field.items() if name not in loose}
    # The rest too, once picture, clip id and calibration are those of this sample.
    sample = reader.read(sample_id)
    assert written.size_by_field["front_jpeg"] == sample["front_jpeg"].nbytes
    checkpoint = Checkpoint(model)
    exact = sample_bytes(
        geometry_of(checkpoint),
        planned_prompt(InputBuilder(checkpoint), sort_cameras(cameras), frames=2, picture=(128, 256)),
        codec=CODECS.get(codec),
        hidden_states=hidden_states == "last",
        clip_id=SampleRef.parse(sample_id).clip_id,
        jpeg_bytes=sample["front_jpeg"].nbytes,
    )
    calibration = written.size_by_field["(metadata)"] - exact["(metadata)"]
    assert 0 < calibration - len(str(sample["calibration"])) < 0.2 * calibration


def test_each_view_is_a_sample_of_the_store():
    one, three = plan(PlanConfig(**ASK)), plan(PlanConfig(**ASK, views=3))
    assert (three.samples, three.views, one.views) == (3000, 3, 1)
    assert three.store_bytes == 3 * one.store_bytes
    assert three.train.steps == 3 * one.train.steps
    assert three.extract.hours == pytest.approx(3 * one.extract.hours)
    assert three.bytes_by_field == one.bytes_by_field


def test_rollouts_are_counted_at_their_longest():
    plain, found = plan(PlanConfig(**ASK)), plan(PlanConfig(**ASK, reasoning="rollout", rollouts=6))
    tails = {name: size for name, size in found.bytes_by_field.items() if name.startswith("tail.")}
    assert len([name for name in tails if name.endswith(".kv")]) == found.rollouts == 6
    a_token = 36 * 8 * 128 * 2
    longest = 24 + 255  # the question, and all but the last of 256 tokens
    assert tails["tail.5.kv"] == pytest.approx(longest * a_token * 1.07, rel=0.02)
    assert found.store_bytes - plain.store_bytes == pytest.approx(1000 * sum(tails.values()), rel=0.01)
    assert found.kv_bytes_by_codec == plain.kv_bytes_by_codec
    assert (found.memory, found.train) == (plain.memory, plain.train)  # training reads the direct prefix only
    assert any("an upper bound" in text for text in found.notes)
    assert plain.rollouts == 0
    assert not any("upper bound" in text for text in plain.notes)


def test_a_number_of_rollouts_is_refused_where_none_are_wanted():
    extraction = {"source": "synthetic:1", "model": "m", "store": "s"}
    assert (PlanConfig(**ASK).tails, ExtractConfig(**extraction, reasoning="rollout").tails) == (0, 6)
    for config, values in ((PlanConfig, ASK), (ExtractConfig, extraction)):
        assert config(**values, reasoning="rollout", rollouts=2).tails == 2
        with pytest.raises(UsageError, match="rollouts is 2, and reasoning is none; add --reasoning rollout"):
            config(**values, rollouts=2)


def test_training_on_rollouts_is_planned_with_their_tails():
    def planned(prefix, codec="int8"):
        return plan(PlanConfig(**ASK | {"codec": codec}, reasoning="rollout", prefix=prefix))

    direct, mix, rollouts = map(planned, ("direct", "mix", "rollouts"))
    assert direct.memory.prefixes < mix.memory.prefixes == rollouts.memory.prefixes
    assert direct.memory.decoding < mix.memory.decoding
    assert direct.memory.pinned < mix.memory.pinned
    kv, tail = direct.bytes_by_field["kv"], direct.bytes_by_field["tail.0.kv"]
    assert rollouts.train.read_s / direct.train.read_s == pytest.approx((kv + tail) / kv)
    assert mix.train.read_s == pytest.approx((direct.train.read_s + rollouts.train.read_s) / 2)
    assert direct.train.compute_s < rollouts.train.compute_s
    plain = planned("rollouts", codec="bf16")
    row = -(-((direct.tokens + 24 + 255) * 36 * 2 * 8 * 128 * 2 + 8) // 256) * 256
    stored = -(-(direct.tokens * 36 * 2 * 8 * 128 * 2 + 8) // 256) * 256
    assert plain.memory.prefixes == 2 * 4 * row + stored  # and one sample that is about to be joined
    with pytest.raises(UsageError, match="prefix is mix; expected direct, or --reasoning rollout with it"):
        PlanConfig(**ASK, prefix="mix")


@pytest.mark.system
def test_the_bound_of_rollouts_holds_for_a_real_store(tiny_checkpoint, tmp_path):
    settings = {"model": str(tiny_checkpoint), "frames": 1, "codec": "int8", "reasoning": "rollout", "rollouts": 2}
    store = tmp_path / "store"
    alpacache.extract(ExtractConfig(source="synthetic:2", store=str(store), device="cpu", **settings))
    found, written = plan(PlanConfig(samples=2, picture=(128, 256), **settings)), info(store)
    for name, size in found.bytes_by_field.items():
        if name.startswith("tail."):
            assert 0 < written.size_by_field[name] <= 2 * size, name
    assert found.tokens == int(CacheReader(store).read(CacheReader(store).sample_ids[0])["prefix_len"])


def test_the_original_ask():
    found = plan(PlanConfig(**ASK))
    assert found.train.steps == 2500
    assert found.store_bytes / 1e9 == pytest.approx(70.0, abs=0.1)
    assert found.memory_bytes / 2**30 == pytest.approx(16.4, abs=0.1)
    assert (found.memory.micro_batch, found.memory.checkpointing) == (4, False)
    assert found.extract.hours == pytest.approx(0.0656, abs=0.002)
    assert found.train.hours == pytest.approx(0.117, abs=0.002)
    assert any("estimates" in text and "RTX 4090" in text for text in found.notes)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("gpu", ["h100", "4090"])
def test_the_cache_is_paid_back_where_both_ways_take_as_long(codec, gpu):
    """Asked for exactly so many epochs, both stages take the hours of the VLM in every step."""
    ask = ASK | {"codec": codec, "gpu": gpu, "samples": 10_000}
    even = plan(PlanConfig(**ask)).loop.break_even_epochs
    if even is None:
        found = plan(PlanConfig(**ask))
        assert found.train.read_s / 4 >= found.extract.prefill_s + found.train.step_s / 4
    else:
        found = plan(PlanConfig(**ask | {"epochs": even}))
        assert found.loop.cached_hours == pytest.approx(found.loop.hours, rel=0.01)
    even = found.loop.break_even_in_memory
    found = plan(PlanConfig(**ask | {"epochs": even}))
    assert found.extract.hours + found.train.hours_in_memory == pytest.approx(found.loop.hours, rel=0.01)
    assert found.loop.memory_bytes == found.extract.weights_bytes + found.memory_bytes


def test_hours_are_steps_times_what_is_slower():
    slow = plan(PlanConfig(**ASK)).train
    busy = slow.compute_s + slow.optimizer_s
    assert slow.read_s > busy
    assert slow.hours == pytest.approx(2500 * slow.read_s / 3600)
    assert slow.hours_in_memory == pytest.approx((250 * slow.read_s + 2250 * busy) / 3600)
    fast = plan(PlanConfig(**ASK | {"codec": "int4", "draws": 8})).train
    assert fast.read_s < fast.compute_s + fast.optimizer_s
    assert fast.hours == fast.hours_in_memory == pytest.approx(2500 * (fast.compute_s + fast.optimizer_s) / 3600)


def test_a_slow_writer_bounds_stage_one(monkeypatch):
    monkeypatch.setattr(planning, "WRITE_BYTES_S", 1e8)
    found = plan(PlanConfig(samples=1000, gpu="h100")).extract
    assert found.prefill_s == pytest.approx(0.0379, rel=0.05)  # measured in batches of eight, of 790 tokens each
    assert found.reading_s == pytest.approx(0.05)
    assert found.hours == pytest.approx(1000 * found.write_s / 3600)
    assert found.write_s == pytest.approx(1.26, abs=0.01)


def test_the_budget_and_the_card_both_cap():
    assert plan(PlanConfig(samples=1, gpu="4090")).cap_bytes == int(23.5 * 2**30)
    assert plan(PlanConfig(samples=1, gpu="4090", memory_budget="80GB")).cap_bytes == int(23.5 * 2**30)
    assert plan(PlanConfig(samples=1, gpu="h100", memory_budget="24GB")).cap_bytes == int(23.5 * 2**30)


def test_what_cannot_fit_is_refused():
    with pytest.raises(UsageError, match=r"Lower --batch-size to \d+"):
        plan(PlanConfig(**ASK | {"cameras": SLOTS, "batch_size": 64}))
    with pytest.raises(UsageError, match="--trainable lora"):
        plan(PlanConfig(**ASK | {"memory_budget": "5GB", "batch_size": 1}))
    assert plan(PlanConfig(**ASK | {"memory_budget": "8GB", "batch_size": 1})).memory_bytes < 7.5 * 2**30
    assert plan(PlanConfig(**ASK | {"memory_budget": "12GB", "trainable": "lora"})).memory_bytes < 11.5 * 2**30


@pytest.mark.parametrize("bad", [{"samples": 0}, {"frames": 5}, {"epochs": 0}, {"batch_size": 0}, {"draws": 0}])
def test_bad_values_are_named(bad):
    (name,) = bad
    with pytest.raises(UsageError, match=f"{name} is"):
        PlanConfig(**{"samples": 1} | bad)


def test_a_store_or_vlm_that_does_not_fit_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 69 * 10**9)
    found = plan(PlanConfig(**ASK, store=str(tmp_path / "store")))
    assert found.free_bytes == 69 * 10**9
    assert found.notes[0].startswith("The store does not fit: 70.0 GB against 69.0 free")
    small = plan(PlanConfig(**ASK | {"memory_budget": "16GB", "trainable": "lora", "reasoning": "rollout"}))
    assert small.notes[0].startswith("Stage one does not fit: reasoning rollouts need the VLM's weights on the GPU")
    assert small.extract.memory is None
    assert not any("not fit" in text for text in plan(PlanConfig(**ASK)).notes)


def test_a_small_card_gets_its_weights_from_ram_and_the_bus_counts():
    large, small = (plan(PlanConfig(**ASK | {"memory_budget": size, "trainable": "lora"})) for size in ("24GB", "16GB"))
    assert (large.extract.memory.home, small.extract.memory.home) == ("gpu", "ram")
    assert large.extract.bus_s == 0
    streamed = small.extract.memory
    assert small.extract.bus_s == streamed.streamed_bytes / small.machine.bus_bytes_s / streamed.group
    assert small.extract.hours >= small.samples * small.extract.bus_s / 3600


@pytest.fixture
def probed(tmp_path, monkeypatch):
    """Plans probed on a machine without a GPU: a disk that reads 0.2 GB/s, and so much RAM."""

    def planned(ram_bytes, **changes):
        speed = DiskSpeed(write_bytes_s=1e9, read_bytes_s=2e8, probe_bytes=2**29)
        monkeypatch.setattr(planning, "disk_speed", lambda path: speed)
        monkeypatch.setattr(planning, "available_bytes", lambda: int(ram_bytes))
        monkeypatch.setattr(planning.torch.cuda, "is_available", lambda: False)
        return plan(
            PlanConfig(**ASK | {"memory_budget": "12GB", "gpu": "4070"} | changes, probe=True, store=str(tmp_path))
        )

    return planned


def test_weights_in_files_arrive_at_the_rate_of_the_disk(probed):
    found = probed(14e9)
    streamed = found.extract.memory
    assert streamed.home == "files"
    assert found.extract.bus_s == streamed.streamed_bytes / 2e8 / streamed.group
    assert found.extract.hours == pytest.approx(1000 * found.extract.bus_s / 3600)
    place, one = planning.stage_one(int(11.5 * 2**30), int(14e9), None, found.machine.gpu, read_bytes_s=2e8)
    _, usual = planning.stage_one(int(11.5 * 2**30), int(14e9), None, found.machine.gpu)
    assert place == "files"
    assert one == pytest.approx(found.extract.hours)
    assert usual == pytest.approx(1000 * found.extract.prefill_s / 3600)


def test_what_stage_two_page_locks_is_held_against_ram_where_it_is_known(probed):
    found = probed(5e9)
    (note,) = (text for text in found.notes if text.startswith("Stage two does not fit"))
    pinned, state = found.memory.pinned / 2**30, found.memory.streamed / 2**30
    assert f"{pinned:.2f} GiB would be page-locked in RAM, {state:.2f} of it optimizer state" in note
    assert "4.66 GiB are available. Free RAM, lower --batch-size, raise --memory-budget, or use --trainable" in note
    for roomy in (probed(2e10), plan(PlanConfig(**ASK | {"memory_budget": "12GB"}))):
        assert not any("Stage two" in text for text in roomy.notes)


def test_nothing_is_summed_up_with_a_stage_one_that_does_not_fit():
    found = plan(PlanConfig(**ASK | {"memory_budget": "16GB", "reasoning": "rollout"}))
    assert found.extract.hours is None
    loop = found.loop
    assert loop.hours > 0
    assert {loop.cached_hours, loop.cached_memory_bytes, loop.break_even_epochs, loop.break_even_in_memory} == {None}


def test_both_stages_take_the_memory_of_the_larger():
    for changes in ({}, {"memory_budget": "12GB"}):
        found = plan(PlanConfig(**ASK | changes))
        sizes = found.extract.memory.device_bytes, found.memory.device_bytes
        assert found.loop.cached_memory_bytes == max(sizes)
        assert (sizes[0] > sizes[1]) == (not changes)


def test_layers_behind_the_last_chosen_one_neither_run_nor_come():
    ask = ASK | {"memory_budget": "12GB", "trainable": "lora"}
    everything, hidden = (plan(PlanConfig(**ask | changes)) for changes in ({}, {"layers": "first:6"}))
    few = plan(PlanConfig(**ask | {"layers": "first:6", "hidden_states": "none"}))
    assert few.extract.memory.streamed_bytes * 6 == everything.extract.memory.streamed_bytes
    assert few.extract.memory.host_weights * 6 == everything.extract.memory.host_weights
    assert hidden.extract.memory.streamed_bytes == everything.extract.memory.streamed_bytes
    assert hidden.extract.prefill_s == everything.extract.prefill_s
    assert 1 / 6 < few.extract.prefill_s / everything.extract.prefill_s < 0.4  # the tower is run through in any case


def test_a_probe_replaces_what_was_assumed(tmp_path, monkeypatch):
    speed = DiskSpeed(write_bytes_s=5e8, read_bytes_s=3e9, probe_bytes=2**29)
    monkeypatch.setattr(planning, "disk_speed", lambda path: speed)
    monkeypatch.setattr(planning.torch.cuda, "is_available", lambda: False)
    before, after = plan(PlanConfig(**ASK)), plan(PlanConfig(**ASK, probe=True, store=str(tmp_path)))
    assert (before.machine.disk_is, after.machine.disk_is, after.machine.gpu_is) == ("assumed", "probed", "scaled")
    assert after.train.read_s == pytest.approx(before.train.read_s / 2)
    assert after.extract.write_s == pytest.approx(before.extract.write_s * 2)
    assert not any("disk is assumed" in text for text in after.notes)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="cannot write at /proc"):
        plan(PlanConfig(**ASK, probe=True, store="/proc"))


def test_a_small_card_is_planned_with_its_bus():
    found = plan(PlanConfig(**ASK | {"memory_budget": "12GB", "batch_size": 8, "gpu": "3090"}))
    assert 0 < found.memory.streamed_layers <= 36
    assert found.memory_bytes < 11.5 * 2**30
    assert found.machine.bus_bytes_s == 25e9
    assert found.train.bus_s == pytest.approx(found.memory.streamed / 25e9)
    assert found.train.step_s > max(found.train.bus_s, found.train.compute_s)
    roomy = plan(PlanConfig(**ASK | {"batch_size": 8, "gpu": "3090"}))
    assert roomy.train.bus_s == 0
    assert roomy.train.step_s == roomy.train.compute_s + roomy.train.optimizer_s


def test_where_the_bus_decides_fewer_bytes_are_named():
    ask = {"samples": 100, "cameras": SLOTS, "batch_size": 8, "gpu": "h200"}
    found, small = (plan(PlanConfig(**ask, codec=codec)) for codec in ("bf16", "transform:2.2"))
    train = found.train
    assert found.machine.bus_bytes_s == 50e9
    assert train.copy_s == pytest.approx(8 * found.kv_bytes_by_codec["bf16"] / 50e9)
    assert train.copy_s > train.step_s
    (note,) = (text for text in found.notes if text.startswith("From RAM the bus decides"))
    assert f"{train.copy_s * 1e3:.0f} ms a step, the GPU takes {train.step_s * 1e3:.0f}" in note
    assert (
        f"int4 {train.copy_s * found.kv_bytes_by_codec['int4'] / found.kv_bytes_by_codec['bf16'] * 1e3:.0f} ms" in note
    )
    assert f"transform:2.2 {small.train.copy_s * 1e3:.0f} ms" in note
    epochs = plan(PlanConfig(**ask, codec="bf16", epochs=1000.0)).train
    assert epochs.hours_in_memory == pytest.approx(epochs.steps * train.copy_s / 3600, rel=0.05)
    assert not any(text.startswith("From RAM") for text in small.notes)


def test_least_memory_of_training():
    everything, adapters = (planning.least_training_bytes(which) / 2**30 for which in ("all", "lora"))
    assert 4.8 < everything < 5.5  # with the optimizer's state in RAM and no gradient kept
    assert 4.5 < adapters < 7


def test_a_black_picture_costs_as_much_as_a_recorded_one_but_is_not_read():
    four = plan(PlanConfig(samples=100, cameras=SLOTS))
    black = plan(PlanConfig(samples=100, cameras=SLOTS[:3], blank=SLOTS[3:]))
    assert (black.cameras, black.blank, black.tokens) == (four.cameras, SLOTS[3:], four.tokens)
    assert black.extract.reading_s == pytest.approx(0.75 * four.extract.reading_s)
    with pytest.raises(UsageError, match="in the place of"):
        plan(PlanConfig(samples=100, blank=SLOTS[3:]))


def test_a_source_is_counted_as_extraction_would_take_it():
    found = plan(PlanConfig(source="synthetic:12", t0="every:4.0", split="train", views=2))
    clips = sum(split_of(clip) == "train" for clip in open_source("synthetic:12").clip_ids)
    assert (found.clips, found.samples) == (clips, clips * 3 * 2)
    assert plan(PlanConfig(source="synthetic:12", samples=5)).samples == 5
    chosen = {"t0": "every:0.5", "clips": ("synthetic-0-00000[0-3]",), "split": "val"}
    refs, _ = select(open_source("synthetic:12"), **chosen, split_by=parse_split("time:8"))
    assert plan(PlanConfig(source="synthetic:12", **chosen, split_by="time:8")).samples == len(refs) > 0
    for wrong, message in (
        ({}, "--samples missing"),
        ({"samples": 3, "t0": "every:2.0"}, "expected a SOURCE beside it"),
        ({"samples": 3, "clips": ("a",)}, "clips is a; expected a SOURCE beside it"),
        ({"samples": 3, "split_by": "time:60"}, "split_by is time:60; expected a SOURCE beside it"),
        ({"source": "synthetic:1", "clips": ("a", "b")}, "1 of 1 names fit no clip of synthetic:1: a"),
        ({"source": "synthetic:1", "split": "val"}, "none of its 1 clips falls into the val split"),
    ):
        with pytest.raises(UsageError, match=message):
            plan(PlanConfig(**wrong))


def test_a_few_clips_on_one_side_are_said_before_extraction():
    (said,) = [note for note in plan(PlanConfig(source="synthetic:1")).notes if "none is left for val" in note]
    assert said.startswith("the only clip of synthetic:1 falls into the train split")
    assert "--split-by time:60" in said
    assert not [note for note in plan(PlanConfig(source="synthetic:60")).notes if "none is left" in note]


def test_a_checkpoint_has_the_weights_and_the_state_of_the_optimizer():
    assert plan(PlanConfig(samples=10)).checkpoint_bytes / 1e9 == pytest.approx(11.5, abs=0.1)
    assert plan(PlanConfig(samples=10, trainable="head")).checkpoint_bytes < 1e8

"""Stage one with routes: what the store says of them, and that both twins are what the VLM makes of whole prompts."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import alpacache
from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.sample import SampleRef
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.planning.config import PlanConfig
from alpacache.planning.plan import plan
from alpacache.sources.registry import open_source
from alpacache.sources.routes import Routes
from cache_store import CacheReader, IdentityMismatchError, verify
from cache_store.upkeep.store_info import info

pytestmark = pytest.mark.system  # whole extractions

SOURCE = "synthetic:3:fork"
FRONT = "camera_front_wide_120fov"


def config(model, store, **changes):
    settings = {"source": SOURCE, "frames": 1, "hidden_states": "none", "route": "source", "device": "cpu"}
    return ExtractConfig(**settings | {"model": str(model), "store": str(store)} | changes)


@pytest.fixture(scope="module")
def store(tiny_checkpoint_15, tmp_path_factory):
    store = tmp_path_factory.mktemp("routed") / "store"
    report = alpacache.extract(config(tiny_checkpoint_15, store))
    assert report.extracted == 3
    assert sum(report.routes.values()) == 3
    assert set(report.routes) <= {"left", "right"}
    return store


def samples():
    source = open_source(SOURCE)
    routes = Routes("source", source)
    for clip_id in source.clip_ids:
        ref = SampleRef(clip_id=clip_id, t0_us=5_100_000)
        yield routes(source.load(ref, cameras=source.cameras, frames=1))


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_cached_equals_live_with_the_route_without_it_and_with_the_other(
    codec, store, tiny_checkpoint_15, tmp_path, relative_error
):
    if codec != "bf16":
        store = tmp_path / "int8"
        alpacache.extract(config(tiny_checkpoint_15, store, codec=codec))
    checkpoint = Checkpoint(str(tiny_checkpoint_15))
    builder, vlm = InputBuilder(checkpoint, routes="source"), load_vlm(checkpoint, dtype=torch.bfloat16)
    data, bar = CachedDataset([store], checkpoint), {"bf16": 8e-3, "int8": 1.6e-2}[codec]
    assert data.routed
    for index, sample in enumerate(samples()):
        assert data.route(index) == sample.route
        sides = ("left", "right") if "left" in sample.route else ("right", "left")
        live = {None: sample.route, "unrouted": None, "swapped": sample.route.replace(*sides)}
        for twin, route in live.items():
            inputs = builder.build(replace(sample, route=route))
            expected = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
            cached = data.load(index, twin=twin)
            if twin is not None:
                found = cached.twin_prefix()
            else:
                found = cached.prefix if codec == "bf16" else cached.prefix.decode()
            assert (found.prefix_len, found.start_position) == (expected.prefix_len, expected.start_position)
            if twin is None and codec == "bf16":
                assert torch.equal(found.keys, expected.keys)
                assert torch.equal(found.values, expected.values)
            stem = cached.stem_len
            for one, other in ((found.keys, expected.keys), (found.values, expected.values)):
                assert relative_error(one, other) <= bar
                assert relative_error(one[:, :, stem:], other[:, :, stem:]) <= 2 * bar


def test_record_and_identity_say_what_was_given(store):
    reader = CacheReader(store)
    assert reader.identity["prompt"]["route"] == {"given": "source", "form": "<|route_start|>(route)<|route_end|>"}
    for sample_id in reader.sample_ids:
        arrays = reader.read(sample_id)
        route = str(arrays["route"])
        assert route.startswith("turn ")
        assert f"<|traj_history_end|><|route_start|>{route}<|route_end|>output" in str(arrays["prompt"])
        assert str(arrays["tail.unrouted.text"]) == ""
        assert str(arrays["tail.swapped.text"]) != route
    assert verify(store, deep=True).ok


def test_a_store_without_routes_is_what_it_was_and_goes_on(tiny_checkpoint_15, tmp_path):
    store = tmp_path / "plain"
    alpacache.extract(config(tiny_checkpoint_15, store, route="none", samples=1))
    reader = CacheReader(store)
    assert set(reader.identity["prompt"]) == {"template", "camera_names", "reasoning"}
    assert not any(name == "route" or name.startswith("tail.") for name in reader.fields)
    assert alpacache.extract(config(tiny_checkpoint_15, store, route="none")).already_there == 1
    says = r"^the store has no routes, this run has some \(source\): leave --route out, or pass another --store\.\n"
    with pytest.raises(IdentityMismatchError, match=says):
        alpacache.extract(config(tiny_checkpoint_15, store))
    assert not CachedDataset([store], Checkpoint(str(tiny_checkpoint_15))).routed


def test_one_text_for_all_is_part_of_the_identity(tiny_checkpoint_15, tmp_path):
    store = tmp_path / "text"
    report = alpacache.extract(config(tiny_checkpoint_15, store, route="continue straight", samples=2))
    assert report.routes == {"straight": 2}
    reader = CacheReader(store)
    fields = reader.fields_of(reader.sample_ids[0])
    assert "tail.unrouted.kv" in fields
    assert "tail.swapped.kv" not in fields  # there is no opposite
    says = r"^the store has routes \(continue straight\), this run has others \(turn left\): pass --route 'continue st"
    with pytest.raises(IdentityMismatchError, match=says):
        alpacache.extract(config(tiny_checkpoint_15, store, route="turn left"))
    says = (
        r"^the store has routes \(continue straight\), this run has none: .*\n"
        "the store was made with --vlm-dtype bf16, this run has fp32: pass --vlm-dtype bf16, or another --store"
    )
    with pytest.raises(IdentityMismatchError, match=says) as caught:
        alpacache.extract(config(tiny_checkpoint_15, store, route="none", vlm_dtype="fp32"))
    assert any(line.startswith("identity.dtype") for line in caught.value.differences)


def test_stores_with_and_without_routes_are_trained_together(store, tiny_checkpoint_15, tmp_path):
    plain = tmp_path / "plain"
    alpacache.extract(config(tiny_checkpoint_15, plain, source="synthetic:2", route="none"))
    data = CachedDataset([plain, store], Checkpoint(str(tiny_checkpoint_15)))
    assert [data.route(index) is None for index in range(len(data))] == [True] * 2 + [False] * 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"route": "<|im_end|>"}, r"route is '<\|im_end\|>'; expected none, source or a text"),
        ({"route": " "}, "it is empty"),
        ({"route": "Source"}, r"too like the word source"),
        ({"route": "soruce"}, r"route is 'soruce'; expected none, source or a text .* too like the word source\)\."),
        ({"route": "NONE"}, "too like the word none"),
        ({"source": "folder"}, "gives no routes"),
    ],
)
def test_what_gives_no_route_is_refused_before_anything_is_written(changes, says, tiny_checkpoint_15, tmp_path):
    if changes.get("source") == "folder":
        from alpacache.sources.prepared_writer import prepare
        from alpacache.sources.selection import select

        drives = open_source("synthetic:1")
        prepare(drives, select(drives)[0], tmp_path / "rows", cameras=drives.cameras, frames=1)
        changes = {"source": str(tmp_path / "rows")}
    with pytest.raises(UsageError, match=says):
        alpacache.extract(config(tiny_checkpoint_15, tmp_path / "store", **changes))
    assert not (tmp_path / "store").exists()


def test_a_model_without_routes_refuses(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="family r1, which was not trained with routes"):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    alpacache.extract(config(tiny_checkpoint, tmp_path / "store", route_tokens=True, samples=1))


def write_drives(root, routes):
    """A folder of generated drives, each with the text of `routes.parquet` that its name has here."""
    source = open_source("synthetic:3")
    for name, clip_id in zip(routes, source.clip_ids, strict=True):
        clip, track = root / "clips" / name, source.track(clip_id)
        (clip / FRONT).mkdir(parents=True)
        columns = {"timestamp": track.timestamps_us} | dict(zip("xyz", track.xyz.T, strict=True))
        columns |= dict(zip(("qx", "qy", "qz", "qw"), track.quaternion_xyzw.T, strict=True))
        pq.write_table(pa.table(columns), clip / "egomotion.parquet")
        times = np.arange(0, 20_000_001, 2_550_000)
        pq.write_table(pa.table({"timestamp": times}), clip / f"{FRONT}.timestamps.parquet")
        for number, frame in enumerate(source.film(clip_id, FRONT, times)):
            Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))).save(clip / FRONT / f"{number:06d}.jpg")
        if routes[name] is not None:
            pq.write_table(pa.table({"timestamp": [0], "route": [routes[name]]}), clip / "route.parquet")
    index = {"name": "drives", "cameras": [FRONT], "clips": list(routes)}
    (root / "dataset.json").write_text(json.dumps(index))


def test_a_bad_text_costs_its_sample_and_samples_without_a_route_are_counted(tiny_checkpoint_15, tmp_path, caplog):
    drives = tmp_path / "drives"
    write_drives(drives, {"good": "turn left", "bad": "turn <|im_end|>", "none": None})
    source, store = f"folder:{drives}", tmp_path / "store"
    report = alpacache.extract(config(tiny_checkpoint_15, store, source=source))
    assert report.routes == {"": 1, "left": 1}
    assert report.kinds == {"bad@5100000#0": "bad_route"}
    assert "cannot go into a prompt" in report.quarantined["bad@5100000#0"]
    assert not caplog.records
    (drives / "clips/good/route.parquet").unlink()
    (drives / "clips/bad/route.parquet").unlink()
    again = alpacache.extract(config(tiny_checkpoint_15, tmp_path / "again", source=source))
    assert again.routes == {"": 3}
    assert "none of 3 samples" in caplog.text


def test_a_text_of_a_rollout_follows_the_route(tiny_checkpoint_15, tmp_path):
    store = tmp_path / "rollouts"
    alpacache.extract(config(tiny_checkpoint_15, store, reasoning="rollout", rollouts=2, samples=1))
    builder, reader = InputBuilder(Checkpoint(str(tiny_checkpoint_15)), routes="source"), CacheReader(store)
    arrays = reader.read(reader.sample_ids[0])
    question = builder.tail_ids("rollout", route=str(arrays["route"]))
    assert question[0] == builder.tokenizer.id_of("<|route_start|>")
    for number in range(2):
        assert np.array_equal(arrays[f"tail.{number}.input_ids"][: len(question)], question)


@pytest.mark.parametrize("route", ["source", "turn right"])
def test_bytes_are_those_that_were_planned(route, tiny_checkpoint_15, tmp_path):
    """Of `source` the plan assumes a text, so there only those of the twin without one are known."""
    store, model = tmp_path / "store", str(tiny_checkpoint_15)
    alpacache.extract(config(model, store, route=route, samples=1))
    written = info(store).size_by_field
    asked = PlanConfig(samples=1, model=model, picture=(128, 256), frames=1, hidden_states="none", route=route)
    planned = plan(asked).bytes_by_field
    names = {name for name in planned if name.startswith("tail.")}
    assert names == {name for name, size in written.items() if name.startswith("tail.") and size}
    assert len(names) == 6
    for name in names - ({name for name in names if "swapped" in name} if route == "source" else set()):
        assert written[name] == planned[name], name


def test_plans_without_a_model_count_routes_too():
    plain, routed = (plan(PlanConfig(samples=1, route=route)).bytes_by_field for route in ("none", "source"))
    tokens = {name: size // (36 * 2 * 8 * 128 * 2) for name, size in routed.items() if name.endswith("kv")}
    assert tokens["tail.unrouted.kv"] == 11
    assert tokens["kv"] - plain["kv"] // (36 * 2 * 8 * 128 * 2) == tokens["tail.swapped.kv"] - 11 == 13

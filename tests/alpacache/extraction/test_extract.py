"""Stage one: what is in the store is what the VLM said, and nothing is done twice or lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import alpacache
from alpacache import flow_matching, randomness
from alpacache.alpamayo import Checkpoint, EncodedPrefix, load_expert, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import RolloutSampler
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.sources.registry import open_source
from cache_store import (
    CODECS,
    CacheReader,
    IdentityMismatchError,
    verify,
)
from cache_store.kv.affine import AffineCodec
from cache_store.kv.registry import codec_from_json

pytestmark = pytest.mark.system  # whole extractions


def config(checkpoint, store, **changes):
    return ExtractConfig(
        **{"source": "synthetic:3", "model": str(checkpoint), "store": str(store), "frames": 2, "device": "cpu"}
        | changes
    )


@pytest.fixture(scope="module")
def extracted(tiny_checkpoint, tmp_path_factory):
    store = tmp_path_factory.mktemp("extract") / "store"
    report = alpacache.extract(config(tiny_checkpoint, store))
    assert (report.extracted, report.already_there, report.quarantined) == (3, 0, {})
    return store


def live_prefixes(checkpoint, frames=2):
    source, builder = open_source("synthetic:3"), InputBuilder(Checkpoint(str(checkpoint)))
    vlm = load_vlm(str(checkpoint), dtype=torch.bfloat16)
    for clip in source.clip_ids:
        sample = source.load(SampleRef(clip_id=clip, t0_us=5_100_000), cameras=source.cameras, frames=frames)
        inputs = builder.build(sample)
        yield sample, vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_equals_live(dtype, extracted, tiny_checkpoint):
    """Loss and velocity from the store against the VLM in the loop: no difference at all for the same batch."""
    expert = load_expert(str(tiny_checkpoint), dtype=dtype)
    data = CachedDataset([extracted], Checkpoint(str(tiny_checkpoint)))
    cached = [data.load(index) for index in range(len(data))]
    live = [prefix for _, prefix in live_prefixes(tiny_checkpoint)]
    action = torch.stack([expert.action_space.to_action(*data.poses(index)) for index in range(len(data))])[:, None]
    noise = torch.stack([randomness.noise(sample.sample_id, draws=2) for sample in cached])
    t = torch.stack([randomness.times(sample.sample_id, draws=2, schedule="beta") for sample in cached])
    noisy = flow_matching.interpolate(action, noise, t)
    from_cache = expert.velocity(noisy, t, [sample.prefix for sample in cached])
    from_vlm = expert.velocity(noisy, t, live)
    assert from_cache.dtype == dtype
    assert torch.equal(from_cache, from_vlm)
    assert torch.equal(flow_matching.loss(from_cache, action, noise), flow_matching.loss(from_vlm, action, noise))


def test_every_field_is_what_the_sample_and_the_vlm_gave(extracted, tiny_checkpoint):
    reader = CacheReader(extracted)
    for sample, prefix in live_prefixes(tiny_checkpoint):
        stored = reader.read(sample.ref.sample_id)
        assert stored["kv"].shape == (4, 2, 2, prefix.prefix_len, 32)
        assert np.array_equal(stored["kv"][:, 0], prefix.keys.view(torch.uint16).numpy())
        assert np.array_equal(stored["hidden"], prefix.hidden.view(torch.uint16).numpy())
        assert (stored["prefix_len"], stored["rope_delta"]) == (prefix.prefix_len, prefix.rope_delta)
        assert stored["start_position"] == prefix.start_position == prefix.rope_delta + prefix.prefix_len
        for name in ("history_xyz", "history_rot", "future_xyz", "future_rot", "frame_timestamps_us"):
            assert np.array_equal(stored[name], getattr(sample, name))
        ids = stored["input_ids"]
        assert len(ids) == prefix.prefix_len
        tokens = Checkpoint(str(tiny_checkpoint)).config.traj_token_ids
        assert ids[-1] == tokens["future_start"]
        assert ids[stored["stem_len"] - 1] == tokens["history_end"]
        assert stored["image_spans"].shape == (2, 2)
        assert str(stored["clip_id"]) == sample.ref.clip_id
        assert list(stored["cameras"]) == list(sample.cameras)


def test_a_second_run_does_nothing_and_a_larger_one_adds(extracted, tiny_checkpoint, tmp_path):
    store = shutil.copytree(extracted, tmp_path / "store")
    again = alpacache.extract(config(tiny_checkpoint, store))
    assert (again.extracted, again.already_there) == (0, 3)
    more = alpacache.extract(config(tiny_checkpoint, store, source="synthetic:5"))
    assert (more.extracted, more.already_there) == (2, 3)


def test_shards_share_the_work(extracted, tiny_checkpoint, tmp_path):
    store = tmp_path / "store"
    counts = [alpacache.extract(config(tiny_checkpoint, store, shard=(worker, 2))).extracted for worker in range(2)]
    assert counts == [2, 1]
    assert CacheReader(store).sample_ids == CacheReader(extracted).sample_ids


def test_worker_count_and_resume_change_no_byte(extracted, tiny_checkpoint, tmp_path):
    store = tmp_path / "store"
    alpacache.extract(config(tiny_checkpoint, store, samples=1, workers=1))
    alpacache.extract(config(tiny_checkpoint, store, workers=4))
    first, second = CacheReader(extracted), CacheReader(store)
    for sample_id in first.sample_ids:
        one, other = first.read(sample_id), second.read(sample_id)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_another_model_or_setting_is_refused_with_the_differences(extracted, tiny_checkpoint_15, tiny_checkpoint):
    with pytest.raises(IdentityMismatchError, match=r"identity\.frames: expected 4, found 2"):
        alpacache.extract(config(tiny_checkpoint, extracted, frames=4))
    with pytest.raises(IdentityMismatchError) as caught:
        alpacache.extract(config(tiny_checkpoint_15, extracted))
    for key in ("model.vlm_weights_sha256", "prompt.camera_names", "prompt.template"):
        assert f"identity.{key}" in str(caught.value)
    assert "identity.model.id" not in str(caught.value)  # a name is not what makes it another model
    assert len(CacheReader(extracted)) == 3


def test_what_follows_from_another_codec_is_not_told_beside_it(extracted, tiny_checkpoint):
    with pytest.raises(IdentityMismatchError) as caught:
        alpacache.extract(config(tiny_checkpoint, extracted, codec="int8", hidden_states="none"))
    assert caught.value.args[0].splitlines()[1:-1] == [
        '  identity.codec: expected "int8", found "bf16"',
        "  fields.hidden: expected nothing, found bfloat16 [token, channel]",
    ]


def test_the_same_model_under_another_name_goes_on(extracted, tiny_checkpoint, tmp_path):
    copy = shutil.copytree(extracted, tmp_path / "store")
    renamed = shutil.copytree(tiny_checkpoint, tmp_path / "weights")
    assert alpacache.extract(config(renamed, copy)).already_there == 3


def test_a_bad_clip_is_quarantined_and_the_run_goes_on(tiny_checkpoint, tmp_path, monkeypatch):
    from alpacache.sources.synthetic import SyntheticSource

    good = SyntheticSource.load

    def load(self, ref, **wanted):
        if ref.clip_id.endswith("1"):
            raise BadClipError("not_finite", f"{ref.clip_id}: pose 17 is NaN; record it again.")
        return good(self, ref, **wanted)

    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(SyntheticSource, "load", load)
        report = alpacache.extract(config(tiny_checkpoint, store))
        assert report.extracted == 2
        assert list(report.quarantined.values()) == ["synthetic-0-000001: pose 17 is NaN; record it again."]
        assert alpacache.extract(config(tiny_checkpoint, store)).extracted == 0
    skipped = alpacache.extract(config(tiny_checkpoint, store))
    assert (skipped.extracted, len(skipped.quarantined)) == (0, 1)
    retried = alpacache.extract(config(tiny_checkpoint, store, retry_quarantined=True))
    assert (retried.extracted, retried.quarantined) == (1, {})


def test_hidden_states_can_be_left_out(tiny_checkpoint, tmp_path):
    alpacache.extract(config(tiny_checkpoint, tmp_path / "store", samples=1, hidden_states="none"))
    reader = CacheReader(tmp_path / "store")
    assert "hidden" not in reader.fields
    assert reader.fields["kv"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("cameras", "frames"), [(("camera_front_tele_30fov", "camera_cross_left_120fov"), 1), (None, 4)]
)
def test_several_cameras_and_frames(cameras, frames, tiny_checkpoint_15, tmp_path):
    from alpacache.driving.cameras import CAMERAS

    cameras = cameras or CAMERAS
    alpacache.extract(config(tiny_checkpoint_15, tmp_path / "store", samples=1, cameras=cameras, frames=frames))
    stored = CacheReader(tmp_path / "store").read("synthetic-0-000000@5100000#0")
    assert list(stored["cameras"]) == sorted(cameras, key=CAMERAS.index)
    assert stored["image_spans"].shape == (len(cameras) * frames, 2)
    assert ("Front telephoto camera: frame 0 " in str(stored["prompt"])) == ("camera_front_tele_30fov" in cameras)


def test_an_empty_selection_is_an_error(tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="val"):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "store", source="synthetic:1", split="val"))
    assert not (tmp_path / "store").exists()


@pytest.mark.ci
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_whole_samples_and_the_next_finishes(kill, tiny_checkpoint, tmp_path, extracted):
    store = tmp_path / "store"
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "extract",
        "synthetic:60",
        "--model",
        str(tiny_checkpoint),
        "--store",
        str(store),
    ]
    command += ["--frames", "2", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(store.glob("commits/*.json"))) < 3:
        time.sleep(0.02)
    os.kill(process.pid, kill)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else 130)
    if kill == signal.SIGTERM:
        assert "run the same command again to go on" in errors
    assert verify(store, deep=True).ok
    done = set(CacheReader(store).sample_ids)
    assert 3 <= len(done) < 60
    report = alpacache.extract(config(tiny_checkpoint, store, source="synthetic:60", samples=8))
    assert report.already_there + report.extracted == 8
    assert done <= set(CacheReader(store).sample_ids)
    one, other = (
        CacheReader(extracted).read("synthetic-0-000001@5100000#0"),
        CacheReader(store).read("synthetic-0-000001@5100000#0"),
    )
    assert np.array_equal(one["kv"], other["kv"])


def test_a_clip_that_gives_samples_again_leaves_quarantine(tiny_checkpoint, tmp_path):
    store = tmp_path / "store"
    report = alpacache.extract(config(tiny_checkpoint, store, t0="19"))
    assert sorted(report.quarantined) == [f"synthetic-0-00000{clip}" for clip in range(3)]
    assert all("6.4 s" in reason for reason in report.quarantined.values())
    report = alpacache.extract(config(tiny_checkpoint, store))
    assert (report.extracted, report.quarantined) == (3, {})
    assert CacheReader(store).quarantined == {}


def test_a_damaged_record_does_not_stop_the_next_run(extracted, tiny_checkpoint, tmp_path):
    store = shutil.copytree(extracted, tmp_path / "store")
    record = sorted(store.glob("commits/*.json"))[0]
    record.write_bytes(record.read_bytes()[:-20])
    report = alpacache.extract(config(tiny_checkpoint, store, source="synthetic:4"))
    assert (report.extracted, report.already_there) == (1, 3)
    assert len(verify(store, repair=True).repaired) == 1
    assert alpacache.extract(config(tiny_checkpoint, store, source="synthetic:4")).extracted == 1
    assert verify(store, deep=True).ok


def test_an_empty_share_is_no_error(tiny_checkpoint, tmp_path):
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store", shard=(5, 8)))
    assert (report.selected, report.extracted) == (0, 0)


@pytest.fixture(scope="module")
def quantised(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    for codec in ("int8", "int4", "fp8"):
        assert alpacache.extract(config(tiny_checkpoint, root / codec, codec=codec)).extracted == 3
    return root


@pytest.mark.parametrize(("codec", "share"), [("int8", 0.54), ("int4", 0.29), ("fp8", 0.52)])
def test_quantised_kv_is_the_reference_encoding_of_the_lossless_one(codec, share, quantised, extracted):
    lossless, reader = CacheReader(extracted), CacheReader(quantised / codec)
    assert reader.identity["codec"] == codec
    assert codec_from_json(reader.identity["codec_definition"], "here") == CODECS[codec]
    assert reader.identity["dtype"] == "bfloat16"
    assert (reader.fields["kv"].dtype, reader.fields["kv"].axes) == ("uint8", ("byte",))
    assert reader.sample_ids == lossless.sample_ids
    for sample_id in reader.sample_ids:
        expected, stored = lossless.read(sample_id), reader.read(sample_id)
        assert tuple(stored["kv_shape"]) == expected["kv"].shape
        assert np.array_equal(stored["kv"], CODECS[codec].encode(expected["kv"]))
        assert stored["kv"].nbytes < share * expected["kv"].nbytes
        assert all(np.array_equal(stored[name], expected[name]) for name in expected if name != "kv")


@pytest.mark.parametrize(("codec", "largest"), [("int8", 0.002), ("int4", 0.03), ("fp8", 0.012)])
def test_quantised_prefixes_decode_to_the_reference_and_move_the_velocity_little(
    codec, largest, quantised, extracted, tiny_checkpoint, relative_error
):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    expert, reader = load_expert(checkpoint, dtype=torch.float32), CacheReader(quantised / codec)
    lossless, data = CachedDataset([extracted], checkpoint), CachedDataset([quantised / codec], checkpoint)
    noisy, t = randomness.noise("codec", draws=4).expand(3, 4, 64, 2), torch.tensor([[0.1, 0.4, 0.7, 0.95]] * 3)
    encoded = [data.load(index).prefix for index in range(3)]
    for sample_id, prefix in zip(reader.sample_ids, encoded, strict=True):
        assert isinstance(prefix, EncodedPrefix)
        stored = reader.read(sample_id)
        bits = CODECS[codec].decode(stored["kv"], tuple(stored["kv_shape"]))
        got = prefix.decode()
        assert (got.prefix_len, got.start_position) == (stored["prefix_len"], stored["start_position"])
        assert np.array_equal(torch.stack([got.keys, got.values], 1).view(torch.uint16).numpy(), bits)
    with torch.no_grad():
        exact = expert.velocity(noisy, t, [lossless.load(index).prefix for index in range(3)])
        got = expert.velocity(noisy, t, [prefix.decode() for prefix in encoded])
    assert largest / 3 < relative_error(got, exact) < largest


def test_a_store_keeps_its_codec(quantised, extracted, tiny_checkpoint, monkeypatch):
    """By name and by definition: what a name means today changes neither what old bytes mean nor what may be added."""
    with pytest.raises(IdentityMismatchError, match=r'identity\.codec: expected "int8", found "bf16"'):
        alpacache.extract(config(tiny_checkpoint, extracted, codec="int8"))
    with pytest.raises(IdentityMismatchError, match=r'identity\.codec: expected "bf16", found "int8"'):
        alpacache.extract(config(tiny_checkpoint, quantised / "int8"))
    checkpoint = Checkpoint(str(tiny_checkpoint))
    before = CachedDataset([quantised / "int8"], checkpoint).load(0).prefix.decode()
    monkeypatch.setitem(CODECS, "int8", AffineCodec(value_group=16))
    with pytest.raises(IdentityMismatchError, match=r"identity\.codec_definition\.value_group: expected 16, found 32"):
        alpacache.extract(config(tiny_checkpoint, quantised / "int8", codec="int8"))
    after = CachedDataset([quantised / "int8"], checkpoint).load(0).prefix.decode()
    assert torch.equal(after.keys, before.keys)
    assert torch.equal(after.values, before.values)


def test_kv_that_cannot_be_quantised_quarantines_its_sample(tiny_checkpoint, tmp_path, monkeypatch):
    from alpacache.alpamayo import FrozenVLM

    good, calls = FrozenVLM.prefill_batch, []

    def prefill_batch(self, inputs):
        (prefix,) = good(self, inputs)
        calls.append(prefix)
        keys = prefix.keys.clone()
        keys[0, 0, 0, 0] = float("nan")
        return [replace(prefix, keys=keys) if len(calls) == 2 else prefix]

    monkeypatch.setattr(FrozenVLM, "prefill_batch", prefill_batch)
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store", codec="int8"))
    assert (report.extracted, list(report.quarantined)) == (2, ["synthetic-0-000001@5100000#0"])
    assert "NaN" in report.quarantined["synthetic-0-000001@5100000#0"]
    assert CacheReader(tmp_path / "store").quarantined["synthetic-0-000001@5100000#0"].kind == "not_finite"


@pytest.mark.ci
def test_rollouts_lie_beside_the_direct_prefix_and_depend_on_the_sample_alone(extracted, tiny_checkpoint, tmp_path):
    """Other shards, other order, another number of rollouts before them: the same tails, byte for byte."""
    settings = {"reasoning": "rollout", "rollouts": 2}
    alpacache.extract(config(tiny_checkpoint, tmp_path / "one", **settings))
    for worker in (1, 0):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "two", **settings, shard=(worker, 2), workers=1))
    plain, one, two = CacheReader(extracted), CacheReader(tmp_path / "one"), CacheReader(tmp_path / "two")
    assert plain.sample_ids == one.sample_ids == two.sample_ids
    vlm = load_vlm(str(tiny_checkpoint), dtype=torch.bfloat16)
    sampler = RolloutSampler.load(Checkpoint(str(tiny_checkpoint)), vlm, InputBuilder(Checkpoint(str(tiny_checkpoint))))
    for sample, prefix in live_prefixes(tiny_checkpoint):
        sample_id = sample.ref.sample_id
        stored, direct = one.read(sample_id), plain.read(sample_id)
        assert all(np.array_equal(stored[name], direct[name]) for name in direct)
        again = two.read(sample_id)
        assert all(np.array_equal(stored[name], again[name]) for name in stored)
        tails = sampler.sample(prefix, int(direct["stem_len"]), rollouts=2, key=sample_id)
        for number, tail in enumerate(tails):
            assert np.array_equal(stored[f"tail.{number}.kv"][:, 1], tail.values.view(torch.uint16).numpy())
            assert stored[f"tail.{number}.start_position"] == tail.start_position
            assert str(stored[f"tail.{number}.text"]) == tail.text
    with pytest.raises(IdentityMismatchError, match=r"identity\.reasoning\.rollouts: expected 3, found 2"):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "one", reasoning="rollout", rollouts=3))
    with pytest.raises(IdentityMismatchError, match=r"identity\.reasoning"):
        alpacache.extract(config(tiny_checkpoint, extracted, **settings))


def test_a_store_with_rollouts_trains_with_one_without(extracted, tiny_checkpoint, tmp_path):
    """The direct prefix is the same, so their samples mix."""
    settings = {"reasoning": "rollout", "rollouts": 1, "samples": 1}
    alpacache.extract(config(tiny_checkpoint, tmp_path / "store", **settings))
    data = CachedDataset([extracted, tmp_path / "store"], Checkpoint(str(tiny_checkpoint)))
    assert (len(data), data.rollouts) == (4, 0)
    assert torch.equal(data.load(0).prefix.keys, data.load(3).prefix.keys)

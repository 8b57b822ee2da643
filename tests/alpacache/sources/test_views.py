"""Views: small changes of the pictures that follow from seed, moment and number alone, recorded with each sample."""

import dataclasses
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint, FrozenVLM, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.sample import SampleRef, split_of
from alpacache.errors import InterruptedRunError, UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.sources import views
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.views import RANGES, Jitter
from alpacache.training.config import TrainConfig
from alpacache.training.validation import Validation
from cache_store import CacheReader, IdentityMismatchError, verify

pytestmark = pytest.mark.system

STILL = Jitter(brightness=1, contrast=1, saturation=1, gamma=1, keep=1, top=0, left=0)
REF = SampleRef(clip_id="synthetic-0-000001", t0_us=5_100_000)


def config(checkpoint, store, **changes):
    settings = {"source": "synthetic:3", "model": str(checkpoint), "store": str(store), "frames": 2, "device": "cpu"}
    return ExtractConfig(**settings | {"views": 3} | changes)


@pytest.fixture(scope="module")
def stores(tiny_checkpoint, tmp_path_factory):
    """A store without views and one with three of each sample."""
    root = tmp_path_factory.mktemp("views")
    assert alpacache.extract(config(tiny_checkpoint, root / "plain", views=1)).extracted == 3
    assert alpacache.extract(config(tiny_checkpoint, root / "views")).extracted == 9
    return root


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (2, 3, 3, 40, 64), np.uint8)


def test_what_is_drawn_is_bounded_and_follows_from_its_key():
    drawn = [views.draw(replace(REF, t0_us=t0, view=view), seed=0) for t0 in range(100) for view in range(1, 4)]
    for name, (low, high) in RANGES.items():
        values = np.array([getattr(jitter, name) for jitter in drawn])
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.1 * (high - low))
    for jitter in drawn:
        assert 0 <= jitter.top <= 1 - jitter.keep + 1e-4
        assert 0 <= jitter.left <= 1 - jitter.keep + 1e-4
    assert len(set(drawn)) == len(drawn)
    one = replace(REF, view=1)
    assert views.draw(one, seed=0) == views.draw(one, seed=0)
    assert views.draw(one, seed=0) == Jitter(  # pinned: stores are extended by later versions too
        brightness=0.9478, contrast=1.1191, saturation=1.0387, gamma=1.0034, keep=0.9912, top=0.0037, left=0.0043
    )
    assert len({views.draw(one, seed=seed) for seed in range(5)}) == 5


def test_nothing_is_changed_by_factors_of_one(picture):
    assert np.array_equal(views.apply(picture, STILL), picture)


@pytest.mark.parametrize(
    ("name", "factor", "value", "expected"),
    [
        ("brightness", 1.1, (100, 200, 250), (110, 220, 255)),
        ("contrast", 0.9, (0, 100, 255), (13, 103, 242)),
        ("gamma", 1.1, (0, 100, 255), (0, 91, 255)),
        ("saturation", 0.8, (200, 100, 100), (186, 106, 106)),
    ],
)
def test_colours_change_as_said(name, factor, value, expected):
    pictures = np.tile(np.array(value, np.uint8)[:, None, None], (1, 8, 8))
    found = views.apply(pictures, replace(STILL, **{name: factor}))
    assert found[:, 3, 3].tolist() == list(expected)


def test_a_crop_is_the_part_that_was_named_enlarged():
    """A ramp across the width shows where each column comes from."""
    ramp = np.tile(np.arange(200, dtype=np.uint8), (3, 100, 1))
    found = views.apply(ramp, replace(STILL, keep=0.95, left=0.04))[0, 50].astype(int)
    first = 0.04 * 200
    assert abs(found[0] - first) <= 1
    assert abs(found[-1] - (first + 0.95 * 200 - 1)) <= 1
    assert (np.diff(found) >= 0).all()


def test_all_frames_and_cameras_of_a_sample_change_alike(picture):
    jitter = views.draw(replace(REF, view=2), seed=0)
    same = np.broadcast_to(picture[0, 0], picture.shape).copy()
    found = views.apply(same, jitter)
    assert found.shape == picture.shape
    assert all(np.array_equal(frame, found[0, 0]) for camera in found for frame in camera)
    assert not np.array_equal(found, same)


def test_pictures_stay_near_what_they_were():
    source = open_source("synthetic:1")
    plain = source.load(SampleRef(clip_id=source.clip_ids[0], t0_us=5_100_000), cameras=source.cameras, frames=1)
    for view in range(1, 9):
        ref = replace(plain.ref, view=view)
        with views.one_pass(source, [ref], cameras=source.cameras, frames=1, seed=0) as load:
            sample = load(ref)
        assert sample.frames.shape == plain.frames.shape
        change = np.abs(sample.frames.astype(float) - plain.frames).mean()
        assert 1 < change < 40
        assert sample.ref.view == view
        assert sample.calibration is None
        assert np.array_equal(sample.future_xyz, plain.future_xyz)


def test_view_0_is_byte_for_byte_that_of_a_store_without_views(stores):
    plain, several = CacheReader(stores / "plain"), CacheReader(stores / "views")
    assert len(plain) == 3
    assert len(several) == 9
    for sample_id in plain.sample_ids:
        one, other = (files_of(stores / name, sample_id) for name in ("plain", "views"))
        assert one == other
        assert len(one) >= 3
    first, second = plain.identity, several.identity
    assert {key: first[key] for key in first} == {key: second[key] for key in second if key != "views"}
    assert second["views"] == {
        "method": "crop-colour-v1",
        "seed": 0,
        "ranges": {name: list(bounds) for name, bounds in RANGES.items()},
    }


def files_of(store, sample_id):
    """Content of a committed sample's files."""
    from cache_store.format.names import sample_key

    key = sample_key(sample_id)
    (folder,) = (store / "samples").glob(f"{key}.*")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_recorded_parameters_reproduce_the_pixels(stores, tiny_checkpoint):
    """From the source, the jitter in the store and nothing else: the same keys and values."""
    reader, source = CacheReader(stores / "views"), open_source("synthetic:3")
    builder, vlm = InputBuilder(Checkpoint(str(tiny_checkpoint))), load_vlm(str(tiny_checkpoint), dtype=torch.bfloat16)
    seen = set()
    for sample_id in reader.sample_ids:
        ref, stored = SampleRef.parse(sample_id), reader.read(sample_id)
        sample = source.load(replace(ref, view=0), cameras=source.cameras, frames=2)
        assert int(stored["view"]) == ref.view
        assert ("jitter" in stored) == (ref.view > 0)
        if ref.view:
            jitter = Jitter(**json.loads(str(stored["jitter"])))
            assert jitter == views.draw(ref, seed=0)
            assert "calibration" not in stored
            sample = replace(sample, frames=views.apply(sample.frames, jitter))
        inputs = builder.build(sample)
        prefix = vlm.prefill(inputs.input_ids, inputs.pixel_values.to(torch.bfloat16), inputs.image_grid_thw)
        assert np.array_equal(stored["kv"][:, 0], prefix.keys.bfloat16().view(torch.uint16))
        assert np.array_equal(stored["kv"][:, 1], prefix.values.bfloat16().view(torch.uint16))
        seen.add(stored["kv"].tobytes())
    assert len(seen) == 9


def test_batches_workers_shards_and_order_change_no_jitter(stores, tiny_checkpoint, tmp_path):
    store = tmp_path / "store"
    for worker in (1, 0):
        alpacache.extract(config(tiny_checkpoint, store, shard=(worker, 2), workers=3))
    one, other = CacheReader(stores / "views"), CacheReader(store)
    assert one.sample_ids == other.sample_ids
    for sample_id in one.sample_ids:
        assert files_of(stores / "views", sample_id) == files_of(store, sample_id)
    alpacache.extract(config(tiny_checkpoint, tmp_path / "batches", batch_size=4))
    batches = CacheReader(tmp_path / "batches")
    for sample_id in one.sample_ids:
        first, second = (reader.read(sample_id, fields=["view", "front_jpeg"]) for reader in (one, batches))
        assert np.array_equal(first["front_jpeg"], second["front_jpeg"])


def test_more_views_may_follow_but_not_others(stores, tiny_checkpoint, tmp_path):
    store = tmp_path / "store"
    alpacache.extract(config(tiny_checkpoint, store, views=2, samples=2))
    more = alpacache.extract(config(tiny_checkpoint, store, samples=2))
    assert (more.selected, more.extracted, more.already_there) == (6, 2, 4)
    with pytest.raises(IdentityMismatchError, match=r"identity\.views\.seed: expected 1, found 0"):
        alpacache.extract(config(tiny_checkpoint, store, seed=1))
    with pytest.raises(IdentityMismatchError, match=r"identity\.views: expected nothing"):
        alpacache.extract(config(tiny_checkpoint, store, views=1))
    with pytest.raises(IdentityMismatchError, match=r"identity\.views"):
        alpacache.extract(config(tiny_checkpoint, stores / "plain"))


def test_a_stopped_run_goes_on_with_the_missing_views(stores, tiny_checkpoint, tmp_path, monkeypatch):
    good, calls = FrozenVLM.prefill_batch, []

    def prefill_batch(self, inputs):
        calls.append(inputs)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return good(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenVLM, "prefill_batch", prefill_batch)
        with pytest.raises(InterruptedRunError, match="4 samples"):
            alpacache.extract(config(tiny_checkpoint, tmp_path / "store"))
    report = alpacache.extract(config(tiny_checkpoint, tmp_path / "store"))
    assert (report.extracted, report.already_there) == (5, 4)
    assert verify(tmp_path / "store", deep=True).ok
    for sample_id in CacheReader(stores / "views").sample_ids:
        assert files_of(stores / "views", sample_id) == files_of(tmp_path / "store", sample_id)


def test_views_of_a_moment_stay_together_and_on_their_clips_side():
    source = open_source("synthetic:40")
    train, val = (select(source, split=split, t0="every:5", views=3)[0] for split in ("train", "val"))
    assert not {ref.clip_id for ref in train} & {ref.clip_id for ref in val}
    assert {split_of(ref.clip_id) for ref in train} == {"train"}
    plain = select(source, split="train", t0="every:5")[0]
    assert [ref.view for ref in train] == [0, 1, 2] * len(plain)
    assert [ref for ref in train if ref.view == 0] == plain
    assert select(source, t0="every:5", samples=4, views=3)[0] == select(source, t0="every:5", views=3)[0][:12]


def test_a_prepared_dataset_gives_views_too(stores, tiny_checkpoint, tmp_path):
    source = open_source("synthetic:3")
    refs, _ = select(source)
    prepare(source, refs, tmp_path / "samples", cameras=source.cameras, frames=2)
    alpacache.extract(config(tiny_checkpoint, tmp_path / "store", source=str(tmp_path / "samples")))
    one, other = CacheReader(stores / "views"), CacheReader(tmp_path / "store")
    assert one.sample_ids == other.sample_ids
    for sample_id in one.sample_ids:
        assert np.array_equal(one.read(sample_id, fields=["kv"])["kv"], other.read(sample_id, fields=["kv"])["kv"])
    prepare(source, [replace(refs[0], view=1)], tmp_path / "odd", cameras=source.cameras, frames=2)
    with pytest.raises(UsageError, match="views are made by extract"):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "none", source=str(tmp_path / "odd")))


@pytest.mark.ci
def test_models_are_judged_on_view_0_and_trained_on_all(stores, tiny_checkpoint, tmp_path):
    data = CachedDataset([stores / "views"], Checkpoint(str(tiny_checkpoint)))
    assert len(data) == 9
    assert [data.sample_id(index) for index in data.plain] == CacheReader(stores / "plain").sample_ids
    assert Validation(data, 64, times="beta", causal=False, with_min_ade=False)._indices == data.plain
    reports = [
        alpacache.evaluate(
            EvalConfig(
                store=str(stores / name),
                model=str(tiny_checkpoint),
                out=str(tmp_path / name),
                paths=2,
                flow_steps=2,
                device="cpu",
            )
        )
        for name in ("plain", "views")
    ]
    assert [[result.sample_id for result in report.results] for report in reports] == [data_ids(stores)] * 2
    assert reports[0].summary.to_json() == reports[1].summary.to_json()
    assert json.loads((tmp_path / "views/eval.json").read_text())["settings"]["view"] == 0
    settings = {"out": str(tmp_path / "run"), "batch_size": 9, "device": "cpu", "epochs": 1.0}
    report = alpacache.train(TrainConfig(stores=(str(stores / "views"),), model=str(tiny_checkpoint), **settings))
    assert (report.samples, report.steps) == (9, 1)


def data_ids(stores):
    return CacheReader(stores / "plain").sample_ids


def test_a_store_without_view_0_cannot_judge(stores, tiny_checkpoint, monkeypatch):
    data = CachedDataset([stores / "views"], Checkpoint(str(tiny_checkpoint)))
    data._index = [place for place in data._index if not place[1].endswith("#0")]
    with pytest.raises(UsageError, match="no sample of view 0"):
        _ = data.plain


@pytest.mark.parametrize("count", [0, -1])
def test_no_views_are_refused(count, tiny_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=f"views is {count}"):
        config(tiny_checkpoint, tmp_path, views=count)


def test_jitter_is_plain_json():
    jitter = views.draw(replace(REF, view=1), seed=0)
    assert Jitter(**json.loads(json.dumps(dataclasses.asdict(jitter)))) == jitter

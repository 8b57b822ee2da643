"""The codec `transform` from the first sample to the last command that reads it, on a tiny model."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import store_codec
from alpacache.errors import DataError, UsageError
from alpacache.extraction import codec_choice
from alpacache.extraction.config import ExtractConfig
from alpacache.planning.config import PlanConfig
from alpacache.planning.plan import plan
from alpacache.training.config import TrainConfig
from cache_store import (
    CacheReader,
    FormatError,
    IdentityMismatchError,
    SampleReadError,
    TransformCodec,
    codec_named,
    collect_garbage,
    copy,
    verify,
)
from cache_store.kv.transform import SIZES, turned, turns
from cache_store.writer import CacheWriter

pytestmark = pytest.mark.system  # whole extractions

CODEC = "transform:5"


def settings(model, store, **more):
    given = {"source": "synthetic:6", "frames": 1, "device": "cpu", "codec": CODEC, "hidden_states": "none"}
    return ExtractConfig(model=str(model), store=str(store), **given | more)


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory):
    """A store, the bf16 store of the same samples, and what was said."""
    folder, notes = tmp_path_factory.mktemp("transform"), []
    alpacache.extract(settings(tiny_checkpoint, folder / "s"), on_note=notes.append)
    alpacache.extract(settings(tiny_checkpoint, folder / "plain", codec="bf16"))
    return folder, notes


def test_a_store_learns_its_codec_once_and_every_later_run_uses_it(made, tiny_checkpoint, tmp_path) -> None:
    folder, notes = made
    store = shutil.copytree(folder / "s", tmp_path / "s")
    assert any("learnt from 6 samples" in note for note in notes)
    (tables,) = (store / "codecs").iterdir()
    before, again = tables.read_bytes(), []
    alpacache.extract(settings(tiny_checkpoint, store, source="synthetic:8"), on_note=again.append)
    assert not any("learnt" in note for note in again)
    assert tables.read_bytes() == before
    reader = CacheReader(store)
    assert len(reader) == 8
    assert reader.identity["codec"] == CODEC
    assert reader.identity["codec_definition"]["tables_sha256"] == tables.name
    sizes = [reader.shape(name, "kv")[0] for name in reader.sample_ids]
    values = np.prod(CachedDataset([store], Checkpoint(str(tiny_checkpoint))).layout.shape(1))
    tokens = reader.read(reader.sample_ids[0], ["prefix_len"])["prefix_len"]
    assert len(set(sizes)) > 1
    assert np.mean(sizes) * 8 / tokens / values < 8


def test_what_is_read_is_what_the_vlm_left(made, tiny_checkpoint) -> None:
    folder, _ = made
    near, exact = (CachedDataset([folder / name], Checkpoint(str(tiny_checkpoint))) for name in ("s", "plain"))
    for index in range(6):
        got, wanted = near.load(index).prefix.decode(), exact.load(index).prefix
        for one, other in ((got.keys, wanted.keys), (got.values, wanted.values)):
            assert (one.float() - other.float()).norm() < 0.05 * other.float().norm()
            assert torch.equal(one[:, :, 0], other[:, :, 0]) or (one[:, :, 0] - other[:, :, 0]).norm() < 1
    assert near.layout.size_bytes(10**4) == int(near.kv_bytes.max())


def test_training_copying_and_verifying(made, tiny_checkpoint, tmp_path) -> None:
    folder, _ = made
    copied = tmp_path / "copy"
    assert copy(folder / "s", copied).ok
    assert verify(copied, deep=True).ok
    run = {"steps": 2, "batch_size": 2, "device": "cpu", "model": str(tiny_checkpoint)}
    losses = [
        alpacache.train(TrainConfig(stores=(str(store),), out=str(tmp_path / f"r{number}"), **run)).last_loss
        for number, store in enumerate((folder / "s", copied, folder / "plain"))
    ]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=0.05)


def test_damaged_or_missing_tables_are_named(made, tiny_checkpoint, tmp_path) -> None:
    store = shutil.copytree(made[0] / "s", tmp_path / "s")
    (tables,) = (store / "codecs").iterdir()
    good = tables.read_bytes()
    for data in (good[:-1], good[:500] + b"x" + good[501:], b""):
        tables.write_bytes(data)
        report = verify(store, deep=True)
        assert [damage.object for damage in report.damaged] == [f"codecs/{tables.name}"]
        with pytest.raises(FormatError, match=r"tables of the codec are damaged.*copy of the store"):
            CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
        with pytest.raises(FormatError, match="damaged"):
            copy(store, tmp_path / "never")
        assert not (tmp_path / "never").exists()
    tables.unlink()
    assert [damage.object for damage in verify(store).damaged] == [f"codecs/{tables.name}"]
    with pytest.raises(FormatError, match=r"missing.*alpacache copy"):
        CachedDataset([store], Checkpoint(str(tiny_checkpoint)))


def test_another_stores_codec(made, tiny_checkpoint, tmp_path) -> None:
    folder, _ = made
    alpacache.extract(
        settings(tiny_checkpoint, tmp_path / "t", source="synthetic:9", codec_from=str(folder / "s"), t0="4")
    )
    first, second = (CacheReader(store) for store in (folder / "s", tmp_path / "t"))
    assert first.identity["codec_definition"] == second.identity["codec_definition"]
    assert store_codec(first.identity, store=str(first.path)) == store_codec(second.identity, store=str(second.path))


def test_a_codec_of_other_settings_is_refused_with_the_difference(made, tiny_checkpoint, tmp_path) -> None:
    source = str(made[0] / "s")
    for change, said in (
        ({"codec": "int8"}, r"goes with --codec transform:RATE"),
        ({"codec": "transform:4"}, r"that store's codec is transform:5, not transform:4"),
        ({"codec_from": str(tmp_path)}, "there is no store"),
        ({"layers": "first:1"}, r"is for layers all of the VLM, this run stores 0"),
    ):
        with pytest.raises(UsageError, match=said):
            alpacache.extract(settings(tiny_checkpoint, tmp_path / "t", **{"codec_from": source} | change))
    with pytest.raises(IdentityMismatchError, match="codec"):
        alpacache.extract(settings(tiny_checkpoint, made[0] / "plain"))
    for name in ("s", "plain"):
        assert sorted(path.name for path in (made[0] / name / "staging").iterdir()) == []
    assert not (tmp_path / "t").exists()


def test_a_store_keeps_its_tables_and_another_stores_are_refused(made, tiny_checkpoint, tmp_path) -> None:
    store, other = shutil.copytree(made[0] / "s", tmp_path / "s"), tmp_path / "o"
    given = {"source": "synthetic:3", "t0": "4"}
    alpacache.extract(settings(tiny_checkpoint, other, **given))
    for source, said in (
        (
            other,
            r"its codec or tables are others, and the store .*/s has its own; leave --codec-from out",
        ),
        (tmp_path / "none", r"there is no store, and the store .*/s has its own; leave --codec-from out"),
    ):
        with pytest.raises(UsageError, match=said):
            alpacache.extract(settings(tiny_checkpoint, store, codec_from=str(source), **given))
    assert len(CacheReader(store)) == 6
    alpacache.extract(settings(tiny_checkpoint, store, codec_from=str(made[0] / "s"), **given))
    assert len(CacheReader(store)) == 9


def test_a_rate_is_one_name_however_it_is_written(made, tiny_checkpoint, tmp_path) -> None:
    """Also of stores of earlier versions, which kept the name as it was written."""
    store = shutil.copytree(made[0] / "s", tmp_path / "s")
    alpacache.extract(settings(tiny_checkpoint, store, source="synthetic:7", codec="transform:05.00"))
    assert len(CacheReader(store)) == 7
    reader, (tables,) = CacheReader(store), (store / "codecs").iterdir()
    fields, identity = list(reader.fields.values()), reader.identity | {"codec": "transform:5.0"}
    old = tmp_path / "old"
    CacheWriter(old, fields=fields, identity=identity, codec_tables=tables.read_bytes())
    alpacache.extract(settings(tiny_checkpoint, old, source="synthetic:1"))
    alpacache.extract(settings(tiny_checkpoint, tmp_path / "t", source="synthetic:1", codec_from=str(old)))
    assert [CacheReader(each).identity for each in (old, tmp_path / "t")] == [identity, identity]


def test_another_vlms_codec_is_refused(made, tiny_checkpoint, tmp_path) -> None:
    store = shutil.copytree(made[0] / "s", tmp_path / "s")
    root = json.loads((store / "zarr.json").read_text())["attributes"]["cache_store"]
    identity = root["identity"] | {"model": root["identity"]["model"] | {"vlm_weights_sha256": "0" * 64}}
    (tables,) = (store / "codecs").iterdir()
    reader = CacheReader(store)
    CacheWriter(
        tmp_path / "o", fields=list(reader.fields.values()), identity=identity, codec_tables=tables.read_bytes()
    )
    with pytest.raises(UsageError, match=r"learnt or chosen for another VLM \(weights 000000000000"):
        alpacache.extract(settings(tiny_checkpoint, tmp_path / "t", codec_from=str(tmp_path / "o")))


def test_a_killed_calibration_leaves_nothing(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(codec_choice, "learn_from", stop)
    with pytest.raises(KeyboardInterrupt):
        alpacache.extract(settings(tiny_checkpoint, tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_who_comes_second_uses_the_winners_codec(made, tiny_checkpoint, tmp_path, monkeypatch) -> None:
    """Two workers learn at once; the one that finds a store when it is through takes what is there."""
    store, learn = tmp_path / "s", codec_choice.learn_from

    def slow(*given):
        shutil.copytree(made[0] / "s", store)
        return learn(*given)

    monkeypatch.setattr(codec_choice, "learn_from", slow)
    notes = []
    alpacache.extract(settings(tiny_checkpoint, store, source="synthetic:8"), on_note=notes.append)
    assert any("another worker" in note for note in notes)
    assert len(CacheReader(store)) == 8
    assert verify(store, deep=True).ok
    assert len(list((store / "codecs").iterdir())) == 1


def test_tables_that_no_root_names_are_garbage(made, tmp_path) -> None:
    store = shutil.copytree(made[0] / "s", tmp_path / "s")
    spare = store / "codecs" / ("0" * 64)
    spare.write_bytes(b"of a writer that was killed")
    assert collect_garbage(store).temporaries == 0  # too young
    assert collect_garbage(store, min_age_s=-1).temporaries == 1
    assert not spare.exists()
    assert verify(store, deep=True).ok


def test_samples_unlike_those_learnt_from_are_told_of(made, caplog) -> None:
    codec = store_codec(CacheReader(made[0] / "s").identity, store=str(made[0] / "s"))
    assert isinstance(codec, TransformCodec)
    shape = np.array([2, 2, 2, 100, 32])
    usual, more = int(np.prod(shape) * 5 / 8), int(np.prod(shape) * 8 / 8)
    assert codec_choice.longer_than_learnt(codec, {"kv": bytes(usual), "kv_shape": shape}) == {}
    assert codec_choice.longer_than_learnt(codec, {"kv": bytes(more), "kv_shape": shape}) == pytest.approx({"": 1.6})
    codec_choice.warn_of({"": {"a": 1.3, "b": 1.6}}, codec, 10)
    assert "2 of 10 samples take more than 1.25 times the 5 bits" in caplog.text
    assert "most: b, 8.0 bits" in caplog.text


def test_plan_counts_the_bytes_and_the_basis() -> None:
    found, other = (plan(PlanConfig(samples=10, codec=codec)) for codec in ("transform:2", "bf16"))
    assert found.kv_bytes_by_codec["transform:2"] == pytest.approx(other.kv_bytes_by_codec["bf16"] / 8, rel=1e-3)
    basis = codec_named("transform:2").decoding_bytes((36, 2, 8, 1, 128))
    assert basis == pytest.approx(36 * 2048**2 * 2, rel=2e-3)
    with pytest.raises(ValueError, match="transform:RATE"):
        PlanConfig(samples=10, codec="transform:40")


def written_again(store, target, change):
    """The store with its second sample changed before it is written, so that all checksums are right."""
    reader = CacheReader(store)
    (tables,) = (store / "codecs").iterdir()
    given = {"fields": list(reader.fields.values()), "identity": reader.identity, "codec_tables": tables.read_bytes()}
    arrays = [dict(reader.read(name, list(reader.fields_of(name)))) for name in reader.sample_ids]
    arrays[1] |= change(arrays[1], arrays[2])
    with CacheWriter(target, **given) as writer:
        for name, values in zip(reader.sample_ids, arrays, strict=True):
            writer.write(name, values)
    return target


def changed(at, value):
    """Bytes of a sample from a place of its sections on, as [section, offset, count], overwritten."""

    def change(mine, _):
        section, offset, count = at
        tokens, data = int(mine["kv_shape"][3]), mine["kv"].copy()
        start = {"positions": 0, "states": 12 * tokens, "ends": 16 * tokens, "words": 24 * tokens}[section] + offset
        data[start : start + count] = value
        return {"kv": data}

    return change


def shaped(**axes):
    def change(mine, _):
        shape = mine["kv_shape"].copy()
        for axis, value in axes.items():
            shape[["layer", "key_value", "head", "token", "channel"].index(axis)] = value
        return {"kv_shape": shape}

    return change


FORGED = {
    "cut": lambda mine, _: {"kv": mine["kv"][:-40]},
    "cut to its beginning": lambda mine, _: {"kv": mine["kv"][:100]},
    "nothing": lambda mine, _: {"kv": mine["kv"][:0]},
    "longer": lambda mine, _: {"kv": np.append(mine["kv"], np.zeros(64, np.uint8))},
    "another's bytes": lambda mine, other: {"kv": other["kv"][: len(other["kv"]) // 2 * 2 - 2]},
    "states": changed(("states", 0, 400), 255),
    "lengths that lie": changed(("ends", 3, 1), 127),
    "positions": changed(("positions", 3, 1), 255),
    "words": changed(("words", 3000, 4000), 85),
    "a bit": changed(("words", 5001, 1), 0),
    "one token more": shaped(token=116),
    "absurdly many": shaped(token=10**9),
    "none": shaped(token=0),
    "fewer than none": shaped(token=-5),
    "a layer more": shaped(layer=5),
}


@pytest.mark.parametrize("name", FORGED)
def test_samples_that_were_written_wrong_are_refused_by_name(name, made, tiny_checkpoint, tmp_path) -> None:
    """What no checksum can tell; the other samples are as they were."""
    store = written_again(made[0] / "s", tmp_path / "s", FORGED[name])
    data, whole = (CachedDataset([each], Checkpoint(str(tiny_checkpoint))) for each in (store, made[0] / "s"))
    with pytest.raises(DataError, match=re.escape(f"sample {data.sample_id(1)!r}") + ".*[Ee]xtract it again"):
        data.load(1).decode()
    assert torch.equal(data.load(2).decode().keys, whole.load(2).decode().keys)


def test_every_flipped_cut_or_swapped_object_is_found(made, tiny_checkpoint, tmp_path) -> None:
    store = shutil.copytree(made[0] / "s", tmp_path / "s")
    kv = sorted(path for path in store.glob("samples/*/kv/*") if path.name != "zarr.json")
    good = {path: path.read_bytes() for path in kv}
    data = CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
    assert len(kv) == len(data) == 6
    first, second = kv[:2]
    size = len(good[first])
    flips = [
        good[first][:at] + bytes([good[first][at] ^ 1]) + good[first][at + 1 :] for at in range(7, size, size // 6)
    ]
    for broken in (*flips, good[first][:-8], good[first] + b"12345678", good[second], b""):
        first.write_bytes(broken)
        (damage,) = verify(store, deep=True).damaged
        assert damage.field == "kv"
        assert str(first.relative_to(store)) == damage.object
        refused = []
        for index in range(6):
            try:
                data.load(index)
            except SampleReadError as error:
                refused.append(error.sample_id)
        assert refused == [damage.sample_id]
    first.write_bytes(good[first])
    assert verify(store, deep=True).ok


def test_samples_of_another_camera_are_within_the_stated_bound(made, tiny_checkpoint, tmp_path) -> None:
    """Coded tokens are within the limit, others as they were."""
    other = {"source": "synthetic:2", "cameras": ("camera_rear_tele_30fov",)}
    alpacache.extract(settings(tiny_checkpoint, tmp_path / "near", codec_from=str(made[0] / "s"), **other))
    alpacache.extract(settings(tiny_checkpoint, tmp_path / "exact", codec="bf16", **other))
    near, exact = (CachedDataset([tmp_path / n], Checkpoint(str(tiny_checkpoint))) for n in ("near", "exact"))
    codec, raw = near.codec, 0
    assert isinstance(codec, TransformCodec)
    tables = codec.calibrated
    for index in range(2):
        sample = near.load(index).prefix
        shape, streams = sample.shape, codec.streams(sample.data.numpy(), sample.shape)
        sections, data = codec.sections(shape), sample.data.numpy()
        sizes = SIZES[data[sections.scales : sections.scales + shape[0] * shape[3]].reshape(shape[0], shape[3])]
        decoded, was = sample.decode(), exact.load(index).prefix
        cos, sin = (part for part in turns(tables, streams.positions))
        keys = turned((decoded.keys.float() - was.keys.float()).numpy(), cos, -sin)
        values = (decoded.values.float() - was.values.float()).numpy() / sizes[:, None, :, None]
        for number, group in enumerate(tables.groups):
            layers = slice(tables.layers_of(number).start, tables.layers_of(number).stop)
            error = np.stack([keys[layers], values[layers]], 1).transpose(3, 0, 1, 2, 4).reshape(shape[3], -1)
            is_raw = streams.states[number, 0] == 0
            raw += int(is_raw.sum())
            assert not error[is_raw].any()
            assert (np.square(error / group.scale).mean(1) < 1.1 * group.limit).all()
    assert raw < 2 * shape[3]

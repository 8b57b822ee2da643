"""Runs on chosen samples: the bits of a run on a store that holds no others, and resumed with no other choice."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.sample_choice import SampleChoice
from alpacache.config import read_toml
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.training.config import TrainConfig
from alpacache.training.data_order import global_order
from alpacache.training.run_state import read_state
from cache_store import CacheReader
from cache_store.format.names import sample_key

pytestmark = pytest.mark.system  # whole runs of a tiny model


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("chosen") / "store"
    config = ExtractConfig(source="synthetic:8", model=str(tiny_checkpoint), store=str(path), frames=1, device="cpu")
    assert alpacache.extract(config).extracted == 8
    return path


@pytest.fixture(scope="module")
def subset(store, tmp_path_factory):
    """A store that holds all samples but the first and one more, and their ids."""
    path = tmp_path_factory.mktemp("chosen") / "subset"
    shutil.copytree(store, path)
    ids = CacheReader(store).sample_ids
    for sample_id in (ids[0], ids[4]):
        (path / "commits" / f"{sample_key(sample_id)}.json").unlink()
    kept = [sample_id for sample_id in ids if sample_id not in (ids[0], ids[4])]
    assert list(CacheReader(path).sample_ids) == kept
    return path, kept


def config(checkpoint, store, out, **changes):
    values = {"stores": (str(store),), "model": str(checkpoint), "out": str(out), "steps": 4, "batch_size": 4}
    values |= {"lr": 1e-3, "device": "cpu", "track": "none"}
    return TrainConfig(**values | changes)


def same_run(first, second):
    one, two = (load_file(out / "last" / "model.safetensors") for out in (first, second))
    lines = [(out / "metrics.jsonl").read_text().splitlines() for out in (first, second)]
    losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
    return losses[0] == losses[1] and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"in_memory": True, "balance": "curvature"}, id="memory-balanced", marks=pytest.mark.ci),
    ],
)
def test_a_choice_gives_the_bits_of_a_store_that_holds_no_others(tiny_checkpoint, store, subset, tmp_path, changes):
    path, kept = subset
    dropped = sorted(set(CacheReader(store).sample_ids) - set(kept))
    notes = []
    val = {"val": str(store), "val_every": 2, **changes}
    alpacache.train(config(tiny_checkpoint, path, tmp_path / "subset", **val))
    by_exception = config(tiny_checkpoint, store, tmp_path / "except", exclude=dropped, **val)
    report = alpacache.train(by_exception, on_note=notes.append)
    assert same_run(tmp_path / "subset", tmp_path / "except")
    both = [read_state(tmp_path / name / "last") for name in ("subset", "except")]
    assert both[0]["best"] == both[1]["best"]  # validation is of all samples of its store
    assert report.chosen["samples"] == report.samples == 6
    assert report.chosen["of"] == 8
    strata = report.chosen["strata"]
    turns = [strata[turn] for turn in ("straight", "gentle", "sharp") if turn in strata]
    assert sum(turn["samples"] for turn in turns) == strata["all"]["samples"] == 6
    assert sum(turn["share"] for turn in turns) == pytest.approx(1)
    if changes:
        assert {round(turn["share"], 6) for turn in turns} == {round(1 / len(turns), 6)}
    assert notes[0] == "6 of 8 samples are chosen; by stratum, with its share of an epoch:"
    assert notes[1].split() == ["6", "100.0%", "all"]


@pytest.fixture(scope="module")
def pairs(tiny_checkpoint, tmp_path_factory):
    """By codec two stores, and copies that hold some of their samples alone, with the ids of those."""
    root, common = tmp_path_factory.mktemp("pairs"), {"model": str(tiny_checkpoint), "frames": 1, "device": "cpu"}

    def make(codec):
        whole, parts, kept = [], [], []
        for name, t0, dropped in (("one", "5.1", (0, 3)), ("two", "9.1", (1,))):
            path, part = root / codec / name, root / codec / f"{name}-part"
            source = {"source": "synthetic:5", "t0": t0, "codec": codec}
            if whole and codec.startswith("transform"):
                source["codec_from"] = str(whole[0])
            alpacache.extract(ExtractConfig(**source, store=str(path), **common))
            shutil.copytree(path, part)
            ids = CacheReader(path).sample_ids
            for place in dropped:
                (part / "commits" / f"{sample_key(ids[place])}.json").unlink()
            whole, parts = [*whole, str(path)], [*parts, str(part)]
            kept += [sample_id for place, sample_id in enumerate(ids) if place not in dropped]
        return tuple(whole), tuple(parts), kept

    return make


@pytest.mark.ci
@pytest.mark.parametrize("codec", ["bf16", "int8", "transform:4"])
def test_of_several_stores_too_in_every_codec_resumed_in_micro_batches_and_judged(
    tiny_checkpoint, pairs, tmp_path, codec
):
    whole, parts, kept = pairs(codec)
    (tmp_path / "ids.txt").write_text("\n".join(reversed(kept)))
    weighted = pd.DataFrame({"sample_id": kept[1:3], "weight": [3.0, 0.5]})
    weighted.to_parquet(tmp_path / "w.parquet")
    shares = {"sample_weights": str(tmp_path / "w.parquet"), "micro_batch": 2, "save_every": 1, "draws": 2}
    alpacache.train(config(tiny_checkpoint, "", tmp_path / "parts", **shares, stores=parts))

    def stop(progress):
        if progress.done == 2:
            raise EOFError

    chosen = config(tiny_checkpoint, "", tmp_path / "chosen", **shares, stores=whole, only=(str(tmp_path / "ids.txt"),))
    with pytest.raises(EOFError):
        alpacache.train(chosen, on_progress=stop)
    alpacache.train(replace(chosen, resume=True))
    assert same_run(tmp_path / "parts", tmp_path / "chosen")
    judge = {"model": str(tiny_checkpoint), "checkpoint": str(tmp_path / "parts"), "device": "cpu", "paths": 2}
    judge |= {
        "flow_steps": "2,1",
        "batch_size": 4,
        "control": "shuffled,none",
        "sample_weights": shares["sample_weights"],
    }
    reports = [
        alpacache.evaluate(EvalConfig(**judge, store=stores, out=str(tmp_path / name), **only))
        for name, stores, only in (
            ("of-parts", parts, {}),
            ("of-chosen", whole, {"only": (str(tmp_path / "ids.txt"),)}),
        )
    ]
    assert [result.sample_id for result in reports[1].results] == kept
    for one, other in zip(*(report.results for report in reports), strict=True):
        for label in ("base", "trained"):
            assert np.array_equal(one.models[label].pred_xyz, other.models[label].pred_xyz)
            assert one.models[label].controls == other.models[label].controls
            assert one.models[label].by_steps == other.models[label].by_steps
    assert reports[0].summary.to_json() == reports[1].summary.to_json()


def test_a_run_resumes_with_its_choice_alone(tiny_checkpoint, store, tmp_path, monkeypatch):
    ids = list(CacheReader(store).sample_ids)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text("\n".join(ids[:6]))
    pd.DataFrame({"sample_id": ids, "weight": [3, *[1] * 7]}).to_csv(tmp_path / "w.csv", index=False)
    choice = {"only": ("ids.txt",), "sample_weights": "w.csv"}
    whole, out = tmp_path / "whole", tmp_path / "run"
    alpacache.train(config(tiny_checkpoint, store, whole, **choice))

    def stop(progress):
        if progress.done == 2:
            raise EOFError

    with pytest.raises(EOFError):
        alpacache.train(config(tiny_checkpoint, store, out, **choice, save_every=1), on_progress=stop)
    for other in ({}, {"only": ("ids.txt",)}, {**choice, "exclude": (ids[1],)}):
        changed = config(tiny_checkpoint, store, out, resume=True, **other)
        with pytest.raises(UsageError, match="was begun with another choice of samples:\n  the run has 6 of 8 samples"):
            alpacache.train(changed)
    saved = read_toml(out / "config.toml", TrainConfig)
    assert saved["only"] == [str(tmp_path / "ids.txt")]
    monkeypatch.chdir("/")
    alpacache.train(TrainConfig(**saved | {"resume": True}))
    assert same_run(whole, out)
    record = read_state(out / "last")["settings"]["choice"]
    assert record["only"] == [str(tmp_path / "ids.txt")]
    assert (record["samples"], record["of"], len(record["sha256"])) == (6, 8, 64)
    noted = pd.read_csv(out / "samples.csv")
    assert noted.sample_id.tolist() == ids[:6]
    assert noted.weight.tolist() == [3.0, *[1.0] * 5]
    (tmp_path / "ids.txt").write_text("\n".join(ids[:5]))
    with pytest.raises(UsageError, match=r"the run has 6 of 8 samples .*\n  now 5 of 8 samples"):
        alpacache.train(TrainConfig(**saved | {"resume": True}))
    everything = tmp_path / "everything"
    alpacache.train(config(tiny_checkpoint, store, everything, steps=1))
    with pytest.raises(UsageError, match="the run has all samples\n  now 1 of 8 samples"):
        alpacache.train(config(tiny_checkpoint, store, everything, steps=1, only=(ids[0],), batch_size=1, resume=True))


def test_weights_are_exact_in_every_epoch_within_stores_and_turns(tiny_checkpoint, store, subset, tmp_path):
    checkpoint, ids = Checkpoint(str(tiny_checkpoint)), list(CacheReader(store).sample_ids)
    pd.DataFrame({"sample_id": ids[1:3], "weight": [4, 0.5]}).to_csv(tmp_path / "w.csv", index=False)
    data = CachedDataset([store, subset[0]], checkpoint, samples=SampleChoice(weights=str(tmp_path / "w.csv")))
    assert len(data) == 14
    shares = [(str(store), 3.0), (str(subset[0]), 1.0)]
    order, _ = global_order(data, shares, seed=0, by_curvature=False, skip_damaged=False)
    due = order.due
    assert due[:8].sum() == pytest.approx(10.5)
    assert due[1] / due[0] == pytest.approx(4)
    assert due[2] / due[0] == pytest.approx(0.5)
    total = Counter()
    for epoch in range(40):
        counts = Counter(order[epoch * 14 + place] for place in range(14))
        assert all(abs(counts[index] - due[index]) < 1 for index in range(14))
        assert sum(counts[index] for index in range(8)) in (10, 11)
        total += counts
        assert all(abs(total[index] - (epoch + 1) * due[index]) < 2 for index in range(14))


def test_nothing_is_written_where_a_choice_is_refused(tiny_checkpoint, store, tmp_path):
    for entry, message in (
        ("synthetic-x", "1 of 1 names fit no sample"),
        ("speed>1000", "none of 8 samples is chosen"),
    ):
        with pytest.raises(UsageError, match=message):
            alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", only=(entry,)))
        with pytest.raises(UsageError, match=message):
            alpacache.evaluate(
                EvalConfig(store=str(store), model=str(tiny_checkpoint), out=str(tmp_path / "eval"), only=(entry,))
            )
    assert not [*tmp_path.iterdir()]


@pytest.mark.ci
def test_an_evaluation_says_what_it_was_of_and_what_runs_know(tiny_checkpoint, store, tmp_path, caplog):
    ids = list(CacheReader(store).sample_ids)
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", steps=1, batch_size=1, only=tuple(ids[:3])))
    judge = {"store": str(store), "model": str(tiny_checkpoint), "checkpoint": str(tmp_path / "run"), "device": "cpu"}
    judge |= {"paths": 1, "flow_steps": 1}
    report = alpacache.evaluate(EvalConfig(**judge, out=str(tmp_path / "others"), exclude=tuple(ids[:3])))
    assert [result.sample_id for result in report.results] == ids[3:]
    assert "was trained on" not in caplog.text
    settings = json.loads((tmp_path / "others" / "eval.json").read_text())["settings"]
    assert settings["choice"] == report.choice
    assert report.choice["except"] == ids[:3]
    assert report.choice["samples"] == 5
    page = (tmp_path / "others" / "report.html").read_text()
    assert re.search(r"chosen: 5 of 8 samples of the store by except synthetic", page)
    alpacache.evaluate(EvalConfig(**judge, out=str(tmp_path / "all")))
    assert "'run'" not in caplog.text
    assert "'trained' was trained on 3 of the 8 clips of --store" in caplog.text
    assert "and 3 of 8 windows of 8 s overlap" in caplog.text


@pytest.mark.ci
def test_blocks_of_time_are_held_out_of_one_store_by_extract_train_and_eval(tiny_checkpoint, tmp_path, caplog):
    common = {"model": str(tiny_checkpoint), "frames": 1, "device": "cpu"}
    long = {"source": "synthetic:6", "t0": "every:1.0", **common}
    alpacache.extract(ExtractConfig(**long, store=str(tmp_path / "all")))
    sides = {}
    for side in ("train", "val"):
        alpacache.extract(ExtractConfig(**long, store=str(tmp_path / side), split=side, split_by="time:8"))
        sides[side] = CacheReader(tmp_path / side)
        assert sides[side].provenance["split"] == f"{side} by time:8"
    held_out = list(sides["val"].sample_ids)
    assert 4 <= len(held_out) <= 40
    run = {"val": str(tmp_path / "all"), "split_by": "time:8", "steps": 2}
    report = alpacache.train(config(tiny_checkpoint, tmp_path / "all", tmp_path / "one", **run))
    assert report.chosen["split_by"] == "time:8"
    assert report.chosen["samples"] == len(sides["train"].sample_ids)
    assert "are trained on" not in caplog.text  # drives of 20 s have no room for a block, its gaps and more
    apart = {"val": str(tmp_path / "val"), "steps": 2}
    alpacache.train(config(tiny_checkpoint, tmp_path / "train", tmp_path / "two", **apart))
    assert same_run(tmp_path / "one", tmp_path / "two")
    judge = {"model": str(tiny_checkpoint), "checkpoint": str(tmp_path / "one"), "device": "cpu", "paths": 1}
    judge |= {"flow_steps": 1, "store": str(tmp_path / "all"), "out": str(tmp_path / "eval"), "split_by": "time:8"}
    judged = alpacache.evaluate(EvalConfig(**judge))
    assert [result.sample_id for result in judged.results] == held_out
    assert judged.summary.split_by == "blocks of 8 s"
    assert "was trained on" not in caplog.text


def test_an_evaluation_weighs_its_samples(tiny_checkpoint, store, tmp_path):
    ids = list(CacheReader(store).sample_ids)
    table = tmp_path / "weights.csv"
    table.write_text(f"sample_id,weight\n{ids[0]},3\n{ids[1]},0.5\n{ids[2]},0\n")
    judge = {"store": str(store), "model": str(tiny_checkpoint), "device": "cpu", "paths": 2, "flow_steps": 1}
    report = alpacache.evaluate(EvalConfig(**judge, out=str(tmp_path / "out"), sample_weights=str(table)))
    by_id = {result.sample_id: result for result in report.results}
    assert set(by_id) == set(ids) - {ids[2]}
    weights = {ids[0]: 3.0, ids[1]: 0.5}
    assert {name: result.weight for name, result in by_id.items()} == {name: weights.get(name, 1.0) for name in by_id}
    errors = [result.models["base"].metrics["min_ade"] for result in by_id.values()]
    expected = np.average(errors, weights=[weights.get(name, 1.0) for name in by_id])
    assert report.summary.strata["all"].metrics["base"]["min_ade"] == pytest.approx(expected)
    assert report.summary.weighted
    assert report.choice["sample_weights"] == str(table)
    rows = pd.read_parquet(tmp_path / "out" / "samples.parquet").query("model == 'base'")
    assert rows.weight.tolist() == [result.weight for result in report.results]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"only": ("x-1", "x-2")}, "--only x-1: 1 of 1 names fit no sample of the stores: x-1"),
        ({"only": ("speed>1000",)}, "none of 8 samples is chosen by --only 'speed>1000'"),
        ({"sample_weights": "w.csv"}, r"weights.csv: 1 of 2 weights cannot be used, synthetic-0-000001=-2; expected"),
        ({"split_by": "time:60"}, r"blocks of 60 s are longer than 8 of 8 clips.*: synthetic-0-000000"),
    ],
)
def test_an_evaluation_of_what_cannot_be_chosen_is_refused(tiny_checkpoint, store, tmp_path, choice, message):
    if "sample_weights" in choice:
        table = tmp_path / "weights.csv"
        table.write_text("clip_id,weight\nsynthetic-0-000000,1\nsynthetic-0-000001,-2\n")
        choice = {"sample_weights": str(table)}
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=message):
        alpacache.evaluate(EvalConfig(store=str(store), model=str(tiny_checkpoint), out=str(out), **choice))
    assert not out.exists()

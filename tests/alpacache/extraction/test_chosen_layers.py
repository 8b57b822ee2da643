"""`extract --layers`: only those layers' KV is stored, with the bits that it has in a store of all."""

import json
import os
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.streamed_vlm import load_streamed_vlm
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.errors import DataError, UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.probe_features import read_probe_data
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.prefill import StoredFeatures
from alpacache.training.config import TrainConfig
from cache_store import CacheReader, IdentityMismatchError, copy, info, verify

pytestmark = pytest.mark.system  # whole extractions


@pytest.fixture(scope="module")
def extract(tiny_checkpoint, tmp_path_factory):
    """Stores of the same two samples, once each."""
    made = {}

    def extract(codec="int8", layers=None, **changes):
        key = (codec, layers, *changes.items())
        if key not in made:
            store = tmp_path_factory.mktemp("layers") / "store"
            values = {"source": "synthetic:2", "model": str(tiny_checkpoint), "store": str(store), "frames": 1}
            values |= {"device": "cpu", "codec": codec, "layers": layers, "hidden_states": "none"}
            values |= {"rollouts": 2 if changes.get("reasoning") == "rollout" else None, "deterministic": True}
            alpacache.extract(ExtractConfig(**values | changes))
            made[key] = str(store)
        return made[key]

    return extract


@pytest.mark.ci
@pytest.mark.parametrize(
    ("codec", "layers", "held", "reasoning"),
    [
        ("bf16", "every:3", (0, 3), "none"),
        ("int8", "first:2", (0, 1), "none"),
        ("bf16", "1,3", (1, 3), "rollout"),
        ("int8", "1,3", (1, 3), "rollout"),
    ],
)
def test_the_chosen_layers_have_the_bits_of_a_full_store(extract, tiny_checkpoint, codec, layers, held, reasoning):
    checkpoint, tails = Checkpoint(str(tiny_checkpoint)), 2 if reasoning == "rollout" else 0
    store, all_layers = (extract(codec, chosen, reasoning=reasoning) for chosen in (layers, None))
    identity = dict(CacheReader(store).identity)
    assert identity.pop("layers") == list(held)
    assert identity == CacheReader(all_layers).identity
    few, full = CachedDataset([store], checkpoint), CachedDataset([all_layers], checkpoint).of_layers(held)
    assert few.held_layers == held
    assert few.of_layers(held) is few
    for index in range(2):
        first, second = (data.load(index, tails=tails) for data in (few, full))
        assert first.prefix.layers == second.prefix.layers == held
        both = ([one.decode(), *one.rollout_prefixes()] for one in (first, second))
        for one, other in zip(*both, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
            assert one.start_position == other.start_position
        if codec == "int8":
            assert torch.equal(first.prefix.data, second.prefix.data)
    kv = [info(path).size_by_field["kv"] for path in (store, all_layers)]
    assert kv[0] == pytest.approx(kv[1] / 2, rel=0.05)


def test_stores_of_different_layers_go_together_for_what_all_of_them_have(extract, tiny_checkpoint):
    stores, checkpoint = [extract(layers="first:2"), extract()], Checkpoint(str(tiny_checkpoint))
    data = CachedDataset(stores, checkpoint)
    assert data.held_layers == (0, 1)
    with pytest.raises(UsageError, match="stores of different layers, heads or channels cannot be mixed"):
        _ = data.layout
    with pytest.raises(UsageError, match=r"values of layers 0, 1 of the VLM; layers 3 are asked for as well"):
        data.of_layers((1, 3))
    data = data.of_layers((1,))
    first, second = (data.load(index).prefix for index in (0, 2))  # the same sample in either store
    assert data.sample_id(0) == data.sample_id(2)
    assert torch.equal(first.data, second.data)
    assert data.kv_bytes[0] == data.kv_bytes[2] == len(first.data)


@pytest.mark.parametrize("layers", [(3, 1), (1, 1), (), (1.0,), (False, True), 3, "0,1"])
def test_what_is_no_rising_choice_of_layers_is_refused_when_it_is_made(extract, tiny_checkpoint, layers):
    data = CachedDataset([extract()], Checkpoint(str(tiny_checkpoint)))
    with pytest.raises(UsageError, match=r"^layers is .*; expected layer numbers from 0, rising, as in \(0, 6, 12\)"):
        data.of_layers(layers)


def test_layers_that_a_data_set_left_out_are_not_given_back(extract, tiny_checkpoint):
    data = CachedDataset([extract()], Checkpoint(str(tiny_checkpoint)))
    few = data.of_layers(np.array([0, 1]))
    assert few.of_layers((0, 1)) is few
    assert few.of_layers((1,)).load(0).prefix.layers == (1,)
    for layers in ((2,), range(4)):
        with pytest.raises(UsageError, match=r"has layers 0, 1 of the VLM alone; `of_layers` left 2.* out before"):
            few.of_layers(layers)


@pytest.mark.parametrize("layers", [[0], [1, 0], [0, "x"], [True, 1]])
def test_an_identity_that_the_samples_do_not_fit_is_refused(extract, tiny_checkpoint, monkeypatch, layers):
    data = CachedDataset([extract(layers="first:2")], Checkpoint(str(tiny_checkpoint)))
    reader, _ = data.locate(0)
    monkeypatch.setattr(reader, "identity", {**reader.identity, "layers": layers})
    with pytest.raises(DataError, match=r"says in its identity that it has layers .*, and its samples have 2 of them"):
        data.of_layers((0,))


@pytest.mark.parametrize(("layers", "held"), [("0", [0]), ("1,2", [1, 2])])
def test_the_vlm_is_run_no_further_than_the_last_of_them_on_the_device_or_through_it(extract, layers, held):
    full = CacheReader(extract("bf16"))
    for how in ({}, {"weights": "ram"}, {"weights": "files"}):
        few = CacheReader(extract("bf16", layers, **how))
        for sample_id in full.sample_ids:
            arrays, all_arrays = few.read(sample_id), full.read(sample_id)
            assert np.array_equal(arrays.pop("kv"), all_arrays.pop("kv")[held])
            assert arrays.keys() == all_arrays.keys()
            assert all(np.array_equal(arrays[name], all_arrays[name]) for name in arrays)


def test_no_more_of_the_vlm_comes_than_is_run(tiny_checkpoint):
    features = {"codec": None, "hidden_states": False, "rollouts": 0, "layers": (0, 1)}
    assert StoredFeatures(**features).run_layers == 2
    for more in ({"hidden_states": True}, {"rollouts": 1}, {"layers": None}):
        assert StoredFeatures(**features | more).run_layers is None
    how = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "home": "files", "tower_streams": False}
    with closing(load_streamed_vlm(Checkpoint(str(tiny_checkpoint)), **how, run_layers=2)) as vlm:
        assert vlm.layers == 2


def test_memory_is_planned_for_the_layers_that_come(tiny_checkpoint, tmp_path):
    def planned(layers):
        values = {"source": "synthetic:1", "model": str(tiny_checkpoint), "frames": 1, "device": "cpu"}
        values |= {"hidden_states": "none", "weights": "ram", "layers": layers, "store": str(tmp_path / str(layers))}
        return alpacache.extract(ExtractConfig(**values)).memory

    everything, half = planned(None), planned("first:2")
    assert half.host_weights == half.streamed_bytes == everything.streamed_bytes // 2


def test_all_layers_named_one_by_one_are_all(extract):
    assert CacheReader(extract(layers="0,1,2,3")).identity == CacheReader(extract(reasoning="none")).identity


def test_what_reads_stores_takes_one_of_some_layers(extract, tmp_path, tiny_checkpoint):
    store = extract(layers="1,3", reasoning="rollout")
    assert verify(store, deep=True).damaged == ()
    copy(store, tmp_path / "copy")
    assert CacheReader(tmp_path / "copy").identity == CacheReader(store).identity
    few, full = CacheReader(store), CacheReader(extract(reasoning="rollout"))
    with pytest.raises(UsageError, match=r"--layers has 2, but .* has 2 layers, 1, 3"):
        read_probe_data(few, few.sample_ids, layers=(1, 2), pool="mean")
    first, second = (read_probe_data(one, one.sample_ids, layers=(3,), pool="mean") for one in (few, full))
    assert first.features.keys() == {"layer 3"}
    assert np.array_equal(first.features["layer 3"], second.features["layer 3"])
    again = ExtractConfig(
        source="synthetic:2",
        model=str(tiny_checkpoint),
        store=store,
        frames=1,
        codec="int8",
        hidden_states="none",
        reasoning="rollout",
        rollouts=2,
        device="cpu",
    )
    with pytest.raises(IdentityMismatchError, match=r"the store has the KV of layers 1,3, .*: pass --layers 1,3, or"):
        alpacache.extract(again)


@pytest.mark.ci
def test_a_new_expert_learns_the_same_from_some_layers_as_from_all_and_a_full_one_is_refused(
    extract, tiny_checkpoint, tmp_path
):
    model, losses = str(tiny_checkpoint), []
    values = {"model": model, "steps": 3, "batch_size": 2, "warmup": 0, "lr": 1e-3, "device": "cpu", "track": "none"}
    few, full = (extract(layers=layers, reasoning="rollout") for layers in ("1,3", None))
    for name, store in (("few", few), ("all", full)):
        config = {"out": str(tmp_path / name), "stores": (store,), "prefix": "mix", "from_scratch": True}
        report = alpacache.train(TrainConfig(**values | config, expert_map=(1, 3), expert_width=64))
        losses.append((report.first_loss, report.last_loss))
    assert losses[0] == losses[1]
    lacks = r"has keys and values of layers 1, 3 of the VLM; layers 0, 2 are asked for as well"
    with pytest.raises(UsageError, match=lacks):
        alpacache.train(TrainConfig(**values, stores=(few,), out=str(tmp_path / "big")))
    with pytest.raises(UsageError, match=lacks):
        alpacache.evaluate(EvalConfig(store=(few,), model=model, out=str(tmp_path / "eval"), device="cpu", paths=2))
    judged = alpacache.evaluate(
        EvalConfig(
            store=(few,),
            model=model,
            checkpoint=str(tmp_path / "few"),
            out=str(tmp_path / "judged"),
            device="cpu",
            paths=2,
            on_overlap="allow",
        )
    )
    assert set(judged.results[0].models) >= {"base", "trained"}


def with_other(value, where, key, model, out):
    """A copy of a checkpoint, its weights linked, with another value in one of its configs."""
    shutil.copytree(model, out, copy_function=os.link)
    config = json.loads((out / where).read_text())
    config[key[0]][key[1]] = value
    (out / where).unlink()
    (out / where).write_text(json.dumps(config))
    return str(out)


def test_another_expert_fits_the_store_and_another_vlm_or_prompt_is_refused_by_name(extract, tiny_checkpoint, tmp_path):
    again = {
        "source": "synthetic:2",
        "store": extract(layers="every:3"),
        "frames": 1,
        "codec": "int8",
    }
    again |= {"layers": "0,3", "hidden_states": "none", "device": "cpu"}
    expert = with_other(64, "config.json", ("expert_cfg", "intermediate_size"), tiny_checkpoint, tmp_path / "expert")
    assert alpacache.extract(ExtractConfig(**again, model=expert)).already_there == 2
    run = {"stores": (again["store"],), "out": str(tmp_path / "run"), "steps": 1, "batch_size": 1, "warmup": 0}
    run |= {"device": "cpu", "track": "none", "from_scratch": True}
    assert alpacache.train(TrainConfig(**run, model=expert)).steps == 1
    vlm = with_other(99.0, "vlm/config.json", ("text_config", "rope_theta"), tiny_checkpoint, tmp_path / "vlm")
    with pytest.raises(IdentityMismatchError, match="rope_theta"):
        alpacache.extract(ExtractConfig(**again, model=vlm))
    with pytest.raises(UsageError, match="rope_theta"):
        alpacache.train(TrainConfig(**run, model=vlm, resume=True))
    with pytest.raises(IdentityMismatchError, match="camera_names"):
        alpacache.extract(ExtractConfig(**again, model=str(tiny_checkpoint), camera_names=True))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("every:0", r"layers is 'every:0'; expected every:3, first:6, or layer numbers"),
        ("last:3", "layers is 'last:3'; expected every:3"),
        ("3,1", "layers is '3,1'; expected every:3"),
        ("1,x", "layers is '1,x'; expected every:3"),
        ("", "layers is ''; expected every:3"),
        ("0,7", "layers names 7; the VLM has layers 0 to 3."),
        ("first:5", r"layers is first:5; the VLM has 4 layers, 0 to 3\."),
    ],
)
def test_layers_that_there_are_not_are_refused_in_a_sentence(extract, layers, message):
    with pytest.raises(UsageError, match=message) as refused:
        extract(layers=layers)
    assert "\n" not in str(refused.value)

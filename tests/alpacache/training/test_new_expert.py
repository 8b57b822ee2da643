"""Experts of one's own size: trained from the layers that they attend to alone, judged, resumed and exported."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.alpamayo.new_expert import ExpertSpec, NewExpert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import checked, prefix_arrays, sample_arrays, store_fields, tail_arrays
from alpacache.cached_samples.prefix_choice import PrefixChoice
from alpacache.cached_samples.ring import BatchRing, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.exporting.config import ExportConfig
from alpacache.training import auto_settings
from alpacache.training.config import TrainConfig
from cache_store import CODECS, CacheReader, CacheWriter
from cache_store.storage.local_storage import LocalStorage

SPEC = ExpertSpec(layer_map=(1, 3), width=64, intermediate=96, heads=2, seed=0)


@pytest.fixture(scope="module")
def stores(rollout_samples, rollout_stores, tmp_path_factory):
    """The samples of `rollout_stores`, in chunks of a layer or so."""
    found = {}
    for name in ("bf16", "int8"):
        codec, store = CODECS.get(name), tmp_path_factory.mktemp("chunks") / name
        fields = store_fields(hidden_states=False, codec=codec, rollouts=3)
        tokens = rollout_samples[0][2].prefix_len
        layer_mb = (2 * 2 * tokens * 32 * 2 if codec is None else codec.encoded_bytes((1, 2, 2, tokens, 32))) / 1e6
        fields = [dataclasses.replace(one, chunk_mb=layer_mb) if one.name == "kv" else one for one in fields]
        with CacheWriter(store, fields=fields, identity=CacheReader(rollout_stores[name]).identity) as writer:
            for sample, inputs, prefix, tails in rollout_samples:
                values = prefix_arrays(inputs, prefix, hidden_states=False, codec=codec)
                values |= tail_arrays(tails, codec=codec)
                arrays = {key: v.numpy() if isinstance(v, torch.Tensor) else v for key, v in values.items()}
                writer.write(
                    sample.ref.sample_id, sample_arrays(sample, inputs) | checked(sample.ref.sample_id, arrays)
                )
        found[name] = str(store)
    return found


@pytest.fixture
def chunks_read(monkeypatch):
    """Names and sizes of the chunks of prefixes' keys and values that are read, in order."""
    read, read_into = [], LocalStorage.read_into

    def counted(storage, path, size, *args, **options):
        if "/kv/c." in path:
            read.append((path.rpartition("/")[2], size))
        return read_into(storage, path, size, *args, **options)

    monkeypatch.setattr(LocalStorage, "read_into", counted)
    return read


@pytest.mark.system
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_only_the_wanted_layers_are_fetched_with_the_bits_of_the_whole(stores, tiny_checkpoint, codec, chunks_read):
    whole = CachedDataset([stores[codec]], Checkpoint(str(tiny_checkpoint)))
    assert whole.held_layers == (0, 1, 2, 3)
    assert whole.of_layers(range(4)) is whole
    full = whole.load(0, tails=2)
    all_bytes = sum(size for _, size in chunks_read)
    chunks_read.clear()
    data = whole.of_layers((1, 2))
    sample = data.load(0, tails=2)
    assert sum(size for _, size in chunks_read) <= {"bf16": 0.55, "int8": 0.8}[codec] * all_bytes
    if codec == "bf16":
        assert sorted(name for name, _ in chunks_read) == ["c.1.0.0.0.0", "c.2.0.0.0.0"]
    assert sample.prefix.layers == (1, 2)
    wanted = [full.prefix.of_layers((1, 2)), *(one.of_layers((1, 2)) for one in full.rollout_prefixes())]
    for got, expected in zip([sample.prefix, *sample.rollout_prefixes()], wanted, strict=True):
        if codec == "int8" and got is sample.prefix:
            assert torch.equal(got.data, expected.data)
            got, expected = got.decode(), expected.decode()
        assert torch.equal(got.keys, expected.keys)
        assert torch.equal(got.values, expected.values)
        assert (got.prefix_len, got.start_position) == (expected.prefix_len, expected.start_position)
    assert data.kv_bytes[0] * 2 == whole.kv_bytes[0]
    assert data.longest == whole.longest
    with pytest.raises(UsageError, match=r"of layers 0 to 3 of the VLM; layers 4, 7 are asked for as well"):
        whole.of_layers((1, 4, 7))


@pytest.mark.system
@pytest.mark.parametrize("prefix", ["direct", "rollouts"])
@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("codec", ["bf16", "int8"])
@torch.no_grad()
def test_velocities_of_a_ring_of_some_layers_are_those_of_whole_prefixes(
    stores, tiny_checkpoint, codec, in_memory, prefix
):
    checkpoint = NewExpert(Checkpoint(str(tiny_checkpoint)), SPEC)
    expert = load_expert(checkpoint, dtype=torch.float32).eval()
    whole = CachedDataset([stores[codec]], checkpoint, choice=PrefixChoice(prefix=prefix))
    data = whole.of_layers(expert.prefix_layers)
    rows = PrefixRows(data.layout, data.longest, batch_size=2, device=torch.device("cpu"), tail_room=data.tail_room)
    staged, noise, t = StagedBatch(rows, expert, draws=1), torch.randn(2, 1, 64, 2), torch.rand(2, 1)
    batches = iter([[(0, 0), (1, 1)], [(2, 1), (3, 0)]])
    with BatchRing(data, expert.action_space, batches, rows, in_memory=in_memory) as ring:
        for batch in ring:
            staged.put(batch, noise, t=t)
            got = expert.velocity(noise, t, staged.prefixes())
            indices = [whole.ids.index(one) for one in batch.sample_ids]
            loaded = [whole.load(index, tails=3) for index in indices]
            tails = [whole.tail_at(index, at) for index, at in zip(indices, batch.positions, strict=True)]
            prefixes = [
                one.prefix if tail is None else one.rollout_prefixes()[tail]
                for one, tail in zip(loaded, tails, strict=True)
            ]
            expected = expert.velocity(noise, t, prefixes)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            ring.done(batch)


@torch.no_grad()
@pytest.mark.parametrize("layer_map", [(1, 3), (3, 0), (2, 2, 1), (0, 1, 2, 3, 3, 3)])
def test_layer_i_attends_to_the_layer_it_is_mapped_to(tiny_checkpoint, rollout_samples, layer_map):
    checkpoint = NewExpert(Checkpoint(str(tiny_checkpoint)), dataclasses.replace(SPEC, layer_map=layer_map))
    prefix = rollout_samples[0][2]
    noise, t = torch.randn(1, 2, 64, 2), torch.rand(1, 2)
    stock = load_expert(checkpoint, dtype=torch.float32, attention="eager").eval()
    expert = load_expert(checkpoint, dtype=torch.float32).eval()
    expected = expert.velocity(noise, t, [prefix])
    torch.testing.assert_close(stock.velocity(noise, t, [prefix]), expected, rtol=1e-4, atol=1e-5)
    unused = sorted(set(range(4)) - set(layer_map))
    keys = prefix.keys.clone()
    keys[unused] = torch.nan
    broken = dataclasses.replace(prefix, keys=keys)
    assert torch.equal(expert.velocity(noise, t, [broken]), expected)
    for layer in set(layer_map):
        keys = prefix.keys.clone()
        keys[layer] += 1
        changed = expert.velocity(noise, t, [dataclasses.replace(prefix, keys=keys)])
        assert not torch.equal(changed, expected)


@pytest.mark.parametrize("family", ["tiny_checkpoint", "tiny_checkpoint_15", "tiny_checkpoint_2"])
def test_weights_are_drawn_as_the_public_code_draws_them_by_seed_and_name(family, request):
    base = Checkpoint(str(request.getfixturevalue(family)))
    spec = ExpertSpec(layer_map=(0, 1, 2, 3, 0, 1), width=128, intermediate=160, heads=6, seed=0)
    experts = [
        load_expert(NewExpert(base, dataclasses.replace(spec, seed=seed)), dtype=torch.float32) for seed in (0, 0, 1)
    ]
    first, same, other = ({name: tensor.detach() for name, tensor in expert.named_parameters()} for expert in experts)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert len(experts[0].expert.layers) == 6
    assert first["expert.layers.5.self_attn.q_proj.weight"].shape == (6 * 32, 128)
    for name, tensor in first.items():
        if name.endswith(".bias"):
            assert not tensor.any()
        elif tensor.ndim == 1:
            assert (tensor == 1).all()
        else:
            std = experts[0].expert.config.initializer_range if name.startswith("expert.") else 0.02
            assert float(tensor.std()) == pytest.approx(std, rel=0.15)
            assert abs(float(tensor.mean())) < 0.1 * std
            assert not torch.equal(tensor, other[name])
    freqs = "action_in_proj.sinus.0.freqs"
    own = load_expert(base, dtype=torch.float32)
    assert torch.equal(dict(experts[0].named_buffers())[freqs], dict(own.named_buffers())[freqs])
    assert experts[0].action_space == own.action_space
    shapes = NewExpert(base, spec).shapes(*EXPERT_PARTS)
    assert {name: shapes[name] for name in first} == {name: tuple(tensor.shape) for name, tensor in first.items()}


@pytest.fixture(scope="module")
def train(stores, tiny_checkpoint):
    def train(out, codec="int8", **changes):
        values = {"stores": (stores[codec],), "model": str(tiny_checkpoint), "out": str(out), "batch_size": 2}
        values |= {"lr": 1e-3, "warmup": 2, "device": "cpu", "track": "none", "steps": 4, "from_scratch": True}
        return alpacache.train(TrainConfig(**values | {"expert_layers": 2, "expert_width": 64} | changes))

    return train


def weights(out):
    return load_file(out / "last" / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.ci
def test_a_small_expert_is_trained_resumed_judged_and_exported(train, stores, tiny_checkpoint, tmp_path):
    whole, parts, out = tmp_path / "whole", tmp_path / "parts", tmp_path / "small"
    train(whole, save_every=1, keep=9, ema=0.9)
    settings = json.loads((whole / "last/state.json").read_text())["settings"]
    assert {key: settings[key] for key in settings if key.startswith("expert_")} == {
        "expert_layers": 2,
        "expert_width": 64,
        "expert_intermediate": 128,
        "expert_heads": 2,
        "expert_map": [0, 2],
    }
    (parts / "checkpoints").mkdir(parents=True)
    (parts / "checkpoints/step-0000002").symlink_to(whole / "checkpoints/step-0000002")
    (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    train(parts, resume=True, ema=0.9, expert_layers=None, expert_width=None)
    assert same(weights(whole), weights(parts))
    with pytest.raises(UsageError, match="expert_width: the run has 64, now 32"):
        train(whole, resume=True, ema=0.9, expert_width=32)
    with pytest.raises(UsageError, match=r"begun with other settings:\n  expert_layers: the run has 2, now 3\nRepeat"):
        train(whole, resume=True, ema=0.9, expert_layers=3)
    with pytest.raises(UsageError, match="from_scratch: the run has True, now False"):
        train(whole, resume=True, ema=0.9, from_scratch=False, expert_layers=None, expert_width=None)

    model, run = str(tiny_checkpoint), str(whole)
    with pytest.raises(UsageError, match=r"an expert of its own size.*Pass --expert-only"):
        alpacache.export(ExportConfig(model=model, checkpoint=run, out=str(out)))
    alpacache.export(ExportConfig(model=model, checkpoint=run, out=str(out), expert_only=True))
    config = json.loads((out / "config.json").read_text())
    assert config["expert_layer_map"] == [0, 2]
    assert load_expert(str(out)).layer_map == (0, 2)
    common = {"store": stores["int8"], "device": "cpu", "paths": 2, "reasoning": "none"}
    judged = alpacache.evaluate(EvalConfig(**common, model=model, checkpoint=run, out=str(tmp_path / "eval")))
    alone = alpacache.evaluate(EvalConfig(**common, model=str(out), out=str(tmp_path / "alone")))
    for one, other in zip(judged.results, alone.results, strict=True):  # the export is rounded to bfloat16
        first, second = (result.models[label].pred_xyz for result, label in ((one, "trained"), (other, "base")))
        assert np.abs(first - second).max() < 0.5
        assert np.abs(first - one.models["base"].pred_xyz).max() > 1
    train(tmp_path / "further", model=str(out), from_scratch=False, expert_layers=None, expert_width=None)


def test_an_expert_wider_than_the_memory_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(auto_settings, "cap_memory", lambda budget, device: budget)
    room = {"device": torch.device("cuda"), "budget_bytes": 8 * 2**30}
    auto_settings.check_room(2 * 2**30, 4096, **room)
    with pytest.raises(UsageError, match=r"width 8192 has 4,294,967,296 .* 16.0 GiB or more of GPU memory; 8.0 GiB"):
        auto_settings.check_room(2**32, 8192, **room)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("how", [{"compile": False, "capture": False}, {"compile": True, "capture": True}])
def test_a_gpu_gives_the_losses_of_the_cpu(train, tmp_path, codec, how):
    own = {"expert_layers": None, "expert_map": (3, 1, 1, 0), "expert_width": 128, "lr": 1e-8, "draws": 2}
    losses = []
    for device, more in (("cpu", {}), ("cuda", how)):
        train(tmp_path / device, codec, device=device, **own, **more)
        rows = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # bfloat16 there


def test_sizes_that_cannot_be_are_refused_in_a_sentence(train, tmp_path, monkeypatch):
    for changes, message in (
        ({"expert_heads": 3}, "expert_heads is 3; expected a multiple of the VLM's 2 KV heads"),
        ({"expert_map": (0, 7)}, r"expert_map names layers 7 of the VLM; there are keys and values of layers 0 to 3\."),
        ({"expert_map": (0, 1, 2)}, "expert_map names 3 layers, and expert_layers is 2; leave one out"),
        ({"from_scratch": False}, "expert_layers is of a new expert, and from_scratch is not given"),
        ({"trainable": "lora"}, "trainable is lora; expected all, as weights that are random must all be trained"),
        ({"expert_width": 60_000}, r"the new expert of width 60000 has [\d,]+ parameters, .* Lower --expert-width"),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            train(tmp_path / "run", **changes)
        assert "\n" not in str(refused.value)
        assert not (tmp_path / "run" / "config.toml").exists()

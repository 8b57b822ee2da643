"""Shared pieces of the tests: the golden model, tiny checkpoints, and how errors are measured."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alpacache import hub
from alpacache.alpamayo import Checkpoint, load_expert, load_vlm
from alpacache.alpamayo.checkpoint import INDEX
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import RolloutSampler
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.cached_samples.features import checked, prefix_arrays, sample_arrays, store_fields, tail_arrays
from alpacache.cached_samples.identity import store_identity
from alpacache.driving.sample import SampleRef
from alpacache.planning.workload import Workload
from alpacache.prefix.layout import PrefixLayout
from alpacache.sources.registry import open_source
from cache_store import CODECS, CacheWriter

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "alpamayo_tiny"
GOLDEN_2 = ROOT / "tests" / "data" / "alpamayo2_tiny"


@pytest.fixture(scope="session", autouse=True)
def plain_checkout():
    """Tests also run where alpacache is not installed, as on a borrowed GPU, in processes of their own too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch):
    """Tests have stand-ins for the hub's client, and no network that would lead to the hub."""
    monkeypatch.setattr(hub, "knock", lambda *_: "")
    monkeypatch.setattr(hub, "_known", {})


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


@pytest.fixture(scope="session")
def golden_dir_2():
    """A whole tiny checkpoint of 2 Super with golden data beside it."""
    return GOLDEN_2


@pytest.fixture
def copied_checkpoint_2(tmp_path):
    """A copy of it to change."""
    return shutil.copytree(GOLDEN_2, tmp_path / "Tiny-2", ignore=shutil.ignore_patterns("cases.*"))


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="session")
def golden_cases():
    return json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="session")
def golden_vlm():
    return load_vlm(str(GOLDEN))


@pytest.fixture(scope="session")
def golden_expert():
    return load_expert(str(GOLDEN)).eval()


@pytest.fixture(scope="session")
def golden_prefixes(golden, golden_vlm):
    """PrefixFeatures of the three golden clips."""
    names = ("input_ids_fused", "pixel_values", "image_grid_thw")
    return [golden_vlm.prefill(*(golden[f"clip{clip}.{name}"] for name in names)) for clip in range(3)]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A complete tiny R1 checkpoint in bfloat16, two shards."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-R1")


@pytest.fixture(scope="session")
def tiny_checkpoint_15(tmp_path_factory):
    """The same for 1.5: constants absent from the weights."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny15") / "Tiny-1.5", seed=1, family="1.5", shards=1)


@pytest.fixture(scope="session")
def tiny_checkpoint_2(tmp_path_factory):
    """The same for 2 Super: files in one folder, one more `expert.` in the names, two shards."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny2") / "Tiny-2", seed=2, family="2")


@pytest.fixture(scope="session")
def renamed_15(tiny_checkpoint_15, tmp_path_factory):
    """The 1.5 checkpoint as the public conversion script leaves it: R1's names, and links to weights and index."""
    out = tmp_path_factory.mktemp("renamed") / "Tiny-1.5-as-R1"
    shutil.copytree(tiny_checkpoint_15 / "vlm", out / "vlm")
    config = json.loads((tiny_checkpoint_15 / "config.json").read_text().replace("alpamayo1_5.", "alpamayo_r1."))
    config |= {"model_type": "alpamayo_r1", "architectures": ["AlpamayoR1"]}
    (out / "config.json").write_text(json.dumps(config))
    for file in (*tiny_checkpoint_15.glob("*.safetensors"), tiny_checkpoint_15 / INDEX):
        (out / file.name).symlink_to(file)
    return out


@pytest.fixture(scope="session")
def relative_error():
    """Relative L2 error."""

    def measure(got, expected):
        got, expected = (torch.as_tensor(tensor).detach().double() for tensor in (got, expected))
        assert got.shape == expected.shape
        return float((got - expected).norm() / expected.norm())

    return measure


@pytest.fixture(scope="session")
def rollout_samples(tiny_checkpoint):
    """Two samples with what the tiny VLM made of them: (sample, inputs, direct prefix, three tails)."""
    checkpoint, source = Checkpoint(str(tiny_checkpoint)), open_source("synthetic:2")
    vlm, builder = load_vlm(checkpoint, dtype=torch.bfloat16), InputBuilder(checkpoint)
    sampler, found = RolloutSampler.load(checkpoint, vlm, builder), []
    for clip_id in source.clip_ids:
        ref = SampleRef(clip_id=clip_id, t0_us=5_100_000)
        sample = source.load(ref, cameras=source.cameras, frames=1)
        inputs = builder.build(sample)
        prefix = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
        found.append((sample, inputs, prefix, sampler.sample(prefix, inputs.stem_len, rollouts=3, key=ref.sample_id)))
    return found


@pytest.fixture(scope="session")
def rollout_stores(rollout_samples, tiny_checkpoint, tmp_path_factory):
    """These samples in a store a codec: `bf16`, `int8`."""
    checkpoint, stores = Checkpoint(str(tiny_checkpoint)), {}
    for name in ("bf16", "int8"):
        codec, store = CODECS.get(name), tmp_path_factory.mktemp("rollouts") / name
        identity = store_identity(
            checkpoint,
            InputBuilder(checkpoint),
            cameras=rollout_samples[0][0].cameras,
            frames=1,
            codec=name,
            dtype="bfloat16",
            rollouts=3,
        )
        fields = store_fields(hidden_states=False, codec=codec, rollouts=3)
        with CacheWriter(store, fields=fields, identity=identity) as writer:
            for sample, inputs, prefix, tails in rollout_samples:
                sample_id = sample.ref.sample_id
                values = prefix_arrays(inputs, prefix, hidden_states=False, codec=codec)
                values |= tail_arrays(tails, codec=codec)
                arrays = {key: v.numpy() if isinstance(v, torch.Tensor) else v for key, v in values.items()}
                assert writer.write(sample_id, sample_arrays(sample, inputs) | checked(sample_id, arrays))
        stores[name] = store
    return stores


@pytest.fixture(scope="session")
def released():
    """Workloads of the released expert on prefixes of four cameras in int8, with changes by keyword."""

    def make(**changes):
        values = {
            "parameters": 2_279_000_000,
            "trained": 2_279_000_000,
            "layers": 36,
            "hidden": 2048,
            "intermediate": 8256,
            "layout": PrefixLayout(layers=36, kv_heads=8, head_dim=128, codec=CODECS["int8"]),
            "longest": 3050,
            "batch_size": 8,
            "trainable": "all",
            "optimizer": "adamw8",
            "compiled": True,
            "validates": False,
        }
        return Workload(**values | changes)

    return make


class Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


@pytest.fixture
def record_launches(monkeypatch):
    """`(module, *names) -> launches`: kernels of these names are noted, all in one list, and not launched."""
    found = []

    def record(module, *names):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
        return found

    return record

"""`extract --vlm`: other weights of the VLM, the model's everything else, and nothing that confuses the two."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alpacache
from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.errors import CheckpointError, UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.exporting.config import ExportConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.training.config import TrainConfig
from cache_store import CacheReader, IdentityMismatchError

SAMPLE = "synthetic-0-000000@5100000#0"


def config(checkpoint, store, **changes):
    settings = {"source": "synthetic:2", "model": str(checkpoint), "store": str(store), "frames": 1, "device": "cpu"}
    return ExtractConfig(**settings | changes)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another Alpamayo checkpoint, of the same sizes."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("other") / "Other-R1", seed=5)


@pytest.fixture(scope="module")
def plain_layout(other, tmp_path_factory):
    """Its VLM alone, as transformers saves one."""
    directory = tmp_path_factory.mktemp("plain") / "Other-VLM"
    directory.mkdir()
    save_file(vlm_tensors(other), directory / "model.safetensors")
    return directory


def vlm_tensors(checkpoint):
    state = {name: tensor for shard in checkpoint.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return {name.removeprefix("vlm."): tensor for name, tensor in state.items() if name.startswith("vlm.")}


@pytest.fixture(scope="module")
def stores(tiny_checkpoint, other, plain_layout, tmp_path_factory):
    """`own`: the model's own VLM; `alpamayo`, `plain`: another one, in either layout; `other`: the other model."""
    root = tmp_path_factory.mktemp("vlm")
    settings = {"reasoning": "rollout", "rollouts": 1}
    alpacache.extract(config(tiny_checkpoint, root / "own", **settings))
    alpacache.extract(config(tiny_checkpoint, root / "alpamayo", vlm=str(other), **settings))
    alpacache.extract(config(tiny_checkpoint, root / "plain", vlm=str(plain_layout), **settings))
    alpacache.extract(config(other, root / "other", **settings))
    return root


@pytest.mark.ci
@pytest.mark.parametrize("layout", ["alpamayo", "plain"])
def test_features_are_the_other_vlms_and_prompts_the_models(layout, stores):
    own, found, other = (CacheReader(stores / name) for name in ("own", layout, "other"))
    for sample_id in found.sample_ids:
        stored, expected = found.read(sample_id), other.read(sample_id)
        assert all(np.array_equal(stored[name], expected[name]) for name in expected)  # its vocabulary head's texts too
        assert not np.array_equal(stored["kv"], own.read(sample_id, fields=["kv"])["kv"])
        assert np.array_equal(stored["input_ids"], own.read(sample_id, fields=["input_ids"])["input_ids"])


@pytest.mark.ci
def test_the_identity_names_it(stores, tiny_checkpoint, other, plain_layout):
    own, alpamayo, plain, whole = (
        CacheReader(stores / name).identity["model"] for name in ("own", "alpamayo", "plain", "other")
    )
    assert "vlm" not in own
    assert (alpamayo["vlm"], plain["vlm"]) == ("Other-R1", "Other-VLM")
    assert alpamayo["vlm_weights_sha256"] == plain["vlm_weights_sha256"] == whole["vlm_weights_sha256"]
    assert own["vlm_weights_sha256"] != plain["vlm_weights_sha256"]
    assert own | {"vlm": "Other-R1", "vlm_weights_sha256": whole["vlm_weights_sha256"]} == alpamayo
    settings = {"reasoning": "rollout", "rollouts": 1}
    with pytest.raises(IdentityMismatchError) as caught:
        alpacache.extract(config(tiny_checkpoint, stores / "own", vlm=str(other), **settings))
    assert 'identity.model.vlm: expected "Other-R1", found nothing' in str(caught.value)
    assert "identity.model.vlm_weights_sha256" in str(caught.value)
    with pytest.raises(IdentityMismatchError, match=r"identity\.model\.vlm: expected nothing"):
        alpacache.extract(config(tiny_checkpoint, stores / "plain", **settings))


@pytest.mark.ci
def test_stores_of_two_vlms_do_not_mix_and_an_expert_stays_with_its_own(stores, tiny_checkpoint, tmp_path):
    model = str(tiny_checkpoint)
    with pytest.raises(UsageError, match=r"cannot be mixed with(.|\n)*model\.vlm"):
        CachedDataset([stores / "own", stores / "plain"], Checkpoint(model))
    settings = {"model": model, "steps": 1, "batch_size": 2, "device": "cpu"}
    with pytest.raises(UsageError, match=r"another VLM than --val"):
        alpacache.train(
            TrainConfig(stores=(str(stores / "own"),), val=str(stores / "plain"), out=str(tmp_path / "val"), **settings)
        )
    run = tmp_path / "run"
    report = alpacache.train(
        TrainConfig(
            stores=(str(stores / "plain"),), val=str(stores / "plain"), on_overlap="allow", out=str(run), **settings
        )
    )
    assert report.steps == 1
    with pytest.raises(UsageError, match=r"another VLM than the stores that are given now"):
        alpacache.train(
            TrainConfig(
                stores=(str(stores / "own"),),
                val=str(stores / "own"),
                on_overlap="allow",
                out=str(run),
                resume=True,
                **settings,
            )
        )
    judge = {"model": model, "checkpoint": str(run), "paths": 1, "flow_steps": 1, "device": "cpu"}
    alpacache.evaluate(EvalConfig(store=str(stores / "plain"), out=str(tmp_path / "eval"), **judge))
    with pytest.raises(UsageError, match=r"another VLM than the store(.|\n)*Other-VLM"):
        alpacache.evaluate(EvalConfig(store=str(stores / "own"), out=str(tmp_path / "none"), **judge))
    whole = ExportConfig(model=model, checkpoint=str(run), out=str(tmp_path / "full"))
    with pytest.raises(UsageError, match=r"features of the VLM Other-VLM .* Pass --expert-only"):
        alpacache.export(whole)
    assert not (tmp_path / "full").exists()
    lean = ExportConfig(model=model, checkpoint=str(run), out=str(tmp_path / "lean"), expert_only=True)
    assert alpacache.export(lean).expert_only


def test_sizes_are_those_of_the_weights_that_are_read(tiny_checkpoint, plain_layout):
    with_other = geometry_of(Checkpoint(str(tiny_checkpoint), vlm=str(plain_layout)))
    assert with_other == geometry_of(Checkpoint(str(tiny_checkpoint)))


def test_weights_that_do_not_fit_are_named(tiny_checkpoint, plain_layout, tmp_path):
    state = load_file(plain_layout / "model.safetensors")
    state["model.language_model.embed_tokens.weight"] = state["model.language_model.embed_tokens.weight"][:-30].clone()
    del state["model.language_model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(str(tiny_checkpoint), vlm=str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        load_vlm(checkpoint, dtype=torch.bfloat16)
    assert f"{tmp_path} does not fit " in str(caught.value)
    assert "vlm/config.json (2 tensors)" in str(caught.value)
    assert "missing model.language_model.norm.weight" in str(caught.value)
    assert "misshapen model.language_model.embed_tokens.weight" in str(caught.value)


@pytest.mark.parametrize("what", ["absent", "empty", "no VLM"])
def test_a_place_without_a_vlm_is_refused_before_a_store_is_made(what, tiny_checkpoint, tmp_path):
    place = tmp_path / "vlm"
    if what != "absent":
        place.mkdir()
    if what == "no VLM":
        save_file({"other.norm.weight": torch.ones(2)}, place / "model.safetensors")
    message = {"absent": "neither a directory nor a hub id", "empty": "does not exist", "no VLM": "has no tensor"}[what]
    with pytest.raises(CheckpointError, match=message):
        alpacache.extract(config(tiny_checkpoint, tmp_path / "store", vlm=str(place)))
    assert not (tmp_path / "store").exists()

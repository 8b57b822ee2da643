"""Reading the public layout: what is touched, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alpacache.alpamayo import Checkpoint, load_expert, load_vlm
from alpacache.alpamayo.checkpoint import INDEX
from alpacache.errors import CheckpointError


def rewrite(directory, change):
    """Apply `change(state)` to a checkpoint's tensors and write them as one file without an index."""
    state = {}
    for shard in directory.glob("*.safetensors"):
        state |= load_file(shard)
        shard.unlink()
    change(state)
    save_file(state, directory / "model.safetensors")
    (directory / INDEX).unlink(missing_ok=True)


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def test_sharded_and_single_file_load_the_same(tiny_checkpoint, copy):
    rewrite(copy, lambda state: None)
    for load in (load_vlm, load_expert):
        sharded, single = load(str(tiny_checkpoint)), load(str(copy))
        first = (sharded.model if load is load_vlm else sharded).state_dict()
        second = (single.model if load is load_vlm else single).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_fingerprint_ignores_sharding_and_sees_one_changed_weight(tiny_checkpoint, copy):
    before = Checkpoint(str(tiny_checkpoint)).fingerprint("vlm.")
    rewrite(copy, lambda state: None)
    assert Checkpoint(str(copy)).fingerprint("vlm.") == before
    rewrite(copy, lambda state: state["vlm.model.language_model.embed_tokens.weight"][0].add_(1))
    assert Checkpoint(str(copy)).fingerprint("vlm.") != before


def test_expert_loads_without_the_vlms_tensors_and_vlm_without_the_experts(copy):
    state = {}
    for shard in copy.glob("*.safetensors"):
        state |= load_file(shard)
    for prefix, load in (("vlm.", load_expert), ("expert.", load_vlm)):
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        for shard in copy.glob("*.safetensors"):
            shard.unlink()
        (copy / INDEX).unlink(missing_ok=True)
        save_file(kept, copy / "model.safetensors")
        load(str(copy))


def test_every_problem_is_listed_at_once(copy):
    def break_it(state):
        del state["expert.layers.0.mlp.up_proj.weight"]
        state["expert.layers.9.extra.weight"] = torch.zeros(2)
        state["expert.norm.weight"] = torch.zeros(3)

    rewrite(copy, break_it)
    with pytest.raises(CheckpointError) as caught:
        load_expert(str(copy))
    message = str(caught.value)
    assert "missing expert.layers.0.mlp.up_proj.weight" in message
    assert "unexpected expert.layers.9.extra.weight" in message
    assert "misshapen expert.norm.weight: [3], expected [96]" in message
    assert "(3 tensors)" in message


def test_an_unknown_target_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["action_in_proj_cfg"]["_target_"] = "alpamayo_r2.models.SomethingElse"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'SomethingElse'; alpacache knows 'PerWaypointActionInProjV2'"):
        load_expert(str(copy))


def test_15_targets_are_matched_by_their_last_part(tiny_checkpoint_15):
    checkpoint = Checkpoint(str(tiny_checkpoint_15))
    assert checkpoint.config.family.name == "1.5"
    assert load_expert(checkpoint).dtype == torch.bfloat16


def test_another_backbone_is_named(copy):
    config = json.loads((copy / "vlm/config.json").read_text())
    (copy / "vlm/config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    with pytest.raises(CheckpointError, match="model_type is 'qwen2_5_vl'; alpacache knows 'qwen3_vl'"):
        load_vlm(str(copy))


def test_a_truncated_shard_is_named(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
        load_vlm(str(copy))


def test_an_index_cannot_point_outside(copy):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        load_expert(str(copy))


def test_offline_hub_id_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="hf download nvidia/Alpamayo-R1-10B"):
        load_expert("nvidia/Alpamayo-R1-10B")


def test_neither_directory_nor_hub_id():
    with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
        Checkpoint("./no/such/place")


def test_revision_of_a_hub_download_is_known(copy):
    note = copy / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    for first, expected in (("0123abcd" * 5, "0123abcd" * 5), ("0123abc", None), ("\0" * 100_000, None)):
        note.write_text(f"{first}\netag\n1.0\n")
        assert Checkpoint(str(copy)).revision == expected


def test_snapshots_in_a_path_means_nothing_by_itself(copy, tmp_path):
    commit = "0123abcd" * 5
    plain = shutil.copytree(copy, tmp_path / "snapshots/2026-11-01/Tiny-R1")
    cached = shutil.copytree(copy, tmp_path / f"models--owner--Tiny-R1/snapshots/{commit}")
    (tmp_path / "link").symlink_to(cached)
    assert (Checkpoint(str(plain)).revision, Checkpoint(str(plain)).full_name) == (None, "Tiny-R1")
    for model in (cached, tmp_path / "link"):
        assert (Checkpoint(str(model)).revision, Checkpoint(str(model)).full_name) == (commit, "owner/Tiny-R1")


@pytest.mark.parametrize(
    "path", ["Tiny-R1", "./a", "../a/b", "/a/b", "~/a", "~nobody-here/a", "a/b/c", "a b/c", "a\\b", ""]
)
def test_what_looks_like_a_path_is_no_hub_id(path):
    with pytest.raises(CheckpointError, match="is neither a directory nor a hub id"):
        Checkpoint(path)


def test_a_mistyped_path_below_a_directory_is_no_hub_id(copy, monkeypatch):
    monkeypatch.chdir(copy.parent.parent)
    mistyped = f"{copy.parent.name}/copi"
    with pytest.raises(
        CheckpointError, match=f"is a directory here, without copi; did you mean {copy.parent.name}/copy"
    ):
        Checkpoint(mistyped)
    assert Checkpoint("nvidia/Alpamayo-R1-10B").directory is None


def test_quantised_weights_are_refused(copy):
    rewrite(copy, lambda state: state.update({"expert.norm.weight": state["expert.norm.weight"].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"quantised expert\.norm\.weight: I8, expected BF16 or"):
        load_expert(str(copy))


def test_a_hub_repository_with_one_file_needs_no_index(monkeypatch, copy):
    from alpacache.alpamayo import checkpoint as module

    rewrite(copy, lambda state: None)

    def hub_file(repo, name, *, revision=None):
        assert repo in ("owner/model", "owner/vlm")
        if not (copy / name).is_file():
            raise module.MissingFileError(name)
        return copy / name

    monkeypatch.setattr(module, "hub_file", hub_file)
    checkpoint = Checkpoint("owner/model")
    assert checkpoint.model_id == "model"
    assert set(checkpoint.names.values()) == {"model.safetensors"}

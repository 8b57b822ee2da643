"""An export is whole, and each kind of damage to it is told by file and key."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

import alpacache
from alpacache.alpamayo.checkpoint import INDEX, SINGLE
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.errors import UsageError
from alpacache.exporting.check import check_export
from alpacache.exporting.config import ExportConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.training.config import TrainConfig

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
QUERIES = "expert.layers.0.self_attn.q_proj.weight"
PLACES = "vlm.model.visual.pos_embed.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A base, a run that trained its head, and the export of that."""
    root = tmp_path_factory.mktemp("check")
    model, store = str(make_tiny_checkpoint(root / "Tiny-R1")), str(root / "store")
    alpacache.extract(ExtractConfig(source="synthetic:2", model=model, store=store, frames=1, device="cpu"))
    few = {"steps": 1, "warmup": 0, "batch_size": 1, "trainable": "head", "device": "cpu"}
    alpacache.train(TrainConfig(stores=(store,), model=model, out=str(root / "run"), **few))
    for name, lean in (("full", False), ("lean", True)):
        settings = {"model": model, "checkpoint": str(root / "run"), "expert_only": lean}
        alpacache.export(ExportConfig(out=str(root / name), **settings))
    return root


@pytest.fixture
def out(root, tmp_path):
    """A copy of the export to damage."""
    return shutil.copytree(root / "full", tmp_path / "out")


def faults(out, root):
    """Faults as (file, key, what)."""
    report = check_export(str(out), base=str(root / "Tiny-R1"), run=str(root / "run"))
    assert report.ok == (not report.faults)
    assert all(fault.remedy.endswith(".") for fault in report.faults)
    return [(fault.file, fault.key, fault.what) for fault in report.faults]


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_shard(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def set_to(key, value):
    return lambda tensors: tensors[key].view(-1)[:1].fill_(value)


@pytest.mark.system
def test_an_export_is_whole(root):
    full = check_export(str(root / "full"), base=str(root / "Tiny-R1"), run=str(root / "run"))
    assert (full.faults, full.family, full.expert_only) == ((), "r1", False)
    trained = load_file(root / "run/last/model.safetensors")
    assert full.compared == full.tensors - len(trained)
    lean = check_export(str(root / "lean"), base=str(root / "Tiny-R1"))
    assert (lean.faults, lean.expert_only) == ((), True)


@pytest.mark.parametrize("family", ["r1", "1.5", "2"])
def test_checkpoints_of_all_families_are_whole(family, tiny_checkpoint, tiny_checkpoint_15, tiny_checkpoint_2):
    model = {"r1": tiny_checkpoint, "1.5": tiny_checkpoint_15, "2": tiny_checkpoint_2}[family]
    report = check_export(str(model))
    assert (report.faults, report.family, report.compared) == ((), family, 0)


def test_files_of_the_public_code_and_folders_of_links_are_whole(copied_checkpoint_2, renamed_15, tiny_checkpoint_15):
    assert check_export(str(copied_checkpoint_2)).faults == ()
    assert check_export(str(renamed_15), base=str(renamed_15)).faults == ()


def test_an_export_has_the_bases_files_and_loads_without_code_of_its_own(root):
    """For the classes that transformers finds by itself."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    base = {path.relative_to(root / "Tiny-R1") for path in (root / "Tiny-R1").rglob("*") if path.is_file()}
    found = {path.relative_to(root / "full") for path in (root / "full").rglob("*") if path.is_file()}
    assert {path.as_posix() for path in found ^ base} == {"README.md"}
    own = {"local_files_only": True}
    assert AutoConfig.from_pretrained(root / "full/vlm", **own).model_type == "qwen3_vl"
    assert AutoTokenizer.from_pretrained(root / "full/vlm", **own).chat_template
    with suppress(ImportError):  # transformers before 5.24 asks for torchvision
        assert AutoImageProcessor.from_pretrained(root / "full/vlm", **own).merge_size == 2


def test_a_library_that_the_machine_lacks_is_no_fault_of_the_files(root, monkeypatch):
    from transformers import AutoImageProcessor

    def lacks(*args, **kwargs):
        raise ImportError("AutoImageProcessor requires the Torchvision library")

    with suppress(ImportError):  # which an older transformers raises by itself
        monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lacks)
    assert check_export(str(root / "full")).faults == ()


def test_an_export_has_a_processor(root):
    pytest.importorskip("torchvision", reason="transformers makes Qwen3-VL's processor of films with it")
    from transformers import AutoProcessor

    own = {"local_files_only": True}
    assert type(AutoProcessor.from_pretrained(root / "full/vlm", **own)).__name__ == "Qwen3VLProcessor"


DAMAGE = {
    "a missing shard": (lambda out: (out / SECOND).unlink(), SECOND, "", "cannot be read"),
    "a cut shard": (lambda out: (out / FIRST).write_bytes((out / FIRST).read_bytes()[:-7]), FIRST, "", "truncated"),
    "a lost tensor": (
        lambda out: edit_shard(out / FIRST, lambda tensors: tensors.pop(QUERIES)),
        *(FIRST, QUERIES, "no shard holds them"),
    ),
    "a tensor too many": (
        lambda out: edit_shard(out / FIRST, lambda tensors: tensors.update(other=torch.zeros(2))),
        *(FIRST, "other", "the index does not name"),
    ),
    "a tensor in another shard": (
        lambda out: edit_json(out / INDEX, lambda index: index["weight_map"].update({QUERIES: SECOND})),
        *(SECOND, QUERIES, f"they are in {FIRST}"),
    ),
    "a name that the index lacks": (
        lambda out: edit_json(out / INDEX, lambda index: index["weight_map"].pop(QUERIES)),
        *(INDEX, QUERIES, "1 tensors are missing"),
    ),
    "a wrong shape": (
        lambda out: edit_shard(out / FIRST, lambda tensors: tensors.update({QUERIES: tensors[QUERIES][:-1].clone()})),
        *(FIRST, QUERIES, "is [127, 96]; config.json describes [128, 96]"),
    ),
    "a type that is no float": (
        lambda out: edit_shard(out / FIRST, lambda tensors: tensors.update({QUERIES: tensors[QUERIES].char()})),
        *(FIRST, QUERIES, "is I8; expected BF16"),
    ),
    "another type than the base's": (
        lambda out: edit_shard(out / FIRST, lambda tensors: tensors.update({QUERIES: tensors[QUERIES].float()})),
        *(FIRST, QUERIES, "not the base's"),
    ),
    "not a number": (lambda out: edit_shard(out / SECOND, set_to(PLACES, torch.nan)), SECOND, PLACES, "finite"),
    "an edited VLM": (lambda out: edit_shard(out / SECOND, set_to(PLACES, 3)), SECOND, PLACES, "not the base's"),
    "an untrained tensor": (lambda out: edit_shard(out / FIRST, set_to(QUERIES, 3)), FIRST, QUERIES, "not the base's"),
    "a stray single file": (
        lambda out: save_file({"x": torch.zeros(1)}, out / SINGLE),
        *(SINGLE, "", "loaders take it in place of the shards"),
    ),
    "an index that leads out": (
        lambda out: edit_json(out / INDEX, lambda index: index["weight_map"].update(x="../x.safetensors")),
        *(INDEX, "weight_map", "outside the checkpoint"),
    ),
    "no config": (lambda out: (out / "config.json").unlink(), "config.json", "", "cannot be read"),
    "a config that is no JSON": (lambda out: (out / "config.json").write_text("{"), "config.json", "", "not valid"),
    "another family": (
        lambda out: edit_json(out / "config.json", lambda config: config.update(model_type="qwen3_vl")),
        *("config.json", "model_type", "is 'qwen3_vl'"),
    ),
    "another class": (
        lambda out: edit_json(out / "config.json", lambda config: config.pop("architectures")),
        *("config.json", "architectures", "without AlpamayoR1"),
    ),
    "an inner block that is made first": (
        lambda out: edit_json(out / "config.json", lambda config: config["traj_tokenizer_cfg"].pop("_recursive_")),
        *("config.json", "traj_tokenizer_cfg._recursive_", "is not false"),
    ),
    "another expert": (
        lambda out: edit_json(out / "config.json", lambda config: config["expert_cfg"].update(intermediate_size=128)),
        *(FIRST, "expert.layers.0.mlp.down_proj.weight", "is [96, 192]; config.json describes [96, 128]"),
    ),
    "a VLM elsewhere": (
        lambda out: edit_json(out / "config.json", lambda config: config.update(vlm_name_or_path="/models/a")),
        *("config.json", "vlm_name_or_path", "neither a folder in the checkpoint nor a hub id"),
    ),
    "no tokenizer": (lambda out: (out / "vlm/tokenizer.json").unlink(), "vlm/tokenizer.json", "", "not there"),
    "no image processor": (
        lambda out: (out / "vlm/preprocessor_config.json").unlink(),
        *("vlm/preprocessor_config.json", "", "no processor"),
    ),
    "no chat template": (
        lambda out: (out / "vlm/chat_template.jinja").unlink(),
        *("vlm/chat_template.jinja", "", "no prompt can be made"),
    ),
    "no video processor": (
        lambda out: (out / "vlm/video_preprocessor_config.json").unlink(),
        *("vlm/video_preprocessor_config.json", "", "the base has it"),
    ),
    "code of its own": (
        lambda out: edit_json(out / "vlm/config.json", lambda config: config.update(auto_map={"AutoConfig": "a.B"})),
        *("vlm/config.json", "auto_map", "code that a loader would have to run"),
    ),
    "code within": (
        lambda out: edit_json(out / "vlm/preprocessor_config.json", lambda config: config.update(a=[{"auto_map": {}}])),
        *("vlm/preprocessor_config.json", "auto_map", "code that a loader would have to run"),
    ),
    "code of the model's": (
        lambda out: edit_json(out / "config.json", lambda config: config.update(auto_map={"AutoModel": "a.B"})),
        *("config.json", "auto_map", "code that a loader would have to run"),
    ),
    "a pickle": (lambda out: (out / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin", "", "a pickle"),
    "a pickle of another name": (lambda out: (out / "extra").write_bytes(b"\x80\x04."), "extra", "", "a pickle"),
    "a link that leads out": (
        lambda out: (out / "notes.txt").symlink_to("/etc/hostname"),
        *("notes.txt", "", "leads out of the checkpoint"),
    ),
}


@pytest.mark.ci
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_by_file_and_key(name, out, root):
    damage, file, key, what = DAMAGE[name]
    damage(out)
    found = faults(out, root)
    assert [fault for fault in found if fault[:2] == (file, key) and what in fault[2]], found


def test_files_that_no_loader_reads_are_no_faults(out, root, tmp_path):
    base = shutil.copytree(root / "Tiny-R1", tmp_path / "Tiny-R1")
    for name in ("cases.json", "notes.txt", "picture.png"):
        (base / name).write_text("{}")
    for model in (base, out):
        save_file({QUERIES: torch.zeros(1)}, model / "cases.safetensors")
    assert check_export(str(out), base=str(base), run=str(root / "run")).faults == ()


def test_a_link_does_not_hide_another(out, root):
    for name in ("one.txt", "two.txt"):
        (out / name).symlink_to("/etc/hostname")
    assert [fault[0] for fault in faults(out, root)] == ["one.txt", "two.txt"]


def test_a_link_to_a_shard_elsewhere_is_that_shard(out, root, tmp_path):
    (out / SECOND).unlink()
    (out / SECOND).symlink_to(root / "Tiny-R1" / SECOND)
    assert faults(out, root) == []


def test_what_is_missing_is_bad_usage(tmp_path, root):
    with pytest.raises(UsageError, match="nowhere is no directory"):
        check_export(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--model, --checkpoint missing"):
        ExportConfig(out="o")
    with pytest.raises(UsageError, match="say what is exported"):
        ExportConfig(out="o", check=True, expert_only=True)

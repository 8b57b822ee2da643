"""An exported checkpoint is the base with the run's tensors in it, byte for byte, or it is not there at all."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alpacache
from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.alpamayo.checkpoint import INDEX, SINGLE
from alpacache.alpamayo.foreign_files import read_header
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.errors import CheckpointError, DataError, UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.exporting import draft
from alpacache.exporting import export as exporting
from alpacache.exporting.check import check_export
from alpacache.exporting.config import ExportConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.training import trainable
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory

pytestmark = pytest.mark.system

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CARD = """---
license: other
license_name: some-licence
license_link: >-
  https://example.org/licence
tags:
- driving
---
# The base
"""


def extracted(root, model):
    alpacache.extract(
        ExtractConfig(source="synthetic:4", model=str(model), store=str(root / "store"), frames=1, device="cpu")
    )


def train(root, model, name, **changes):
    values = {"stores": (str(root / "store"),), "model": str(model), "out": str(root / name), "device": "cpu"}
    alpacache.train(TrainConfig(**values | {"steps": 3, "batch_size": 2, "lr": 1e-2, "warmup": 1} | changes))
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An R1 of two shards in float32, as the CPU trains, and runs of each kind."""
    root = tmp_path_factory.mktemp("export")
    model = make_tiny_checkpoint(root / "Tiny-R1", dtype="float32")
    (model / "README.md").write_text(CARD)
    extracted(root, model)
    for which in ("all", "head", "lora"):
        rank = {"lora_rank": 4} if which == "lora" else {}
        train(root, model, which, trainable=which, **rank, val=str(root / "store"), on_overlap="allow", val_every=2)
    return root


@pytest.fixture(scope="module")
def bf16(tiny_checkpoint, tmp_path_factory):
    """A run of the R1 whose tensors are bfloat16."""
    root = tmp_path_factory.mktemp("bf16")
    extracted(root, tiny_checkpoint)
    return train(root, tiny_checkpoint, "run", trainable="lora", lora_rank=4)


def export(model, run, out, **changes):
    return alpacache.export(ExportConfig(model=str(model), checkpoint=str(run), out=str(out), **changes))


def tensors(directory):
    """All tensors of a checkpoint, each of which must be there once."""
    found = {}
    for shard in directory.glob("*.safetensors"):
        state = load_file(shard)
        assert not found.keys() & state.keys()
        found |= state
    return found


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype for name, tensor in first.items()
    )


def merged(model, run):
    """The expert with the run applied, in memory, under the checkpoint's names; not the frequencies, float32 there."""
    expert = load_expert(str(model))
    trainable.apply_checkpoint(expert, load_file(run / "model.safetensors"))
    return {name: tensor for name, tensor in expert.state_dict().items() if not name.endswith(".freqs")}


def merged_names(checkpoint):
    """Names of the base's tensors that a run's checkpoint changes."""
    names = load_file(checkpoint / "model.safetensors").keys() - {trainable.LORA_SCALE}
    return {re.sub(r"\.lora_[AB]$", ".weight", name) for name in names}


def evaluated(root, model, out, **changes):
    values = {"store": str(root / "store"), "model": str(model), "out": str(out), "device": "cpu"}
    return alpacache.evaluate(EvalConfig(**values | {"paths": 2, "flow_steps": 3} | changes))


def left_beside(out):
    return sorted(path.name for path in out.parent.iterdir())


@pytest.mark.system
@pytest.mark.parametrize("which", ["all", "head", "lora"])
def test_trained_tensors_are_the_runs_and_all_others_the_bases(which, root, tmp_path):
    model, out = root / "Tiny-R1", tmp_path / "out"
    report = export(model, root / which, out)
    base, got, expected = tensors(model), tensors(out), merged(model, root / which / "best")
    assert got.keys() == base.keys()
    assert same({name: got[name] for name in expected}, expected)
    others = base.keys() - expected.keys()
    assert same({name: got[name] for name in others}, {name: base[name] for name in others})
    changed = {name for name in got if not torch.equal(got[name], base[name])}
    assert len(changed) == report.changed_tensors
    assert (report.tensors, report.trainable, report.expert_only) == (len(base), which, False)
    assert json.loads((out / INDEX).read_text())["weight_map"] == json.loads((model / INDEX).read_text())["weight_map"]
    assert trainable.LORA_SCALE not in got
    checked = check_export(str(out), base=str(model), run=str(root / which))
    assert (checked.faults, checked.compared) == ((), len(base) - len(merged_names(root / which / "best")))


def test_a_shard_of_the_vlm_is_the_bases_file_and_the_others_header_too(root, tmp_path):
    model, out = root / "Tiny-R1", tmp_path / "out"
    report = export(model, root / "all", out)
    assert (out / SECOND).samefile(model / SECOND)
    assert not (out / FIRST).samefile(model / FIRST)
    assert report.linked_files == 1
    with (out / FIRST).open("rb") as got, (model / FIRST).open("rb") as base:
        length = int.from_bytes(got.read(8), "little")
        assert base.read(8) == length.to_bytes(8, "little")
        assert got.read(length) == base.read(length)
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    expected = {path.relative_to(model) for path in model.rglob("*") if path.is_file()}
    assert {path.as_posix() for path in files - expected} == {"BASE_README.md"}
    for name in ("config.json", "vlm/config.json", "vlm/tokenizer.json", "vlm/preprocessor_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
        assert not (out / name).samefile(model / name)
    assert report.written_files == len(files) - 1
    assert report.written_bytes == sum((out / file).stat().st_size for file in files if file.name != SECOND)


def test_adapters_are_rounded_once_as_in_memory(bf16, tiny_checkpoint, tmp_path):
    export(tiny_checkpoint, bf16, tmp_path / "out")
    got, expected = tensors(tmp_path / "out"), merged(tiny_checkpoint, bf16 / "last")
    assert same({name: got[name] for name in expected}, expected)
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    base = tensors(tiny_checkpoint)
    name = "expert.layers.0.self_attn.q_proj"
    assert not torch.equal(got[f"{name}.weight"], base[f"{name}.weight"])
    run = load_file(bf16 / "last/model.safetensors")
    a, b = run[f"{name}.lora_A"], run[f"{name}.lora_B"]
    exact = base[f"{name}.weight"].float() + run[trainable.LORA_SCALE] * (b @ a)
    assert torch.equal(got[f"{name}.weight"], exact.to(torch.bfloat16))


def test_15_gets_no_constants(tiny_checkpoint_15, tmp_path):
    extracted(tmp_path, tiny_checkpoint_15)
    run = train(tmp_path, tiny_checkpoint_15, "run")
    for name, changes in (("full", {}), ("lean", {"expert_only": True})):
        export(tiny_checkpoint_15, run, tmp_path / name, **changes)
    base, full, lean = (tensors(place) for place in (tiny_checkpoint_15, tmp_path / "full", tmp_path / "lean"))
    assert full.keys() == base.keys()
    assert lean.keys() == {name for name in base if not name.startswith("vlm.")}
    assert not any("freqs" in name or name.startswith("action_space.") for name in full.keys() | lean.keys())
    assert same({name: full[name] for name in lean}, lean)
    for name in ("full", "lean"):
        checked = check_export(str(tmp_path / name), base=str(tiny_checkpoint_15), run=str(run))
        assert (checked.faults, checked.family, checked.expert_only) == ((), "1.5", name == "lean")
    assert same(
        {name: full[name] for name in merged(tiny_checkpoint_15, run / "last")},
        merged(tiny_checkpoint_15, run / "last"),
    )


def test_a_single_file_stays_a_single_file(tmp_path, root):
    model = shutil.copytree(root / "Tiny-R1", tmp_path / "single/Tiny-R1")
    state = tensors(model)
    for path in (model / FIRST, model / SECOND, model / INDEX):
        path.unlink()
    save_file(state, model / SINGLE, {"format": "pt", "kept": "yes"})
    export(model, root / "all", tmp_path / "out")
    expected = merged(model, root / "all/best")
    assert same(tensors(tmp_path / "out"), state | expected)
    with safe_open(tmp_path / "out" / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "kept": "yes"}
    assert set(Checkpoint(str(tmp_path / "out")).names.values()) == {SINGLE}


@pytest.mark.parametrize("single", [False, True])
def test_files_that_no_loader_reads_stand_in_no_exports_way(single, root, tmp_path):
    model = shutil.copytree(root / "Tiny-R1", tmp_path / "base/Tiny-R1")
    if single:
        save_file(tensors(model), model / SINGLE, {"format": "pt"})
        for path in (model / FIRST, model / SECOND, model / INDEX):
            path.unlink()
    (model / "old").mkdir()
    for name in ("cases", "old/model", *(() if single else ("model",))):
        save_file({"expert.norm.weight": torch.zeros(96)}, model / f"{name}.safetensors")
    for name in ("cases.json", "old/model.safetensors.index.json", "vlm/tokenizer.model", "NOTICE.txt"):
        (model / name).write_text("{}")
    export(model, root / "all", tmp_path / "full")
    export(model, root / "all", tmp_path / "lean", expert_only=True)
    for out, shards, copied in (
        (tmp_path / "full", {SINGLE} if single else {FIRST, SECOND}, {"cases.json"}),
        (tmp_path / "lean", {SINGLE}, set()),
    ):
        written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert {name for name in written if name.endswith(".safetensors")} == shards
        unread = {"cases.json", "old/model.safetensors.index.json", "vlm/tokenizer.model", "NOTICE.txt"}
        assert written & unread == {"vlm/tokenizer.model", "NOTICE.txt"} | copied
        assert Checkpoint(str(out)).names
    expected = merged(model, root / "all/best")
    assert same({name: tensors(tmp_path / "full")[name] for name in expected}, expected)


@pytest.mark.ci
@pytest.mark.parametrize("expert_only", [False, True])
@pytest.mark.parametrize("which", ["all", "lora"])
def test_it_is_judged_exactly_as_the_run(which, expert_only, root, tmp_path):
    """On the store of the base, under another name: its VLM is the base's."""
    model = root / "Tiny-R1"
    export(model, root / which, tmp_path / "out", expert_only=expert_only)
    run = evaluated(root, model, tmp_path / "a", checkpoint=str(root / which))
    alone = evaluated(root, tmp_path / "out", tmp_path / "b")
    for first, second in zip(run.results, alone.results, strict=True):
        assert second.models["base"].metrics == first.models["trained"].metrics
        assert np.array_equal(second.models["base"].pred_xyz, first.models["trained"].pred_xyz)
        assert second.models["base"].metrics != first.models["base"].metrics


def test_expert_only_holds_what_stage_two_loads_and_no_more(root, tmp_path):
    model, out = root / "Tiny-R1", tmp_path / "out"
    report = export(model, root / "all", out, expert_only=True)
    assert tensors(out).keys() == {name for name in tensors(model) if not name.startswith("vlm.")}
    assert [path.name for path in out.rglob("*.safetensors")] == [SINGLE]
    assert (report.linked_files, report.tensors) == (0, len(tensors(out)))
    assert "**The VLM is missing.**" in (out / "README.md").read_text()
    state, expected = load_expert(str(out)).state_dict(), merged(model, root / "all/best")
    assert same({name: state[name] for name in expected}, expected)
    with pytest.raises(CheckpointError, match="has no tensor of a VLM; pass a complete checkpoint"):
        extracted(tmp_path, out)
    assert not (tmp_path / "store").exists()
    again = export(out, train(tmp_path, out, "more", stores=(str(root / "store"),)), tmp_path / "again")
    assert again.expert_only
    assert "**The VLM is missing.**" in (tmp_path / "again/README.md").read_text()


@pytest.mark.system
def test_training_goes_on_from_an_export_whose_run_does_not_fit_the_base(root, tmp_path):
    model, first, second = root / "Tiny-R1", tmp_path / "first", tmp_path / "second"
    export(model, root / "all", first)
    run = train(tmp_path, first, "more", stores=(str(root / "store"),))
    with pytest.raises(UsageError, match=r": it is of first, not of Tiny-R1; expert_sha256, trained differ\. P"):
        export(model, run, second)
    disguised = tmp_path / "elsewhere/first"
    shutil.copytree(model, disguised)
    differs = r"base model than .*\n  expert_sha256: .*\n  trained: expected \{.*found nothing"
    with pytest.raises(UsageError, match=differs):
        export(disguised, run, second)
    export(first, run, second)
    assert same({name: tensors(second)[name] for name in merged(first, run / "last")}, merged(first, run / "last"))
    assert Checkpoint(str(second)).origin["vlm"]["id"] == "Tiny-R1"
    assert Checkpoint(str(second)).origin["base"]["id"] == "first"
    assert (second / "BASE_BASE_README.md").read_text() == CARD
    assert (second / "BASE_README.md").read_bytes() == (first / "README.md").read_bytes()
    extracted(tmp_path, second)
    evaluated(tmp_path, model, tmp_path / "e")


def test_a_run_means_its_best_and_a_checkpoint_itself(root, tmp_path):
    best = export(root / "Tiny-R1", root / "all", tmp_path / "best")
    assert best.checkpoint == str((root / "all/best").resolve())
    step = RunDirectory(root / "all").checkpoint(3)
    assert export(root / "Tiny-R1", step, tmp_path / "step").step == 3
    with pytest.raises(UsageError, match="neither a run directory"):
        export(root / "Tiny-R1", tmp_path, tmp_path / "none")


def test_the_card_names_base_data_steps_losses_and_licence(root, tmp_path):
    export(root / "Tiny-R1", root / "lora", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    front = card.split("---\n")[1]
    assert 'base_model: "Tiny-R1"\n' in front
    assert (
        "license: other\nlicense_name: some-licence\nlicense_link: >-\n  https://example.org/licence\ntags:\n" in front
    )
    rows = [json.loads(line) for line in (root / "lora/metrics.jsonl").read_text().splitlines()]
    step = json.loads((root / "lora/best/state.json").read_text())["step"]
    losses = [row["loss"] for row in rows if row["step"] <= step]
    for text in (
        f"| steps | {step} |",
        "| store `store` | 4 samples, KV as bf16, camera_front_wide_120fov |",
        f"| training loss | {sum(losses) / len(losses):.4f} ",
        f"| validation loss | {min(row['val_loss'] for row in rows if 'val_loss' in row):.4f} ",
        f"alpacache {alpacache.__version__}",
    ):
        assert text in card
    assert "non-commercial" not in card
    assert str(root) not in card
    assert (tmp_path / "out/BASE_README.md").read_text() == CARD


def test_a_licence_file_of_another_name_goes_along_and_is_linked(root, tmp_path):
    model = shutil.copytree(root / "Tiny-R1", tmp_path / "Tiny-R1")
    (model / "README.md").write_text("# Tiny\n\n## Licence\n\nFor research.\n")
    (model / "COPYING").write_text("Terms\n")
    export(model, root / "head", tmp_path / "out", expert_only=True)
    front = (tmp_path / "out/README.md").read_text().split("---\n")[1]
    assert 'license: other\nlicense_name: "For research."\nlicense_link: COPYING\ntags:\n' in front
    assert (tmp_path / "out/COPYING").read_text() == "Terms\n"


def test_another_base_is_refused(root, tiny_checkpoint_15, tmp_path):
    with pytest.raises(
        UsageError, match=r"base model than .*: it is of Tiny-R1, not of .*; expert_sha256, .* differ\. Pass"
    ):
        export(tiny_checkpoint_15, root / "all", tmp_path / "out")
    copy = shutil.copytree(root / "Tiny-R1", tmp_path / "weights")
    config = json.loads((copy / "config.json").read_text())
    space = config["action_space_cfg"] | {"accel_mean": 0.5}
    (copy / "config.json").write_text(json.dumps(config | {"action_space_cfg": space}))
    with pytest.raises(UsageError, match=r":\n  settings\.action_space\.accel_mean: expected .*, found 0\.5\nPass"):
        export(copy, root / "all", tmp_path / "out")
    assert left_beside(tmp_path / "out") == ["weights"]


def test_the_base_under_another_name_saved_again_is_the_base(root, tmp_path):
    copy = shutil.copytree(root / "Tiny-R1", tmp_path / "weights")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99.0"}))
    assert export(copy, root / "all", tmp_path / "out").base == "weights"


def test_an_existing_out_is_refused_and_an_empty_one_used(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export(root / "Tiny-R1", root / "head", out)
    before = sorted(out.rglob("*"))
    with pytest.raises(UsageError, match="exists and is not an empty directory"):
        export(root / "Tiny-R1", root / "lora", out)
    assert sorted(out.rglob("*")) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        export(root / "Tiny-R1", root / "head", tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not an empty directory"):
        export(root / "Tiny-R1", root / "head", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("expert_only", [False, True])
def test_the_same_export_again_finds_it_finished_unless_a_byte_is_another(expert_only, root, tmp_path):
    model, out = root / "Tiny-R1", tmp_path / "out"
    first = export(model, root / "all", out, expert_only=expert_only)
    assert not first.existed
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = export(model, root / "all", out, expert_only=expert_only)
    assert (again.existed, again.written_files, again.linked_files, again.step) == (True, 0, 0, first.step)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    with pytest.raises(UsageError, match="exists and is not an empty directory"):
        export(model, root / "all", out, expert_only=not expert_only)
    shard = out / (SINGLE if expert_only else FIRST)
    info = read_header(shard)["expert.norm.weight"]
    data = bytearray(shard.read_bytes())
    data[info.offset] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UsageError, match="does not hold just this export"):
        export(model, root / "all", out, expert_only=expert_only)


def test_an_average_is_recorded_where_it_was_taken(root, tmp_path):
    model = root / "Tiny-R1"
    run = train(tmp_path, model, "run", stores=(str(root / "store"),), ema=0.5, ema_every=2)
    plain, taken = (export(model, run, tmp_path / str(ema), ema=ema) for ema in (False, True))
    assert (plain.average, plain.had_average) == (None, True)
    assert (taken.average, taken.had_average) == (0.5, True)
    cards = [(tmp_path / name / "README.md").read_text() for name in ("False", "True")]
    assert "| weights | of the last of these steps |" in cards[0]
    assert "| weights | moving average over the steps, decay 0.5 |" in cards[1]
    notes = [Checkpoint(str(tmp_path / name)).origin["trained"] for name in ("False", "True")]
    assert "average" not in notes[0]
    assert notes[1] == notes[0] | {"average": {"decay": 0.5, "crc32c": notes[1]["average"]["crc32c"]}}


def test_files_have_the_modes_that_the_umask_leaves(root, tmp_path):
    before = os.umask(0o027)
    try:
        export(root / "Tiny-R1", root / "head", tmp_path / "out", expert_only=True)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"0o640"}


def test_a_base_that_holds_a_tensor_twice_is_refused(root, tmp_path):
    model = shutil.copytree(root / "Tiny-R1", tmp_path / "base/Tiny-R1")
    name = "expert.norm.weight"
    shard = model / {FIRST: SECOND, SECOND: FIRST}[Checkpoint(str(model)).names[name]]
    save_file(load_file(shard) | {name: torch.zeros(96)}, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"index\.json names do not hold just once .*: expert\.norm\.weight\. F"):
        export(model, root / "head", tmp_path / "out")
    assert left_beside(tmp_path / "out") == ["base"]


def test_a_damaged_run_is_refused(root, tmp_path):
    run = shutil.copytree(root / "head/best", tmp_path / "step")
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "model.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        export(root / "Tiny-R1", run, tmp_path / "out")
    assert left_beside(tmp_path / "out") == ["step"]


def test_without_hard_links_everything_is_copied(root, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    report = export(root / "Tiny-R1", root / "all", tmp_path / "out")
    assert report.linked_files == 0
    assert (tmp_path / "out" / SECOND).read_bytes() == (root / "Tiny-R1" / SECOND).read_bytes()
    assert not (tmp_path / "out" / SECOND).samefile(root / "Tiny-R1" / SECOND)
    assert report.written_bytes == sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())


def test_too_little_space_is_said_beforehand(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    size = (root / "Tiny-R1" / FIRST).stat().st_size
    with pytest.raises(DataError, match=r"needs \d+ bytes, 5 are free; nothing was written") as caught:
        export(root / "Tiny-R1", root / "all", tmp_path / "out")
    assert size < int(str(caught.value).split("needs ")[1].split()[0]) < size + 100_000
    assert left_beside(tmp_path / "out") == []


@pytest.mark.parametrize("expert_only", [False, True])
def test_a_disk_that_fills_up_leaves_nothing(expert_only, root, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(draft, "save_file" if expert_only else "merge", full)
    with pytest.raises(DataError, match=r"No space left on device\); it needs \d+ bytes there\. .* free space"):
        export(root / "Tiny-R1", root / "all", tmp_path / "out", expert_only=expert_only)
    assert left_beside(tmp_path / "out") == []


def test_ctrl_c_leaves_nothing(root, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(draft, "merge", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(root / "Tiny-R1", root / "all", tmp_path / "out")
    assert left_beside(tmp_path / "out") == []


@pytest.mark.system
def test_kill_9_leaves_nothing_under_the_name_and_the_next_export_tidies_up(root, tmp_path):
    out = tmp_path / "out"
    code = f"""
import os, signal, alpacache
from alpacache import ExportConfig
from alpacache.exporting.draft import Draft
Draft.check = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
alpacache.export(ExportConfig(model={str(root / "Tiny-R1")!r}, checkpoint={str(root / "all")!r}, out={str(out)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert left_beside(out) == [".out.writing"]
    export(root / "Tiny-R1", root / "all", out)
    assert left_beside(out) == ["out"]
    assert same(tensors(out), tensors(root / "Tiny-R1") | merged(root / "Tiny-R1", root / "all/best"))


def test_what_reads_back_wrong_is_not_published(root, tmp_path, monkeypatch):
    index = exporting._index
    monkeypatch.setattr(exporting, "_index", lambda *a, **k: index(*a, **k).replace('"expert.norm', '"expert.morn'))
    with pytest.raises(DataError, match=r"does not read as the base \(.*expert\.morn"):
        export(root / "Tiny-R1", root / "all", tmp_path / "out")
    assert left_beside(tmp_path / "out") == []


@pytest.fixture
def hub_cache(root, tmp_path, monkeypatch):
    """The R1 as a hub download: a snapshot of links to blobs, offline."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--Tiny-R1"
    snapshot = repository / "snapshots" / ("0a" * 20)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    for number, file in enumerate(sorted(path for path in (root / "Tiny-R1").rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:040d}"
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(root / "Tiny-R1")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return snapshot


@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("expert_only", [False, True])
def test_a_snapshot_of_the_hubs_cache(by_id, expert_only, hub_cache, root, tmp_path):
    out = tmp_path / "out"
    report = export("owner/Tiny-R1" if by_id else hub_cache, root / "all", out, expert_only=expert_only)
    assert (report.base, report.base_revision) == ("owner/Tiny-R1", hub_cache.name)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    if not expert_only:
        assert (out / SECOND).samefile((hub_cache / SECOND).resolve())
    expected = merged(root / "Tiny-R1", root / "all/best")
    assert same({name: tensors(out)[name] for name in expected}, expected)
    assert (out / "vlm/tokenizer.json").read_bytes() == (root / "Tiny-R1/vlm/tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert 'base_model: "owner/Tiny-R1"' in card
    assert f"revision `{hub_cache.name}`" in card


def test_a_snapshot_that_lacks_a_shard_says_what_to_fetch(hub_cache, root, tmp_path):
    (hub_cache / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND} of owner/Tiny-R1 is not in the local hub cache.*hf download"):
        export("owner/Tiny-R1", root / "all", tmp_path / "out")
    export("owner/Tiny-R1", root / "all", tmp_path / "out", expert_only=True)


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_that_leads_out_is_refused(folder, root, tmp_path):
    model = shutil.copytree(root / "Tiny-R1", tmp_path / "base/Tiny-R1")
    (tmp_path / "private").mkdir()
    (tmp_path / "private/notes.txt").write_text("mine")
    (model / "notes.txt").symlink_to(tmp_path / "private" / ("" if folder else "notes.txt"))
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link or special file .*expected a file inside"):
        export(model, root / "all", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def linked(model, out, *names):
    """A folder of links to a checkpoint's files, its VLM's folder among them, as `ln -s` makes."""
    out.mkdir()
    for name in names or [file.name for file in model.iterdir()]:
        (out / name).symlink_to(model / name)
    return out


@pytest.mark.parametrize("expert_only", [False, True])
def test_a_folder_of_links_exports_as_what_it_links_to(expert_only, root, tmp_path):
    model = linked(root / "Tiny-R1", tmp_path / "linked")
    export(model, root / "all", tmp_path / "out", expert_only=expert_only)
    export(root / "Tiny-R1", root / "all", tmp_path / "plain", expert_only=expert_only)
    files = [sorted(p.relative_to(out) for p in out.rglob("*")) for out in (tmp_path / "out", tmp_path / "plain")]
    assert files[0] == files[1]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "plain"))


def test_a_folder_of_links_into_the_hubs_cache_exports(hub_cache, root, tmp_path):
    model = linked(hub_cache, tmp_path / "linked")
    export(model, root / "all", tmp_path / "out")
    expected = merged(root / "Tiny-R1", root / "all/best")
    assert same({name: tensors(tmp_path / "out")[name] for name in expected}, expected)


def test_links_to_weights_and_index_as_the_public_conversion_leaves_them(root, tmp_path):
    model = linked(root / "Tiny-R1", tmp_path / "converted", FIRST, SECOND, INDEX)
    shutil.copytree(root / "Tiny-R1/vlm", model / "vlm")
    shutil.copy(root / "Tiny-R1/config.json", model)
    export(model, root / "all", tmp_path / "out")
    assert (tmp_path / "out" / SECOND).samefile(root / "Tiny-R1" / SECOND)
    assert not (tmp_path / "out" / SECOND).is_symlink()


@pytest.mark.parametrize("place", ["notes.txt", "vlm"])
def test_what_could_not_be_exported_is_refused_before_training(place, root, tmp_path):
    """A linked shard opens its folder to files of the same name alone."""
    model = linked(root / "Tiny-R1", tmp_path / "linked", FIRST, SECOND, INDEX, "config.json")
    (tmp_path / "private/vlm").mkdir(parents=True)
    for file in (root / "Tiny-R1/vlm").iterdir():
        shutil.copy(file, tmp_path / "private/vlm")
    (model / "vlm").symlink_to((tmp_path / "private" if place == "vlm" else root / "Tiny-R1") / "vlm")
    if place == "notes.txt":
        (root / "mine.txt").write_text("mine")
        (model / place).symlink_to(root / "mine.txt")
    with pytest.raises(CheckpointError, match=rf"{place} is a link or special file"):
        train(root, model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_download_tools_left_is_not_copied(root, tmp_path):
    model = shutil.copytree(root / "Tiny-R1", tmp_path / "base/Tiny-R1")
    note = model / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("0123abcd" * 5 + "\netag\n1.0\n")
    report = export(model, root / "all", tmp_path / "out")
    assert report.base_revision == "0123abcd" * 5
    assert not (tmp_path / "out/.cache").exists()
    assert Checkpoint(str(tmp_path / "out")).revision is None


def test_headers_name_what_is_there(root, tmp_path):
    """Every tensor once, with the base's dtype and shape, in the shard that the index says."""
    export(root / "Tiny-R1", root / "lora", tmp_path / "out")
    written, base = Checkpoint(str(tmp_path / "out")), Checkpoint(str(root / "Tiny-R1"))
    assert written.infos(written.names) == base.infos(base.names)
    assert sum(len(read_header(tmp_path / "out" / shard)) for shard in (FIRST, SECOND)) == len(base.names)


@pytest.mark.parametrize("out", ["s3://bucket/x", "https://user:word@host/b"])
def test_an_address_is_no_place_for_an_export(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is no path") as refused:
        export("model", "run", out)
    assert "word" not in str(refused.value)
    assert not list(tmp_path.iterdir())

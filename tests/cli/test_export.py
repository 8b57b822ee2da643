"""`export --check` on the command line; the checks' own tests damage a checkpoint in each way."""

import json
import os
import shutil

import pytest

from alpacache.alpamayo.checkpoint import INDEX
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture
def model(tmp_path):
    return make_tiny_checkpoint(tmp_path / "Tiny-R1")


def test_a_whole_checkpoint(model, run_here):
    said = run_here("export", "--out", model, "--check")
    assert "not compared; name it with --model" in said.stdout
    report = json.loads(run_here("export", "--model", model, "--out", model, "--check", "--json").stdout)
    assert (report["ok"], report["faults"], report["family"]) == (True, [], "r1")
    assert 0 < report["compared"] < report["tensors"]


def test_faults_are_named_and_end_with_1(model, run_here):
    (model / "vlm/tokenizer.json").unlink()
    (model / INDEX).write_text("{}")
    report = json.loads(run_here("export", "--out", model, "--check", "--json", code=1).stdout)
    assert {fault["file"] for fault in report["faults"]} == {INDEX, "vlm/tokenizer.json"}
    said = run_here("export", "--out", model, "--check", code=1)
    assert "what a loader would refuse" in said.stdout
    assert "Copy it from the base model." in " ".join(said.stdout.split())


def test_without_a_run_nothing_is_exported(tmp_path, run_here):
    missing = run_here("export", "--out", tmp_path / "out", code=2)
    assert "--model, --checkpoint missing; give it as an option" in missing.stderr
    assert "is no directory" in run_here("export", "--out", tmp_path / "out", "--check", code=2).stderr


@pytest.mark.system
@pytest.mark.parametrize("by_id", [True, False], ids=["by its id", "by the snapshot's folder"])
def test_a_download_of_links_to_blobs_goes_all_the_way(by_id, model, tmp_path, run_here, monkeypatch):
    """As the hub's cache has it: extract, train, eval and export read through the links, and none comes out."""
    repository = tmp_path / "hub/models--owner--Tiny-R1"
    snapshot = repository / "snapshots" / ("0a" * 20)
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text(snapshot.name)
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob, link = repository / f"blobs/{number:040d}", snapshot / file.relative_to(model)
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name, store, run, out = (
        "owner/Tiny-R1" if by_id else snapshot,
        tmp_path / "store",
        tmp_path / "run",
        tmp_path / "out",
    )
    run_here("extract", "synthetic:2", "--model", name, "--store", store, "--frames", 1, "--device", "cpu")
    steps = ("--steps", 1, "--batch-size", 2, "--track", "none", "--device", "cpu")
    run_here("train", "--store", store, "--model", name, "--out", run, *steps)
    few = ("--paths", 1, "--flow-steps", 1, "--device", "cpu")
    run_here("eval", "--store", store, "--model", name, "--checkpoint", run, "--out", tmp_path / "eval", *few)
    report = json.loads(
        run_here("export", "--model", name, "--checkpoint", run, "--out", out, "--check", "--json").stdout
    )
    assert report["check"]["ok"], report["check"]["faults"]
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert (out / "vlm/tokenizer.json").read_bytes() == (model / "vlm/tokenizer.json").read_bytes()

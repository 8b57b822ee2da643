"""`export --check` on the command line; the checks' own tests damage a checkpoint in each way."""

import json

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

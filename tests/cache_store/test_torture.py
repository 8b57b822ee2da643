"""The short version of benchmarks/torture_store.py."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "torture_store.py"


def run(kills: int, flips: int) -> str:
    command = [sys.executable, str(SCRIPT), "--kills", str(kills), "--flips", str(flips), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout.splitlines()[-1]


@pytest.mark.ci
def test_kills_power_cuts_full_disks_and_damage() -> None:
    last = run(kills=20, flips=150)
    assert last.endswith(": 0 lost, 0 torn, 0 wrong")
    tried = {words.split(" ", 1)[1]: int(words.split(" ", 1)[0]) for words in last.partition(":")[0].split(", ")}
    assert tried["kills"] >= 20
    assert (tried["flips"], tried["flips noticed"] > 75) == (150, True)
    assert min(tried["power cuts"], tried["full disks"], tried["cut or deleted files"]) > 30
    assert min(tried["kills of a copy"], tried["wrong answers"]) > 10
    assert tried["kills of a repair"] > 3


@pytest.mark.slow
def test_the_same_at_length() -> None:
    assert run(kills=300, flips=3000).endswith(": 0 lost, 0 torn, 0 wrong")


def test_the_counters_count(tmp_path, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("torture_store", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    torture = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "torture_store", torture)
    spec.loader.exec_module(torture)
    torture.make_store(tmp_path / "s")
    counts = torture.Counts()
    torture.check_store(tmp_path / "s", {"s0", "gone"}, counts)
    assert (counts.lost, counts.torn, counts.wrong) == (1, 0, 0)
    values = torture.values_of
    monkeypatch.setattr(torture, "values_of", lambda sample_id, writer: values(sample_id, writer + 1))
    torture.check_store(tmp_path / "s", set(), counts)
    assert counts.wrong == 4
    next((tmp_path / "s" / "samples").glob("s1*/kv/c.*")).unlink()
    torture.check_store(tmp_path / "s", set(), counts)
    assert counts.torn == 1

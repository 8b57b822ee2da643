"""The short version of benchmarks/torture_runs.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="traces system calls of Linux")


@pytest.mark.slow
def test_kills_at_system_calls_and_flipped_bits_of_a_run(tmp_path) -> None:
    command = [sys.executable, str(BENCHMARKS / "torture_runs.py"), "--kills", "2", "--flips", "1", "--seed", "1"]
    done = subprocess.run([*command, "--json", str(tmp_path / "report.json")], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.splitlines()[-1].endswith("tried: 0 lost, 0 silent, 0 left over")
    rows = {row["disaster"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    killed = [row for row in rows.values() if row["calls"]]
    assert [row["tried"] for row in killed] == [2] * 8
    assert min(row["calls"] for row in killed) > 20
    assert "refused" in rows["flip in checkpoints/step-0000002/state.json"]["outcome"]


@pytest.fixture
def torture(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import torture_runs

    yield torture_runs
    for name in ("torture_runs", "kill_at_call", "benchmark_report"):
        sys.modules.pop(name, None)


def test_a_process_is_killed_before_the_call_that_is_asked_for(torture, tmp_path) -> None:
    def body() -> None:
        (tmp_path / "read").exists()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("words")

    run = torture.kill_at_call.run
    assert run(body, kill_at=1) == (1, None)
    assert not (tmp_path / "folder").exists()
    assert run(body, kill_at=3) == (3, None)
    assert (tmp_path / "folder" / "file").read_text() == ""
    assert run(lambda: (tmp_path / "folder" / "other").write_text("words")) == (2, 0)
    assert run(lambda: sys.exit(3)) == (0, 3)


def test_the_counters_count(torture, tmp_path) -> None:
    row, out = torture.Row("some"), tmp_path / "eval"
    out.mkdir()
    old, new = {"eval.json": "a", "report.html": "b"}, {"eval.json": "c", "report.html": "d"}

    def seen(**files: str) -> tuple[int, int, int]:
        tree = {f"{name}.{'json' if name == 'eval' else 'html'}": value for name, value in files.items()}
        torture.check_evaluation(tmp_path, row, old=old, new=new, got=tree)
        return row.lost, row.silent, row.left

    assert seen(eval="a", report="b") == seen(eval="c", report="d") == seen() == (0, 0, 0)
    assert seen(eval="a", report="d") == (0, 1, 0)
    assert seen(eval="a") == (0, 2, 0)
    expected = {"train": {"model.safetensors": "x"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"other")
    file = Path("run/state.json")
    for status, said, silent in (
        (0, "", 3),
        (2, "state.json is damaged", 3),
        (2, "it failed", 4),
        (99, "Traceback", 5),
    ):
        torture.judge_flip(row, file, "flip", status, said, tmp_path, "train", expected)
        assert row.silent == silent
    assert row.notes["refused"] == 2
    assert not row.ok

"""The variables of torchrun are read in one place, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from alpacache.errors import UsageError
from alpacache.torchrun import LaunchedProcess, lone_task, this_process

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def test_a_process_knows_its_place(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert this_process() == LaunchedProcess(rank=0, world_size=1, local_rank=0, local_world_size=1)
    for name, value in zip(NAMES, ("9", "16", "1", "8"), strict=True):
        monkeypatch.setenv(name, value)
    assert this_process() == LaunchedProcess(rank=9, world_size=16, local_rank=1, local_world_size=8)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "a", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"},
    ],
)
def test_half_of_a_launch_is_refused(monkeypatch, variables):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="no process of a launch") as error:
        this_process()
    assert all(f"{name} is {value!r}" in str(error.value) for name, value in variables.items())


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, ("srun", "SLURM_PROCID")),
        ({"SLURM_PROCID": "1"}, ("srun", "SLURM_PROCID")),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "RANK": "9"}, None),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, ("mpirun", "OMPI_COMM_WORLD_RANK")),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
    ],
)
def test_a_task_of_another_launcher_is_told_apart(monkeypatch, variables, found):
    for name in ("WORLD_SIZE", "RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert lone_task() == found


def test_nothing_else_reads_them():
    for package in ("alpacache", "cli", "cache_store"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            quoted = {name for name in NAMES if f'"{name}"' in text or f"'{name}'" in text}
            assert not quoted or path.name == "torchrun.py", path


def test_it_needs_no_torch():
    code = "import sys, alpacache.torchrun; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "alpacache.torchrun" in done.stdout.split()
    assert "torch" not in done.stdout.split()

"""Place of this process among those that torchrun has started, or another launcher without it.

The only place that reads launchers' variables. It imports no torch, so that the command line can ask it.
"""

import os
from dataclasses import dataclass

from alpacache.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedProcess:
    """One of torchrun's processes, or the only one."""

    rank: int
    world_size: int
    """Number of processes, on all machines."""
    local_rank: int
    """Rank among the processes of this machine."""
    local_world_size: int


def this_process() -> LaunchedProcess:
    """This process as torchrun started it; without torchrun the only one. Raises `UsageError` for half of a launch."""
    given = {name: os.environ.get(name, str(alone)) for name, alone in _ALONE.items()}
    rank, size, local_rank, local_size = (int(text) if text.isdecimal() else -1 for text in given.values())
    is_whole = ("RANK" in os.environ) == ("WORLD_SIZE" in os.environ)
    if not (is_whole and 0 <= rank < size and local_rank >= 0 and local_size > 0):
        told = ", ".join(f"{name} is {os.environ[name][:40]!r}" for name in _ALONE if name in os.environ)
        raise UsageError(
            f"{told}, which is no process of a launch: torchrun sets {', '.join(_ALONE)} together. Start it with "
            "torchrun, or unset them to run alone."
        )
    return LaunchedProcess(rank=rank, world_size=size, local_rank=local_rank, local_world_size=local_size)


_ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
"""torchrun's variables, and what they would be of a process alone."""
_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE"),
}
"""Variables with a task's number and the number of tasks, for each launcher."""


def lone_task() -> tuple[str, str] | None:
    """Launcher and variable of a task that is one of several, but not of torchrun's: they know nothing of each other.

    A batch script has a SLURM_PROCID, too, but is no step of several tasks.
    """
    if "WORLD_SIZE" in os.environ:
        return None
    for launcher, (number, count) in _LAUNCHERS.items():
        mine, tasks = os.environ.get(number, ""), os.environ.get(count, "")
        if mine.isdigit() and (int(mine) > 0 or (tasks.isdigit() and int(tasks) > 1)):
            return launcher, number
    return None

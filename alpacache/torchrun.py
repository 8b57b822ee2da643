"""Where this process stands among those that torchrun has started.

The only place that reads torchrun's variables. It imports no torch, so that the command line can ask it.
"""

import os
from dataclasses import dataclass


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
    """This process as torchrun started it; without torchrun the only one."""
    return LaunchedProcess(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )

"""Names of what a run writes, and what under one of them cannot be it.

That is found before the first step: hours may pass until the file is written.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from alpacache.durable import RUN
from alpacache.regular_file import read_regular, regular_size

CONFIG, METRICS, MEMORY, WANDB_ID = "config.toml", "metrics.jsonl", "memory.json", "wandb-id"
CHOICE = "choice"
"""Key of the choice of samples in a run's settings; runs of all samples have none."""
SAMPLES = "samples.csv"
"""The chosen samples and their weights, of a run that does not take all."""
CHECKPOINTS = "checkpoints"
WRITING, DROPPED = ".writing-", ".dropped-"
"""Prefixes of a checkpoint's name while it is being written, and once it is being deleted."""
_FILES = (RUN, CONFIG, METRICS, MEMORY, WANDB_ID, SAMPLES)


def step_of(name: str) -> int | None:
    """Step of a checkpoint by its directory's name, `step-0000200`; None if it is not exactly of this form."""
    number = name.removeprefix("step-")
    step = int(number) if number.isascii() and number.isdigit() else None
    return step if step is not None and name == name_of(step) else None


def name_of(step: int) -> str:
    """Name of a checkpoint's directory."""
    return f"step-{step:07d}"


def leftovers(checkpoints: Path) -> Iterator[Path]:
    """Unfinished and half-deleted checkpoints that a kill left behind."""
    for prefix, like in ((WRITING, "step-"), (DROPPED, "")):
        for path in checkpoints.glob(f"{prefix}*"):
            if step_of(like + path.name.removeprefix(prefix)) is not None:
                yield path


def misfits(run: Path) -> Iterator[tuple[Path, str]]:
    """Paths that have the name of a file of the run but cannot be one, each with the reason."""
    drafts = [f".{name}.new" for name in _FILES]
    for path in map(run.joinpath, (*_FILES, *drafts)):
        try:
            with suppress(FileNotFoundError):
                regular_size(path)
        except OSError as error:
            yield path, str(error)
        if path.name in (METRICS, WANDB_ID, *drafts) and path.is_symlink():  # written in place
            yield path, "it is a link, and what it leads to would be written over; expected a regular file"
    checkpoints, tensorboard = run / CHECKPOINTS, run / "tensorboard"
    folders = [checkpoints, tensorboard, run / "wandb"]
    if checkpoints.is_dir():
        folders += [path for path in checkpoints.iterdir() if step_of(path.name) is not None]
        folders += leftovers(checkpoints)
    for path in folders:
        if path.is_symlink() and (path.name.startswith(".") or not path.is_dir()):
            yield path, f"it is a link{'' if path.is_dir() else ' that leads to none'}; expected a directory"
        elif path.exists() and not path.is_dir():
            yield path, "it is a file; expected a directory"
    for path in (run, checkpoints, tensorboard, run / METRICS):
        if path.exists() and not os.access(path, os.W_OK):
            yield path, "this user may not write to it"


def is_written_link(file: Path) -> bool:
    """Tell whether a file is what some archives and disks make of a link to a checkpoint: where it leads to."""
    with suppress(OSError, ValueError):
        folder, _, name = read_regular(file, limit_bytes=100).decode().strip().rpartition("/")
        return folder == CHECKPOINTS and step_of(name) is not None
    return False

"""The directory of one training run: its config, its metrics, its checkpoints.

A checkpoint is written beside the others under a temporary name, flushed to the medium and only then renamed, so a kill
or a full disk never costs an earlier one. Which is the last and which the best stands in `run.json`, which moves on
before the checkpoint that it named is dropped, and which also tells a run from any other directory; the links `last`
and `best` are for people, and a copy or a file system may lack them. Tensors are safetensors, all else is JSON or TOML;
nothing is pickled.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alpacache.alpamayo.checkpoint import listed
from alpacache.directory_lock import DirectoryLock
from alpacache.durable import RUN, check_out, has_marks, names_in
from alpacache.errors import DataError, UsageError
from alpacache.finite import not_finite
from alpacache.gpu.host_copies import copied_to_host
from alpacache.regular_file import lfs_pointer
from alpacache.training.ema import up_to_date
from alpacache.training.metrics_file import MetricsFile
from alpacache.training.run_names import (
    CHECKPOINTS,
    CONFIG,
    DROPPED,
    METRICS,
    WANDB_ID,
    WRITING,
    is_written_link,
    leftovers,
    misfits,
    name_of,
    step_of,
)
from alpacache.training.run_state import (
    STATE,
    STATE_FORMAT,
    check_step,
    is_complete,
    read_marks,
    read_state,
    sealed,
    size_and_checksum,
    write_marks,
)
from cache_store.storage.local_files import FULL, flush, write_flushed

_log = logging.getLogger(__name__)
MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
_HEADER = "# All settings of the run in this directory, written by alpacache. `train --config` reads them.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCheckpoint:
    """The content of a checkpoint, in memory."""

    model: dict[str, Tensor]
    """Trained tensors under the public state-dict names."""
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    """Step, base model, settings."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the trained tensors, float32, as last updated; empty where the run keeps none."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for part in (self.model, self.optimizer, self.average) for tensor in part.values())

    def on_host(self) -> "RunCheckpoint":
        """A copy that training no longer changes."""
        model, optimizer, average = map(copied_to_host, (self.model, self.optimizer, self.average))
        return replace(self, model=model, optimizer=optimizer, average=average)


class RunDirectory:
    """A run's files. Creating the object creates nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics = MetricsFile(self.path / METRICS)
        self._lock: DirectoryLock | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        steps = (step_of(path.name) for path in self.checkpoints.glob("step-*") if is_complete(path))
        return sorted(step for step in steps if step is not None)

    @property
    def is_run(self) -> bool:
        """Tell whether a run is or was here, with a checkpoint or not."""
        return has_marks(self.path) or bool(self.steps)

    def check_usable(self) -> None:
        """Refuse a place that holds anything but a run: nothing of it may be written over.

        Raises `UsageError`, or `DataError` where the checkpoints of a run are gone, or one is named after another step.
        """
        check_out(self.path)
        ignored = {f".{RUN}.new", WANDB_ID}  # of a run killed as it began; an id to go on under
        names = [name for name in names_in(self.path) if name not in ignored]
        if names and not self.is_run and not _has_settings(self.path / CONFIG):
            raise UsageError(
                f"--out {self.path} is no run but holds {', '.join(names[:3])}; nothing of it is written over. Choose "
                "another directory, or an empty one."
            )
        for path, fault in misfits(self.path):
            raise UsageError(f"{path} cannot be used: {fault}. Move it away, or choose another --out.")
        if names and not self.steps:
            self._check_untrained()
        for step in self.steps:
            state = None
            with suppress(DataError):  # a damaged one counts where it is used
                state = read_state(self.checkpoint(step))
            if state is not None:
                check_step(self.checkpoint(step), state)

    def _check_untrained(self) -> None:
        """Refuse a run without checkpoints that may have had some. Raises `DataError`."""
        remedy = "bring them back, or choose another --out to begin anew"
        last, lost = None, "missing"
        if (self.path / RUN).exists():
            lost = "damaged"
        if has_marks(self.path):
            with suppress(DataError):
                last, lost = read_marks(self.path)[0], ""
        if lost:
            raise DataError(
                f"{self.path} holds what a run has left, but its {RUN} is {lost}, and no whole checkpoint is in "
                f"{self.checkpoints}; {remedy}."
            )
        if last is not None:
            raise DataError(
                f"{self.path} has been trained to step {last}, but no whole checkpoint is in {self.checkpoints}; "
                f"{remedy}."
            )

    @contextmanager
    def owned(self, *, take_over: bool = False) -> Iterator[None]:
        """Keep other processes from writing to the run. Raises `UsageError` where one does, but to `take_over`."""
        remedy = "Two trainings must not write to one run: wait for that one, stop it, or choose another --out."
        if not take_over:
            remedy += " If it has ended for certain, pass --take-over."
        with DirectoryLock(self.path, remedy=remedy, take_over=take_over) as self._lock:
            yield

    def begin(self, config_toml: str) -> None:
        """Make the directory a run's, at step 0, in place of one that has no checkpoint."""
        self._mark(None, None)
        self.write(CONFIG, _HEADER + config_toml)
        self.rewind_metrics(0)

    def restore_config(self, config_toml: str) -> bool:
        """Write the config of a run that has lost it, and tell whether it had."""
        if lost := not os.path.lexists(self.path / CONFIG):
            self.write(CONFIG, _HEADER + config_toml)
        return lost

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / name_of(step)

    def state(self, step: int) -> dict[str, Any]:
        """A checkpoint's state: all of it but the tensors."""
        state = read_state(self.checkpoint(step))
        check_step(self.checkpoint(step), state)
        return state

    def write(self, name: str, text: str) -> None:
        """Write a small file to the medium, in place of one of its name."""
        self.path.mkdir(parents=True, exist_ok=True)
        with _room_for(name, self.path, len(text)):
            write_flushed(self.path / name, text.encode())

    def save(self, step: int, content: RunCheckpoint, *, keep: int, best: int | None = None) -> Path:
        """Write a checkpoint, mark it as the last, and drop all but the newest `keep` and the best.

        `best`: step of the best checkpoint, this one or an earlier one.
        """
        with _room_for(f"checkpoint at step {step}", self.checkpoints, content.size_bytes):
            self._check_owner()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            final, draft = self.checkpoint(step), self.checkpoints / f"{WRITING}{step:07d}"
            try:
                _write(draft, step, content)
                if self.metrics.path.is_file():
                    flush(self.metrics.path)
            except (OSError, SafetensorError):
                shutil.rmtree(draft, ignore_errors=True)
                raise
            self._check_owner()
            replaced = _set_aside(final) if final.exists() else None
            draft.rename(final)
            flush(self.checkpoints)
            self.mark(step, best=best)
        if replaced is not None:
            _delete(replaced)
        self.prune(keep)
        return final

    def mark(self, last: int, *, best: int | None) -> None:
        """Mark checkpoints as the last and the best; the best stays if its checkpoint was never written."""
        if best is None or not is_complete(self.checkpoint(best)):
            with suppress(DataError):  # a damaged file is written anew
                best = self._marks()[1]
        self._mark(last, best if best is not None and is_complete(self.checkpoint(best)) else None)

    def prune(self, keep: int) -> None:
        """Drop all checkpoints but the newest `keep` and the best, and what a kill has left half written or deleted."""
        self._remove_leftovers()
        _, best = self._marks()
        for step in self.steps[:-keep]:
            if step != best:
                _delete(_set_aside(self.checkpoint(step)))

    def find_checkpoint(self) -> Path | None:
        """The best checkpoint or else the last; None where there is none. Raises `DataError` where it is gone."""
        last, best = self._marks()
        step = last if best is None else best
        if step is None:
            return None
        if not is_complete(self.checkpoint(step)):
            raise DataError(
                f"{self.path} names step {step} as its {'last' if best is None else 'best'} checkpoint, which is not "
                f"there (any more); give the directory of one in {self.checkpoints} instead."
            )
        return self.checkpoint(step)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a row to `metrics.jsonl`; what is not finite becomes null."""
        self._check_owner()
        with _room_for("metrics", self.metrics.path, 1000):
            self.metrics.append(row)

    def rewind_metrics(self, step: int, seal: Mapping[str, Any] | None = None) -> None:
        """Drop rows of `metrics.jsonl` after a step; `MetricsFile.rewind` says more."""
        with _room_for(self.metrics.path.name, self.path, 0):
            self.metrics.rewind(step, seal)

    def _marks(self) -> tuple[int | None, int | None]:
        """Steps of last and best: as `run.json` says, or of a run without one its links, or its newest checkpoint."""
        if has_marks(self.path):
            return read_marks(self.path)
        last, best = self._linked("last"), self._linked("best")
        steps = self.steps
        if last is None and best is None and steps:
            last, best = steps[-1], self.state(steps[-1])["best"]["step"]
            best = best if best in steps else None
        return last, best

    def _linked(self, name: str) -> int | None:
        """Step of the checkpoint that a link points at, there or not, or of the copy that is in its place."""
        link = self.path / name
        if link.is_symlink():
            return step_of(link.readlink().name)
        return int(read_state(link)["step"]) if is_complete(link) else None

    def _mark(self, last: int | None, best: int | None) -> None:
        """Write `run.json`, then the links, where the file system has them."""
        self.path.mkdir(parents=True, exist_ok=True)
        with _room_for(RUN, self.path, 100):
            write_marks(self.path, last, best)
        for name, step in (("last", last), ("best", best)):
            self._link(name, step)
        flush(self.path)

    def _link(self, name: str, step: int | None) -> None:
        """Let a link point at a checkpoint; none is better than one that points at another."""
        link, draft = self.path / name, self.path / f".{name}.new"
        if link.is_file() and not link.is_symlink() and not is_written_link(link):
            _log.warning("%s is a file of its own and stays; %s says which checkpoint is meant.", link, RUN)
            return
        if link.is_dir() and not link.is_symlink():  # a copy of the run that followed links
            copied = None
            with suppress(DataError):
                copied = self._linked(name)
            if copied is None or not is_complete(self.checkpoint(copied)):
                _log.warning("%s is a directory of its own and stays; %s says which checkpoint is meant.", link, RUN)
                return
            shutil.rmtree(link)
        try:
            draft.unlink(missing_ok=True)
            if step is not None:
                draft.symlink_to(self.checkpoint(step).relative_to(self.path))
                draft.replace(link)
        except OSError:
            step = None
        if step is None:
            with suppress(OSError):
                link.unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        for leftover in list(leftovers(self.checkpoints)):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check_owner(self) -> None:
        if self._lock is not None:
            self._lock.check()


def run_of(config_file: Path) -> Path | None:
    """The run whose settings a file holds; None if it is not a run's `config.toml`.

    Raises `UsageError` if it is one, but the run is not there.
    """
    file = config_file
    if file.name != CONFIG or not RunDirectory(file.parent).is_run:
        file = file.resolve()  # a link lies elsewhere than what it leads to
    if (file.name == CONFIG or _has_settings(file)) and RunDirectory(file.parent).is_run:
        return file.parent
    if not _has_settings(config_file):
        return None
    raise UsageError(
        f"{config_file} holds the settings of a run that is not there; bring its checkpoints back beside it, name the "
        "run with --out, or leave --resume out to begin one."
    )


def _has_settings(file: Path) -> bool:
    """Tell whether a file is a run's `config.toml`."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(_HEADER)) == _HEADER.encode()


def read_checkpoint(path: Path, *, optimizer: bool = False, average: bool = False) -> RunCheckpoint:
    """Read and check a checkpoint directory; optimizer state and average only if asked for.

    Raises `DataError` if a byte is not as it was written, a number not finite, or the directory is named after another
    step, `UsageError` if there is no average.
    """
    state = read_state(path, average=average)
    check_step(path, state)

    def tensors(name: str) -> dict[str, Tensor]:
        file, written = path / name, state["files"].get(name)
        if not file.is_file() or written != size_and_checksum(file):
            if pointer := lfs_pointer(file):
                raise DataError(f"{file} cannot be read: {pointer}.")
            raise DataError(
                f"{file} is damaged (size or checksum differ from {STATE}); use an earlier checkpoint of the run."
            )
        loaded = load_file(file)
        if bad := not_finite(loaded):
            raise DataError(
                f"{file} has tensors that are not finite (NaN or infinity): {listed(bad)}; use an earlier checkpoint "
                "of the run, or train again with a lower --lr."
            )
        return loaded

    return RunCheckpoint(
        model=tensors(MODEL),
        optimizer=tensors(OPTIMIZER) if optimizer else {},
        average=tensors(AVERAGE) if average else {},
        state=state,
    )


def read_trained(path: Path, *, average: bool) -> RunCheckpoint:
    """Read a checkpoint for use: its weights or, in their place, their average, brought up to the checkpoint's step."""
    content = read_checkpoint(path, average=average)
    if not average:
        return content
    averaged = up_to_date(content.average, content.model, **content.state["average"])
    return replace(content, model=content.model | averaged, average={})


def recorded_metrics(checkpoint: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the run around a checkpoint, up to its step; warns where they are not those that its state records."""
    return RunDirectory(checkpoint.parent.parent).metrics.rows(up_to=state["step"], seal=state.get("metrics"))


def _write(draft: Path, step: int, content: RunCheckpoint) -> None:
    """Write all files of a checkpoint and flush them to the medium."""
    tensors = {MODEL: content.model, OPTIMIZER: content.optimizer}
    if content.average:
        tensors[AVERAGE] = content.average
    draft.mkdir()
    for name, named in tensors.items():
        save_file(named, draft / name, {"format": "pt"})
    files = {name: size_and_checksum(draft / name) for name in tensors}
    (draft / STATE).write_bytes(sealed({"format": STATE_FORMAT, "step": step, **content.state, "files": files}))
    mode = (draft / STATE).stat().st_mode
    for name in tensors:
        with suppress(PermissionError):  # a file system without modes
            (draft / name).chmod(mode)  # safetensors writes for its user alone, whatever the umask says
    for name in (*tensors, STATE):
        flush(draft / name)
    flush(draft)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint, so that a kill during its deletion leaves none that looks whole; return its new path."""
    aside = path.with_name(f"{DROPPED}{path.name}")
    path.rename(aside)
    return aside


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint; of one that is linked to, the link."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint)


def find_checkpoint(path: str | Path) -> Path:
    """A run directory's best or else last checkpoint, or the checkpoint directory itself.

    Raises `UsageError` where there is none, `DataError` where the one that the run names is gone.
    """
    path = Path(path)
    if is_complete(path):
        return path
    directory = RunDirectory(path)
    if directory.is_run and (found := directory.find_checkpoint()) is not None:
        return found
    raise UsageError(
        f"{path} is neither a run directory with a checkpoint nor a checkpoint; expected what `alpacache train` wrote."
    )


@contextmanager
def _room_for(what: str, place: Path, size_bytes: int) -> Iterator[None]:
    """Turn an error of writing for want of room into `DataError`; other errors pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        raise DataError(
            f"{what} could not be written to {place} ({error}); it needs {size_bytes} bytes. Earlier checkpoints are "
            "intact; free space and run again with --resume."
        ) from error

"""The directory of one training run: its config, its metrics, its checkpoints.

A checkpoint is written beside the others under a temporary name, flushed to the medium and only then renamed, so a kill
or a full disk never costs an earlier one; links move before the checkpoint that they pointed at is dropped. Tensors are
safetensors, all else is JSON or TOML; nothing is pickled.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alpacache import strict_json
from alpacache.alpamayo.checkpoint import listed
from alpacache.alpamayo.foreign_files import Schema, conform, read_json
from alpacache.errors import DataError, UsageError
from alpacache.finite import not_finite
from alpacache.gpu.host_copies import copied_to_host
from alpacache.training.ema import up_to_date
from cache_store.checksum import crc32c
from cache_store.storage.local_files import FULL, flush, write_flushed

MODEL, OPTIMIZER, AVERAGE, STATE = "model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json"


class _File(Schema):
    bytes: int
    crc32c: str


class _Files(Schema):
    model: _File = Field(alias="model.safetensors")
    optimizer: _File = Field(alias="optimizer.safetensors")
    average: _File | None = Field(None, alias="average.safetensors")


class _Base(Schema):
    revision: str | None


class _VLM(Schema):
    id: str


class _Store(Schema):
    path: str
    samples: int
    ids_sha256: str
    identity: dict[str, Any]


class _Settings(Schema):
    draws: int
    micro_batch: int
    processes: int
    dataset_samples: int
    stores: list[_Store]


class _Best(Schema, extra="forbid"):
    step: int | None
    value: float | None
    by: str
    since: int


class _Average(Schema, extra="forbid"):
    decay: float
    behind: int


class _Skipped(Schema, extra="forbid"):
    total: int
    in_a_row: int


class _State(Schema):
    """What this version reads of a checkpoint's `state.json`; docs/reference/run-directory.md says what it means."""

    format: Literal[1]
    step: int
    settings: _Settings
    base: _Base
    vlm: _VLM | None
    best: _Best
    average: _Average | None
    trainable: Literal["all", "head", "lora"]
    damaged_indices: list[int]
    skipped: _Skipped | None = None
    files: _Files


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
        self.checkpoints = self.path / "checkpoints"

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        numbers = (path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*") if _is_complete(path))
        return sorted(int(number) for number in numbers if number.isdigit())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:07d}"

    def state(self, step: int) -> dict[str, Any]:
        """A checkpoint's state: all of it but the tensors."""
        return read_state(self.checkpoint(step))

    def write(self, name: str, text: str) -> None:
        """Write a small file to the medium, in place of one of its name."""
        self.path.mkdir(parents=True, exist_ok=True)
        with _room_for(name, self.path, len(text)):
            write_flushed(self.path / name, text.encode())

    def save(self, step: int, content: RunCheckpoint, *, keep: int, best: int | None = None) -> Path:
        """Write a checkpoint, move the links, and drop all but the newest `keep` and the best.

        `best`: step that the link `best` should point at, this one or an earlier one.
        """
        with _room_for(f"checkpoint at step {step}", self.checkpoints, content.size_bytes):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in (*self.checkpoints.glob(".writing-*"), *self.checkpoints.glob(".dropped-*")):
                shutil.rmtree(leftover, ignore_errors=True)
            final, draft = self.checkpoint(step), self.checkpoints / f".writing-{step:07d}"
            try:
                _write(draft, step, content)
            except (OSError, SafetensorError):
                shutil.rmtree(draft, ignore_errors=True)
                raise
            replaced = _set_aside(final) if final.exists() else None
            draft.rename(final)
            flush(self.checkpoints)
            self.point_links(step, best=best)
        if replaced is not None:
            shutil.rmtree(replaced)
        linked = (self.path / "best").resolve()
        for old in map(self.checkpoint, self.steps[:-keep]):
            if old.resolve() != linked:
                shutil.rmtree(_set_aside(old))
        return final

    def point_links(self, step: int, *, best: int | None) -> None:
        """Point `last` and `best` at these checkpoints; `best` stays if its checkpoint was never written."""
        self.point("last", step)
        if best is not None and _is_complete(self.checkpoint(best)):
            self.point("best", best)

    def point(self, name: str, step: int) -> None:
        """Point the link `last` or `best` at a checkpoint, atomically."""
        draft = self.path / f".{name}.new"
        draft.unlink(missing_ok=True)
        draft.symlink_to(self.checkpoint(step).relative_to(self.path))
        draft.replace(self.path / name)
        flush(self.path)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add a row to `metrics.jsonl`; what is not finite becomes null."""
        path, line = self.path / "metrics.jsonl", strict_json.dumps(row) + "\n"
        with _room_for("metrics", path, len(line)), path.open("a") as file:
            file.write(line)

    def metrics(self, *, up_to: int) -> list[dict[str, Any]]:
        """Rows of `metrics.jsonl` up to a step, without a torn last line; none if there is no file."""
        path, rows = self.path / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):
                if (row := json.loads(line))["step"] <= up_to:
                    rows.append(row)
        return rows

    def rewind_metrics(self, step: int) -> None:
        """Drop rows after a step (and a torn last line), so that a resumed run does not report steps twice."""
        if (self.path / "metrics.jsonl").is_file():
            lines = (strict_json.dumps(row) + "\n" for row in self.metrics(up_to=step))
            self.write("metrics.jsonl", "".join(lines))


def read_checkpoint(path: Path, *, optimizer: bool = False, average: bool = False) -> RunCheckpoint:
    """Read and check a checkpoint directory; optimizer state and average only if asked for.

    Raises `DataError` if a byte is not as it was written or a number not finite, `UsageError` if there is no average.
    """
    state = read_state(path, average=average)

    def tensors(name: str) -> dict[str, Tensor]:
        file, written = path / name, state["files"].get(name)
        if not file.is_file() or written != _size_and_checksum(file):
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


def _write(draft: Path, step: int, content: RunCheckpoint) -> None:
    """Write all files of a checkpoint and flush them to the medium."""
    tensors = {MODEL: content.model, OPTIMIZER: content.optimizer}
    if content.average:
        tensors[AVERAGE] = content.average
    draft.mkdir()
    for name, named in tensors.items():
        save_file(named, draft / name, {"format": "pt"})
    files = {name: _size_and_checksum(draft / name) for name in tensors}
    state = {"format": 1, "step": step, **content.state, "files": files}
    (draft / STATE).write_text(strict_json.dumps(state, indent=1) + "\n")
    for name in (*tensors, STATE):
        flush(draft / name)
    flush(draft)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint, so that a kill during its deletion leaves none that looks whole; return its new path."""
    aside = path.with_name(f".dropped-{path.name}")
    path.rename(aside)
    return aside


def _is_complete(path: Path) -> bool:
    return (path / STATE).is_file()


def read_state(path: Path, *, average: bool = False) -> dict[str, Any]:
    """A checkpoint's state, without its tensors.

    Raises `DataError` naming the keys that are not of the known form, `UsageError` if it lacks an `average` that is
    asked for.
    """
    try:
        state = read_json(path / STATE)
        conform(_State, state, STATE)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path / STATE} cannot be read ({error}); use an earlier checkpoint, or the alpacache that wrote it."
        ) from error
    if average and state["average"] is None:
        raise UsageError(f"{path} has no average of the weights; train with --ema, or leave --ema out here.")
    return state


def find_checkpoint(path: str | Path) -> Path:
    """A run directory's `best` or else `last` checkpoint, or the checkpoint directory itself.

    Raises `UsageError` where there is none, `DataError` where a link points at none.
    """
    path = Path(path)
    if _is_complete(path):
        return path
    for link in (path / "best", path / "last"):
        if _is_complete(link):
            return link
        if link.is_symlink():
            raise DataError(
                f"{link} points at {link.readlink()}, which is no checkpoint (any more); give the directory of one in "
                f"{path / 'checkpoints'} instead."
            )
    raise UsageError(
        f"{path} is neither a run directory with a checkpoint nor a checkpoint; expected what `alpacache train` wrote."
    )


def _size_and_checksum(path: Path) -> dict[str, Any]:
    size, crc, block = 0, 0, np.empty(2**20, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):  # type: ignore[arg-type]
            size, crc = size + count, crc32c(block[:count], crc)
    return {"bytes": size, "crc32c": f"{crc:08x}"}


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

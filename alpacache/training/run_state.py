"""The JSON files of a run that name others: a checkpoint's `state.json`, and the run's `run.json`.

Each carries a checksum of its own, as the documents of a store do, so that no flipped bit is taken for a setting. Those
of older versions have none and are read all the same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from alpacache import strict_json
from alpacache.alpamayo.foreign_files import JSON_LIMIT_BYTES, Count, Schema, Width, conform
from alpacache.durable import RUN
from alpacache.errors import DataError, UsageError
from alpacache.regular_file import lfs_pointer, read_regular
from alpacache.training.run_names import name_of, step_of
from cache_store.checksum import crc32c
from cache_store.document import SEAL_KEY, check_seal, seal_bytes
from cache_store.storage.local_files import write_flushed

STATE = "state.json"
STATE_FORMAT = 2
"""Version that is written now; 1 was the same without a checksum."""


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


class _NewExpert(Schema, extra="forbid"):
    layer_map: Annotated[list[Annotated[int, Field(ge=0, le=1023)]], Field(min_length=1, max_length=1024)]
    width: Width
    intermediate: Width
    heads: Count
    seed: Annotated[int, Field(ge=0)]


class _LossSum(Schema, extra="forbid"):
    total: float
    samples: int = Field(ge=1)


class _State(Schema):
    """Schema of what is read of a checkpoint's `state.json`; docs/reference/run-directory.md says what it means."""

    format: Literal[1, 2]
    step: int
    settings: _Settings
    base: _Base
    vlm: _VLM | None
    new_expert: _NewExpert | None = None
    best: _Best
    average: _Average | None
    trainable: Literal["all", "head", "lora"]
    damaged_indices: list[int]
    skipped: _Skipped | None = None
    turn_losses: list[dict[str, _LossSum]] = Field(default_factory=list)
    files: _Files
    metrics: _File | None = None
    free_settings: dict[str, Any] = Field(default_factory=dict)


class _Marks(Schema):
    """Content of `run.json`."""

    format: Literal[1]
    last: int | None
    """Step of the newest checkpoint; None before the first."""
    best: int | None
    """Step of the best one; None without a validation."""


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a directory is a whole checkpoint: its state is written last."""
    return (checkpoint / STATE).is_file()


def read_state(checkpoint: Path, *, average: bool = False) -> dict[str, Any]:
    """A checkpoint's state, without its tensors.

    Raises `DataError` naming the keys that are not of the known form, `UsageError` if it lacks an `average` that is
    asked for.
    """
    state = _read(checkpoint / STATE, _State, "use an earlier checkpoint, or the alpacache that wrote it")
    if average and state["average"] is None:
        raise UsageError(f"{checkpoint} has no average of the weights; train with --ema, or leave --ema out here.")
    return state


def check_step(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Raise `DataError` where a checkpoint, or what a link to it leads to, is named after another step than its own."""
    for path in (checkpoint, checkpoint.resolve()):
        named = step_of(path.name)
        if named is not None and named != state["step"]:
            raise DataError(
                f"{path} is named after step {named} but holds the checkpoint of step {state['step']}; it was renamed "
                f"or copied. Name it {name_of(state['step'])}, or move it out of the run."
            )


def read_marks(run: Path) -> tuple[int | None, int | None]:
    """Steps of the last and the best checkpoint, as `run.json` says. Raises `DataError` where it is damaged."""
    marks = _read(run / RUN, _Marks, "resume the run, which writes it anew, or name one of its checkpoints instead")
    return marks["last"], marks["best"]


def write_marks(run: Path, last: int | None, best: int | None) -> None:
    """Write `run.json`."""
    write_flushed(run / RUN, sealed({"format": 1, "last": last, "best": best}))


def sealed(document: dict[str, Any]) -> bytes:
    """JSON for people, with its checksum."""
    return seal_bytes((strict_json.dumps(document, indent=1) + "\n").encode())


def size_and_checksum(path: Path) -> dict[str, Any]:
    """A file's record in a state."""
    size, crc, block = 0, 0, np.empty(2**20, np.uint8)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):  # type: ignore[arg-type]
            size, crc = size + count, crc32c(block[:count], crc)
    return {"bytes": size, "crc32c": f"{crc:08x}"}


def _read(path: Path, schema: type[Schema], remedy: str) -> dict[str, Any]:
    try:
        content = read_regular(path, limit_bytes=JSON_LIMIT_BYTES)
        if pointer := lfs_pointer(content):
            raise ValueError(pointer)
        value = strict_json.loads(content)
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}; expected a JSON object")
        if schema is not _State or value.get("format") != 1 or SEAL_KEY in value:
            check_seal(content, path.name)
        conform(schema, value, path.name)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).rstrip(".").split())
        raise DataError(f"{path} cannot be read ({reason}); {remedy}.") from error
    return value

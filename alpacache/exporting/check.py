"""A checkpoint, exported or not, held against what its loaders ask for and against the base that it was made from."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import LAYER_MAP
from alpacache.alpamayo.checkpoint import FLOATS, INDEX, listed
from alpacache.alpamayo.family import EXPERT_PARTS, OWN_PARTS
from alpacache.alpamayo.foreign_files import TensorInfo, read_json
from alpacache.alpamayo.new_expert import begun_with
from alpacache.alpamayo.public_layout import (
    CONFIG,
    LOADED_FILES,
    Fault,
    companion_faults,
    config_faults,
    file_faults,
    shape_faults,
    weight_faults,
)
from alpacache.errors import CheckpointError, UsageError
from alpacache.finite import not_finite
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.training.run_directory import find_checkpoint, read_trained
from alpacache.training.trainable import changed_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Findings of `check_export`."""

    out: str
    ok: bool
    """True if there are no faults."""
    family: str | None
    """None where `config.json` does not tell."""
    expert_only: bool
    """True for an export without the VLM: `train` and `eval` load it, the public classes do not."""
    tensors: int
    """Number of tensors whose values were read."""
    compared: int
    """Number of those that were compared with the base's; what a run trained is left out."""
    faults: tuple[Fault, ...]
    seconds: float


def check_export(
    directory: str, *, base: str | None = None, run: str | None = None, on_progress: OnProgress = ignore
) -> CheckReport:
    """Look for all that a loader would refuse in a checkpoint's directory; nothing there is changed or run.

    Every tensor is read once. One that lies in the base's own file, by a hard link, is not compared with itself.

    Args:
        base: hub id or directory of the model that it was made from: what was not trained must be equal to that.
        run: run directory or checkpoint that it was made of: only what that trained may differ. None: all of expert
            and projections may.

    Raises `UsageError` where there is no such directory.
    """
    started, path = time.monotonic(), Path(directory)
    if not path.is_dir():
        raise UsageError(f"{directory} is no directory; --check looks at a checkpoint's directory.")
    checkpoint = Checkpoint(directory)
    faults, readable = list(file_faults(checkpoint, path)), dict[str, TensorInfo]()
    family, expert_only, compared = None, False, 0
    try:
        raw = read_json(path / CONFIG)
        named = checkpoint.config.family
    except CheckpointError as error:
        faults.append(Fault(file=CONFIG, key="", what=str(error), remedy="Copy it from the base model."))
    else:
        family = named.name
        faults += config_faults(raw, model_type=named.package, architecture=named.architecture)
        faults += weight_faults(checkpoint, path, readable)
        expert_only = _is_expert_only(checkpoint)
        if not any(fault.file == INDEX for fault in faults):
            faults += shape_faults(checkpoint, readable, expert_only=expert_only)
            origin = None if base is None else Checkpoint(base)
            untouched = {}
            if origin is not None:
                faults += _files_apart(path, origin)
                untouched = _untouched(origin, readable, run)
            compared = len(untouched)
            faults += _value_faults(checkpoint, readable, origin, untouched, on_progress)
        faults += companion_faults(checkpoint, path)
    return CheckReport(
        out=directory,
        ok=not faults,
        family=family,
        expert_only=expert_only,
        tensors=len(readable),
        compared=compared,
        faults=tuple(faults),
        seconds=time.monotonic() - started,
    )


def _is_expert_only(checkpoint: Checkpoint) -> bool:
    """An export says so by its note, and then has no tensor of the VLM at all."""
    try:
        return checkpoint.origin is not None and not checkpoint.with_prefix("vlm.")
    except CheckpointError:  # told of as a fault of the index
        return False


def _files_apart(path: Path, base: Checkpoint) -> Iterator[Fault]:
    """Files of the base that loaders read beside the weights, and that are not there or not the same."""
    for name, file in base.files(*LOADED_FILES).items():
        if not (path / name).is_file():
            what = "is not there; the base has it."
        elif (path / name).read_bytes() != file.read_bytes() and not (name == CONFIG and _is_new_expert(path, base)):
            what = "is not the base's."
        else:
            continue
        yield Fault(file=name, key="", what=what, remedy="Copy it from the base model.")


def _is_new_expert(path: Path, base: Checkpoint) -> bool:
    """Tell whether the expert has another size than the base's, and therefore a config of its own."""
    return LAYER_MAP in read_json(path / CONFIG) and LAYER_MAP not in base.config.raw


def _untouched(base: Checkpoint, readable: Mapping[str, TensorInfo], run: str | None) -> dict[str, TensorInfo]:
    """Tensors of the base that the run did not train, of those that can be compared."""
    infos = base.infos({name: shard for name, shard in base.names.items() if name in readable})
    if run is None:
        trained = {name for name in infos if name.startswith(EXPERT_PARTS) and not name.endswith(".freqs")}
    else:
        path = find_checkpoint(run)
        read = read_trained(path, average=False)
        begun = begun_with(base, read.state)
        trained = set(changed_tensors(read.model, begun.shapes(*OWN_PARTS), where=path))
        if begun is not base:  # a new expert has none of the base's tensors
            trained |= {name for name in infos if name.startswith(EXPERT_PARTS)}
    return {name: info for name, info in infos.items() if name not in trained}


def _value_faults(
    checkpoint: Checkpoint,
    readable: Mapping[str, TensorInfo],
    base: Checkpoint | None,
    untouched: Mapping[str, TensorInfo],
    on_progress: OnProgress,
) -> Iterator[Fault]:
    """Read every tensor: those that are not finite, and those of `untouched` that are not the base's."""
    bad, apart = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    homes = {name: info.shard for name, info in readable.items() if info.dtype in FLOATS}
    places = {(readable[name].shard, info.shard) for name, info in untouched.items()}
    shared = {(own, theirs) for own, theirs in places if base and checkpoint.file(own).samefile(base.file(theirs))}
    started = time.monotonic()
    for done, (name, tensor) in enumerate(checkpoint.read(homes), start=1):
        stored, shard = checkpoint.stored_name(name), homes[name]
        if not_finite({name: tensor}):
            bad[shard].append(stored)
        if base is not None and name in untouched and (shard, untouched[name].shard) not in shared:
            ((_, expected),) = base.read({name: untouched[name].shard})
            if not _are_same(tensor, expected):
                apart[shard].append(stored)
        rate = done / max(time.monotonic() - started, 1e-6)
        on_progress(Progress(done=done, total=len(homes), unit="tensors", rate=rate, notes={}))
    for shard, names in bad.items():
        what = f"{len(names)} tensors are not finite (NaN or infinity)."
        yield Fault(file=shard, key=listed(names), what=what, remedy="Export an earlier checkpoint of the run.")
    for shard, names in apart.items():
        what = f"{len(names)} tensors that were not trained are not the base's."
        remedy = "Export again, or name the model (--model) and run (--checkpoint) that it was made of."
        yield Fault(file=shard, key=listed(names), what=what, remedy=remedy)


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether type, shape and every bit are the same."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))

"""A complete checkpoint again: what a run trained, put back into the base model's layout.

The 16 GB of the VLM are not written anew: shards without a trained tensor become hard links to the base's. In the
others only the trained tensors' bytes change, so headers, order and all other tensors stay what they were. The
directory appears under its name in one rename, after everything in it was checked and is on the medium.
"""

import errno
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from alpacache import __version__
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.checkpoint import INDEX, ORIGIN, SINGLE
from alpacache.alpamayo.safetensors_header import TensorInfo, read_header
from alpacache.cached_samples.identity import check_base, model_identity, vlm_identity
from alpacache.errors import AlpacacheError, CheckpointError, DataError, UsageError
from alpacache.exporting.model_card import model_card, run_facts
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.training.run_directory import (
    MODEL,
    RunCheckpoint,
    find_checkpoint,
    read_trained,
)
from alpacache.training.trainable import changed_tensors, merge
from cache_store.storage.file_errors import FULL
from cache_store.storage.local_files import flush


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """A complete checkpoint again."""

    model: str
    """Hub id or directory of the model that the run was trained from."""
    checkpoint: str
    """A run directory or one of its checkpoints."""
    out: str
    """Directory to write; must not exist or be empty."""
    ema: bool = False
    """Export the average of the weights that a run with `--ema` kept."""
    expert_only: bool = False
    """Leave out the VLM: what `train` and `eval` load, not what the public code loads."""


TRAINED_PREFIXES = ("expert.", "action_in_proj.", "action_out_proj.", "action_space.")
"""All that stage two loads, and all that `expert_only` writes."""
_CARD, _LICENCE = "README.md", "LICENSE"
_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*")
"""What goes along with `expert_only`: configs, tokenizer, card, licence; no weights of any kind."""
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was exported and where it lies."""

    out: str
    checkpoint: str
    """The run's checkpoint that was taken: of a run directory `best`, else `last`."""
    step: int
    base: str
    base_revision: str | None
    trainable: str
    expert_only: bool
    """Whether it lacks the VLM, as asked for or because the base does."""
    tensors: int
    """In the exported checkpoint."""
    changed_tensors: int
    """Those that the run trained."""
    linked_files: int
    """Hard links to the base's files."""
    written_files: int
    written_bytes: int
    seconds: float


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What goes into the new directory, by path inside it, and from which file of the base."""

    linked: dict[str, Path] = field(default_factory=dict)
    copied: dict[str, Path] = field(default_factory=dict)
    patched: dict[str, Path] = field(default_factory=dict)
    """Shards with a trained tensor."""
    texts: dict[str, str] = field(default_factory=dict)
    new_bytes: int = 0
    """Of tensors that go into a file of their own."""

    @property
    def size_bytes(self) -> int:
        """What it takes on disk."""
        files = sum(file.stat().st_size for part in (self.copied, self.patched) for file in part.values())
        return self.new_bytes + files + sum(len(text.encode()) for text in self.texts.values())


def export(config: ExportConfig, *, on_progress: OnProgress = ignore) -> ExportReport:
    """Write a checkpoint directory in the public layout with a run's tensors in it.

    Adapters are merged as in `trainable.apply_checkpoint`; every tensor keeps the base's dtype. Takes about as much
    memory as the trained tensors. Nothing lies under `out` until all is written and checked.

    Raises `UsageError` where `out` is not empty, the run was trained from another model or the base is incomplete, and
    `DataError` where the run's checkpoint is damaged or the disk is full.
    """
    started, out = time.monotonic(), Path(config.out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"--out {config.out} exists and is not an empty directory; choose another, or remove it.")
    base, path = Checkpoint(config.model), find_checkpoint(config.checkpoint)
    run = read_trained(path, average=config.ema)
    check_base(base, run.state["base"], run=path)
    if (vlm := run.state.get("vlm")) and not config.expert_only:
        raise UsageError(
            f"{path} was trained on features of the VLM {vlm['id']} (`alpacache extract --vlm`), which {config.model} "
            "does not hold: a complete checkpoint would pair the expert with another VLM. Pass --expert-only."
        )
    infos = base.infos(base.with_prefix(*TRAINED_PREFIXES) if config.expert_only else base.names)
    shapes = {name: info.shape for name, info in infos.items() if name.startswith(TRAINED_PREFIXES)}
    changed = changed_tensors(run.model, shapes, where=path)
    plan = _expert_plan(base, infos) if config.expert_only else _full_plan(base, infos, changed)
    texts = {name: file.read_text(errors="replace") for name, file in base.files(_CARD, _LICENCE).items()}
    lean = not any(name.startswith("vlm.") for name in infos)
    plan.texts[INDEX] = _index(base, infos, run, single=config.expert_only)
    plan.texts[_CARD] = model_card(
        out.name,
        base,
        run_facts(path, run),
        base_card=texts.get(_CARD),
        base_licence=texts.get(_LICENCE),
        expert_only=lean,
    )
    with _appearing(out, plan) as draft:
        _link(draft, plan)
        _check_space(draft, plan, out)
        _write(draft, plan, base, infos, run.model, changed, on_progress)
        _check(draft, base, infos)
    return ExportReport(
        out=config.out,
        checkpoint=str(path),
        step=int(run.state["step"]),
        base=base.full_name,
        base_revision=base.revision,
        trainable=str(run.state["trainable"]),
        expert_only=lean,
        tensors=len(infos),
        changed_tensors=len(changed),
        linked_files=len(plan.linked),
        written_files=len(plan.copied) + len(plan.patched) + len(plan.texts) + config.expert_only,
        written_bytes=plan.size_bytes,
        seconds=time.monotonic() - started,
    )


def _full_plan(base: Checkpoint, infos: Mapping[str, TensorInfo], changed: Iterable[str]) -> _Plan:
    """Every file of the base. Only weights are linked: an edit of a small file must not reach the base."""
    files = base.files()
    if wrong := _misplaced(infos, [file for name, file in files.items() if _is_shard(name)]):
        raise CheckpointError(
            f"{base.model}: {wrong[0]} and {len(wrong) - 1} more tensors are not exactly once in its .safetensors "
            f"files, as {INDEX} says; remove files that do not belong to it, or fetch it again."
        )
    plan = _Plan()
    shards = {infos[name].shard for name in changed}
    for name, file in files.items():
        if name in shards:
            plan.patched[name] = file
        elif name != INDEX:
            (plan.linked if name.endswith(".safetensors") else plan.copied)[_new_name(name)] = file
    return plan


def _expert_plan(base: Checkpoint, infos: Mapping[str, TensorInfo]) -> _Plan:
    files = base.files(*_SMALL_FILES)
    return _Plan(
        copied={_new_name(name): file for name, file in files.items() if not name.endswith(INDEX)},
        new_bytes=sum(info.nbytes for info in infos.values()),
    )


def _new_name(name: str) -> str:
    """The base's card stays beside the new one; where the base was exported itself, so does its base's."""
    return f"BASE_{name}" if re.fullmatch(rf"(BASE_)*{re.escape(_CARD)}", name) else name


def _index(base: Checkpoint, infos: Mapping[str, TensorInfo], run: RunCheckpoint, *, single: bool) -> str:
    """The index, with a note of what the checkpoint was made from: `identity` reads it."""
    note = {
        "version": __version__,
        "base": model_identity(base),
        "vlm": vlm_identity(base),
        "trained": {"step": run.state["step"], "crc32c": run.state["files"][MODEL]["crc32c"]},
    }
    total = sum(info.nbytes for info in infos.values())
    metadata = base.index_metadata | {"total_size": total, ORIGIN: note}
    weight_map = {name: SINGLE if single else infos[name].shard for name in sorted(infos)}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


@contextmanager
def _appearing(out: Path, plan: _Plan) -> Iterator[Path]:
    """A directory beside `out` that takes its name when the body ends well, and is removed when it does not."""
    draft = out.with_name(f".{out.name}.writing")
    try:
        if draft.exists():  # of an export that was killed
            shutil.rmtree(draft)
        draft.mkdir(parents=True)
        yield draft
        for place in (*draft.rglob("*"), draft):
            flush(place)
        draft.rename(out)
        flush(out.parent)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, AlpacacheError) or not isinstance(error, (OSError, SafetensorError)):
            raise
        full = isinstance(error, SafetensorError) or error.errno in FULL
        raise DataError(
            f"the checkpoint could not be written to {out} ({error}); it needs {plan.size_bytes} bytes there. Nothing "
            f"was left; {'free space' if full else 'see to the cause'} and export again."
        ) from error


def _link(draft: Path, plan: _Plan) -> None:
    """Link what can be linked; the rest of `plan.linked` moves to `plan.copied`."""
    for name, file in list(plan.linked.items()):
        try:
            os.link(file, _place(draft, name))
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
            plan.copied[name] = plan.linked.pop(name)


def _check_space(draft: Path, plan: _Plan, out: Path) -> None:
    free = shutil.disk_usage(draft).free
    if free < plan.size_bytes:
        raise DataError(
            f"{out} needs {plan.size_bytes} bytes, {free} are free; nothing was written. Free space, or choose an "
            "--out on the base model's file system, where shards can be linked."
        )


def _write(
    draft: Path,
    plan: _Plan,
    base: Checkpoint,
    infos: Mapping[str, TensorInfo],
    trained: Mapping[str, Tensor],
    changed: Iterable[str],
    on_progress: OnProgress,
) -> None:
    """All files but the links, one tensor at a time where a shard is patched."""
    started, done = time.monotonic(), 0
    total = len(plan.copied) + len(plan.patched) + bool(plan.new_bytes)

    def tell() -> None:
        nonlocal done
        done += 1
        rate = done / max(time.monotonic() - started, 1e-6)
        on_progress(Progress(done=done, total=total, unit="files", rate=rate, notes={}))

    for name, file in plan.copied.items():
        shutil.copyfile(file, _place(draft, name))
        tell()
    for shard, file in plan.patched.items():
        shutil.copyfile(file, draft / shard)
        mine = {name: shard for name in changed if infos[name].shard == shard}
        with (draft / shard).open("r+b") as target:
            for name, tensor in base.read(mine):
                target.seek(infos[name].offset)
                target.write(_bytes(merge(name, tensor, trained)))
        tell()
    if plan.new_bytes:
        tensors = dict(base.read({name: info.shard for name, info in infos.items()}))
        tensors |= {name: merge(name, tensors[name], trained) for name in changed}
        save_file(tensors, draft / SINGLE, {"format": "pt"})
        tell()
    for name, text in plan.texts.items():
        (draft / name).write_text(text)


def _check(draft: Path, base: Checkpoint, infos: Mapping[str, TensorInfo]) -> None:
    """Read the headers of what was written and compare them with the base's."""
    written = Checkpoint(str(draft))
    wrong = _misplaced(infos, draft.glob("*.safetensors")) or sorted(written.names.keys() ^ infos.keys())
    if wrong or written.config.sha256 != base.config.sha256:
        raise DataError(
            f"what was written to {draft} does not read as the base ({wrong[:3] or 'config.json'}); try again."
        )
    written.infos(written.names)  # raises where the index names the wrong shard


def _misplaced(infos: Mapping[str, TensorInfo], shards: Iterable[Path]) -> list[str]:
    """Tensors that are not exactly once in the shards with the expected dtype and shape."""
    found = defaultdict(list)
    for shard in shards:
        for name, info in read_header(shard).items():
            found[name].append((info.dtype, info.shape))
    expected = {name: [(info.dtype, info.shape)] for name, info in infos.items()}
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def _is_shard(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors")


def _place(draft: Path, name: str) -> Path:
    path = draft / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

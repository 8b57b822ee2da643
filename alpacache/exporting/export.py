"""A complete checkpoint again: what a run trained, put back into the base model's layout.

The 16 GB of the VLM are not written anew: shards without a trained tensor become hard links to the base's. In the
others only the trained tensors' bytes change, so headers, order and all other tensors stay what they were.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alpacache import __version__
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.checkpoint import INDEX, ORIGIN, SINGLE, listed
from alpacache.alpamayo.family import OWN_PARTS
from alpacache.alpamayo.foreign_files import TensorInfo
from alpacache.alpamayo.licence import CARD, LICENCE_FILES, card_of, licence_file_of
from alpacache.alpamayo.new_expert import begun_with
from alpacache.alpamayo.public_layout import LOADED_FILES
from alpacache.cached_samples.identity import check_base, model_identity, vlm_name
from alpacache.durable import check_out, names_in, take_back
from alpacache.errors import CheckpointError, UsageError
from alpacache.exporting.config import ExportConfig
from alpacache.exporting.draft import Draft, MergedTensors, misplaced, writing
from alpacache.exporting.model_card import model_card, run_facts
from alpacache.progress import OnProgress, ignore
from alpacache.training.run_directory import AVERAGE, MODEL, RunCheckpoint, find_checkpoint, read_trained

_CONFIG = "config.json"
_SMALL_FILES = (*LOADED_FILES, "*.txt", "*.md", "LICENSE*", "NOTICE*", *LICENCE_FILES)
"""Files that go along with `expert_only`: configs, tokenizer, card, licence; no weights of any kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """An exported checkpoint: where it lies, what it was made from, what it took."""

    out: str
    checkpoint: str
    """The run's checkpoint that was taken: of a run directory `best`, else `last`."""
    step: int
    base: str
    base_revision: str | None
    trainable: str
    expert_only: bool
    """True if it lacks the VLM, as asked for or because the base does."""
    tensors: int
    changed_tensors: int
    """Number of those that the run trained."""
    linked_files: int
    """Hard links to the base's files."""
    written_files: int
    written_bytes: int
    average: float | None
    """Decay of the average of the weights that was taken; None where the weights themselves were."""
    had_average: bool
    """True if the run keeps an average, taken or not."""
    existed: bool
    """True if all of this lay there already, from an earlier export: nothing was written."""
    seconds: float


def export(config: ExportConfig, *, on_progress: OnProgress = ignore) -> ExportReport:
    """Write a checkpoint directory in the public layout with a run's tensors in it.

    Adapters are merged as in `trainable.apply_checkpoint`; every tensor keeps the base's dtype. Takes about as much
    memory as the trained tensors. Nothing lies under `out` until all is written and checked. Where just this export
    lies there already, nothing is written.

    Raises `UsageError` where `out` holds anything else, the run was trained from another model or the base is
    incomplete, and `DataError` where the run's checkpoint is damaged or the disk is full.
    """
    if config.model is None or config.checkpoint is None:
        raise UsageError("an export needs `model` and `checkpoint`; `check_export` looks at one that is there.")
    started = time.monotonic()
    check_out(Path(config.out))  # before it is resolved: an address becomes a path of that
    out = Path(config.out).resolve()
    check_out(out)
    take_back(out)
    occupied = bool(names_in(out))
    if occupied and not (out / INDEX).is_file():
        raise _occupied(config.out)
    base, path = Checkpoint(config.model), find_checkpoint(config.checkpoint)
    run = read_trained(path, average=config.ema)
    files, base = base, begun_with(base, run.state)
    if base is not files and not config.expert_only:
        raise UsageError(
            f"{path} has an expert of its own size, which the public code cannot load beside the VLM. Pass "
            "--expert-only: `train` and `eval` take what that writes as a model."
        )
    check_base(base, run.state["base"], run=path)
    if (vlm := run.state.get("vlm")) and not config.expert_only:
        raise UsageError(
            f"{path} was trained on features of the VLM {vlm['id']} (`alpacache extract --vlm`), which {config.model} "
            "does not hold: a complete checkpoint would pair the expert with another VLM. Pass --expert-only."
        )
    infos = base.infos(base.with_prefix(*OWN_PARTS) if config.expert_only else base.names)
    tensors = MergedTensors(base, infos, run.model, where=path)
    lean = not any(name.startswith("vlm.") for name in infos)
    if config.expert_only:
        draft = _expert_draft(base, files, new_bytes=sum(info.nbytes for info in infos.values()))
    else:
        draft = _full_draft(base, tensors)
    draft.texts[INDEX] = _index(base, infos, run, single=config.expert_only, average=config.ema)
    draft.texts[CARD] = model_card(
        out.name,
        base,
        run_facts(path, run, average=config.ema),
        base_card=card_of(base),
        base_licence=licence_file_of(base),
        expert_only=lean,
    )
    if occupied and not draft.is_in(out, tensors):
        raise _occupied(config.out)
    if not occupied:
        with writing(out, draft) as directory:
            draft.write(directory, tensors, on_progress)
            draft.check(directory, tensors)
    average = run.state["average"]
    return ExportReport(
        out=config.out,
        checkpoint=str(path),
        step=int(run.state["step"]),
        base=base.full_name,
        base_revision=base.revision,
        trainable=str(run.state["trainable"]),
        expert_only=lean,
        tensors=len(infos),
        changed_tensors=len(tensors.changed),
        linked_files=0 if occupied else len(draft.linked),
        written_files=0 if occupied else draft.written_files,
        written_bytes=0 if occupied else draft.size_bytes,
        average=average["decay"] if config.ema else None,
        had_average=average is not None,
        existed=occupied,
        seconds=time.monotonic() - started,
    )


def _expert_draft(base: Checkpoint, files: Checkpoint, *, new_bytes: int) -> Draft:
    """Small files of the base, beside which the expert's tensors come in one new file.

    `files`: the base as it lies there; `base` differs from it where a run's expert has a size of its own.
    """
    small = {_new_name(name): file for name, file in files.files(*_SMALL_FILES).items()}
    draft = Draft(copied=small, new_bytes=new_bytes)
    if base is not files:
        del draft.copied[_CONFIG]
        draft.texts[_CONFIG] = json.dumps(dict(base.config.raw), indent=2) + "\n"
    return draft


def _occupied(out: str) -> UsageError:
    return UsageError(
        f"--out {out} exists and is not an empty directory, and does not hold just this export; choose another, or "
        "remove it."
    )


def _full_draft(base: Checkpoint, tensors: MergedTensors) -> Draft:
    """Every file of the base but weights that no loader reads. Only weights are linked: an edit of a small file must
    not reach the base.
    """
    files, shards = base.files(), {*base.names.values()}
    if wrong := misplaced(tensors.stored_infos, (files[shard] for shard in sorted(shards))):
        raise CheckpointError(
            f"{base.model}: the files that {INDEX} names do not hold just once what it says, and nothing else: "
            f"{listed(wrong)}. Fetch it again."
        )
    draft = Draft()
    for name, file in files.items():
        if name in tensors.changed_shards:
            draft.patched[name] = file
        elif name in shards:
            draft.linked[name] = file
        elif not name.endswith((".safetensors", INDEX)):
            draft.copied[_new_name(name)] = file
    return draft


def _new_name(name: str) -> str:
    """Name under which a file of the base is kept: its card stays beside the new one, and so does its base's card."""
    return f"BASE_{name}" if re.fullmatch(rf"(BASE_)*{re.escape(CARD)}", name) else name


def _index(
    base: Checkpoint, infos: Mapping[str, TensorInfo], run: RunCheckpoint, *, single: bool, average: bool
) -> str:
    """Text of the index, with a note of what the checkpoint was made from: `identity` reads it."""
    trained = {"step": run.state["step"], "crc32c": run.state["files"][MODEL]["crc32c"]}
    if average:
        kept = {"decay": run.state["average"]["decay"], "crc32c": run.state["files"][AVERAGE]["crc32c"]}
        trained["average"] = kept
    note = {
        "version": __version__,
        "base": model_identity(base),
        "vlm": vlm_name(base),
        "trained": trained,
    }
    total = sum(info.nbytes for info in infos.values())
    metadata = base.index_metadata | {"total_size": total, ORIGIN: note}
    homes = {base.stored_name(name): SINGLE if single else info.shard for name, info in infos.items()}
    weight_map = dict(sorted(homes.items()))
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"

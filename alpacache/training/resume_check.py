"""The samples and settings of a run, compared among its processes and with those of a later call that resumes it.

A run can go on exactly only with the samples that it began with, in their order: all of them decide which one comes
when.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import model_identity
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.training.run_directory import MODEL, RunDirectory
from cache_store import differences

_FREE_TO_CHANGE = {
    "resume",
    "out",
    "device",
    "keep",
    "save_every",
    "val_every",
    "val",
    "val_samples",
    "in_memory",
    "capture",
    "checkpointing",
    "memory_budget",
    "stores",
    "model",
    "best_by",
    "patience",
    "ema",
    "ema_every",
    "on_damage",
    "track",
    "micro_batch",
}
"""Settings that do not change what a step computes; `stores` and `model` may move, their identity is checked.

`micro_batch` changes how sums are rounded: a run keeps its own unless another is given.
"""
_MACHINE_SETTINGS = {"resume", "out", "device", "model", "stores", "val", "in_memory", "memory_budget", "track", "keep"}
"""Settings that may differ among the processes of a run; what their paths lead to may not."""


def stores_record(paths: Sequence[str], data: CachedDataset) -> list[dict[str, Any]]:
    """Path, samples and identity of each store that a dataset was opened from; plain JSON."""
    return [_store_record(path, data, indices) for path, indices in zip(paths, data.store_ranges, strict=True)]


def _store_record(path: str, data: CachedDataset, indices: range) -> dict[str, Any]:
    ids = hashlib.sha256()
    for index in indices:
        ids.update(f"{data.sample_id(index)}\n".encode())
    identity = dict(data.locate(indices.start)[0].identity) if indices else {}
    if indices:
        identity["model"] = _without_revision(identity["model"])
    return {"path": path, "samples": len(indices), "ids_sha256": ids.hexdigest(), "identity": identity}


def _without_revision(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's identity without its revision: a plain directory knows none, and the VLM is known by its weights."""
    return {key: value for key, value in model.items() if key != "revision"}


def check_processes_agree(
    world: World,
    settings: Mapping[str, Any],
    *,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    stores: Sequence[Mapping[str, Any]],
    val: CachedDataset | None,
    total: int,
) -> None:
    """Refuse to begin where processes see different things: they would train apart, or wait for each other.

    Raises `UsageError` in all processes, with what each sees.

    Args:
        world: the processes.
        settings: fields of the config.
        directory: of the run.
        checkpoint: the base model.
        stores: their `stores_record`.
        val: held-out samples.
        total: steps of the whole run.
    """
    if world.size == 1:
        return
    model = _without_revision(model_identity(checkpoint))
    seen = {
        "checkpoint to go on from": _newest(directory),
        "model": f"{model['id']} ({_digest(model)[:8]})",
        "samples of --store": _samples_text(stores),
        "samples of --val": "none" if val is None else _samples_text([_store_record("", val, range(len(val)))]),
        "steps in all": total,
    }
    seen |= {key: value for key, value in settings.items() if key not in _MACHINE_SETTINGS}
    views = world.all_gather(seen)
    lines = [
        f"{key}: {_by_process([view[key] for view in views])}"
        for key in seen
        if len({repr(view[key]) for view in views}) > 1
    ]
    if lines:
        raise UsageError(
            f"the {world.size} processes of {settings['out']} do not see the same:\n  "
            + "\n  ".join(lines)
            + "\nNothing was changed. Put run directory and stores where every machine sees them, wait until nothing "
            "writes to the stores any more (`alpacache extract`), and start all processes with the same options."
        )


def _newest(directory: RunDirectory) -> str:
    steps = directory.steps
    if not steps:
        return "none"
    return f"step {steps[-1]} (crc32c {directory.state(steps[-1])['files'][MODEL]['crc32c']})"


def _samples_text(stores: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{store['samples']} of digest {_fingerprint(store)[:8]}" for store in stores)


def _fingerprint(store: Mapping[str, Any]) -> str:
    """Digest of a store's samples and identity, wherever it lies."""
    return _digest([store["ids_sha256"], store["identity"]])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _by_process(values: Sequence[object]) -> str:
    """Text such as `4 in process 0; none in process 1, 2`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return "; ".join(f"{value} in process {', '.join(map(str, those))}" for value, those in ranks.items())


def settings_record(
    settings: Mapping[str, Any], stores: Sequence[Mapping[str, Any]], *, processes: int
) -> dict[str, Any]:
    """The settings that a checkpoint records: those that must not change over a resume, and those that are restored.

    Args:
        settings: fields of the settled config, with `lr` as it is used and `store_weights`.
        stores: their `stores_record`.
        processes: number of the run's processes.
    """
    record = {key: value for key, value in settings.items() if key not in _FREE_TO_CHANGE}
    record["betas"] = list(settings["betas"])
    if settings["trainable"] != "lora":
        del record["lora_rank"], record["lora_alpha"]
    samples = sum(store["samples"] for store in stores)
    restored = {"micro_batch": settings["micro_batch"], "processes": processes}
    return {**record, **restored, "dataset_samples": samples, "stores": [dict(store) for store in stores]}


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], *, run: str) -> None:
    """Refuse to go on with other samples or settings than a run began with; both are a `settings_record`."""
    _check_stores(before, now, run=run)
    apart = _FREE_TO_CHANGE | {"dataset_samples", "processes", "stores"}
    changed = [
        f"{key}: the run has {before[key]!r}, now {now[key]!r}"
        for key in now
        if key not in apart and key in before and before[key] != now[key]
    ]
    if changed:
        raise UsageError(
            f"{run} was begun with other settings:\n  "
            + "\n  ".join(changed)
            + "\nRepeat them, or choose another --out."
        )


def _check_stores(before: Mapping[str, Any], now: Mapping[str, Any], *, run: str) -> None:
    old, new = before["stores"], now["stores"]
    first, second = [_fingerprint(store) for store in old], [_fingerprint(store) for store in new]
    if first == second:
        return
    names = [", ".join(store["path"] for store in stores) for stores in (old, new)]
    if len(old) != len(new):
        lines = [
            f"{now['dataset_samples']} samples of {len(new)} stores ({names[1]})",
            f"the run has {before['dataset_samples']} of {len(old)} stores ({names[0]})",
        ]
    elif sorted(first) == sorted(second):
        lines = [f"the order of the stores: the run has {names[0]}", f"now {names[1]}"]
    else:
        lines = [line for pair in zip(old, new, strict=True) for line in _changes(*pair)]
    raise UsageError(
        f"{run} was begun with other samples:\n  "
        + "\n  ".join(lines)
        + "\nWhich sample comes when depends on all of them. Give the run's stores as they were, in their order (they "
        "may lie elsewhere); or train on these with another --out, from the run's weights if you like: "
        "`alpacache export` it and pass that as --model."
    )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between a store when the run began and the one given now."""
    path, count, was = new["path"], new["samples"], old["samples"]
    lines = []
    if count > was:
        lines.append(f"store {path} has grown: {count} samples, {was} when the run began")
    elif count < was:
        lines.append(
            f"store {path} has lost samples: {count}, {was} when the run began; `alpacache extract` makes them again"
        )
    elif old["ids_sha256"] != new["ids_sha256"]:
        lines.append(f"store {path} has other samples than {old['path']} had when the run began")
    if old["identity"] and new["identity"]:
        apart = differences(old["identity"], new["identity"])
        lines += [f"store {path} has other features than {old['path']} had: {line}" for line in apart]
    return lines

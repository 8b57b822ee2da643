"""What a run is of: its samples and settings, compared among its processes and with who goes on with it.

A run is exact only for the samples that it began with, in their order, because which one comes when depends on all of
them.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import model_identity
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.training.config import TrainConfig
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
"""Config keys that do not change what a step computes; `stores` and `model` may move, their identity is checked.

`micro_batch` changes how sums are rounded: unless another is given, a run keeps its own.
"""
_OF_A_MACHINE = {"resume", "out", "device", "model", "stores", "val", "in_memory", "memory_budget", "track", "keep"}
"""Config keys that may differ among the processes of a run; what the paths lead to may not."""


def total_steps(config: TrainConfig, samples: int) -> int:
    """Steps of the whole run."""
    return config.steps or math.ceil((config.epochs or 0) * samples / config.batch_size)


def stores_record(config: TrainConfig, data: CachedDataset) -> list[dict[str, Any]]:
    """Of each store, in order: its path, its samples, and what their features are; plain JSON."""
    return [_record(path, data, indices) for path, indices in zip(config.store_paths, data.store_ranges, strict=True)]


def _record(path: str, data: CachedDataset, indices: range) -> dict[str, Any]:
    ids = hashlib.sha256()
    for index in indices:
        ids.update(f"{data.sample_id(index)}\n".encode())
    identity = dict(data.locate(indices.start)[0].identity) if indices else {}
    if indices:
        identity["model"] = _without_revision(identity["model"])
    return {"path": path, "samples": len(indices), "ids_sha256": ids.hexdigest(), "identity": identity}


def _without_revision(model: Mapping[str, Any]) -> dict[str, Any]:
    """A plain directory knows none; the VLM is known by its weights."""
    return {key: value for key, value in model.items() if key != "revision"}


def check_alike(
    config: TrainConfig,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    stores: Sequence[Mapping[str, Any]],
    val: CachedDataset | None,
    world: World,
) -> None:
    """Refuse to begin where the processes see different things: they would train apart, or wait for each other.

    `stores`: their `stores_record`. Raises `UsageError` in all processes, with what each sees.
    """
    if world.size == 1:
        return
    model = _without_revision(model_identity(checkpoint))
    seen = {
        "checkpoint to go on from": _newest(directory),
        "model": f"{model['id']} ({_digest(model)[:8]})",
        "samples of --store": _in_short(stores),
        "samples of --val": "none" if val is None else _in_short([_record("", val, range(len(val)))]),
        "steps in all": total_steps(config, sum(store["samples"] for store in stores)),
    }
    settings = dataclasses.asdict(config)
    seen |= {key: value for key, value in settings.items() if key not in _OF_A_MACHINE}
    every = world.all_gather(seen)
    lines = [
        f"{key}: {_by_process([one[key] for one in every])}" for key in seen if len({repr(o[key]) for o in every}) > 1
    ]
    if lines:
        raise UsageError(
            f"the {world.size} processes of {config.out} do not see the same:\n  "
            + "\n  ".join(lines)
            + "\nNothing was changed. Put run directory and stores where every machine sees them, wait until nothing "
            "writes to the stores any more (`alpacache extract`), and start all processes with the same options."
        )


def _newest(directory: RunDirectory) -> str:
    steps = directory.steps
    if not steps:
        return "none"
    return f"step {steps[-1]} (crc32c {directory.state(steps[-1])['files'][MODEL]['crc32c']})"


def _in_short(stores: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{store['samples']} of digest {_fingerprint(store)[:8]}" for store in stores)


def _fingerprint(store: Mapping[str, Any]) -> str:
    """Of a store's samples and features, wherever it lies."""
    return _digest([store["ids_sha256"], store["identity"]])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _by_process(values: Sequence[object]) -> str:
    """`4 in process 0; none in process 1, 2`."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return "; ".join(f"{value} in process {', '.join(map(str, found))}" for value, found in ranks.items())


def settings_record(config: TrainConfig, stores: Sequence[Mapping[str, Any]], *, processes: int) -> dict[str, Any]:
    """What a run saves of its settings: what must not change over a resume, and what is kept unless it is given."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE_TO_CHANGE}
    settings["betas"] = list(config.betas)
    settings["lr"] = config.peak_lr
    settings["store_weights"] = config.store_weights
    if config.trainable != "lora":
        del settings["lora_rank"], settings["lora_alpha"]
    samples = sum(store["samples"] for store in stores)
    kept = {"micro_batch": config.micro_batch, "processes": processes}
    return {**settings, **kept, "dataset_samples": samples, "stores": [dict(store) for store in stores]}


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], *, run: str) -> None:
    """Refuse to go on with other samples or settings than a run began with, both as `settings_record` gave them."""
    if before["dataset_samples"] != now["dataset_samples"] or "stores" in before:  # in none of an older version
        _check_stores(before, now, run=run)
    apart = _FREE_TO_CHANGE | {"dataset_samples", "processes"}
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
    old, new = before.get("stores", []), now["stores"]
    first, second = [_fingerprint(store) for store in old], [_fingerprint(store) for store in new]
    if first == second:
        return
    names = [", ".join(store["path"] for store in stores) for stores in (old, new)]
    if len(old) != len(new):
        of = f" of {len(old)} stores ({names[0]})" if old else ""
        lines = [
            f"{now['dataset_samples']} samples of {len(new)} stores ({names[1]})",
            f"the run has {before['dataset_samples']}{of}",
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
    """What is another about a store."""
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
        found = differences(old["identity"], new["identity"])
        lines += [f"store {path} has other features than {old['path']} had: {line}" for line in found]
    return lines


def as_begun(config: TrainConfig, directory: RunDirectory, world: World) -> TrainConfig:
    """What was left to the plan when the run began, and changes what a step computes, stays as it was planned then.

    A micro-batch stays on as many processes as it was planned for.
    """
    if not directory.steps:
        return config
    before = directory.state(directory.steps[-1])["settings"]
    names = ["draws", "micro_batch"] if before.get("processes") == world.size else ["draws"]
    open_ones = {name: before[name] for name in names if getattr(config, name) in (None, "auto") and name in before}
    return replace(config, **open_ones)

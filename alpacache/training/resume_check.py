"""Records of a run's settings and samples in its checkpoints, and the check that a later call goes on with the same.

A run can go on exactly only with the samples that it began with, in their order: all of them decide which one comes
when.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import ids_digest
from alpacache.cached_samples.sample_choice import ChosenSamples, words_of
from alpacache.errors import UsageError
from alpacache.masking import masked
from alpacache.planning.config import NEW_EXPERT
from alpacache.training.config import absolute_place, absolute_stores
from alpacache.training.run_directory import RunDirectory
from alpacache.training.run_names import CHOICE
from alpacache.training.schedule import FORMER_SCHEDULE, SCHEDULE, default_warmup
from cache_store import differences

MACHINE_SETTINGS = {
    "resume",
    "take_over",
    "out",
    "device",
    "model",
    "stores",
    "val",
    "in_memory",
    "memory_budget",
    "track",
    "keep",
}
"""Settings that may differ among the processes of a run; what their paths lead to may not."""
CHOICE_SETTINGS = {"only", "exclude", "sample_weights", "split_by"}
"""Settings that are recorded by what they came to."""
_FREE_TO_CHANGE = MACHINE_SETTINGS | {
    "save_every",
    "val_every",
    "val_samples",
    "val_shuffled",
    "best_by",
    "patience",
    "on_damage",
}
_FREE_TO_CHANGE |= {"on_overlap", "ema", "ema_every", "capture", "checkpointing", "micro_batch"}
"""Settings that do not change what a step computes; `stores` and `model` may move, their identity is checked.

`micro_batch` changes how sums are rounded: a run keeps its own unless another is given.
"""


def steps_of(epochs: float, samples: int, batch_size: int) -> int:
    """Steps in which every sample comes so many times."""
    return math.ceil(epochs * samples / batch_size)


def stores_record(paths: Sequence[str], data: CachedDataset) -> list[dict[str, Any]]:
    """Path, samples and identity of each store that a dataset was opened from; plain JSON."""
    return [store_record(path, data, indices) for path, indices in zip(paths, data.store_ranges, strict=True)]


def store_record(path: str, data: CachedDataset, indices: range) -> dict[str, Any]:
    ids = ids_digest(map(data.sample_id, indices))
    identity = dict(data.locate(indices.start)[0].identity) if indices else {}
    if indices:
        identity["model"] = _without_revision(identity["model"])
    return {"path": masked(path), "samples": len(indices), "ids_sha256": ids, "identity": identity}


def _without_revision(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's identity without its revision: a plain directory knows none, and the VLM is known by its weights."""
    return {key: value for key, value in model.items() if key != "revision"}


def samples_text(stores: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{store['samples']} of digest {_fingerprint(store)[:8]}" for store in stores)


def _fingerprint(store: Mapping[str, Any]) -> str:
    """Digest of a store's samples and identity, wherever it lies."""
    return digest([store["ids_sha256"], store["identity"]])


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def settings_record(
    settings: Mapping[str, Any],
    stores: Sequence[Mapping[str, Any]],
    *,
    processes: int,
    schedule: str = SCHEDULE,
    chosen: ChosenSamples | None = None,
) -> dict[str, Any]:
    """The settings that a checkpoint records: those that must not change over a resume, and those that are restored.

    `settings` are the fields of the settled config, with `lr` as it is used and `store_weights`.
    """
    record = {key: value for key, value in settings.items() if key not in _FREE_TO_CHANGE | CHOICE_SETTINGS}
    if chosen is not None:
        record[CHOICE] = chosen.record
    if not settings["from_scratch"]:
        record = {key: value for key, value in record.items() if key not in NEW_EXPERT}
    record["betas"] = list(settings["betas"])
    if settings["trainable"] != "lora":
        del record["lora_rank"], record["lora_alpha"]
    samples = sum(store["samples"] for store in stores)
    restored = {"micro_batch": settings["micro_batch"], "processes": processes, "schedule": schedule}
    return {**record, **restored, "dataset_samples": samples, "stores": [dict(store) for store in stores]}


def check_begun(directory: RunDirectory, *, resume: bool) -> None:
    """Raise `UsageError` where a run would begin in the place of another."""
    if (steps := directory.steps) and not resume:
        raise UsageError(
            f"{directory.path} already holds a run (step {steps[-1]}); pass --resume to go on, or choose another --out."
        )


def kept_settings(directory: RunDirectory, *, resume: bool) -> dict[str, Any]:
    """The settings that a run keeps where a call leaves them open: as it was begun, or the defaults of a new run.

    Sizes of a new expert are among them where the run recorded such.
    """
    settings: Mapping[str, Any] = {}
    average: Mapping[str, Any] = {}
    free: Mapping[str, Any] = {}
    if resume and (steps := directory.steps):
        state = directory.state(steps[-1])
        settings, average, free = state["settings"], state["average"] or {}, state.get("free_settings", {})
    rule = settings.get("label_rule", "unguarded") if settings else "guarded"  # runs of before knew no other
    kept = {"seed": settings.get("seed", 0), "draws": settings.get("draws", 1), "label_rule": rule}
    kept |= {"prefix": settings.get("prefix", "direct"), "route_dropout": settings.get("route_dropout", 0.0)}
    kept |= {"ema": average.get("decay"), "ema_every": free.get("ema_every") or 100}
    return kept | {name: settings[name] for name in NEW_EXPERT if name in settings}


def check_same_expert(kept: Mapping[str, Any], given: Mapping[str, Any], *, run: str) -> None:
    """Raise `UsageError` where a new expert is asked for in another size than the run began with."""
    changed = [
        f"{name}: the run has {was!r}, now {value!r}"
        for name, value in given.items()
        if (was := kept.get(name)) is not None and value not in (None, was)
    ]
    _refuse_changed(changed, run=run)


def schedule_of(directory: RunDirectory) -> str:
    """The schedule of a run that goes on, or that of new ones."""
    steps = directory.steps
    settings = directory.state(steps[-1])["settings"] if steps else {"schedule": SCHEDULE}
    return str(settings.get("schedule", FORMER_SCHEDULE))


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], *, run: str) -> None:
    """Refuse to go on with other samples or settings than a run began with; both are a `settings_record`."""
    _check_same_choice(before.get(CHOICE), now.get(CHOICE), run=run)
    old, new = before["stores"], now["stores"]
    first, second = [_fingerprint(store) for store in old], [_fingerprint(store) for store in new]
    if first != second:
        names = [", ".join(store["path"] for store in stores) for stores in (old, new)]
        if len(old) != len(new):
            given = f"{now['dataset_samples']} samples of {len(new)} stores ({names[1]})"
            lines = [given, f"the run has {before['dataset_samples']} of {len(old)} stores ({names[0]})"]
        elif sorted(first) == sorted(second):
            lines = [f"the order of the stores: the run has {names[0]}", f"now {names[1]}"]
        else:
            lines = [line for pair in zip(old, new, strict=True) for line in _changes(*pair)]
        listed = "\n  ".join(lines)
        raise UsageError(
            f"{run} was begun with other samples:\n  {listed}\nWhich sample comes when depends on all of them. Give "
            "the run's stores as they were, in their order (they may lie elsewhere); or train on these with another "
            "--out, from the run's weights if you like: `alpacache export` it and pass that as --model."
        )
    was, wanted = _meant(before), _meant(now)
    changed = [
        f"{key}: the run has {was[key]!r}, now {value!r}"
        for key, value in wanted.items()
        if was.get(key, value) != value
    ]
    _refuse_changed(changed, run=run)


def _refuse_changed(changed: Sequence[str], *, run: str) -> None:
    """Raise `UsageError` where a run goes on with other settings, a line each."""
    if changed:
        listed = "\n  ".join(changed)
        raise UsageError(f"{run} was begun with other settings:\n  {listed}\nRepeat them, or choose another --out.")


def _check_same_choice(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None, *, run: str) -> None:
    """Refuse another choice of samples; one in other words that comes to the same is the same."""
    was, wanted = (None if choice is None else choice["sha256"] for choice in (before, now))
    of = {choice["of"] for choice in (before, now) if choice is not None}
    same_words = words_of(before or {}) == words_of(now or {})
    if was == wanted or (len(of) > 1 and same_words):  # the stores changed, which is told next
        return
    raise UsageError(
        f"{run} was begun with another choice of samples:\n  the run has {_choice_text(before)}\n  now "
        f"{_choice_text(now)}\nWhich sample comes when depends on it. Repeat the run's, or choose another --out."
    )


def _choice_text(choice: Mapping[str, Any] | None) -> str:
    if choice is None:
        return "all samples"
    options = "; ".join(f"{key} {json.dumps(value)[:300]}" for key, value in words_of(choice).items())
    return f"{choice['samples']} of {choice['of']} samples ({options}; digest {choice['sha256'][:8]})"


def _meant(record: Mapping[str, Any]) -> dict[str, Any]:
    """Part of a `settings_record` that must not change, in one form: epochs as steps, defaults spelled out."""
    apart = {"micro_batch", "processes", "schedule", "dataset_samples", "stores", "epochs", "steps", "warmup", CHOICE}
    # As it was before there was a choice.
    meant: dict[str, Any] = {"label_rule": "unguarded", "prefix": "direct", "route_dropout": 0.0, "from_scratch": False}
    meant |= {key: value for key, value in record.items() if key not in apart}
    if record.get("steps") or record.get("epochs"):
        meant["steps"] = steps = record.get("steps") or steps_of(
            record["epochs"], record["dataset_samples"], record["batch_size"]
        )
        meant["warmup"] = default_warmup(steps) if record.get("warmup") is None else record["warmup"]
    if meant.get("lora_alpha", 0) is None:
        meant["lora_alpha"] = 2.0 * meant["lora_rank"]
    if meant.get("optimizer") == "auto":  # as older versions recorded it: which one it was is not known
        del meant["optimizer"]
    return meant


def free_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a call that may differ in the next one, for a checkpoint to record; plain JSON, secrets masked."""
    free: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _FREE_TO_CHANGE - {"resume", "take_over"}:
            texts = isinstance(value, (list, tuple))
            free[key] = list(map(masked, value)) if texts else masked(value) if isinstance(value, str) else value
    return free


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List what a resumed run does otherwise than the call that wrote its checkpoint, where that recorded it."""
    return [
        f"{key} {json.dumps(before[key])} -> {json.dumps(value)}"
        for key, value in now.items()
        if key in before and _resolved(key, before[key]) != _resolved(key, value)
    ]


def _resolved(key: str, value: Any) -> Any:
    """A setting as it is compared: places as whole paths, since older versions recorded them as they were typed."""
    if key not in ("model", "stores", "val") or value is None:
        return value
    try:
        return absolute_place(value) if isinstance(value, str) else absolute_stores(value)
    except UsageError:  # what looks like a weight belonged to a path that is not there any more
        return value


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List the differences between a store when the run began and the one given now."""
    store, count, was = f"store {new['path']}", new["samples"], old["samples"]
    lines = []
    if count > was:
        lines.append(f"{store} has grown: {count} samples, {was} when the run began")
    elif count < was:
        lines.append(
            f"{store} has lost samples: {count}, {was} when the run began; `alpacache extract` makes them again"
        )
    elif old["ids_sha256"] != new["ids_sha256"]:
        lines.append(f"{store} has other samples than {old['path']} had when the run began")
    apart = differences(old["identity"], new["identity"]) if old["identity"] and new["identity"] else ()
    return lines + [f"{store} has other features than {old['path']} had: {line}" for line in apart]

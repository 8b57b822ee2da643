"""Inputs of a run, compared among its processes and with those a later call resumes it with.

A run can go on exactly only with the samples that it began with, in their order: all of them decide which one comes
when.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from alpacache import strict_json
from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import layer_map_of, vlm_config
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.alpamayo.new_expert import ExpertSpec, NewExpert, plan_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import check_same_vlm, ids_digest, model_identity, prompt_doubt
from alpacache.cached_samples.other_clips import partners_of
from alpacache.cached_samples.prefix_choice import PrefixChoice
from alpacache.cached_samples.sample_choice import ChosenSamples, SampleChoice, words_of
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.masking import masked
from alpacache.planning.config import NEW_EXPERT
from alpacache.training.config import TrainConfig, absolute_place, absolute_stores, weighted_stores
from alpacache.training.data_order import check_overlap, global_order
from alpacache.training.run_directory import MODEL, RunDirectory
from alpacache.training.run_names import CHOICE
from alpacache.training.schedule import FORMER_SCHEDULE, SCHEDULE, default_warmup
from alpacache.training.validation import held_out_samples
from cache_store import differences

_log = logging.getLogger(__name__)

_MACHINE_SETTINGS = {
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
_CHOICE = {"only", "exclude", "sample_weights", "split_by"}
"""Settings that are recorded by what they came to."""
_FREE_TO_CHANGE = _MACHINE_SETTINGS | {
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


class RunInputs:
    """Inputs of a run: its processes, its directory, what it learns from."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        """Open model and stores, and check that all processes see the same ones and can go on from the same step."""
        self.world, self.directory = world, RunDirectory(config.out)
        self.directory.check_usable()
        check_begun(self.directory, resume=config.resume)
        self.checkpoint = Checkpoint(config.model)
        if self.checkpoint.directory is not None:
            self.checkpoint.files()  # what could not be exported is refused now, not after training
        prefix = config.prefix or "direct"
        choice = PrefixChoice(prefix=prefix, route_dropout=config.route_dropout or 0.0, seed=config.seed or 0)
        self.data = CachedDataset(config.store_paths, self.checkpoint, choice=choice, samples=config.sample_choice)
        self.new_expert: ExpertSpec | None = None
        """The expert of one's own size that the run begins with; None for the model's."""
        if config.from_scratch:
            self.new_expert = _new_expert(
                self.checkpoint, config.expert_choices, held=self.data.held_layers, seed=config.seed or 0
            )
            self.checkpoint = NewExpert(self.checkpoint, self.new_expert)
        attended = sorted(set(layer_map_of(self.checkpoint)))
        self.data = self.data.of_layers(attended)
        if config.on_damage == "stop":
            self.data.refuse_unreadable()
        self.val: CachedDataset | None = None
        if config.val:
            choice = PrefixChoice(prefix=prefix, seed="val")  # the same for every seed, as validation's noise is
            held_out = SampleChoice(split=config.split_by, side="val")
            val = CachedDataset([config.val], self.checkpoint, choice=choice, samples=held_out)
            self.val = val.of_layers(attended)
            if config.val_shuffled:
                partners_of(val, held_out_samples(val, config.val_samples), seed=0)  # what cannot be is refused now
        if self.val is not None:
            check_same_vlm(self.data.vlm, self.val.vlm, run=f"this run ({config.out})", what=f"--val {config.val}")
        for path, places in zip(config.store_paths, self.data.store_ranges, strict=True):
            identity = self.data.locate(places.start)[0].identity if places else {}
            if world.is_first and identity and (doubt := prompt_doubt(self.checkpoint, identity, store=path)):
                _log.warning("%s.", doubt)
        if world.is_first and len(changes := self.data.changes) > 1:
            shown = "; ".join(sorted(", ".join(each) or "nothing" for each in changes))
            _log.warning("the stores show pictures that were changed since they were recorded by %s.", shown)
        if self.val is not None and world.is_first and (others := self.val.pictures - self.data.pictures):
            shown, learnt = "; ".join(sorted(others)), "; ".join(sorted(self.data.pictures))
            _log.warning("--val %s shows %s, and training sees %s.", masked(config.val or ""), shown, learnt)
        allowed, paths = config.on_overlap == "allow", config.store_paths
        for warning in check_overlap(self.data, paths, self.val, val_store=config.val, allowed=allowed):
            if world.is_first:
                _log.warning("%s.", warning)
        self.stores = stores_record(config.store_paths, self.data)
        self.total = config.steps or steps_of(config.epochs or 0, len(self.data), config.batch_size)
        """Steps of the whole run."""
        if world.size > 1:
            self._check_processes_agree(asdict(config))
        if not self.directory.steps:  # a run that was begun goes on
            self._check_enough(config.batch_size, config.epochs)
        self.order, self.unreadable = global_order(
            self.data,
            weighted_stores(config.stores),
            seed=config.seed or 0,
            by_curvature=config.balance == "curvature",
            skip_damaged=config.on_damage == "skip",
        )

    def _check_enough(self, batch_size: int, epochs: float | None) -> None:
        """Raise `UsageError` where a batch is larger than the data, or `epochs` smaller than a batch."""
        samples = len(self.data)
        if batch_size > samples:
            raise UsageError(
                f"batch_size is {batch_size}; expected at most {samples}, as many as the stores have samples. Pass "
                "--batch-size, or extract more."
            )
        least = math.ceil(1000 * batch_size / samples) / 1000
        if epochs is not None and epochs < least:
            raise UsageError(
                f"epochs is {epochs:g}; expected at least {least:g}, one batch of {batch_size} of {samples} samples."
            )

    def _check_processes_agree(self, settings: Mapping[str, Any]) -> None:
        """Refuse to begin where processes see different things: they would train apart, or wait for each other.

        Raises `UsageError` in all processes, with what each sees.
        """
        model, steps = model_identity(self.checkpoint), self.directory.steps
        newest = "none"
        if steps:
            newest = f"step {steps[-1]} (crc32c {self.directory.state(steps[-1])['files'][MODEL]['crc32c']})"
        val = "none"
        if self.val is not None:
            val = _samples_text([_store_record("", self.val, range(len(self.val)))])
        seen = {
            "checkpoint to go on from": newest,
            "model": f"of digest {_digest([model['settings'], model['expert_sha256'], model.get('trained')])[:8]}",
            "samples of --store": _samples_text(self.stores),
            "samples of --val": val,
            "weights of samples": "none" if self.data.chosen is None else f"of digest {self.data.chosen.sha256[:8]}",
            "steps in all": self.total,
        }
        seen |= {key: value for key, value in settings.items() if key not in _MACHINE_SETTINGS | _CHOICE}
        views = self.world.all_gather(seen)
        lines = []
        for key in seen:
            ranks: dict[str, list[str]] = {}
            for rank, view in enumerate(views):
                ranks.setdefault(str(view[key]), []).append(str(rank))
            seen_by = "; ".join(f"{value} in process {', '.join(those)}" for value, those in ranks.items())
            if len(ranks) > 1:
                lines.append(f"{key}: {seen_by}")
        if lines:
            listed = "\n  ".join(lines)
            raise UsageError(
                f"the {self.world.size} processes of {settings['out']} do not see the same:\n  {listed}\nNothing was "
                "changed. Put run directory and stores where every machine sees them, wait until nothing writes to the "
                "stores any more (`alpacache extract`), and start all processes with the same options."
            )


def _new_expert(checkpoint: Checkpoint, choices: Mapping[str, Any], *, held: Sequence[int], seed: int) -> ExpertSpec:
    text = vlm_config(checkpoint).text_config
    return plan_expert(
        checkpoint.shapes(*EXPERT_PARTS),
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        held=held,
        seed=seed,
        **choices,
    )


def steps_of(epochs: float, samples: int, batch_size: int) -> int:
    """Steps in which every sample comes so many times."""
    return math.ceil(epochs * samples / batch_size)


def stores_record(paths: Sequence[str], data: CachedDataset) -> list[dict[str, Any]]:
    """Path, samples and identity of each store that a dataset was opened from; plain JSON."""
    return [_store_record(path, data, indices) for path, indices in zip(paths, data.store_ranges, strict=True)]


def _store_record(path: str, data: CachedDataset, indices: range) -> dict[str, Any]:
    digest = ids_digest(map(data.sample_id, indices))
    identity = dict(data.locate(indices.start)[0].identity) if indices else {}
    if indices:
        identity["model"] = _without_revision(identity["model"])
    return {"path": masked(path), "samples": len(indices), "ids_sha256": digest, "identity": identity}


def _without_revision(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's identity without its revision: a plain directory knows none, and the VLM is known by its weights."""
    return {key: value for key, value in model.items() if key != "revision"}


def _samples_text(stores: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{store['samples']} of digest {_fingerprint(store)[:8]}" for store in stores)


def _fingerprint(store: Mapping[str, Any]) -> str:
    """Digest of a store's samples and identity, wherever it lies."""
    return _digest([store["ids_sha256"], store["identity"]])


def _digest(content: object) -> str:
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
    record = {key: value for key, value in settings.items() if key not in _FREE_TO_CHANGE | _CHOICE}
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


def restore_settings(config: TrainConfig) -> TrainConfig:
    """Fill in the seed, draws, prefix, label rule and average that a config leaves open: a run's, or defaults."""
    settings: Mapping[str, Any] = {}
    average: Mapping[str, Any] = {}
    free: Mapping[str, Any] = {}
    directory = RunDirectory(config.out)
    if config.resume and (steps := directory.steps):
        state = directory.state(steps[-1])
        settings, average, free = state["settings"], state["average"] or {}, state.get("free_settings", {})
    rule = settings.get("label_rule", "unguarded") if settings else "guarded"  # runs of before knew no other
    chosen = {"seed": settings.get("seed", 0), "draws": settings.get("draws", 1), "label_rule": rule}
    chosen |= {"prefix": settings.get("prefix", "direct"), "route_dropout": settings.get("route_dropout", 0.0)}
    chosen |= {"ema": average.get("decay"), "ema_every": free.get("ema_every") or 100}
    if config.from_scratch:
        sizes = {name: settings.get(name) for name in NEW_EXPERT}
        given = {name: strict_json.plain(getattr(config, name)) for name in NEW_EXPERT}
        changed = [
            f"{name}: the run has {was!r}, now {given[name]!r}"
            for name, was in sizes.items()
            if was is not None and given[name] not in (None, was)
        ]
        _refuse_changed(changed, run=config.out)
        chosen |= sizes
    return replace(config, **{key: value for key, value in chosen.items() if getattr(config, key) is None})


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

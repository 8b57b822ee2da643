"""Inputs of a run: its model, what it learns from and is validated on, and the order of its samples."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import layer_map_of, vlm_config
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.alpamayo.new_expert import ExpertSpec, NewExpert, plan_expert
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.identity import check_same_vlm, model_identity, prompt_doubt
from alpacache.cached_samples.order import GlobalOrder
from alpacache.cached_samples.other_clips import partners_of
from alpacache.cached_samples.prefix_choice import PrefixChoice
from alpacache.cached_samples.sample_choice import SampleChoice
from alpacache.distributed.world import World
from alpacache.errors import UsageError
from alpacache.masking import masked
from alpacache.training.config import TrainConfig, weighted_stores
from alpacache.training.data_order import check_overlap, global_order
from alpacache.training.resume_check import (
    CHOICE_SETTINGS,
    MACHINE_SETTINGS,
    check_begun,
    digest,
    samples_text,
    steps_of,
    store_record,
    stores_record,
)
from alpacache.training.run_directory import MODEL, RunDirectory
from alpacache.training.validation import held_out_samples
from cache_store import SampleReadError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """Inputs of a run, the same in all of its processes."""

    world: World
    directory: RunDirectory
    checkpoint: Checkpoint
    new_expert: ExpertSpec | None
    """The expert of one's own size that the run begins with; None for the model's."""
    data: CachedDataset
    val: CachedDataset | None
    stores: Sequence[Mapping[str, Any]]
    """Record of the stores that `data` is from."""
    total: int
    """Steps of the whole run."""
    order: GlobalOrder
    unreadable: Mapping[int, SampleReadError]
    """Samples that cannot be read, by index, and are left out from the beginning."""

    @classmethod
    def of(cls, config: TrainConfig, world: World) -> "RunInputs":
        """Open model and stores, and check that all processes see the same ones and can go on from the same step."""
        directory, checkpoint = RunDirectory(config.out), Checkpoint(config.model)
        directory.check_usable()
        check_begun(directory, resume=config.resume)
        if checkpoint.directory is not None:
            checkpoint.files()  # what could not be exported is refused now, not after training
        prefix, seed, paths = config.prefix or "direct", config.seed or 0, config.store_paths
        choice = PrefixChoice(prefix=prefix, route_dropout=config.route_dropout or 0.0, seed=seed)
        data = CachedDataset(paths, checkpoint, choice=choice, samples=config.sample_choice)
        new_expert = None
        if config.from_scratch:
            new_expert = _new_expert(checkpoint, config.expert_choices, held=data.held_layers, seed=seed)
            checkpoint = NewExpert(checkpoint, new_expert)
        attended = sorted(set(layer_map_of(checkpoint)))
        data = data.of_layers(attended)
        if config.on_damage == "stop":
            data.refuse_unreadable()
        val = None
        if config.val:
            val = _open_val(config.val, checkpoint, attended, prefix=prefix, split_by=config.split_by)
            if config.val_shuffled:
                partners_of(val, held_out_samples(val, config.val_samples), seed=0)  # what cannot be is refused now
            check_same_vlm(data.vlm, val.vlm, run=f"this run ({config.out})", what=f"--val {config.val}")
        for doubt in _doubts(checkpoint, data, paths, val, config.val) if world.is_first else ():
            _log.warning("%s.", doubt)
        allowed = config.on_overlap == "allow"
        for warning in check_overlap(data, paths, val, val_store=config.val, allowed=allowed):
            if world.is_first:
                _log.warning("%s.", warning)
        stores = stores_record(paths, data)
        total = config.steps or steps_of(config.epochs or 0, len(data), config.batch_size)
        if world.size > 1:
            seen = _seen(checkpoint, directory, data, stores, val) | {"steps in all": total}
            settings = {k: v for k, v in asdict(config).items() if k not in MACHINE_SETTINGS | CHOICE_SETTINGS}
            _check_processes_agree(world, seen | settings, run=config.out)
        if not directory.steps:  # a run that was begun goes on
            _check_enough(len(data), config.batch_size, config.epochs)
        order, unreadable = global_order(
            data,
            weighted_stores(config.stores),
            seed=seed,
            by_curvature=config.balance == "curvature",
            skip_damaged=config.on_damage == "skip",
        )
        return cls(
            world=world,
            directory=directory,
            checkpoint=checkpoint,
            new_expert=new_expert,
            data=data,
            val=val,
            stores=stores,
            total=total,
            order=order,
            unreadable=unreadable,
        )


def _open_val(
    store: str, checkpoint: Checkpoint, attended: Sequence[int], *, prefix: Any, split_by: str | None
) -> CachedDataset:
    """The store of held-out samples, with the choice of prefixes that is the same for every seed, as its noise is."""
    choice = PrefixChoice(prefix=prefix, seed="val")
    held_out = SampleChoice(split=split_by, side="val")
    return CachedDataset([store], checkpoint, choice=choice, samples=held_out).of_layers(attended)


def _doubts(
    checkpoint: Checkpoint, data: CachedDataset, paths: Sequence[str], val: CachedDataset | None, val_store: str | None
) -> Iterator[str]:
    """Yield sentences on prompts and pictures that may not be meant."""
    for path, places in zip(paths, data.store_ranges, strict=True):
        identity = data.locate(places.start)[0].identity if places else {}
        if identity and (doubt := prompt_doubt(checkpoint, identity, store=path)):
            yield doubt
    if len(changes := data.changes) > 1:
        shown = "; ".join(sorted(", ".join(each) or "nothing" for each in changes))
        yield f"the stores show pictures that were changed since they were recorded by {shown}"
    if val is not None and (others := val.pictures - data.pictures):
        shown, learnt = "; ".join(sorted(others)), "; ".join(sorted(data.pictures))
        yield f"--val {masked(val_store or '')} shows {shown}, and training sees {learnt}"


def _check_enough(samples: int, batch_size: int, epochs: float | None) -> None:
    """Raise `UsageError` where a batch is larger than the data, or `epochs` smaller than a batch."""
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


def _seen(
    checkpoint: Checkpoint,
    directory: RunDirectory,
    data: CachedDataset,
    stores: Sequence[Mapping[str, Any]],
    val: CachedDataset | None,
) -> dict[str, Any]:
    """Describe the run's model, checkpoints and samples as this process sees them, for people to compare."""
    model, steps = model_identity(checkpoint), directory.steps
    newest = "none"
    if steps:
        newest = f"step {steps[-1]} (crc32c {directory.state(steps[-1])['files'][MODEL]['crc32c']})"
    return {
        "checkpoint to go on from": newest,
        "model": f"of digest {digest([model['settings'], model['expert_sha256'], model.get('trained')])[:8]}",
        "samples of --store": samples_text(stores),
        "samples of --val": "none" if val is None else samples_text([store_record("", val, range(len(val)))]),
        "weights of samples": "none" if data.chosen is None else f"of digest {data.chosen.sha256[:8]}",
    }


def _check_processes_agree(world: World, seen: Mapping[str, Any], *, run: str) -> None:
    """Refuse to begin where processes see different things: they would train apart, or wait for each other.

    Raises `UsageError` in all processes, with what each sees.
    """
    views = world.all_gather(dict(seen))
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
            f"the {world.size} processes of {run} do not see the same:\n  {listed}\nNothing was changed. Put run "
            "directory and stores where every machine sees them, wait until nothing writes to the stores any more "
            "(`alpacache extract`), and start all processes with the same options."
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

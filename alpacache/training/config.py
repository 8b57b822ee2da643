"""Settings of stage two."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from alpacache.cached_samples.config import ChoiceConfig, check_weights_file
from alpacache.cached_samples.prefix_choice import TrainedPrefix
from alpacache.config import (
    MOST,
    BatchSize,
    Count,
    Epochs,
    Name,
    Place,
    Rank,
    Repeats,
    Seed,
    Written,
    expand_home,
    expect,
    number,
    parts,
    whole_number,
)
from alpacache.errors import UsageError
from alpacache.planning.config import LORA_RANK, MemoryBudget, NewExpertConfig, Trainable, budget_bytes

if TYPE_CHECKING:
    from alpacache.cached_samples.sample_choice import SampleChoice

_LR = {"all": 1e-4, "lora": 5e-4, "head": 1e-3}
_MIN_LR = 1e-6
_Beta = Annotated[float, Ge(0), Lt(1)]


def _count_or_auto(written: Any) -> Any:
    try:
        return whole_number(written)
    except (TypeError, ValueError):
        return written


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(ChoiceConfig, NewExpertConfig):
    """Settings of `train`."""

    stores: Annotated[tuple[str, ...], MinLen(1), Written(metavar="PATH[=WEIGHT]", read=expand_home, repeatable=True)]
    """Store to train from (also s3://), `PATH` or `PATH=WEIGHT`; repeatable. Without weights every sample comes once an
    epoch; with them each store has its weight's share of every epoch (1 where it has none)."""
    model: Place
    """The checkpoint that the stores were extracted with: hub id or directory."""
    out: Place
    """Directory of the run."""
    resume: bool = False
    """Go on from the run's newest checkpoint, if it has one. With the `config.toml` of a run as the config file and no
    other directory, that is the run where the file lies."""
    take_over: bool = False
    """Write to the run even if another process seems to: for a lock that a vanished machine has left. A process that is
    still there ends at its next row."""
    steps: Count | None = None
    """Optimizer steps; exactly one of steps and epochs."""
    epochs: Epochs | None = None
    """Passes over the samples, instead of steps."""
    batch_size: BatchSize = 8
    """Samples per step."""
    draws: Annotated[Repeats | Literal["auto"] | None, Written(metavar="INTEGER|auto", read=_count_or_auto)] = None
    """Noise draws per sample and step; they share the sample's prefix. `auto`: as many as the GPU can process
    while the next batch is read, measured when a run begins. Default: 1, or a resumed run's."""
    prefix: TrainedPrefix | None = None
    """What the expert attends to of a sample: the `direct` prefix, that of one of its reasoning `rollouts`, chosen anew
    in every epoch, or a `mix`, half of the times direct. Validation goes by the same rule, with one choice a sample for
    all of a run. Default: direct, or a resumed run's."""
    route_dropout: Annotated[float, Ge(0), Le(1)] | None = None
    """Share of the samples with a route that are trained without it, drawn anew for each sample in every epoch.
    Validation has all routes. Default: 0, or a resumed run's."""
    balance: Literal["none", "curvature"] = "none"
    """`curvature`: straight, gentle and sharp futures have equal shares of every epoch."""
    sample_weights: Place | None = None
    """Table (`.csv`, `.parquet`) of columns `sample_id` or `clip_id`, and `weight`: how often a sample comes relative
    to others, exact in every epoch. 0 leaves it out, and what is not named has weight 1. Store weights and `balance`
    divide the epoch first. Default: every sample once an epoch."""
    on_overlap: Literal["stop", "allow"] = "stop"
    """Reaction to stores that share samples: refuse, or count them as often as they are there."""
    on_damage: Literal["stop", "skip"] = "stop"
    """Reaction to a damaged sample: stop the run, or leave it out, counted, with another one in its place."""
    trainable: Trainable = "all"
    """`all`: expert and projections; `head`: projections and final norm; `lora`: head and adapters."""
    lora_rank: Rank = LORA_RANK
    """Rank of the adapters."""
    lora_alpha: Annotated[float, Gt(0), Le(1e6)] | None = None
    """Adapters are scaled by alpha / rank. Default: twice the rank."""
    optimizer: Literal["auto", "adamw8", "adamw"] = "auto"
    """`adamw8`: 8-bit moments and 24-bit master weights; `adamw`: as the public recipe. `auto` is adamw8 on a GPU."""
    lr: Annotated[float, Ge(0), Le(1)] | None = None
    """Peak learning rate. Default: 1e-4 for all parameters (the public recipe's), 5e-4 for adapters, 1e-3 for the head
    alone."""
    min_lr: Annotated[float, Ge(0), Le(1)] | None = None
    """Learning rate at the end of the cosine. Default: 1e-6, or lr if that is less."""
    warmup: Annotated[int, Ge(0), Le(MOST)] | None = None
    """Steps of linear warm-up before the cosine. Default: 100, or a tenth of the run if that is less."""
    betas: Annotated[tuple[_Beta, _Beta], parts(number, "NUMBER,NUMBER", expected="two numbers, as in 0.9,0.999")] = (
        0.9,
        0.999,
    )
    """Decay of AdamW's first and second moment."""
    weight_decay: Annotated[float, Ge(0), Le(1)] = 0.0
    """Decoupled weight decay of AdamW."""
    clip: Annotated[float, Gt(0), Le(1e18)] = 1.0
    """Largest gradient norm."""
    label_rule: Literal["guarded", "unguarded"] | None = None
    """`guarded`: curvatures are clamped, and 0 where the car all but stands, as in the public code since August 2026;
    `unguarded`: as before. Default: guarded, or a resumed run's."""
    times: Literal["beta", "uniform"] = "beta"
    """Distribution of the flow times that are trained."""
    causal: bool = False
    """Causal attention among action tokens, as the public recipe has it with transformers 4.57 and sdpa or eager
    attention (not with FlashAttention 2, nor with transformers 5). The deployed sampler is not causal."""
    seed: Seed | None = None
    """Seed of order, noise and times. Default: 0, or a resumed run's."""
    ema: Annotated[float, Gt(0), Lt(1)] | None = None
    """Decay per step, such as 0.999, of an average of the weights, kept in host memory and saved with every checkpoint.
    Default: no average, or a resumed run's."""
    ema_every: Count | None = None
    """Steps between updates of that average. Default: 100, or a resumed run's."""
    val: Place | None = None
    """Store of held-out samples for the validation loss. Default: no validation."""
    val_every: Count = 100
    """Steps between validations."""
    val_samples: Count = 64
    """Validation samples at most, spread evenly over the store."""
    val_shuffled: bool = False
    """Also log `val_loss/shuffled`, the loss with another clip's prefix: far above `val_loss` if the run looks. Takes
    the time of a second validation."""
    best_by: Literal["loss", "min_ade"] = "loss"
    """Measure of the best checkpoint: the validation loss, or minADE of 6 paths, which takes longer to compute."""
    patience: Count | None = None
    """Stop after so many validations without a new best. Default: never."""
    save_every: Count = 200
    """Steps between checkpoints; one is always saved at the end."""
    keep: Count = 2
    """Checkpoints to keep, besides the best."""
    track: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """TensorBoard events in the run directory; `wandb`: Weights & Biases as well."""
    micro_batch: BatchSize | None = None
    """Samples that go through the expert at a time; fewer take less memory, where all
    need not go at once for two backwards. Default: as many as fit."""
    checkpointing: bool | None = None
    """Compute activations again in the backward instead of keeping them: less memory. Default: if needed."""
    memory_budget: MemoryBudget | None = None
    """Size of the card to stay within, such as `24GB`: GPU memory is capped at half a GiB less. Default: all of it."""
    in_memory: bool = False
    """Keep training samples in RAM, page-locked and as they are stored, after their first read."""
    capture: bool = True
    """On a GPU, replay each step as one CUDA graph."""
    compile: bool = True
    """On a GPU, let torch.compile fuse each layer's small operations; rounds differently."""
    device: Name | None = None
    """`cuda`, `cuda:1` or `cpu`. Default: a GPU if there is one."""

    def _check_together(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            given = "neither is" if self.steps is None else "both are"
            raise UsageError(f"steps or epochs says how long to train, and {given} given; expected one of the two.")
        expect((self.min_lr or 0.0) <= self.peak_lr, "min_lr", self.min_lr, f"0 to lr ({self.peak_lr})")
        expect(self.patience is None or self.val is not None, "patience", self.patience, "a --val store with it")
        expect(not self.val_shuffled or self.val is not None, "val_shuffled", "true", "a --val store with it")
        expect(self.best_by == "loss" or self.val is not None, "best_by", self.best_by, "a --val store with it")
        if self.trainable != "lora" and not self.resume:  # runs of before may say a rank that nothing uses
            expect(self.lora_rank == LORA_RANK, "lora_rank", self.lora_rank, "--trainable lora with it")
            expect(self.lora_alpha is None, "lora_alpha", self.lora_alpha, "--trainable lora with it")
        weighted_stores(self.stores)
        self.check_new_expert()
        whole = not self.from_scratch or self.trainable == "all"
        expect(whole, "trainable", self.trainable, "all, as weights that are random must all be trained")
        check_weights_file(self.sample_weights)

    @property
    def sample_choice(self) -> "SampleChoice":
        """The choice among the samples of the stores."""
        from alpacache.cached_samples.sample_choice import SampleChoice

        return SampleChoice(
            only=self.only, exclude=self.exclude, weights=self.sample_weights, split=self.split_by, side="train"
        )

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return _LR[self.trainable] if self.lr is None else self.lr

    @property
    def final_lr(self) -> float:
        """The learning rate at the end."""
        return min(_MIN_LR, self.peak_lr) if self.min_lr is None else self.min_lr

    @property
    def budget_bytes(self) -> int | None:
        """GPU memory that the run's allocator may take; None: what is free."""
        return None if self.memory_budget is None else budget_bytes(self.memory_budget)

    @property
    def store_paths(self) -> list[str]:
        """The stores without their weights."""
        return [path for path, _ in weighted_stores(self.stores)]

    @property
    def store_weights(self) -> list[float | None]:
        """Weight of each store; all None where none has one."""
        return [weight for _, weight in weighted_stores(self.stores)]

    def with_absolute_places(self) -> "TrainConfig":
        """The same with whole paths for a model and stores that lie on this machine, for use from another directory."""
        stores = tuple(absolute_stores(self.stores))
        val = None if self.val is None else absolute_place(self.val)
        chosen = self.sample_choice.moved(absolute_place)
        moved = replace(self, only=chosen.only, exclude=chosen.exclude, sample_weights=chosen.weights)
        return replace(moved, model=absolute_place(self.model), stores=stores, val=val)


def absolute_place(place: str) -> str:
    """The whole path of what is there on a disk; a hub id, an address and what is not there stay as they are."""
    try:
        return str(Path(place).absolute()) if "://" not in place and Path(place).exists() else place
    except OSError:  # a name that is too long
        return place


def absolute_stores(stores: Sequence[str]) -> list[str]:
    """The same with whole paths, as `absolute_place` makes them; weights stay."""
    pairs = zip(stores, weighted_stores(stores), strict=True)
    return [absolute_place(path) + entry.removeprefix(path) for entry, (path, _) in pairs]


def weighted_stores(stores: Sequence[str]) -> list[tuple[str, float | None]]:
    """`PATH=WEIGHT` and `PATH` apart; the weight is None where none has one, else 1 where it is left out.

    Raises `UsageError` for a weight that is no number above 0.
    """
    pairs: list[tuple[str, float | None]] = []
    for entry in stores:
        path, separator, text = entry.rpartition("=")
        if not separator or "/" in text or "?" in path or Path(entry).exists():  # of a query no store says the weight
            pairs.append((entry, None))
            continue
        try:
            weight = number(text)
        except ValueError:
            weight = math.nan
        expect(0 < weight < math.inf, f"weight of store {path}", text, "a number above 0, as in PATH=0.5")
        pairs.append((path, weight))
    if all(weight is None for _, weight in pairs):
        return pairs
    return [(path, 1.0 if weight is None else weight) for path, weight in pairs]

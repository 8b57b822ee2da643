"""What stage two is told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alpacache.config_file import check_value
from alpacache.planning.config import Trainable, budget_gib

_LR = {"all": 1e-4, "lora": 5e-4, "head": 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Stage two."""

    stores: tuple[str, ...]
    """Each `PATH` or `PATH=WEIGHT`. Without weights every sample comes once an epoch; with them each store has its
    weight's share of every epoch (1 where it has none)."""
    model: str
    out: str
    val: str | None = None
    """A store of held-out samples; without it there is no validation loss."""
    steps: int | None = None
    """Exactly one of steps and epochs."""
    epochs: float | None = None
    batch_size: int = 8
    draws: int | Literal["auto"] = 1
    """Noise draws a sample and step; they share the sample's prefix. `auto`: as many as a GPU is through with while the
    stores deliver the next batch, measured when a run begins."""
    micro_batch: int | None = None
    """Samples that go through the expert at a time; fewer take less memory. None: as many as fit."""
    trainable: Trainable = "all"
    lora_rank: int = 16
    lora_alpha: float | None = None
    """Adapters are scaled by alpha / rank; None means twice the rank."""
    optimizer: Literal["auto", "adamw8", "adamw"] = "auto"
    """`adamw8`: 8-bit moments and 24-bit master weights; `adamw`: as the public recipe. `auto` is adamw8 on a GPU."""
    lr: float | None = None
    """Peak; None means 1e-4 for all parameters (the public recipe's), 5e-4 for adapters, 1e-3 for the head alone."""
    min_lr: float = 1e-6
    warmup: int | None = None
    """Steps of linear warm-up before the cosine; None means 100, or a tenth of the run if that is less."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest gradient norm."""
    times: Literal["beta", "uniform"] = "beta"
    causal: bool = False
    seed: int = 0
    save_every: int = 200
    """Steps between checkpoints; one is always saved at the end."""
    keep: int = 2
    val_every: int = 100
    val_samples: int = 64
    best_by: Literal["loss", "min_ade"] = "loss"
    """What `best` is the best by: the validation loss, or minADE of 6 paths, which takes longer to find."""
    patience: int | None = None
    """Stop after so many validations without a new best."""
    ema: float | None = None
    """Decay a step of an average of the weights, such as 0.999, kept in host memory and saved with every checkpoint."""
    ema_every: int = 100
    """Steps between updates of that average."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What a damaged sample does: stop the run, or be left out and counted, another one in its place."""
    track: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """TensorBoard events in the run directory; `wandb`: Weights & Biases as well."""
    balance: Literal["none", "curvature"] = "none"
    """`curvature`: straight, gentle and sharp futures have equal shares of every epoch."""
    in_memory: bool = False
    """Keep training samples in RAM, page-locked and as they are stored, after their first read."""
    capture: bool = True
    """On a GPU, replay each step as one CUDA graph."""
    compile: bool = True
    """On a GPU, let torch.compile fuse each layer's small operations; rounds differently."""
    checkpointing: bool | None = None
    """Compute activations again in the backward instead of keeping them. None: where it is what fits."""
    memory_budget: str | None = None
    """Size of the card to stay within, such as `24GB`: GPU memory is capped at half a GiB less."""
    device: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        check_value(len(self.stores) >= 1, "stores", self.stores, "at least one store")
        check_value(
            (self.steps is None) != (self.epochs is None),
            "steps/epochs",
            (self.steps, self.epochs),
            "exactly one of the two",
        )
        check_value(self.steps is None or self.steps >= 1, "steps", self.steps, "at least 1")
        check_value(self.epochs is None or self.epochs > 0, "epochs", self.epochs, "above 0")
        for name in ("batch_size", "keep", "save_every", "val_every", "val_samples", "ema_every"):
            check_value(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check_value(self.draws == "auto" or self.draws >= 1, "draws", self.draws, "at least 1, or auto")
        for name in ("micro_batch", "lora_rank", "patience"):
            check_value((getattr(self, name) or 1) >= 1, name, getattr(self, name), "at least 1")
        if self.memory_budget is not None:
            check_value(
                budget_gib(self.memory_budget) > 0.5, "memory_budget", self.memory_budget, "a size such as 24GB"
            )
        lr = self.peak_lr
        check_value(0 <= self.min_lr <= lr, "min_lr", self.min_lr, f"0 to lr ({lr})")
        check_value(self.patience is None or self.val is not None, "patience", self.patience, "a --val store with it")
        check_value(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "above 0 and below 1, such as 0.999")
        check_value(self.best_by == "loss" or self.val is not None, "best_by", self.best_by, "a --val store with it")
        check_value(self.clip > 0, "clip", self.clip, "above 0")
        check_value(self.warmup is None or self.warmup >= 0, "warmup", self.warmup, "0 or more")
        weighted_stores(self.stores)

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return _LR[self.trainable] if self.lr is None else self.lr


def weighted_stores(stores: Sequence[str]) -> list[tuple[str, float | None]]:
    """`PATH=WEIGHT` and `PATH` apart; the weight is None where none has one, else 1 where it is left out.

    Raises `UsageError` for a weight that is no number above 0.
    """
    found: list[tuple[str, float | None]] = []
    for entry in stores:
        path, separator, text = entry.rpartition("=")
        if not separator or "/" in text or Path(entry).exists():
            found.append((entry, None))
            continue
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        check_value(0 < weight < math.inf, f"weight of store {path}", text, "a number above 0, as in PATH=0.5")
        found.append((path, weight))
    if all(weight is None for _, weight in found):
        return found
    return [(path, 1.0 if weight is None else weight) for path, weight in found]

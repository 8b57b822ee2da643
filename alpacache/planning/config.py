"""What `plan` is asked, and the sizes that people write."""

from dataclasses import dataclass
from typing import Literal

from alpacache.driving.sample import FRONT_CAMERA
from alpacache.errors import UsageError
from alpacache.planning.machine import MEASURED
from cache_store import CodecName

Trainable = Literal["all", "head", "lora"]


def budget_gib(text: str) -> float:
    """`24GB` or `24` as 24.0: cards are named by GB and have GiB. Raises `UsageError` for anything else."""
    number = text.strip().upper().removesuffix("IB").removesuffix("GB").removesuffix("G")
    try:
        return float(number)
    except ValueError:
        raise UsageError(f"memory_budget is {text!r}; expected a size such as 24GB.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What is asked. Fields are `extract`'s and `train`'s of the same names."""

    samples: int
    views: int = 1
    model: str | None = None
    """None: the released sizes."""
    cameras: tuple[str, ...] = (FRONT_CAMERA,)
    frames: int = 4
    picture: tuple[int, int] = (1080, 1920)
    """Height and width of the recordings."""
    codec: CodecName = "bf16"
    hidden_states: Literal["last", "none"] = "last"
    reasoning: Literal["none", "rollout"] = "none"
    rollouts: int = 6
    batch_size: int = 8
    draws: int = 1
    epochs: float = 3.0
    trainable: Trainable = "all"
    lora_rank: int = 16
    memory_budget: str | None = None
    """None: all of the GPU's."""
    store: str | None = None
    """Where free space and, with `probe`, the disk's speed are looked up."""
    gpu: str = MEASURED
    """A key of `gpus.GPUS`."""
    probe: bool = False
    """Measure the disk, and the GPU if there is one, and count CPU cores, instead of assuming."""

    def __post_init__(self) -> None:
        for name in ("samples", "views", "rollouts", "batch_size", "draws", "lora_rank"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if max(self.picture) > 200 * min(self.picture):
            raise UsageError(f"picture is {self.picture}; expected height and width of at most 1 to 200.")
        if not 1 <= self.frames <= 4:
            raise UsageError(f"frames is {self.frames}; expected 1 to 4.")
        if not self.epochs > 0:
            raise UsageError(f"epochs is {self.epochs}; expected above 0.")
        if self.memory_budget is not None and budget_gib(self.memory_budget) <= 0.5:
            raise UsageError(f"memory_budget is {self.memory_budget}; expected a size such as 24GB.")

    @property
    def stored(self) -> int:
        """Samples in the store, each view one."""
        return self.samples * self.views

    @property
    def tails(self) -> int:
        """Reasoning rollouts that each is stored with."""
        return self.rollouts if self.reasoning == "rollout" else 0

"""Settings of `plan`, and the sizes of cards that people write."""

import difflib
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from alpacache.cached_samples.prefix_choice import TrainedPrefix
from alpacache.config import (
    BatchSize,
    Config,
    Count,
    Epochs,
    Name,
    Place,
    Rank,
    Repeats,
    Written,
    expect,
    parts,
    whole_number,
)
from alpacache.driving.cameras import FRONT_CAMERA, check_blank
from alpacache.driving.route import check_route
from alpacache.errors import UsageError
from alpacache.layer_choice import check_choice
from alpacache.planning.gpus import MEASURED
from alpacache.sources.config import Blank, Cameras, Clips, Frames, Moments, Side, SplitBy

Trainable = Literal["all", "head", "lora"]
ReleasedFamily = Literal["r1", "1.5", "2"]
"""Families with a public checkpoint, which a plan can be made for before it is here."""
_Side = Annotated[int, Ge(1), Le(16_384)]


def codec_names() -> list[str]:
    """How keys and values may be stored: as they are, or by a codec."""
    from cache_store import CODECS  # `alpacache --help` makes all options without it

    return ["bf16", *CODECS]


AUTO = "auto:"
"""Begins the name of a codec that is to be chosen: `auto:2%` is the smallest within that error of the velocity."""


def known_codec_name(written: Any) -> Any:
    """The name that stores have of this codec. Raises `ValueError` with what is allowed for one of no codec."""
    from cache_store.kv.registry import codec_name

    if str(written).startswith(AUTO):
        raise ValueError("a codec's name, as `alpacache codecs` finds beforehand for auto:PERCENT%")
    return codec_name(str(written))


Codec = Annotated[str, Written(metavar=lambda: "|".join([*codec_names(), "transform:RATE"]), read=known_codec_name)]
CONTEXT_BYTES = 2**29
"""CUDA's own, outside the allocator: why a budget of 24GB is a cap of 23.5 GiB."""


def allowed_bytes(card_gib: float) -> int:
    """Return the bytes that the allocator may take of a card of this size."""
    return int((card_gib - CONTEXT_BYTES / 2**30) * 2**30)


def budget_bytes(text: Any) -> int:
    """Parse a card's size into the allocator's bytes: 23.5 GiB of `24GB`. Cards are named by GB and have GiB.

    Raises `ValueError` with what was expected of anything else.
    """
    size = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(GI?B?)?\s*", text, re.IGNORECASE) if isinstance(text, str) else None
    if size is None or not 0.5 < float(size[1]) < 1e6:
        raise ValueError("a size such as 24GB")
    return allowed_bytes(float(size[1]))


def _checked_budget(written: Any) -> Any:
    budget_bytes(written)
    return written


_ROUTE_WORDS = ("none", "source")


def _checked_route(written: Any) -> Any:
    try:
        if check_route(written) is None:
            raise ValueError("it is empty")
        words = [] if written in _ROUTE_WORDS else written.lower().split()
        if len(words) == 1 and (near := difflib.get_close_matches(words[0], _ROUTE_WORDS, n=1, cutoff=0.8)):
            raise ValueError(f"as the text of all samples it is too like the word {near[0]}")
    except ValueError as error:
        raise ValueError(f"none, source or a text for the prompt ({error})") from None
    return written


Route = Annotated[str, Written(metavar="none|source|TEXT", read=_checked_route)]
MemoryBudget = Annotated[str, Written(metavar="SIZE", read=_checked_budget)]


_ROLLOUTS = 6
"""Reasoning texts per sample unless another number is asked for."""


@dataclass(frozen=True, kw_only=True)  # a second base of `ExtractConfig`, so without slots
class StoredConfig(Config):
    """Contents of a store for each sample; settings of `plan` and `extract`."""

    views: Repeats = 1
    """Times each sample is extracted: as it is, then with small seeded changes of its pictures."""
    codec: Codec = "bf16"
    """How KV is stored: lossless (`bf16`) or quantised; `int8` takes half the size, `transform:RATE` so many bits a
    value by a basis that is learnt from the first samples."""
    layers: Annotated[str | None, Written(metavar="every:N|first:N|0,6,..", read=check_choice)] = None
    """The VLM's layers whose KV is stored: `every:3`, `first:6`, or numbers from 0 as in `0,6,12`. Default: all."""
    hidden_states: Literal["last", "none"] = "last"
    """`last` stores the hidden states after the last layer, `none` does not."""
    reasoning: Literal["none", "rollout"] = "none"
    """`rollout` stores, beside the direct prompt's KV, that of sampled reasoning texts, for `eval` and `train
    --prefix`."""
    rollouts: Repeats | None = None
    """Reasoning texts per sample, with `--reasoning rollout`. Default: 6."""
    route: Route = "none"
    """Navigation text in the prompt: the source's (`source`) or one for all samples; the KV without it, and with left
    for right, is stored beside."""

    @property
    def tails(self) -> int:
        """Reasoning rollouts that each sample is stored with."""
        return (self.rollouts or _ROLLOUTS) if self.reasoning == "rollout" else 0

    def check_rollouts(self) -> None:
        """Raise `UsageError` for a number of rollouts where none are wanted."""
        if self.rollouts is not None and not self.tails:
            raise UsageError(
                f"rollouts is {self.rollouts}, and reasoning is none; add --reasoning rollout, or leave --rollouts out."
            )


LORA_RANK = 16
"""Rank of adapters unless another one is asked for."""
NEW_EXPERT = ("expert_layers", "expert_width", "expert_intermediate", "expert_heads", "expert_map")
"""Settings of an expert of one's own size."""
_Width = Annotated[int, Ge(1), Le(65_536)]
_Number = Annotated[int, Ge(1), Le(1024)]


@dataclass(frozen=True, kw_only=True)  # a second base, as above
class NewExpertConfig(Config):
    """An expert of one's own size; settings of `train` and `plan`."""

    from_scratch: bool = False
    """Train a new expert from random weights instead of the model's own; of any size, with the settings below."""
    expert_layers: _Number | None = None
    """Layers of the new expert. Default: as many as the model's own, or as the stores have, if that is fewer."""
    expert_width: _Width | None = None
    """Channels of its hidden states. Default: as the model's own; so are the proportions of what follows."""
    expert_intermediate: _Width | None = None
    """Width of its MLPs."""
    expert_heads: _Number | None = None
    """Query heads, a multiple of the VLM's KV heads."""
    expert_map: Annotated[
        tuple[Annotated[int, Ge(0), Le(1023)], ...] | None,
        parts(whole_number, "0,6,12,...", expected="layer numbers from 0, as in 0,6,12"),
    ] = None
    """The VLM's layer that each of its layers attends to. Default: evenly over the layers that the stores have; 12 over
    36 attend to 0, 3, 6, ..."""

    @property
    def expert_choices(self) -> dict[str, Any]:
        """Sizes asked of the new expert, as keywords of `plan_expert`."""
        return {
            "layers": self.expert_layers,
            "width": self.expert_width,
            "intermediate": self.expert_intermediate,
            "heads": self.expert_heads,
            "layer_map": self.expert_map,
        }

    def check_new_expert(self) -> None:
        """Raise `UsageError` for sizes of a new expert where none is wanted."""
        sizes = [name for name in NEW_EXPERT if getattr(self, name) is not None]
        if sizes and not self.from_scratch:
            raise UsageError(f"{sizes[0]} is of a new expert, and from_scratch is not given; add --from-scratch.")
        expect(self.expert_map != (), "expert_map", "empty", "layer numbers from 0, as in 0,6,12")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig(StoredConfig, NewExpertConfig):
    """Settings of `plan`; fields are those of `extract` and `train` of the same names."""

    source: Place | None = None
    """Recordings whose samples are counted, as `extract` would take them. Default: `samples` says how many."""
    samples: Count | None = None
    """How many samples: clips times t0s; of a source at most so many."""
    split: Side = "all"
    """Side of the source that is counted."""
    split_by: SplitBy = "clip"
    """How the source is split: `clip`, or `time:BLOCK_S[:GAP_S[:SEED]]`, as of `extract`."""
    clips: Clips = field(default_factory=tuple)
    """Count these clips only: ids (with `*` and `?`), or a file of them, as of `extract`; repeatable. Default: all."""
    t0: Moments = "5.1"
    """Moments of the source: seconds into the clip, `every:S`, `events`, `sharpest`, or a file, as of `extract`."""
    model: Place | None = None
    """Hub id or directory; only configs and headers are read. Default: the released sizes of `family`."""
    family: ReleasedFamily | None = None
    """Family whose released sizes are planned for without a model: R1, 1.5 or 2 Super. Default: `r1`."""
    cameras: Cameras = (FRONT_CAMERA,)
    """Cameras by full or short names, such as `front_wide,front_tele`."""
    blank: Blank = ()
    """Cameras that a black picture stands in for."""
    frames: Frames = 4
    """Images per camera, 0.1 s apart."""
    picture: Annotated[
        tuple[_Side, _Side],
        parts(whole_number, "HEIGHTxWIDTH", expected="HEIGHTxWIDTH, as in 1080x1920", separator="x"),
    ] = (1080, 1920)
    """Height and width of the recordings."""
    batch_size: BatchSize = 8
    """Samples per step."""
    draws: Repeats = 1
    """Noise draws per sample and step."""
    prefix: TrainedPrefix = "direct"
    """What is trained on: the direct prefix, `rollouts` or a `mix` of both, which need `--reasoning rollout`."""
    epochs: Epochs = 3.0
    """Passes over the samples."""
    trainable: Trainable = "all"
    """`all`: expert and projections; `head`: projections and final norm; `lora`: head and adapters."""
    lora_rank: Rank = LORA_RANK
    """Rank of the adapters."""
    memory_budget: MemoryBudget | None = None
    """Size of the card to stay within, such as `24GB`. Default: the GPU's."""
    store: Place | None = None
    """Place of the store to be: for free space and, with `probe`, the disk's speed."""
    gpu: Name = MEASURED
    """`h100`, `h200`, `a100`, `l40s`, `a6000`, `5090`, `4090`, `3090`, `4080`, `4070`, `3060` or `4060`."""
    probe: bool = False
    """Measure this disk, and this GPU if there is one, for up to 30 s, and count CPU cores, instead of assuming."""

    def _check_together(self) -> None:
        check_blank(self.cameras, self.blank)
        self.check_rollouts()
        self.check_new_expert()
        if self.source is None and self.samples is None:
            raise UsageError(
                "--samples missing; give it as an option or in --config FILE.toml: clips times t0s, or a SOURCE "
                "to count them in."
            )
        chooses = {"split": self.split, "split_by": self.split_by, "clips": ",".join(self.clips), "t0": self.t0}
        usual = {"split": "all", "split_by": "clip", "clips": "", "t0": "5.1"}
        for name, value in chooses.items():
            counts = self.source is not None or value == usual[name]
            expect(counts, name, value, "a SOURCE beside it, whose samples it chooses")
        adapts = self.trainable == "lora" or self.lora_rank == LORA_RANK
        expect(adapts, "lora_rank", self.lora_rank, "--trainable lora with it")
        expect(
            self.prefix == "direct" or self.tails > 0, "prefix", self.prefix, "direct, or --reasoning rollout with it"
        )
        flat = max(self.picture) > 200 * min(self.picture)
        expect(not flat, "picture", self.picture, "height and width of at most 1 to 200")

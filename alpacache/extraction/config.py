"""Settings of stage one."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from alpacache.config import (
    MOST,
    BatchSize,
    Config,
    Count,
    Name,
    Place,
    Seed,
    Threads,
    Written,
    expect,
    number,
    parts,
    whole_number,
)
from alpacache.driving.cameras import FRONT_CAMERA, check_blank
from alpacache.errors import UsageError
from alpacache.planning.config import AUTO, MemoryBudget, StoredConfig, codec_names, known_codec_name
from alpacache.sources.config import Blank, Cameras, Frames, Moments, SamplesConfig, Side

TRIED = (
    "int8",
    "fp8",
    "int5",
    "int4",
    *(f"transform:{rate}" for rate in ("6", "5", "4", "3.5", "3", "2.5", "2", "1.5", "1")),
)
"""Codecs that are tried unless others are named."""


def most_velocity_error(name: str) -> float | None:
    """The relative error of the velocity that `auto:2%` allows, 0.02; None for the name of a codec.

    Raises `ValueError` with what is allowed.
    """
    if not name.startswith(AUTO):
        return None
    text = name.removeprefix(AUTO)
    try:
        percent = number(text.removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not text.endswith("%") or not 0.01 <= percent <= 50:
        raise ValueError("auto:2%, from 0.01% to 50%")
    return percent / 100


def _known_or_chosen(written: Any) -> Any:
    if (most := most_velocity_error(str(written))) is not None:
        return f"{AUTO}{100 * most:.12g}%"
    try:
        return known_codec_name(written)
    except ValueError as error:
        raise ValueError(f"{error} or auto:PERCENT%") from None


_SEVERAL = "names of codecs, as in int8,transform:2"


def _codec_of_several(written: Any) -> Any:
    try:
        return known_codec_name(written)
    except ValueError as error:
        raise UsageError(f"codecs has {written!r}; expected {_SEVERAL}, each {error}.") from None


_Codec = Annotated[
    str,
    Written(metavar=lambda: "|".join([*codec_names(), "transform:RATE", "auto:PERCENT%"]), read=_known_or_chosen),
]
_Share = Annotated[int, Ge(0), Le(MOST)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig(StoredConfig, SamplesConfig):
    """Settings of `extract`."""

    model: Place
    """Hub id or directory of an Alpamayo checkpoint."""
    store: Place
    """Directory or s3://BUCKET/PREFIX of the store; created if absent."""
    blank: Blank = ()
    """Further cameras, recorded or not, each of which a black picture stands in for and keeps the place of."""
    codec: _Codec = "bf16"
    """How KV is stored: lossless (`bf16`) or quantised; `int8` takes half the size, `transform:RATE` so many bits a
    value by a basis that is learnt from the first samples, `auto:2%` whichever is smallest with an error of the
    expert's velocity of at most 2 % on some of them."""
    codec_from: Place | None = None
    """Store whose basis and tables `--codec transform:RATE` takes, rather than learning its own."""
    seed: Seed = 0
    """Seed of the changes that views make."""
    vlm: Place | None = None
    """Directory or hub id whose VLM weights take the place of the model's own."""
    vlm_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision that the VLM runs in, whatever its weights are stored in; `fp32` takes twice the memory."""
    camera_names: bool | None = None
    """Name cameras in the prompt. Default: as the model was trained (1.5 yes, R1 no), by what the checkpoint holds."""
    frame_numbers: bool | None = None
    """Number each camera's frames in the prompt. Default: as the model was trained."""
    route_tokens: bool | None = None
    """Write routes between the route tokens, not as they are. Default: as the model was trained (1.5 yes, R1 takes no
    routes)."""
    shard: Annotated[tuple[_Share, _Share], parts(whole_number, "I/N", expected="I/N, as in 0/4", separator="/")] = (
        0,
        1,
    )
    """This worker's number, from 0, and how many there are. Under torchrun its processes divide this share again."""
    deterministic: bool = False
    """Same bytes on every run on one GPU model, a little slower."""
    retry_quarantined: bool = False
    """Try samples again that failed before."""
    force: bool = False
    """Begin even if the disk has no room for all of it."""
    batch_size: BatchSize | None = None
    """Samples that go through the VLM at a time. Default: as many as have 32 images together on a GPU; 1 on a CPU
    and where runs are deterministic."""
    workers: Threads | None = None
    """Samples that are read and preprocessed at a time ahead of the VLM, by processes beside a GPU and by threads
    elsewhere. Default: two fewer than there are CPU cores, 2 to 24, shared by torchrun's processes."""
    writers: Threads = 6
    """Threads that commit samples behind the VLM. Each holds a sample in host memory, beside those that go through the
    VLM at a time, or two at least."""
    memory_budget: MemoryBudget | None = None
    """Size of the card to stay within, such as `12GB`: GPU memory is capped at half a GiB less. Where the VLM's weights
    do not fit, they come from RAM or from the files for each group of samples. Default: what is free."""
    weights: Literal["auto", "gpu", "ram", "files"] = "auto"
    """Home of the weights of the VLM's layers while they do not compute: the GPU, page-locked RAM, or the checkpoint's
    files, which want a fast drive. `auto`: the first of these that fits."""
    compile: bool | None = None
    """On a GPU, let torch.compile fuse the VLM's small operations; rounds differently. Default: where at least a minute
    of prefill is left and runs need not be deterministic."""
    device: Name | None = None
    """`cuda`, `cuda:1` or `cpu`. Default: a GPU if there is one."""

    def _check_together(self) -> None:
        check_blank(self.cameras, self.blank)
        self.check_rollouts()
        worker, workers = self.shard
        expect(0 <= worker < workers, "shard", f"{worker}/{workers}", "I/N with 0 <= I < N, as in 0/4")
        expect(not (self.compile and self.deterministic), "compile", True, "off, as the run is to be deterministic")
        alone = self.batch_size in (None, 1) or not self.deterministic
        expect(alone, "batch_size", self.batch_size, "1, as the run is to be deterministic")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecsConfig(Config):
    """Settings of `codecs`."""

    input: Place
    """Recordings, as `extract` takes them, or a store of `--codec bf16`."""
    model: Place
    """Hub id or directory of an Alpamayo checkpoint, whose expert judges."""
    codecs: Annotated[
        Annotated[tuple[str, ...], MinLen(1)] | None,
        parts(_codec_of_several, "NAME,...", expected=_SEVERAL),
    ] = None
    """Codecs to try. Default: int8, fp8, int5, int4, and transform from 6 bits a value down to 1."""
    samples: Count = 48
    """Samples that are looked at, at most, spread over all: codecs are learnt from two thirds and judged on the
    others."""
    split: Side = "all"
    """Side of the recordings, by clip."""
    t0: Moments = "5.1"
    """Moments of the recordings, as of `extract`."""
    cameras: Cameras = (FRONT_CAMERA,)
    """Cameras by full or short names, such as `front_wide,front_tele`."""
    frames: Frames = 4
    """Images per camera, 0.1 s apart, the last at t0."""
    gradients: bool = True
    """Measure the error of the expert's gradient too, which takes twice the memory of its weights."""
    seed: Seed = 0
    """Seed of noise and times."""
    workers: Threads | None = None
    """Samples that are read at a time. Default: as `extract` has it."""
    device: Name | None = None
    """`cuda`, `cuda:1` or `cpu`. Default: a GPU if there is one."""

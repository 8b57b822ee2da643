"""Settings of `prepare` and `check`, and the choice of samples that `extract` has too."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from alpacache.config import Config, Count, Name, Place, Seed, Written, expand_home, is_unicode, number, parts
from alpacache.driving.cameras import FRONT_CAMERA, full_camera_name
from alpacache.errors import UsageError

_LONGEST_S = 1e6
_LISTS = (".txt", ".csv", ".parquet")


def is_file(entry: str) -> bool:
    """Tell whether a text names a file of names, by its ending, whether it is there or not; others are names."""
    return entry.lower().endswith(_LISTS)


def t0_us(written: Any) -> int | None:
    """Microseconds of `5.1` (into the clip) or `every:2.0` (apart); None for `events`, `routes`, `sharpest` and files.

    Raises `ValueError` with what was expected of anything else.
    """
    if written in ("events", "routes", "sharpest") or is_file(written):
        return None
    with suppress(ValueError):
        if 1e-3 <= (seconds := number(written.removeprefix("every:"))) <= _LONGEST_S:
            return round(seconds * 1e6)
    words = "events, routes, sharpest, or a file of moments (.csv, .parquet, .txt)"
    raise ValueError(f"5.1 (seconds), every:2.0 (seconds apart), {words}")


def _checked_t0(written: Any) -> Any:
    t0_us(written)
    return expand_home(written) if is_file(written) else written


def _names(written: Any) -> tuple[str, ...]:
    names = (written,) if isinstance(written, str) else tuple(written)
    if not all(name.strip() and is_unicode(name) for name in names):
        raise ValueError("ids of clips, or a file of them")
    return tuple(expand_home(name) if is_file(name) else name for name in names)


def _checked_split(written: Any) -> Any:
    from alpacache.driving.splits import checked_split  # `--help` does without numpy

    return checked_split(written)


SplitBy = Annotated[str, Written(metavar="clip|time:S", read=_checked_split)]
Cameras = Annotated[tuple[str, ...], MinLen(1), parts(full_camera_name, "NAME,...", expected="names of cameras")]
Blank = Annotated[tuple[str, ...], parts(full_camera_name, "NAME,...", expected="names of cameras")]
Frames = Literal[1, 2, 3, 4]
Clips = Annotated[tuple[str, ...], Written(metavar="CLIPS", read=_names, repeatable=True)]
Moments = Annotated[str, Written(metavar="TEXT", read=_checked_t0)]
Side = Literal["train", "val", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesConfig(Config):
    """Choice of samples of a source."""

    source: Place
    """`folder:DIR`, `pai`, `pai:DIR`, `hf:PATH`, `synthetic:N`, or a directory that `prepare` wrote."""
    split: Side = "all"
    """Samples of one side, 90 to 10: by default clips, by the md5 of the clip id."""
    split_by: SplitBy = "clip"
    """`time:BLOCK_S[:GAP_S[:SEED]]` splits within each drive: one block of that many seconds in ten is held out, and
    training keeps GAP_S (8 or more) away from it."""
    clips: Clips = field(default_factory=tuple)
    """Only these clips: ids (with `*` and `?`), or a file of them (`.txt`, or `.csv` and `.parquet` with a column
    `clip_id`); repeatable. Default: all."""
    samples: Count | None = None
    """At most this many samples; 10 is the pilot run."""
    cameras: Cameras = (FRONT_CAMERA,)
    """Cameras by full or short names, such as `front_wide,front_tele`."""
    frames: Frames = 4
    """Images per camera, 0.1 s apart, the last at t0."""
    t0: Moments = "5.1"
    """Seconds into the clip, `every:S`, `events`, `routes` (the moments of `route_file`), `sharpest` (each clip's
    sharpest curve ahead), or a file of moments: sample ids, or columns `clip_id` and `t0_us`."""
    route_file: Place | None = None
    """JSON of navigation texts by clip and t0, as the public recipe's, in place of the source's own routes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig(SamplesConfig):
    """Settings of `prepare`."""

    out: Place
    """Directory for the Hugging Face dataset; must not exist."""
    seed: Seed | None = None
    """Take clips in a random order that this seed settles. Default: the source's order."""
    quota: Name | None = None
    """Samples of each turn in place of `samples`: `straight=200,gentle=100,sharp=100`."""
    size: Literal["original", "processor"] = "original"
    """Pictures as recorded (`original`) or as the model resizes them (`processor`)."""
    route: Literal["none", "source"] = "none"
    """`source` keeps the source's routes, or those of `route_file`, in a column `route`."""
    model: Place | None = None
    """Hub id or directory whose processor sets the size. Default: that of the released R1 and 1.5."""

    def _check_together(self) -> None:
        if self.model is not None and self.size == "original":
            raise UsageError(f"model {self.model[:200]} is of use with --size processor only; leave one of them out.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig(SamplesConfig):
    """Settings of `check`."""

    route: Literal["none", "source"] = "none"
    """`source`: look at the source's routes too, or at those of `route_file`."""
    out: Place | None = None
    """Directory for `contact_sheet.png` and `check.json`. Default: nothing written."""

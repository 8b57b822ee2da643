"""The number of samples of a plan: what a person says, or what extraction would take of a source."""

from collections.abc import Sequence
from dataclasses import dataclass

from alpacache.driving.splits import Split
from alpacache.errors import UsageError
from alpacache.sources.config import Side
from alpacache.sources.registry import open_source
from alpacache.sources.selection import note_on_split, select


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCount:
    """Samples before views."""

    samples: int
    clips: int | None = None
    """Clips that they are of; None where no source was counted."""
    notes: tuple[str, ...] = ()


def count_samples(
    source: str | None,
    *,
    cameras: Sequence[str],
    split: Side,
    split_by: Split,
    clips: Sequence[str],
    t0: str,
    most: int | None,
) -> SampleCount:
    """Count what `extract` would take of a source, or `most` without one. Raises `UsageError` for nothing to take."""
    if source is None:
        assert most is not None
        return SampleCount(samples=most)
    recordings = open_source(source, cameras=cameras)
    refs, unusable = select(recordings, split=split, split_by=split_by, clips=clips, t0=t0, samples=most)
    if not refs:
        raise UsageError(f"{source} has no sample in split {split!r}; choose another --split or --t0.")
    reasons = f"{len(unusable)} clips of {source} cannot be used; `alpacache check` says why." if unusable else None
    notes = tuple(filter(None, (reasons, note_on_split(recordings, split_by=split_by, clips=clips))))
    return SampleCount(samples=len(refs), clips=len({ref.clip_id for ref in refs}), notes=notes)

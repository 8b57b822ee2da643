"""Chooses which samples a run takes from a source: split, moments, number.

`prepare`, `extract` and `check` all choose here. The choice depends on the source and the arguments alone, so that a
resumed or sharded run makes the same one. Clips are looked at only until there are enough samples: a source may be a
hub with hundreds of thousands of clips.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from alpacache.driving.sample import FUTURE_STEPS, HISTORY_STEPS, STEP_US, SampleRef, split_of
from alpacache.driving.strata import Turn
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.quota import Quota
from alpacache.sources.source import EventSource, FixedSource, GroupedSource, Source

HISTORY_US = HISTORY_STEPS * STEP_US
"""t0 lies more than this after the start of the recording."""
FUTURE_US = FUTURE_STEPS * STEP_US
"""t0 lies at least this before the end of the recording."""
CLOCK_SLACK_US = 1_000_000
"""A recording that begins this near the zero of its clock counts its seconds from there."""
DEFAULT_T0 = "5.1"

Rejected = tuple[str, BadClipError]
"""Id of a clip (or, with a quota, of a sample) that was wanted and cannot be used, and the reason."""


def select(
    source: Source,
    *,
    split: Literal["train", "val", "all"] = "all",
    t0: str = DEFAULT_T0,
    samples: int | None = None,
    views: int = 1,
    seed: int | None = None,
    quota: Mapping[Turn, int] | None = None,
) -> tuple[list[SampleRef], list[Rejected]]:
    """Choose samples to load, clip after clip; also returns the clips that cannot give one.

    Args:
        t0: `"5.1"` (seconds from the start of the clip), `"every:2.0"` (all that fit on that raster) or `"events"`
            (the source's own moments, as far as they fit). A sample needs more than 1.6 s before t0 and 6.4 s after.
            A `FixedSource` gives all its samples and takes only the default.
        samples: take the first that many; clips beyond are not looked at.
        views: take each sample that many times in a row: more views never mean other moments.
        seed: take clips in a random order that this settles, in place of the source's.
        quota: take the first that many of each turn, by the poses; in place of `samples`.

    Raises `UsageError` for arguments that make no sense and for a split that holds no clip.
    """
    _check_arguments(split, samples, views, quota)
    wanted = None if quota is None else Quota(source, quota)
    samples_of: Callable[[str], Sequence[SampleRef]]
    if isinstance(source, FixedSource):
        samples_of = _fixed_samples(source.sample_refs, source.name, t0)
    else:
        samples_of = partial(_Moments.parse(t0, source).of, source)
    clips = [clip for clip in source.clip_ids if split == "all" or split_of(clip) == split]
    if not clips:
        raise UsageError(f"{source.name}: none of its {len(source.clip_ids)} clips falls into the {split} split.")
    refs: list[SampleRef] = []
    rejected: list[Rejected] = []
    for clip_id in clips if seed is None else shuffled(source, clips, seed):
        if wanted.is_full if wanted is not None else samples is not None and len(refs) >= samples:
            break
        try:
            fitting = samples_of(clip_id)
        except BadClipError as error:
            rejected.append((clip_id, error))
            continue
        refs += fitting if wanted is None else _within(wanted, fitting, rejected)
    return [replace(ref, view=view) for ref in refs[:samples] for view in range(views)], rejected


def shuffled(source: Source, clip_ids: Iterable[str], seed: int) -> list[str]:
    """Clips in a random order, group by group, by seed and names: more clips do not change the order of others."""

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    if not isinstance(source, GroupedSource):
        return sorted(clip_ids, key=place)
    return sorted(clip_ids, key=lambda clip_id: (place(f"group {source.group_of(clip_id)}"), place(clip_id)))


def _within(quota: Quota, refs: Iterable[SampleRef], rejected: list[Rejected]) -> list[SampleRef]:
    """The samples that the quota takes; those whose poses cannot be used are appended to `rejected`."""
    taken = []
    for ref in refs:
        try:
            if quota.take(ref):
                taken.append(ref)
        except BadClipError as error:
            rejected.append((ref.sample_id, error))
    return taken


def _fixed_samples(refs: Sequence[SampleRef], name: str, t0: str) -> Callable[[str], Sequence[SampleRef]]:
    """A function that gives the samples of a clip, all of which are taken."""
    if t0 != DEFAULT_T0:
        raise UsageError(f"{name}: t0 {t0!r} cannot be chosen, its moments were fixed when it was prepared.")
    if any(ref.view for ref in refs):
        raise UsageError(f"{name}: holds views above 0; views are made by extract, prepare the pictures as is.")
    by_clip: dict[str, list[SampleRef]] = {}
    for ref in refs:
        by_clip.setdefault(ref.clip_id, []).append(ref)
    return by_clip.__getitem__


class _Moments:
    """A parsed `t0`: one time, a raster, or the source's events."""

    def __init__(self, mode: Literal["at", "every", "events"], value_us: int) -> None:
        self._mode, self._value_us = mode, value_us

    @classmethod
    def parse(cls, text: str, source: Source) -> "_Moments":
        if text == "events":
            if not isinstance(source, EventSource):
                raise UsageError(f"{source.name} knows no events; give t0 in seconds, or every:SECONDS.")
            return cls("events", 0)
        mode: Literal["at", "every"] = "every" if text.startswith("every:") else "at"
        try:
            value_us = round(float(text.removeprefix("every:")) * 1e6)
        except (ValueError, OverflowError):
            value_us = 0
        if value_us <= 0:
            raise UsageError(f"t0 {text!r} is none of 5.1 (seconds), every:2.0 (seconds apart) or events.")
        return cls(mode, value_us)

    def of(self, source: Source, clip_id: str) -> list[SampleRef]:
        """The samples of one clip whose t0 leaves room for history and future, ascending."""
        if self._mode == "events" and isinstance(source, EventSource) and not source.event_times_us(clip_id):
            return []
        first, last = source.times_us(clip_id)
        start = clip_start_us(first, last)
        low, high = max(start + HISTORY_US + 1, first + HISTORY_US - STEP_US), last - FUTURE_US
        fitting = [time for time in self._candidates(source, clip_id, start, high) if low <= time <= high]
        if not fitting and self._mode != "events":
            raise BadClipError("short_clip", self._too_short(clip_id, start, first, last))
        return [SampleRef(clip_id=clip_id, t0_us=time) for time in fitting]

    def _candidates(self, source: Source, clip_id: str, start: int, high: int) -> Iterator[int]:
        if self._mode == "at":
            yield start + self._value_us
        elif self._mode == "every":
            yield from range(start + self._value_us, high + 1, self._value_us)
        elif isinstance(source, EventSource):
            yield from sorted(set(source.event_times_us(clip_id)))

    def _too_short(self, clip_id: str, start: int, first: int, last: int) -> str:
        wanted = (
            f"t0 at {self._value_us / 1e6:g} s" if self._mode == "at" else f"any t0 every {self._value_us / 1e6:g} s"
        )
        return (
            f"{clip_id}: poses and pictures cover {(first - start) / 1e6:.2f} s to {(last - start) / 1e6:.2f} s of the "
            f"clip, too short for {wanted}: more than {HISTORY_US / 1e6:g} s before it and {FUTURE_US / 1e6:g} s after "
            "it are needed."
        )


def clip_start_us(first_us: int, last_us: int) -> int:
    """Instant that a clip's seconds are counted from.

    The zero of its own clock if the recording begins within a second of it or runs across it (PhysicalAI-AV:
    5.1 s is the public loader's t0), else the recording's first instant (clocks that count from 1970).
    """
    return 0 if first_us <= CLOCK_SLACK_US and last_us > 0 else first_us


def _check_arguments(split: str, samples: int | None, views: int, quota: Mapping[Turn, int] | None) -> None:
    if split not in ("train", "val", "all"):
        raise UsageError(f"split {split!r} is none of train, val, all.")
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}; at least 1 is needed.")
    if views < 1:
        raise UsageError(f"views is {views}; at least 1 is needed, the pictures as they are.")
    if samples is not None and quota is not None:
        raise UsageError(f"samples is {samples} and there is a quota; the quota says how many, leave samples out.")

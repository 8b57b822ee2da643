"""Chooses which samples a run takes from a source: split, moments, number.

`prepare`, `extract` and `check` all choose here. The choice depends on the source and the arguments alone, so that a
resumed or sharded run makes the same one. Clips are looked at only until there are enough samples: a source may be a
hub with hundreds of thousands of clips.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

from alpacache.driving.poses import Track, history_and_future
from alpacache.driving.sample import FUTURE_STEPS, HISTORY_STEPS, STEP_US, SampleRef, split_of
from alpacache.driving.splits import Split, covered_us
from alpacache.driving.strata import TURNS, Turn, turns_ahead
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.config import is_file, t0_us
from alpacache.sources.moments import named_clips, named_moments, sharpest_us
from alpacache.sources.source import EventSource, FixedSource, GroupedSource, RecordedSource, Source

HISTORY_US = HISTORY_STEPS * STEP_US
"""t0 lies more than this after the start of the recording."""
FUTURE_US = FUTURE_STEPS * STEP_US
"""t0 lies at least this before the end of the recording."""
CLOCK_SLACK_US = 1_000_000
"""A recording that begins this near the zero of its clock counts its seconds from there."""
LONGEST_US = 86_400_000_000
"""A recording of more than a day is one whose clock was set while it ran, say from 1970."""
DEFAULT_T0 = "5.1"
_BY_HAND = (
    "Of few clips all may fall on one side: name those of either with --clips, or hold out blocks of time within long "
    "ones with --split-by time:60."
)

Rejected = tuple[str, BadClipError]
"""Id of a clip (or, with a quota, of a sample) that was wanted and cannot be used, and the reason."""


def select(
    source: Source,
    *,
    split: Literal["train", "val", "all"] = "all",
    split_by: Split = None,
    clips: Sequence[str] = (),
    t0: str = DEFAULT_T0,
    samples: int | None = None,
    views: int = 1,
    seed: int | None = None,
    quota: Mapping[Turn, int] | None = None,
    routed_us: Callable[[str], Sequence[int]] | None = None,
) -> tuple[list[SampleRef], list[Rejected]]:
    """Choose samples to load, clip after clip; also returns the clips that cannot give one.

    Args:
        clips: take samples of these clips only: ids, patterns, files of them. Empty for all.
        split: side of `split_by` to take samples of; None is by clip, else a clip's samples fall on both sides.
        t0: `"5.1"` (seconds from the start of the clip), `"every:2.0"` (all that fit on that raster), `"events"` (the
            source's own moments, as far as they fit), `"routes"` (those of `routed_us`), `"sharpest"` (one a clip, with
            its sharpest curve ahead) or a file that names clips and moments, each of which is tried. A sample needs
            more than 1.6 s before t0 and 6.4 s after. A `FixedSource` gives all its samples and takes only the default.
        samples: take the first that many; clips beyond are not looked at.
        views: take each sample that many times in a row: more views never mean other moments.
        seed: take clips in a random order that this settles, in place of the source's.
        quota: take the first that many of each turn, by the poses; in place of `samples`.
        routed_us: moments (us) of a clip that a file of routes names.

    Raises `UsageError` for arguments that make no sense and for a split that holds no clip.
    """
    if split not in ("train", "val", "all"):
        raise UsageError(f"split {split!r} is none of train, val, all.")
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}; at least 1 is needed.")
    if views < 1:
        raise UsageError(f"views is {views}; at least 1 is needed, the pictures as they are.")
    if samples is not None and quota is not None:
        raise UsageError(f"samples is {samples} and there is a quota; the quota says how many, leave samples out.")
    wanted = None if quota is None else Quota(source, quota)
    fixed = source.sample_refs if isinstance(source, FixedSource) else None
    samples_of = _moments(source, t0, routed_us) if fixed is None else _fixed_samples(fixed, source.name, t0)
    if split == "all" and split_by is not None:
        raise UsageError("split_by divides samples into two sides; name one of them with --split train or --split val.")
    by_clip = split != "all" and split_by is None
    among = named_clips(clips, source.clip_ids, source=source.name) if clips else source.clip_ids
    wanted_clips = [clip for clip in among if not by_clip or split_of(clip) == split]
    if not wanted_clips:
        raise UsageError(
            f"{source.name}: none of its {len(among)} {'named ' if clips else ''}clips falls into the {split} split. "
            f"{_BY_HAND}"
        )
    refs: list[SampleRef] = []
    rejected: list[Rejected] = []
    lengths_us: dict[str, int] = {}
    for clip_id in wanted_clips if seed is None else shuffled(source, wanted_clips, seed):
        if wanted.is_full if wanted is not None else samples is not None and len(refs) >= samples:
            break
        try:
            fitting = samples_of(clip_id)
            if split_by is not None and fitting:
                lengths_us[clip_id] = _length_us(source, clip_id, fitting)
                fitting = [ref for ref in fitting if split_by.side(ref.clip_id, ref.t0_us) == split]
        except BadClipError as error:
            rejected.append((clip_id, error))
            continue
        refs += fitting if wanted is None else wanted.take(fitting, rejected)
    if split_by is not None:
        split_by.check_lengths(lengths_us)
    return [replace(ref, view=view) for ref in refs[:samples] for view in range(views)], rejected


def note_on_split(source: Source, *, split_by: Split = None, clips: Sequence[str] = ()) -> str | None:
    """Say where a split by clip leaves the other side without a clip; None where both have one.

    To be said before anything is extracted: of a dozen clips all may be for training.
    """
    if split_by is not None:
        return None
    among = named_clips(clips, source.clip_ids, source=source.name) if clips else source.clip_ids
    if len(sides := {split_of(clip) for clip in among}) != 1:
        return None
    (side,) = sides
    other = "val" if side == "train" else "train"
    clips_of = "the only clip" if len(among) == 1 else f"each of the {len(among)} clips"
    return f"{clips_of} of {source.name} falls into the {side} split, none is left for {other}. {_BY_HAND}"


def _length_us(source: Source, clip_id: str, refs: Sequence[SampleRef]) -> int:
    """Length of a clip (us); of a source of samples, the time that those cover."""
    if isinstance(source, FixedSource):
        return covered_us(refs)[clip_id]
    first, last = source.times_us(clip_id)
    return last - first


def shuffled(source: Source, clip_ids: Iterable[str], seed: int) -> list[str]:
    """Clips in a random order, group by group, by seed and names: more clips do not change the order of others."""

    def place(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    if not isinstance(source, GroupedSource):
        return sorted(clip_ids, key=place)
    return sorted(clip_ids, key=lambda clip_id: (place(f"group {source.group_of(clip_id)}"), place(clip_id)))


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


def _moments(
    source: Source, t0: str, routed_us: Callable[[str], Sequence[int]] | None
) -> Callable[[str], Sequence[SampleRef]]:
    """A function that gives the samples of a clip whose t0 leaves room for history and future, ascending."""
    events: Callable[[str], Sequence[int]] | None = None
    track: Callable[[str], Track] | None = None
    every = t0.startswith("every:")
    try:
        given_us = t0_us(t0)
    except ValueError as error:
        raise UsageError(f"t0 is {t0!r}; expected {error}.") from None
    step_us = given_us or 0
    if t0 == "routes":
        if routed_us is None:
            raise UsageError("t0 is 'routes'; give the file that names the moments with --route-file.")
        events = routed_us
    elif is_file(t0):
        named = named_moments(t0, source.clip_ids, source=source.name)
        return lambda clip_id: [SampleRef(clip_id=clip_id, t0_us=time) for time in named(clip_id)]
    elif t0 == "sharpest":
        if not isinstance(source, RecordedSource):
            raise UsageError(f"{source.name} has no recordings to look for curves in; give t0 in seconds.")
        track = source.track
    elif given_us is None:
        if not isinstance(source, EventSource):
            raise UsageError(f"{source.name} knows no events; give t0 in seconds, or every:SECONDS.")
        events = source.event_times_us

    def samples_of(clip_id: str) -> Sequence[SampleRef]:
        times: Iterable[int] = sorted(set(events(clip_id))) if events else ()
        if events and not times:
            return []
        first, last = source.times_us(clip_id)
        if last - first > LONGEST_US:
            covered = f"poses and pictures cover {(last - first) / LONGEST_US:.0f} days"
            remedy = "a clock was set while they were recorded; drop what came before that."
            raise BadClipError("time_order", f"{clip_id}: {covered}: {remedy}")
        start = clip_start_us(first, last)
        low, high = max(start + HISTORY_US + 1, first + HISTORY_US - STEP_US), last - FUTURE_US
        if track is not None:
            raster = range(start + -(-(low - start) // STEP_US) * STEP_US, high + 1, STEP_US)
            times = [sharpest_us(track(clip_id), raster, where=clip_id)] if raster else []
        elif events is None:
            times = range(start + step_us, high + 1, step_us) if every else [start + step_us]
        fitting = [SampleRef(clip_id=clip_id, t0_us=time) for time in times if low <= time <= high]
        if not fitting and events is None:
            wanted = f"any t0 every {step_us / 1e6:g} s" if every else f"t0 at {step_us / 1e6:g} s"
            wanted = wanted if track is None else "any t0"
            covered = f"{(first - start) / 1e6:.2f} s to {(last - start) / 1e6:.2f} s of the clip"
            needed = f"more than {HISTORY_US / 1e6:g} s before it and {FUTURE_US / 1e6:g} s after it are needed"
            reason = f"poses and pictures cover {covered}, too short for {wanted}: {needed}."
            raise BadClipError("short_clip", f"{clip_id}: {reason}")
        return fitting

    return samples_of


def clip_start_us(first_us: int, last_us: int) -> int:
    """Instant that a clip's seconds are counted from.

    The zero of its own clock if the recording begins within a second of it or runs across it (PhysicalAI-AV:
    5.1 s is the public loader's t0), else the recording's first instant (clocks that count from 1970).
    """
    return 0 if first_us <= CLOCK_SLACK_US and last_us > 0 else first_us


class Quota:
    """Counts down the samples that are still wanted of each turn: in any log, straight roads outnumber curves by far.

    A turn that is not named is not wanted. It follows from the poses: no picture is read for a sample that is left out.
    """

    def __init__(self, source: Source, wanted: Mapping[Turn, int]) -> None:
        for turn, count in wanted.items():
            if turn not in TURNS or count < 1:
                raise UsageError(f"quota {turn}={count}: expected {', '.join(TURNS)} with at least 1 sample each.")
        if not wanted or not isinstance(source, FixedSource | RecordedSource):
            raise UsageError(f"{source.name}: a quota needs at least one turn, and a source whose poses can be read.")
        self._source, self._left = source, dict(wanted)
        if isinstance(source, RecordedSource):
            self._track = lru_cache(maxsize=1)(source.track)

    @property
    def is_full(self) -> bool:
        return not any(self._left.values())

    def take(self, refs: Iterable[SampleRef], rejected: list[Rejected]) -> list[SampleRef]:
        """The samples that are wanted; those whose poses cannot be used are appended to `rejected`."""
        taken = []
        for ref in refs:
            try:
                if isinstance(self._source, FixedSource):
                    poses = self._source.poses(ref)
                else:
                    poses = history_and_future(self._track(ref.clip_id), ref.t0_us, where=ref.clip_id)
            except BadClipError as error:
                rejected.append((ref.sample_id, error))
                continue
            (turn,) = turns_ahead(poses.history_rot[None], poses.future_xyz[None], poses.future_rot[None])
            if self._left.get(turn):
                self._left[turn] -= 1
                taken.append(ref)
        return taken


def parse_quota(text: str) -> dict[Turn, int]:
    """Parse `straight=200,sharp=100`; raises `UsageError`."""
    wanted: dict[Turn, int] = {}
    for part in text.split(","):
        turn, _, count = (piece.strip() for piece in part.partition("="))
        if turn not in TURNS or turn in wanted or not re.fullmatch("0*[1-9][0-9]{0,8}", count):
            form, example = f"TURN=SAMPLES with one of {', '.join(TURNS)}", "straight=200,gentle=100,sharp=100"
            raise UsageError(f"quota: {part.strip()[:80]!r} is not {form}, each once; expected such as {example}.")
        wanted[turn] = int(count)
    return wanted

"""Moments and clips that a person names: the clips of a list, the moments of a table, each clip's sharpest curve."""

from collections.abc import Callable, Sequence

import numpy as np

from alpacache.config import number
from alpacache.driving.poses import Track, check_usable, interpolate
from alpacache.driving.sample import FUTURE_STEPS, STEP_US, SampleRef
from alpacache.driving.strata import CURVATURE_STEPS, curvatures, driven_heading
from alpacache.errors import UsageError
from alpacache.sources.config import is_file
from alpacache.sources.name_lists import fitting, listed, read_names, read_table


def named_clips(entries: Sequence[str], clip_ids: Sequence[str], *, source: str) -> list[str]:
    """The clips of a source that entries name, in the source's order.

    An entry is an id, a pattern with `*` or `?`, or a file of them. Raises `UsageError` for what fits no clip.
    """
    known, taken = set(clip_ids), set[str]()
    for entry in entries:
        names = read_names(entry, ["clip_id"], what=f"--clips {entry}") if is_file(entry) else [entry]
        unknown = []
        for name in names:
            found = fitting(name, known)
            taken |= set(found)
            if not found:
                unknown.append(name)
        _refuse_unknown(unknown, f"--clips {entry}: {len(unknown)} of {len(names)} names fit no clip of {source}")
    return [clip_id for clip_id in clip_ids if clip_id in taken]


def named_moments(file: str, clip_ids: Sequence[str], *, source: str) -> Callable[[str], Sequence[int]]:
    """The moments (us) of a clip that a file names, ascending: sample ids, or columns `clip_id` and `t0_us`.

    Raises `UsageError` for a file that names no moments, or clips that the source does not have.
    """
    what = f"--t0 {file}"
    if file.lower().endswith(".txt"):
        table = {"sample_id": read_names(file, (), what=what)}
    else:
        table = read_table(file, ("sample_id", "clip_id", "t0_us"), what=what)
    if "sample_id" in table:
        names = [name.strip() for name in table["sample_id"]]
        refs = [_sample(name) for name in names]
        if bad := [name for name, ref in zip(names, refs, strict=True) if ref is None]:
            expected = "expected CLIP@T0_US#VIEW, as clip-7@5100000#0"
            raise UsageError(f"{what}: {len(bad)} of {len(names)} names are no sample ids, {listed(bad)}; {expected}.")
        pairs = [(ref.clip_id, ref.t0_us) for ref in refs if ref is not None]
    elif {"clip_id", "t0_us"} <= table.keys():
        times = [_microseconds(text) for text in table["t0_us"]]
        if bad := [text for text, time in zip(table["t0_us"], times, strict=True) if time is None]:
            expected = "expected whole microseconds on the clip's clock, as 5100000"
            raise UsageError(f"{what}: {len(bad)} of {len(times)} moments cannot be used, {listed(bad)}; {expected}.")
        pairs = [(clip.strip(), time) for clip, time in zip(table["clip_id"], times, strict=True) if time is not None]
    else:
        raise UsageError(f"{what}: expected a column sample_id, or the columns clip_id and t0_us.")
    if not pairs:
        raise UsageError(f"{what} names nothing.")
    moments: dict[str, set[int]] = {}
    for clip_id, time in pairs:
        moments.setdefault(clip_id, set()).add(time)
    known = set(clip_ids)
    unknown = [clip_id for clip_id in moments if clip_id not in known]
    _refuse_unknown(unknown, f"{what}: {len(unknown)} of {len(moments)} clips are none of {source}")
    return lambda clip_id: sorted(moments.get(clip_id, ()))


def sharpest_us(track: Track, times_us: Sequence[int], *, where: str) -> int:
    """The moment, of some 0.1 s apart, whose largest curvature ahead is the largest of all.

    Of many that have the same curve ahead it is the one with the curve in the middle of the 6.4 s, or as near to that
    as they get. Raises `BadClipError` for poses that cannot be used, as `history_and_future` does.
    """
    span = np.arange(times_us[0], times_us[-1] + FUTURE_STEPS * STEP_US + 1, STEP_US)
    check_usable(track, span, where=where)
    xyz, rot = interpolate(track, span)
    bent = curvatures(xyz, driven_heading(xyz, rot)).round(6)  # rounding must not choose within an even curve
    sharpest = int(bent.argmax()) + CURVATURE_STEPS // 2
    place = min(max(sharpest - FUTURE_STEPS // 2, 0), len(times_us) - 1)
    return times_us[place]


def _sample(name: str) -> SampleRef | None:
    try:
        return SampleRef.parse(name)
    except UsageError:
        return None


def _microseconds(text: str) -> int | None:
    try:
        value = number(text.strip())
    except ValueError:
        return None
    return int(value) if 0 <= value < 2**53 and value == int(value) else None


def _refuse_unknown(unknown: Sequence[str], problem: str) -> None:
    if unknown:
        raise UsageError(f"{problem}: {listed(unknown)}.")

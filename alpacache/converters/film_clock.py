"""Finds when the first frame of a film was taken, by how the film turns.

A camera's own clock is seconds or time zones off. But a film moves sideways in every turn, and a log says how the
vehicle turned: where both movements are alike, and nowhere else, the film belongs. On a drive without turns it cannot
be told, and nothing is guessed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.clocks import BEYOND, LAG_STEP_S, LAGS_S, Sideways, lag_curve
from alpacache.checks.pictures import WIDTH_PX, far_field, shift_px
from alpacache.converters.remux import opened
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError
from alpacache.sources.film_index import FORMATS
from alpacache.sources.image import check_size

STEP_S = 0.2
"""Least time between two frames that are compared."""
LOOKED_S = 240.0
"""Length of the film's beginning that is looked at."""
REORDERED = 64
"""Packets among which the first frame to be shown is."""
MIN_PAIRS = 25
MIN_TURNED_RAD = 0.5
"""Turning within what overlaps, without which a likeness tells nothing."""
MIN_LIKENESS, MIN_LEAD = 0.6, 0.15
"""Correlation of both movements, and by how much it must exceed that at any other peak."""
LEAST_OVERLAP = 0.5
"""Share of what was looked at that the log must cover at a place for that to be tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    """Sideways movement of a film, frame by frame."""

    begins_s: Floats
    """`[N]` since the first frame."""
    ends_s: Floats
    shift_px: Floats
    """`[N]` right positive, of 256 across; NaN where that is not clear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmStart:
    """The instant of a film's first frame in a log."""

    seconds: float
    """Since the log's first row."""
    error_s: float
    """Standard error, by leaving out each eighth of the film."""
    likeness: float
    """Correlation of both movements there."""


def shown_us(film: Path) -> NDArray[np.int64]:
    """Times at which frames are shown, from the film's first on, in the order of showing. Raises `BadClipError`."""
    times = []
    with opened(film, formats=FORMATS) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                if packet.pts is None:
                    reason = "does not say when its frames are shown; write it as MP4 with their times"
                    raise BadClipError("undecodable_video", f"{film.name} {reason}.")
                times.append(packet.pts)
        base = float(stream.time_base)
    shown = np.sort(np.array(times, dtype=np.int64))
    if len(shown) < 2 or (np.diff(shown) <= 0).any():
        raise BadClipError("undecodable_video", f"{film.name} has {len(shown)} frames, or two at one time.")
    since_us: NDArray[np.int64] = np.rint((shown - shown[0]) * (base * 1e6)).astype(np.int64)
    return since_us


def first_shown_s(film: Path) -> float:
    """Time at which the first frame is shown, on the clock of all of the film's streams. Raises `BadClipError`."""
    with opened(film, formats=FORMATS) as (container, stream):
        packets = islice((packet for packet in container.demux(stream) if packet.size), REORDERED)
        shown = [packet.pts for packet in packets if packet.pts is not None and not packet.is_discard]
        if not shown:
            raise BadClipError("undecodable_video", f"{film.name} does not say when its frames are shown.")
        return float(min(shown) * stream.time_base)


def turning_of(film: Path) -> Turning:
    """Look at the film's first minutes. Raises `BadClipError` for one that cannot be decoded."""
    fields, at_s = [], []
    for second, picture in _glimpses(film):
        fields.append(far_field(picture))
        at_s.append(second)
    shifts = [shift_px(before, after, quick=True) for before, after in pairwise(fields)]
    return Turning(
        begins_s=np.array(at_s[:-1]),
        ends_s=np.array(at_s[1:]),
        shift_px=np.array([np.nan if moved is None else moved for moved in shifts], dtype=np.float64),
    )


def find_start(turning: Turning, log_s: Floats, yaw_rad: Floats) -> FilmStart | str:
    """Place of the film in a log of `[M]` headings (rad, left positive, not wrapped); in words why there is none."""
    known = np.isfinite(turning.shift_px)
    if known.sum() < MIN_PAIRS:
        return f"the picture's movement is clear in {known.sum()} of {len(known)} steps only"
    begins, ends, shift = turning.begins_s[known], turning.ends_s[known], turning.shift_px[known]
    starts = np.arange(log_s[0] - ends[-1] * (1 - LEAST_OVERLAP), log_s[-1] - ends[-1] * LEAST_OVERLAP, LAG_STEP_S)
    likeness, turned = _likeness(starts, begins, ends, shift, log_s, yaw_rad)
    if not len(starts) or not np.isfinite(likeness).any():
        return f"the log does not cover half of the film, or turns by less than {MIN_TURNED_RAD} rad in it"
    best = int(np.nanargmax(likeness))
    other = float(np.nanmax(np.where(_of_peak(likeness, best), np.nan, likeness), initial=-1.0))
    turns = f"turned by {turned[best]:.1f} rad"
    if (opposite := -float(np.nanmin(likeness))) > max(float(likeness[best]), MIN_LIKENESS):
        why = "is the film mirrored, or is the log's turning right positive?"
        return (
            f"opposite movements are more alike ({opposite:.2f}) than equal ones ({likeness[best]:.2f}, {turns}); {why}"
        )
    if likeness[best] < MIN_LIKENESS or likeness[best] - other < MIN_LEAD:
        return f"the best likeness of both movements is {likeness[best]:.2f}, the next best {other:.2f} ({turns})"
    return _refined(float(starts[best]), begins, ends, shift, log_s, yaw_rad)


def _of_peak(values: Floats, best: int) -> NDArray[np.bool_]:
    """Tell which values are of the peak at `best`: on either side down to where they rise again."""
    inside = np.zeros(len(values), dtype=np.bool_)
    for step in (-1, 1):
        place = best
        while 0 <= place < len(values):
            inside[place] = True
            onward = place + step
            if not 0 <= onward < len(values) or not values[onward] <= values[place] + 1e-3:  # also NaN
                break
            place = onward
    return inside


def _likeness(
    starts: Floats, begins: Floats, ends: Floats, shift: Floats, log_s: Floats, yaw_rad: Floats
) -> tuple[Floats, Floats]:
    """Correlation of both movements if the film begins at each of `starts`, and by how much the vehicle turns there."""
    likeness, turned = np.full(len(starts), np.nan), np.zeros(len(starts))
    for place, start in enumerate(starts.tolist()):
        before, after = (np.interp(start + part, log_s, yaw_rad, left=np.nan, right=np.nan) for part in (begins, ends))
        turn = after - before
        known = np.isfinite(turn)
        turned[place] = np.abs(turn[known]).sum()
        if known.sum() < max(MIN_PAIRS, LEAST_OVERLAP * len(shift)) or turned[place] < MIN_TURNED_RAD:
            continue
        norm = np.linalg.norm(turn[known]) * np.linalg.norm(shift[known])
        likeness[place] = (turn[known] * shift[known]).sum() / norm if norm > 1e-9 else np.nan
    return likeness, turned


def _refined(
    start: float, begins: Floats, ends: Floats, shift: Floats, log_s: Floats, yaw_rad: Floats
) -> FilmStart | str:
    """The place between steps, and how well it is known: as the clocks of a finished clip are compared."""
    lags_s = LAG_STEP_S * np.arange(-BEYOND, len(LAGS_S) + BEYOND) + LAGS_S[0]
    before, after = (
        np.interp(start + part[:, None] - lags_s, log_s, yaw_rad, left=np.nan, right=np.nan) for part in (begins, ends)
    )
    seconds = (begins + ends) / 2
    pairs_us = np.round(1e6 * np.stack([begins, ends], axis=1)).astype(np.int64)
    film = Sideways(clip_id="film", pairs_us=pairs_us, seconds=seconds, shift_px=shift, turned_rad=after - before)
    curve = lag_curve([film])
    if curve is None or curve.best_s is None or curve.error_s is None or curve.drift is not None:
        why = "" if curve is None or curve.drift is None else ": the film's clock runs at another speed than the log's"
        return f"no place fits clearly best over {seconds[-1]:.0f} s of film{why}"
    peak = max(value for value in curve.likeness if value is not None)
    return FilmStart(seconds=start - curve.best_s, error_s=curve.error_s, likeness=peak)


def _glimpses(film: Path) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Seconds since the first frame and small pictures `[3, h, w]`, about `STEP_S` apart."""
    first: float | None = None
    wanted = 0.0
    with opened(film, formats=FORMATS) as (container, stream):
        for frame in container.decode(stream):
            if frame.time is None:
                continue
            first = frame.time if first is None else first
            second = frame.time - first
            if second > LOOKED_S:
                return
            if second + 1e-3 < wanted:
                continue
            wanted = second + STEP_S
            check_size(frame.width, frame.height, where=film.name)
            part = max(1, frame.width // (2 * WIDTH_PX))
            small = frame.reformat(
                width=frame.width // part, height=max(1, frame.height // part), format="rgb24", interpolation="AREA"
            )
            yield second, small.to_ndarray(format="rgb24").transpose(2, 0, 1)

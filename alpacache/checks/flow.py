"""Flow of the road: from picture to picture it comes nearer, and by as much as the vehicle drives.

Pictures in the wrong order and positions in a wrong unit leave each sample sound, and no camera is known well enough to
measure metres by. But a road that goes away shows that time runs backwards. And how far the road moves in the picture,
for each metre of the poses, is the focal length times the camera's height: the first follows from how the picture moves
in turns, so that positions which are 3.6 times too large put the camera on a mast, and small ones onto the asphalt.

The picture of the road in front is seen from above (`_patches`): there it moves as a whole, whatever the camera.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.checks.glimpses import MOVED_M, Glimpse
from alpacache.driving.sample import Floats

STEP_M = 0.8
"""Way between two pictures, if there are such, by which the road clearly moves."""
MAX_TURNED_RAD = 0.015
"""Turn between two pictures above which they are no step straight on."""
STEPS = 96
"""Most steps to look at, evenly chosen."""
MIN_STEPS = 10
CLIP_STEPS = 5
"""Least steps backwards by which a single clip is judged."""
MIN_PX = 24
"""Least height of pictures in which anything can be seen to move."""
HORIZONS = np.arange(0.26, 0.66, 0.04)
"""Heights of the horizon that are tried, as a share of the picture's height from the top."""
BOTTOM = 0.97
ROWS, COLUMNS = 64, 24
FAR = 3.0
"""Distance up to which the road is looked at, as a multiple of that at the bottom of the picture."""
BESIDE = 1.5
"""The same to either side, as a multiple of the camera's height."""
SMOOTH = 9
"""Rows on either side whose mean is taken off: the road's brightness falls with distance."""
SHIFTS = 28
"""Most rows by which the road is taken to move between two pictures."""
STILL = 0.7
"""Rows below which it does not clearly move."""
REACHES_PX_M: Floats = np.geomspace(10, 6000, 96)
"""Focal lengths (px, of 256 across) times heights (m) of the camera that are tried."""
MIN_MARGIN = 0.1
"""Least margin by which the likeness of both pictures must be greater one way than the other."""
MEAN_MARGIN = 0.15
"""Least mean of these margins over all steps: 0.24 to 0.6 on roads that are seen to move, 0.07 where nothing does."""
BACKWARDS = 0.8
MIN_LIKENESS, MIN_PROMINENCE = 0.2, 0.15
STEADY = 1.25
"""Most by which the best fit may change when any eighth of the steps is left out."""
PARTS = 8
LOW_M, HIGH_M = 0.8, 3.2
"""Heights of cameras behind windscreens and on roofs of cars, vans and lorries, with some room for error."""
LOW_PX_M, HIGH_PX_M = 70.0, 800.0
"""The same times focal lengths, for pictures that are 50 to 120 degrees wide."""
USUAL_FOCAL_PX = 175.0
"""Focal length of a picture that is 72 degrees wide."""


class Step(NamedTuple):
    """Two pictures between which the vehicle drove straight on."""

    clip_id: str
    before: NDArray[np.uint8]
    """`[h, w]`, grey."""
    after: NDArray[np.uint8]
    moved_m: float
    """Forwards positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Direction that the road moved in, counted over all steps."""

    steps: int
    """Steps at which it clearly moved one way."""
    backwards: int
    """Those of them at which it moved away while the vehicle drove forwards, or came nearer in reverse."""
    clips_against: tuple[str, ...]
    """Clips in which it did so at `CLIP_STEPS` steps or more, and at hardly any other."""
    reach_px_m: float | None
    """Focal length (px, of 256 across) times height (m) of the camera by which the road moved as far as the poses say;
    None if that is not clear."""


def steps_of(glimpse: Glimpse) -> list[Step]:
    """Steps straight on of `STEP_M` or more, the last one of `MOVED_M`."""
    steps, first, end = [], 0, len(glimpse.pictures) - 1
    for last in range(1, end + 1):
        moved_m = float(glimpse.way_m[last] - glimpse.way_m[first])
        if abs(moved_m) < (STEP_M if last < end else MOVED_M):
            continue
        if abs(glimpse.heading_rad[last] - glimpse.heading_rad[first]) < MAX_TURNED_RAD:
            steps.append(Step(glimpse.clip_id, glimpse.pictures[first], glimpse.pictures[last], moved_m))
        first = last
    return steps


def flow_of(glimpses: Sequence[Glimpse]) -> Flow | None:
    """Measure the flow over all steps straight on; None if there are too few."""
    steps = [step for glimpse in glimpses for step in steps_of(glimpse)]
    shapes = [step.before.shape for step in steps]
    steps = [step for step in steps if step.before.shape == step.after.shape == max(set(shapes), key=shapes.count)]
    if len(steps) < MIN_STEPS or min(steps[0].before.shape) < MIN_PX:
        return None
    steps = [steps[place] for place in np.linspace(0, len(steps) - 1, min(STEPS, len(steps))).round().astype(int)]
    moved_m = np.array([step.moved_m for step in steps])
    # What never moves, such as the bonnet, is in all pictures and hence in their mean.
    before, after = (
        np.stack([getattr(step, name) for step in steps]).astype(np.float32) for name in ("before", "after")
    )
    mean = (before.mean(axis=0) + after.mean(axis=0)) / 2
    before, after = before - mean, after - mean
    tables = [
        (_shares(before, after, horizon), _rows_a_metre(before.shape[1], before.shape[2], horizon))
        for horizon in HORIZONS
    ]
    margins = [_margins(shares) * np.sign(moved_m) for shares, _ in tables]
    seen = max(margins, key=lambda margin: float(np.abs(margin).mean()))  # whichever way: some may run backwards
    clear = (np.abs(seen) > MIN_MARGIN) & (np.abs(seen).mean() > MEAN_MARGIN)
    each = Counter(step.clip_id for step, told in zip(steps, clear, strict=True) if told)
    away = Counter(step.clip_id for step, told in zip(steps, clear & (seen < 0), strict=True) if told)
    return Flow(
        steps=each.total(),
        backwards=away.total(),
        clips_against=tuple(
            clip_id for clip_id, count in away.items() if count >= max(CLIP_STEPS, BACKWARDS * each[clip_id])
        ),
        reach_px_m=_reach(tables, moved_m),
    )


def _patches(pictures: NDArray[np.float32], horizon: float) -> NDArray[np.float32]:
    """`[N, ROWS, COLUMNS]` the road as seen from above, its rows evenly spaced in distance, without what is smooth."""
    height, width = pictures.shape[1:]
    top = horizon * height
    below = (BOTTOM * height - top) / np.linspace(1, FAR, ROWS)
    y = np.repeat(top + below, COLUMNS)
    x = (width / 2 + np.outer(below, np.linspace(-BESIDE, BESIDE, COLUMNS))).ravel()
    y, x = np.clip(y, 0, height - 1.001), np.clip(x, 0, width - 1.001)
    row, column = y.astype(np.intp), x.astype(np.intp)
    down, right = (y - row).astype(np.float32), (x - column).astype(np.float32)
    flat, at = pictures.reshape(len(pictures), -1), row * width + column
    seen = flat[:, at] * ((1 - down) * (1 - right)) + flat[:, at + width] * (down * (1 - right))
    seen += flat[:, at + 1] * ((1 - down) * right) + flat[:, at + width + 1] * (down * right)
    seen = seen.reshape(len(pictures), ROWS, COLUMNS)
    sums = np.cumsum(np.pad(seen, ((0, 0), (SMOOTH + 1, SMOOTH), (0, 0)), mode="edge"), axis=1)
    smooth = (sums[:, 2 * SMOOTH + 1 :] - sums[:, : -2 * SMOOTH - 1]) / (2 * SMOOTH + 1)
    return np.asarray(seen - smooth, dtype=np.float32)


def _shares(before: NDArray[np.float32], after: NDArray[np.float32], horizon: float) -> Floats:
    """`[N, 2 SHIFTS + 1]` likeness of both pictures' roads for each shift in rows, coming nearer positive."""
    one, other = _patches(before, horizon), _patches(after, horizon)
    energy_one, energy_other = ((part**2).sum(axis=2) for part in (one, other))
    likeness = []
    for shift in range(-SHIFTS, SHIFTS + 1):
        of_one, of_other = slice(max(0, shift), ROWS + min(0, shift)), slice(max(0, -shift), ROWS - max(0, shift))
        product = np.einsum("nrc,nrc->n", one[:, of_one], other[:, of_other])
        energy = energy_one[:, of_one].sum(axis=1) * energy_other[:, of_other].sum(axis=1)
        likeness.append(product / np.sqrt(energy + 1e-6))
    return np.stack(likeness, axis=1).astype(np.float64)


def _rows_a_metre(height: int, width: int, horizon: float) -> float:
    """Rows of a patch by which a road moves for each metre, if the camera's reach is 1 px m."""
    return (BOTTOM - horizon) * height / (width / 256) * (ROWS - 1) / (FAR - 1)


def _margins(shares: Floats) -> Floats:
    """`[N]` how much better the best shift nearer fits than the best one away."""
    return np.asarray(shares[:, SHIFTS + 1 :].max(axis=1) - shares[:, :SHIFTS].max(axis=1))


def _reach(tables: Sequence[tuple[Floats, float]], moved_m: Floats) -> float | None:
    """The reach that fits all steps best, if it fits clearly, and whichever eighth of them is left out."""
    best, prominence, sums = 0.0, 0.0, None
    for shares, rows_a_metre in tables:
        nearer = _by_reach(shares, moved_m * rows_a_metre)
        away = _by_reach(shares[:, ::-1], moved_m * rows_a_metre)
        rest = max(float(shares[:, SHIFTS].mean()), float(_mean(away.sum(axis=0)).max()))
        peak = float(_mean(nearer.sum(axis=0)).max())
        if peak > best:
            best, prominence, sums = peak, peak - rest, nearer
    if sums is None or best < MIN_LIKENESS or prominence < MIN_PROMINENCE:
        return None
    whole = _mean(sums.sum(axis=0))
    reach = float(REACHES_PX_M[np.argmax(whole)])
    rests = [float(REACHES_PX_M[np.argmax(_mean(sums.sum(axis=0) - part))]) for part in sums]
    is_steady = max(abs(np.log(rest / reach)) for rest in rests) < np.log(STEADY)
    return reach if is_steady else None


def _by_reach(shares: Floats, rows_px_m: Floats) -> Floats:
    """`[PARTS, 2, reaches]` sum over each part of the steps' likeness if the camera had each reach, and their number.

    Steps at which the road would hardly move are left out.
    """
    shift = rows_px_m[:, None] / REACHES_PX_M
    known = (np.abs(shift) > STILL) & (np.abs(shift) < SHIFTS - 1)
    place = np.where(known, shift, 0.0) + SHIFTS
    lower = np.minimum(np.floor(place).astype(np.intp), 2 * SHIFTS - 1)
    part, row = place - lower, np.arange(len(shares))[:, None]
    likeness = shares[row, lower] * (1 - part) + shares[row, lower + 1] * part
    columns = np.stack([np.where(known, likeness, 0.0), known], axis=1)
    return np.stack([steps.sum(axis=0) for steps in np.array_split(columns, PARTS)])


def _mean(sums: Floats) -> Floats:
    """`[reaches]` mean likeness; 0 where fewer than a third of the steps can tell."""
    likeness, known = sums
    return np.where(known >= max(3, known.max() / 3), likeness / np.maximum(known, 1), 0.0)


def judge_scale(flow: Flow | None, focal_px: float | None) -> Check:
    """Judge whether the road moves in the picture as far as the poses say, by the camera's height that this means.

    `focal_px` is how far the picture moves for each radian of a turn, of 256 across; None if no turn shows it.
    """
    if flow is None or flow.reach_px_m is None:
        return not_judged("scale", "the road in front is not clearly seen to move")
    reach = flow.reach_px_m
    height_m = reach / (focal_px or USUAL_FOCAL_PX)
    low, high = (LOW_M, HIGH_M) if focal_px else (LOW_PX_M / USUAL_FOCAL_PX, HIGH_PX_M / USUAL_FOCAL_PX)
    finding = f"for each metre of the poses the road moves as if seen from {height_m:.1f} m above"
    if not focal_px:
        finding += ", if the picture is 72 degrees wide"
    if low <= height_m <= high:
        return verdict("scale", finding)
    size, times, place = ("large", height_m / 1.6, "high") if height_m > high else ("small", 1.6 / height_m, "low")
    remedy = (
        f"From a car's height positions would be some {times:.1f} times too {size}: is it km/h taken for m/s "
        f"(3.6 times), feet (3.3 times), or the other way round? Or is the camera mounted that {place}?"
    )
    return verdict("scale", finding, warn=remedy)

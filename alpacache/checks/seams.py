"""Seams of samples that come without a recording: at t0 the future must go on as the history ends.

Each half may be sound and both not belong together, such as where rows were shuffled column by column. Then velocity
changes at t0 as nowhere else around it; if left and right of the future are exchanged, the yaw rate does.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, verdict
from alpacache.driving.poses import Seam
from alpacache.driving.sample import DT_S, HISTORY_STEPS
from alpacache.driving.strata import heading

CHANGE_MPS, TIMES = 0.4, 6.0
"""Change of velocity within 0.1 s, and multiple of the usual one, of a seam that is none of one drive: of 527 sound
moments (KITTI, a simulator, generated drives, with and without noise) none was so, with another moment's future 75 to
96 % were (30 % with 3 cm of noise)."""
MIN_SHARE = 0.02
BEND_STEPS = 6
"""Poses on either side of a moment by which the yaw rate before and after it is told: a parabola through headings."""
BEND_RADPS, BEND_TIMES = 0.15, 6.0
"""Change of the yaw rate, and multiple of the usual one, of a future that turns otherwise than its history: 3 of 580
sound moments were so (KITTI, a simulator, generated drives), three in four of those in turns with mirrored futures."""
MIN_BENT, MIN_BENT_SHARE = 2, 0.05


def is_torn(seam: Seam) -> bool:
    """Tell whether the future hardly is that of the history."""
    return seam.change_mps > CHANGE_MPS and seam.times > TIMES


def bends_at_t0(history_rot: NDArray[np.float32], future_rot: NDArray[np.float32]) -> bool:
    """Tell whether the yaw rate of `[16, 3, 3]` and `[64, 3, 3]` rotations changes at t0 as nowhere else."""
    yaw = np.unwrap(heading(np.concatenate([history_rot, future_rot]).astype(np.float64)))
    seconds = DT_S * np.arange(BEND_STEPS + 1)
    slope = np.linalg.pinv(np.stack([np.ones_like(seconds), seconds, seconds**2], axis=1))[1]
    windows = np.lib.stride_tricks.sliding_window_view(yaw, BEND_STEPS + 1)
    after, before = windows[BEND_STEPS:] @ slope, -(windows[:-BEND_STEPS, ::-1] @ slope)
    changes, now = np.abs(after - before), HISTORY_STEPS - 1 - BEND_STEPS
    usual = np.sqrt((changes[now + BEND_STEPS + 1 :] ** 2).mean())  # what is before t0 is too short to tell
    return bool(changes[now] > max(BEND_RADPS, BEND_TIMES * usual))


def judge_bends(bends: Mapping[str, Sequence[bool]]) -> Check | None:
    """A check of `poses` that warns if futures turn otherwise than their histories; None if not. `bends`: by clip."""
    count, of = sum(map(sum, bends.values())), sum(map(len, bends.values()))
    if count < max(MIN_BENT, MIN_BENT_SHARE * of):
        return None
    example = max(bends, key=lambda clip_id: sum(bends[clip_id]))
    finding = f"in {count} of {of} samples the yaw rate changes at t0 as nowhere after it, such as in {example}"
    remedy = "Is the future that of the same sample, and are left and right the same in history and future?"
    return verdict("poses", finding, warn=remedy)


def judge_seams(seams: Mapping[str, Sequence[Seam]]) -> Check | None:
    """A check of `poses` that warns if paths are torn at t0, or fails if most are; None if not. `seams`: by clip."""
    torn = {clip_id: [seam for seam in each if is_torn(seam)] for clip_id, each in seams.items()}
    count, of = sum(map(len, torn.values())), sum(map(len, seams.values()))
    if count < max(1, MIN_SHARE * of):
        return None
    example = max(torn, key=lambda clip_id: len(torn[clip_id]))
    worst = max(torn[example], key=lambda seam: seam.change_mps)
    finding = f"in {count} of {of} samples velocity changes at t0 as nowhere around it, such as in {example}: by "
    finding += f"{worst.change_mps:.1f} m/s within 0.1 s, {worst.times:.0f} times as much"
    remedy = "Is the future that of the same sample, and in the order of time?"
    return verdict("poses", finding, **{"fail" if 2 * count > of else "warn": remedy})

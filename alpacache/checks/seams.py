"""Seams of samples that come without a recording: at t0 the future must go on as the history ends.

Each half may be sound and both not belong together, such as where rows were shuffled column by column. Then velocity
changes at t0 as nowhere else around it.
"""

from collections.abc import Mapping, Sequence

from alpacache.checks.check import Check, verdict
from alpacache.driving.poses import Seam

CHANGE_MPS, TIMES = 0.4, 6.0
"""Change of velocity within 0.1 s, and multiple of the usual one, of a seam that is none of one drive: of 527 sound
moments (KITTI, a simulator, generated drives, with and without noise) none was so, with another moment's future 75 to
96 % were (30 % with 3 cm of noise)."""
MIN_SHARE = 0.02


def is_torn(seam: Seam) -> bool:
    """Tell whether the future hardly is that of the history."""
    return seam.change_mps > CHANGE_MPS and seam.times > TIMES


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

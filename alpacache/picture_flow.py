"""Which way a front camera's picture moves, to find pictures that are mirrored against the poses.

Turning left moves what lies ahead to the right in the picture, whatever lens and calibration. Driving on spreads the
picture from its middle; blocks are matched in pairs left and right of it, so that this cancels out.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.strata import Floats

Picture: TypeAlias = NDArray[np.uint8]
WIDTH_PX = 256
"""Pictures are matched at about this width."""
BLOCK_PX = 48
REACH_PX = 36
"""Furthest that a block is looked for."""
ROWS = (0.25, 0.62)
"""Rows around the horizon: the far field, above the road and the bonnet."""
PLACES = (0.12, 0.24, 0.36)
"""Middles of blocks from the picture's middle, as a share of its width."""
MIN_LIKENESS = 0.6
MIN_CONTRAST = 2.0
MIN_SHIFT_PX = 0.75


def sideways_shift_px(earlier: Picture, later: Picture) -> float | None:
    """Pixels, at 256 across, that the far field of `[3, H, W]` pictures moved right; None: it cannot be told."""
    before, after = _small(earlier), _small(later)
    shifts = []
    for top, bottom in _bands(before.shape[0]):
        for place in PLACES:
            pair = [_block_shift(before, after, top, bottom, 0.5 + side * place) for side in (-1, 1)]
            if pair[0] is not None and pair[1] is not None:
                shifts.append((pair[0] + pair[1]) / 2)
    if len(shifts) < 2:
        return None
    return float(np.median(shifts))


def agrees(shift_px: float | None, turned_rad: float) -> bool | None:
    """Whether a picture moved as the heading's change (left positive) says; None for too little to tell."""
    if shift_px is None or abs(shift_px) < MIN_SHIFT_PX:
        return None
    return bool((shift_px > 0) == (turned_rad > 0))


def _bands(height: int) -> list[tuple[int, int]]:
    low, high = int(ROWS[0] * height), int(ROWS[1] * height)
    middle = (low + high) // 2
    return [(low, middle), (middle, high), (low, high)]


def _small(picture: Picture) -> Floats:
    """Grey `[h, 256]`, a little blurred."""
    from PIL import Image, ImageFilter

    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))).convert("L")
    height = max(16, round(image.height * WIDTH_PX / image.width))
    small = image.resize((WIDTH_PX, height), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(1))
    return np.asarray(small, dtype=np.float64)


def _block_shift(before: Floats, after: Floats, top: int, bottom: int, place: float) -> float | None:
    """Where the block around the column `place` of `before` went, by normalised correlation."""
    left = round(place * WIDTH_PX) - BLOCK_PX // 2
    start, end = max(0, left - REACH_PX), min(WIDTH_PX, left + BLOCK_PX + REACH_PX)
    if left < 0 or left + BLOCK_PX > WIDTH_PX:
        return None
    block = before[top:bottom, left : left + BLOCK_PX]
    block = block - block.mean(axis=1, keepdims=True)  # rows differ from sky to road; only columns tell a shift
    if block.std() < MIN_CONTRAST:
        return None
    views = np.lib.stride_tricks.sliding_window_view(after[top:bottom, start:end], BLOCK_PX, axis=1)
    views = views - views.mean(axis=2, keepdims=True)
    likeness = np.einsum("rc,rsc->s", block, views) / np.maximum(
        1e-9, np.linalg.norm(block) * np.sqrt((views**2).sum(axis=(0, 2)))
    )
    best = int(np.argmax(likeness))
    if likeness[best] < MIN_LIKENESS or best in (0, len(likeness) - 1):
        return None
    fine = (likeness[best - 1] - likeness[best + 1]) / 2
    fine /= likeness[best - 1] - 2 * likeness[best] + likeness[best + 1] - 1e-12
    return start + best + float(fine) - left

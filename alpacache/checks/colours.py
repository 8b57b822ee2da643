"""Pictures whose red and blue are swapped, as OpenCV's are if they are written as RGB.

Two things are compared with the road below: green is yellower (leaves and grass are), and the bright part of the upper
half is bluer (the sky is). A night, a sunset or an avenue turns one of them round; swapped channels turn both. Colours
are taken as they are and with the road as grey: a camera's cast hides swapped channels from one of the two.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.driving.sample import Floats

Picture: TypeAlias = NDArray[np.uint8]
SIZE_PX = (160, 90)
ROWS = (np.arange(90) / 90)[:, None]
"""Height of each row, from 0 at the top to 1."""
MIN_PIXELS = 50
GREEN = 0.04
"""Least excess of green in a green pixel; the road's is half of it at most. In shares of red + green + blue."""
MIN_GREEN = 0.03
"""Share of green pixels that a picture must have to be judged."""
MIN_DARK = 90
"""Least red + green + blue of a pixel whose colour is looked at."""
BLUER_GREEN, BOTH = 0.02, 0.05
"""Least errors of green, and of green and sky together, from which red and blue look swapped."""
MIN_SHARE = 0.25
"""Share of such pictures from which on the source is warned of: of 110 real and generated pictures none looked so, with
red and blue swapped two thirds and more did, though under an overcast sky few."""


def looks_swapped(picture: Picture) -> bool | None:
    """Tell whether red and blue of `[H, W, 3]` look swapped; None if the picture has no green or no road."""
    from PIL import Image

    pixels = np.asarray(Image.fromarray(picture).resize(SIZE_PX, Image.Resampling.BOX), np.float64)
    lit = pixels.sum(axis=2) > MIN_DARK
    ground = pixels[lit & (ROWS > 0.6)]
    if len(ground) < MIN_PIXELS:
        return None
    road = np.maximum(np.median(ground, axis=0), 5)
    looks = [_is_off(one, lit) for one in (pixels, pixels * (road.mean() / road))]
    return None if looks == [None, None] else any(looks)


def _is_off(pixels: Floats, lit: NDArray[np.bool_]) -> bool | None:
    red, green, blue = np.moveaxis(pixels, -1, 0)
    total = np.maximum(red + green + blue, 1)
    blueness, excess = (blue - red) / total, (2 * green - red - blue) / total
    leaves, road, upper = lit & (excess > GREEN), lit & (excess < GREEN / 2) & (ROWS > 0.55), lit & (ROWS < 0.45)
    if leaves.mean() < MIN_GREEN or road.sum() < MIN_PIXELS or not upper.any():
        return None
    sky = upper & (total >= np.percentile(total[upper], 70))
    grey = np.median(blueness[road])
    green_off, sky_off = blueness[leaves].mean() - grey, blueness[sky].mean() - grey
    return bool(green_off > BLUER_GREEN and green_off - sky_off > BOTH)


def judge_colours(looks: Sequence[bool]) -> Check:
    """Judge whether red and blue look swapped, over all pictures that could be judged."""
    if not looks:
        return not_judged("colours", "no picture with enough green in it")
    swapped = sum(looks)
    finding = f"red and blue look swapped in {swapped} of {len(looks)} pictures ({100 * swapped / len(looks):.0f} %)"
    remedy = (
        "Is grass bluish and the sky reddish on the contact sheet? OpenCV's pictures are BGR: turn them round with "
        "cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) before they are written as RGB."
    )
    return verdict("colours", finding, warn=remedy if swapped >= MIN_SHARE * len(looks) else "")

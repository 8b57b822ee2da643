"""Pictures of a recording for checks that need no detail."""

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.source import GlancedSource, RecordedSource

MOST, MOST_SMALL = 16, 128
"""Most frames to ask for at once of a source that gives them whole, and of one that gives them small."""


def glance(source: RecordedSource, clip_id: str, times_us: NDArray[np.int64], *, about_px: int) -> NDArray[np.uint8]:
    """The front camera's frames `[N, 3, H, W]` at these times, about so wide or wider, or what `film` raises."""
    if isinstance(source, GlancedSource):
        return source.glance(clip_id, FRONT_CAMERA, times_us, about_px=about_px)
    return source.film(clip_id, FRONT_CAMERA, times_us)


def most_at_once(source: RecordedSource) -> int:
    """Number of frames to ask for at once: each reading of a film begins anew at a key frame."""
    return MOST_SMALL if isinstance(source, GlancedSource) else MOST

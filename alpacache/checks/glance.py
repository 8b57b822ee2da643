"""Pictures of a recording for checks that need no detail."""

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.source import GlancedSource, RecordedSource


def glance(source: RecordedSource, clip_id: str, times_us: NDArray[np.int64], *, about_px: int) -> NDArray[np.uint8]:
    """The front camera's frames `[N, 3, H, W]` at these times, about so wide or wider, or what `film` raises."""
    if isinstance(source, GlancedSource):
        return source.glance(clip_id, FRONT_CAMERA, times_us, about_px=about_px)
    return source.film(clip_id, FRONT_CAMERA, times_us)

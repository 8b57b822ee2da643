"""How a generated clip looks: time of day, colours, road layout, skyline."""

import numpy as np
from numpy.typing import NDArray

from alpacache.sources.scene import SKYLINE, Floats, Look

_DUSK_SHARE = 0.3


def draw_look(rng: np.random.Generator) -> Look:
    """Draw a look; three in ten clips are at dusk, with headlights."""
    dusk = bool(rng.uniform() < _DUSK_SHARE)
    colours = _dusk(rng) if dusk else _day(rng)
    grass, dirt, asphalt, leaf, hill, paint = (_vary(rng, colour) for colour in colours[2:])
    return Look(
        sky_low=_vary(rng, colours[0]),
        sky_high=_vary(rng, colours[1]),
        grass=grass,
        dirt=dirt,
        asphalt=asphalt,
        leaf=leaf,
        hill=hill,
        paint=paint,
        haze_m=float(rng.uniform(180, 500)),
        headlights=0.55 if dusk else 0.0,
        gain=float(rng.uniform(0.85, 1.12)),
        noise=float(rng.uniform(2.0, 6.0)) * (1.4 if dusk else 1.0),
        lanes=_LANES[int(rng.integers(len(_LANES)))],
        dashed=(bool(rng.uniform() < 0.8), bool(rng.uniform() < 0.8)),
        dash_m=float(rng.uniform(3.0, 6.0)),
        period_m=float(rng.uniform(9.0, 14.0)),
        hills=_skyline(rng),
        tile_shift=(int(rng.integers(256)), int(rng.integers(256))),
    )


_LANES = ((1, 0), (1, 0), (1, 1), (0, 0), (2, 0), (0, 1))


def _day(rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Horizon, zenith, grass, dirt, asphalt, leaf, hill, paint."""
    dry = rng.uniform()
    grass = (1 - dry) * np.array([84, 122, 58]) + dry * np.array([150, 138, 88])
    sky = (190, 208, 226), (96, 146, 212)
    rest = (140, 124, 100), (98, 98, 102), (58, 92, 46), (118, 138, 138), (232, 232, 226)
    return [np.array(colour, dtype=np.float64) for colour in (*sky, grass, *rest)]


def _dusk(rng: np.random.Generator) -> list[NDArray[np.float64]]:
    warm = rng.uniform()
    low = (1 - warm) * np.array([150, 128, 150]) + warm * np.array([218, 142, 92])
    rest = (48, 52, 92), (70, 80, 56), (98, 86, 76), (78, 76, 84), (40, 52, 42), (62, 60, 80), (214, 210, 196)
    return [np.array(colour, dtype=np.float64) for colour in (low, *rest)]


def _vary(rng: np.random.Generator, colour: NDArray[np.float64]) -> Floats:
    return (colour * rng.uniform(0.9, 1.1) + rng.uniform(-6, 6, 3)).astype(np.float32)


def _skyline(rng: np.random.Generator) -> Floats:
    """`[SKYLINE]` elevation of distant hills by azimuth, radians; a sum of whole waves, so it closes."""
    turn = np.linspace(0, 2 * np.pi, SKYLINE, endpoint=False)
    height = sum(
        rng.uniform(-1, 1) / wave**0.7 * np.sin(wave * turn + rng.uniform(0, 2 * np.pi)) for wave in range(2, 20)
    )
    return (rng.uniform(0.0, 0.05) + 0.02 * np.asarray(height)).astype(np.float32)

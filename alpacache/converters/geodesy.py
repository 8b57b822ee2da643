"""Places on the WGS 84 ellipsoid as metres east, north and up of an origin.

Exact on the ellipsoid, by way of ECEF (earth-centred axes): degrees times a radius are off by 1.3 m a kilometre from
the origin, and the Mercator projection of KITTI's own tools by twice that. North also turns on the way east (the
meridians converge), which `level_axes` tells for headings.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from alpacache.driving.sample import Floats

EQUATOR_M, FLATTENING = 6_378_137.0, 1 / 298.257223563
"""Half of the long axis, and the share by which the short one is shorter (NIMA TR8350.2)."""
SQUARED = FLATTENING * (2 - FLATTENING)
"""Eccentricity, squared."""


def ecef_of(latitude_deg: ArrayLike, longitude_deg: ArrayLike, height_m: ArrayLike) -> Floats:
    """`[..., 3]` ECEF metres of geodetic degrees and of metres above the ellipsoid."""
    latitude, longitude = np.deg2rad(latitude_deg), np.deg2rad(longitude_deg)
    height = np.asarray(height_m, np.float64)
    normal = EQUATOR_M / np.sqrt(1 - SQUARED * np.sin(latitude) ** 2)
    level = (normal + height) * np.cos(latitude)
    upward = (normal * (1 - SQUARED) + height) * np.sin(latitude)
    return np.stack([level * np.cos(longitude), level * np.sin(longitude), upward + 0 * level], axis=-1)


def geodetic_of(ecef_m: ArrayLike) -> tuple[Any, Any, Any]:
    """Latitude and longitude (degrees) and height (m) of ECEF places `[..., 3]`, by Bowring's formula, repeated."""
    x, y, z = np.moveaxis(np.asarray(ecef_m, np.float64), -1, 0)
    from_axis, pole_m = np.hypot(x, y), EQUATOR_M * (1 - FLATTENING)
    reduced = np.arctan2(z, (1 - FLATTENING) * from_axis)
    latitude = reduced
    for _ in range(3):
        latitude = np.arctan2(
            z + SQUARED / (1 - SQUARED) * pole_m * np.sin(reduced) ** 3,
            from_axis - SQUARED * EQUATOR_M * np.cos(reduced) ** 3,
        )
        reduced = np.arctan2((1 - FLATTENING) * np.sin(latitude), np.cos(latitude))
    normal = EQUATOR_M / np.sqrt(1 - SQUARED * np.sin(latitude) ** 2)
    # of both ways, the one that divides by nothing small
    height = from_axis * np.cos(latitude) + z * np.sin(latitude) - normal * (1 - SQUARED * np.sin(latitude) ** 2)
    return np.rad2deg(latitude), np.rad2deg(np.arctan2(y, x)), height


def level_axes(latitude_deg: ArrayLike, longitude_deg: ArrayLike) -> Floats:
    """`[..., 3, 3]`: rows are east, north and up at these places, as ECEF directions."""
    latitude, longitude = np.broadcast_arrays(np.deg2rad(latitude_deg), np.deg2rad(longitude_deg))
    nothing = np.zeros_like(latitude)
    east = [-np.sin(longitude), np.cos(longitude), nothing]
    north = [-np.sin(latitude) * np.cos(longitude), -np.sin(latitude) * np.sin(longitude), np.cos(latitude)]
    up = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    return np.stack([np.stack(row, axis=-1) for row in (east, north, up)], axis=-2)


def convergence_rad(latitude_deg: ArrayLike, longitude_deg: ArrayLike) -> Floats:
    """`[N]`: how far north has turned to the left at each place, in the axes of the first one.

    A heading against the north of its place is so much further left in the axes of `enu_m`: by 0.1 degrees 10 km
    to the east, at 48 degrees north.
    """
    axes = level_axes(latitude_deg, longitude_deg)
    north = axes[:, 1] @ axes[0].T
    turned: Floats = np.arctan2(-north[:, 0], north[:, 1])
    return turned


def enu_m(
    latitude_deg: ArrayLike,
    longitude_deg: ArrayLike,
    height_m: ArrayLike,
    origin: tuple[float, float, float] | None = None,
) -> Floats:
    """`[N, 3]` metres east, north and up of `origin` (latitude, longitude, height), by default the first place."""
    places = np.stack(np.broadcast_arrays(latitude_deg, longitude_deg, height_m), axis=-1).astype(np.float64)
    if origin is None:
        origin = tuple(places[0])
    apart = ecef_of(*np.moveaxis(places, -1, 0)) - ecef_of(*origin)
    turned: Floats = apart @ level_axes(*origin[:2]).T
    return turned

"""Renders generated roads: ground plane, lane markings, verge, hills and sky, in numpy.

    make_camera, draw_look: once a clip      paint_world: once a frame, then roadside.draw and expose

A pixel's ray meets the flat ground at a point that is fixed in the vehicle's frame and computed once a clip. Each frame
moves these points into the world, finds where along and across the road they lie (a few Newton steps towards the
nearest point of the centre line) and colours them, so that what lies ahead looks the way it will be driven. Markings
are blended by the share of a pixel they cover; otherwise they would flicker with distance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.sample import Floats
from alpacache.sources.road import Road

Floats32: TypeAlias = NDArray[np.float32]

GROUND_REACH_M = 220.0
"""Distance to which the ground is drawn; beyond it is sky."""
LANE_M = 3.5
MAST_M = 0.8
"""Distance of the cameras ahead of the vehicle's origin, all in one place."""
HORIZON = 0.4
"""Share of the picture above the horizon of a level camera: sky is cropped away, as cars do."""
SKYLINE = 1440
"""Directions around the vehicle for which the height of the hills is given."""
_TILE = 256
"""Width and height of the tile of noise that all textures repeat."""
_CLOUDS = np.float32(3 * _TILE / (2 * np.pi))
"""Steps of the tile a radian. A full circle is three whole tiles, so that the sky has no seam."""
_LANES = ((1, 0), (1, 0), (1, 1), (0, 0), (2, 0), (0, 1))
"""Lanes to the left and right of the ego lane, drawn evenly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """A pinhole camera on the vehicle; every pixel's place on the ground or in the sky is worked out once."""

    width: int
    height: int
    focal_px: float
    centre_px: tuple[float, float]
    position_m: tuple[float, float, float]
    rotation: Floats
    """`[3, 3]` camera (x right, y down, z forward) to vehicle (x forward, y left, z up)."""
    ground: NDArray[np.intp]
    """Flat indices of the pixels whose ray meets the ground within `GROUND_REACH_M`."""
    ground_xy: Floats32
    """`[ground, 2]` metres, vehicle frame."""
    distance: Floats32
    """`[ground]` metres along the ground from the camera."""
    sky: NDArray[np.intp]
    """Flat indices of all other pixels."""
    azimuth: Floats32
    """`[sky]` radians in the vehicle frame, left positive."""
    elevation: Floats32
    """`[sky]` radians, up positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Appearance of one clip's world; colours are RGB 0 to 255."""

    grass: Floats32
    dirt: Floats32
    asphalt: Floats32
    leaf: Floats32
    hill: Floats32
    paint: Floats32
    sky_low: Floats32
    sky_high: Floats32
    haze_m: float
    """Distance after which 1 / e of a colour is left."""
    headlights: float
    """Share of the light that comes from the car, 0 by day."""
    gain: float
    noise: float
    """Standard deviation of the sensor's noise, in colour values."""
    lanes: tuple[int, int]
    """Lanes to the left and right of the ego lane."""
    dashed: tuple[bool, bool]
    """True if the ego lane's left and right markings are dashed, where there is a lane beyond."""
    dash_m: float
    period_m: float
    """Length of a dash and its gap."""
    hills: Floats32
    """`[SKYLINE]` elevation of the skyline by azimuth, radians."""
    tile_shift: tuple[int, int]
    """Row and column of the tile of noise at which this clip's textures begin."""


@lru_cache(maxsize=32)
def make_camera(
    *, width: int, height: int, fov_rad: float, yaw_rad: float, pitch_rad: float, above_ground_m: float
) -> Camera:
    """A camera `above_ground_m` high; yaw is positive to the left, pitch downwards, and 0 looks straight ahead."""
    focal = width / 2 / np.tan(fov_rad / 2)
    centre = ((width - 1) / 2, height * HORIZON)
    cos_p, sin_p, cos_y, sin_y = np.cos(pitch_rad), np.sin(pitch_rad), np.cos(yaw_rad), np.sin(yaw_rad)
    tilt = np.array([[0.0, -sin_p, cos_p], [-1.0, 0.0, 0.0], [0.0, -cos_p, -sin_p]])
    turn = np.array([[cos_y, -sin_y, 0.0], [sin_y, cos_y, 0.0], [0.0, 0.0, 1.0]])
    rotation = turn @ tilt
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    rays = np.stack([(columns - centre[0]) / focal, (rows - centre[1]) / focal, np.ones(columns.shape)], axis=-1)
    rays = rays.reshape(-1, 3) @ rotation.T
    level = np.hypot(rays[:, 0], rays[:, 1])
    reach = above_ground_m / np.maximum(-rays[:, 2], 1e-9)
    hit = (rays[:, 2] < 0) & (reach * level < GROUND_REACH_M)
    ground, sky = np.flatnonzero(hit), np.flatnonzero(~hit)
    position = (MAST_M, 0.0, above_ground_m)
    return Camera(
        width=width,
        height=height,
        focal_px=float(focal),
        centre_px=centre,
        position_m=position,
        rotation=rotation,
        ground=ground,
        ground_xy=(rays[ground, :2] * reach[ground, None] + position[:2]).astype(np.float32),
        distance=(reach * level)[ground].astype(np.float32),
        sky=sky,
        azimuth=np.arctan2(rays[sky, 1], rays[sky, 0]).astype(np.float32),
        elevation=np.arctan2(rays[sky, 2], level[sky]).astype(np.float32),
    )


def paint_world(
    camera: Camera, look: Look, roads: Sequence[Road], *, position: Floats, yaw_rad: float, arc_m: float
) -> Floats32:
    """Sky and ground `[H, W, 3]`, RGB, seen from a vehicle at `position` (`[2]`, world), `arc_m` along each road."""
    canvas = np.empty((camera.height * camera.width, 3), dtype=np.float32)
    canvas[camera.sky] = _sky(camera, look, yaw_rad)
    canvas[camera.ground] = _ground(camera, look, roads, position=position, yaw_rad=yaw_rad, arc_m=arc_m)
    return canvas.reshape(camera.height, camera.width, 3)


def expose(picture: Floats32, look: Look, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Apply gain and sensor noise: `[H, W, 3]` to `[3, H, W]` uint8."""
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(look.noise)
    return np.ascontiguousarray(np.clip(picture * look.gain + noise, 0, 255).astype(np.uint8).transpose(2, 0, 1))


def _sky(camera: Camera, look: Look, yaw_rad: float) -> Floats32:
    """Colours `[sky, 3]`: a gradient, clouds and a skyline that turn with the car."""
    up = np.clip(camera.elevation / 0.35, 0.0, 1.0)[:, None]
    azimuth = camera.azimuth + np.float32(yaw_rad)
    clouds = _texture(azimuth * _CLOUDS + look.tile_shift[0], camera.elevation * 400 + look.tile_shift[1], soft=True)
    colour = look.sky_low + (look.sky_high - look.sky_low) * up
    colour += (np.maximum(clouds, 0.0) * 45)[:, None] * np.sqrt(up)
    place = (azimuth * np.float32(SKYLINE / (2 * np.pi))).astype(np.intp) % SKYLINE
    colour[camera.elevation < look.hills[place]] = look.hill
    return np.asarray(colour, dtype=np.float32)


def _ground(
    camera: Camera, look: Look, roads: Sequence[Road], *, position: Floats, yaw_rad: float, arc_m: float
) -> Floats32:
    """Colours `[ground, 3]` of the ground pixels; where roads lie over each other, of the one whose edge is further."""
    cos, sin = np.float32(np.cos(yaw_rad)), np.float32(np.sin(yaw_rad))
    x, y = camera.ground_xy.T
    world_x = x * cos - y * sin + np.float32(position[0])
    world_y = x * sin + y * cos + np.float32(position[1])
    along, across, heading = _locate(roads[0], world_x, world_y, x + np.float32(arc_m))
    clear = 1.0 / (1.0 + camera.distance / 30.0)
    shift = look.tile_shift
    rough = _texture(world_x * 9 + shift[0], world_y * 9) * clear * 26
    rough += _texture(world_x * 0.9, world_y * 0.9 + shift[1]) * 16
    colour = look.grass + rough[:, None]
    edge = _beyond_edge(look, across)
    for road in roads[1:]:
        other = _locate(road, world_x, world_y, x + np.float32(arc_m))
        nearer = (beyond := _beyond_edge(look, other[1])) < edge
        along, across, heading = (np.where(nearer, *both) for both in zip(other, (along, across, heading), strict=True))
        edge = np.where(nearer, beyond, edge)
    verge = edge < 1.6
    colour[verge] = look.dirt + (rough[verge] * 0.8)[:, None]
    paved = np.flatnonzero(edge < 0.35)
    view = np.arctan2(y[paved], x[paved]) + np.float32(yaw_rad) - heading[paved]
    colour[paved] = _pavement(camera, look, along[paved], across[paved], view, camera.distance[paved], clear[paved])
    colour *= (look.headlights * np.exp(-camera.distance / 22.0) + (1 - look.headlights))[:, None]
    haze = (1.0 - np.exp(-camera.distance / look.haze_m))[:, None]
    return np.asarray(colour + (look.sky_low - colour) * haze, dtype=np.float32)


def _beyond_edge(look: Look, across: Floats32) -> Floats32:
    """Distance (m) beyond a road's outer marking of points that lie so far to the left of its centre line."""
    left, right = (np.float32((lanes + 0.5) * LANE_M) for lanes in look.lanes)
    return np.where(across > 0, across - left, -across - right)


def _locate(road: Road, x: Floats32, y: Floats32, guess_m: Floats32) -> tuple[Floats32, Floats32, Floats32]:
    """For each point: arc length of the nearest point of the centre line, distance to its left, and its heading."""
    along, last = guess_m, len(road.points) - 1
    for _ in range(3):
        place = ((along - np.float32(road.start_m)) * np.float32(1 / road.spacing_m)).astype(np.intp)
        here = road.points[np.clip(place, 0, last)]
        dx, dy = x - here[:, 0], y - here[:, 1]
        ahead = dx * here[:, 2] + dy * here[:, 3]
        across = dy * here[:, 2] - dx * here[:, 3]
        along = here[:, 6] + np.float32(road.start_m) + ahead / np.maximum(1.0 - here[:, 4] * across, 0.3)
    across[np.abs(ahead) > 2.0] = 1e3  # these points found no nearest one
    return along, across, here[:, 5]


def _pavement(
    camera: Camera, look: Look, along: Floats32, across: Floats32, view: Floats32, distance: Floats32, clear: Floats32
) -> Floats32:
    """Colours of asphalt with its markings; `view` is the angle between line of sight and road."""
    wide = distance / np.float32(camera.focal_px)
    deep = wide * distance / np.float32(camera.position_m[2])
    cos, sin = np.abs(np.cos(view)), np.abs(np.sin(view))
    print_across, print_along = wide * cos + deep * sin, deep * cos + wide * sin
    rough = _texture(along * 14, across * 14) * clear * 14 + _texture(along * 0.3, across * 3) * 5
    colour = look.asphalt + rough[:, None]
    phase = np.abs(along % np.float32(look.period_m) - np.float32(look.period_m / 2))
    dash = np.clip((look.dash_m / 2 - phase) / print_along + 0.5, 0.0, 1.0)
    dash = np.where(print_along > look.period_m, np.float32(look.dash_m / look.period_m), dash)
    paint = np.zeros_like(along)
    half = np.float32(0.16 / 2)  # of the width of a line, in metres
    for place, dashed in _markings(look):
        off = np.abs(across - np.float32(place))
        overlap = np.minimum(half, off + print_across / 2) - np.maximum(-half, off - print_across / 2)
        cover = np.clip(overlap / print_across, 0.0, 1.0)  # share of each pixel's footprint
        paint = np.maximum(paint, cover * dash if dashed else cover)
    return np.asarray(colour + (look.paint - colour) * paint[:, None] * 0.9, dtype=np.float32)


def _markings(look: Look) -> list[tuple[float, bool]]:
    """Offset (m, left positive) of every painted line, and whether it is dashed; the outermost are solid."""
    left, right = look.lanes
    lines = [((lane - 0.5) * LANE_M, -right < lane < left + 1) for lane in range(-right, left + 2)]
    inner = {0.5 * LANE_M: look.dashed[0], -0.5 * LANE_M: look.dashed[1]}
    return [(place, inside and inner.get(place, True)) for place, inside in lines]


def _texture(u: Floats32, v: Floats32, *, soft: bool = False) -> Floats32:
    """Noise of mean 0 and deviation 1 that repeats every 256 steps; `soft` has little fine detail."""
    rows, columns = u.astype(np.int32) & (_TILE - 1), v.astype(np.int32) & (_TILE - 1)
    return np.asarray(_tile(1.9 if soft else 0.9)[rows * _TILE + columns])


@lru_cache(maxsize=2)
def _tile(falloff: float) -> Floats32:
    """The tile of noise, always the same; its amplitude falls with frequency to the power of `falloff`."""
    spectrum = np.fft.fft2(np.random.default_rng(7).standard_normal((_TILE, _TILE)))
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(_TILE), np.fft.fftfreq(_TILE)))
    tile = np.fft.ifft2(spectrum / (radius + 0.02) ** falloff).real
    tile -= tile.mean()
    return np.asarray((tile / tile.std()).astype(np.float32).reshape(-1))


def draw_look(rng: np.random.Generator) -> Look:
    """Draw how a clip looks; three in ten are at dusk, with headlights."""
    dusk, mix = bool(rng.uniform() < 0.3), rng.uniform()
    warm_sky = (1 - mix) * np.array([150, 128, 150]) + mix * np.array([218, 142, 92])
    dry_grass = (1 - mix) * np.array([84, 122, 58]) + mix * np.array([150, 138, 88])
    ground = ((70, 80, 56), (98, 86, 76), (78, 76, 84)) if dusk else (dry_grass, (140, 124, 100), (98, 98, 102))
    above = ((40, 52, 42), (62, 60, 80), (214, 210, 196)) if dusk else ((58, 92, 46), (118, 138, 138), (232, 232, 226))
    sky = (warm_sky, (48, 52, 92)) if dusk else ((190, 208, 226), (96, 146, 212))
    varied = [np.asarray(each) * rng.uniform(0.9, 1.1) + rng.uniform(-6, 6, 3) for each in (*ground, *above, *sky)]
    names = ("grass", "dirt", "asphalt", "leaf", "hill", "paint", "sky_low", "sky_high")
    return Look(
        **{name: colour.astype(np.float32) for name, colour in zip(names, varied, strict=True)},
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


def _skyline(rng: np.random.Generator) -> Floats32:
    """`Look.hills`: a sum of whole waves, so that the circle closes."""
    turn = np.linspace(0, 2 * np.pi, SKYLINE, endpoint=False)
    waves = [rng.uniform(-1, 1) / n**0.7 * np.sin(n * turn + rng.uniform(0, 2 * np.pi)) for n in range(2, 20)]
    return np.asarray(rng.uniform(0.0, 0.05) + 0.02 * sum(waves), dtype=np.float32)

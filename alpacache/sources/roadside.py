"""Trees and marker posts beside generated roads. They stand upright, so that a bend shows above the ground too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.sample import Floats
from alpacache.sources.road import Road
from alpacache.sources.scene import LANE_M, Camera, Floats32, Look

NEAR_M, FAR_M = 2.0, 150.0
"""Depths between which things are drawn."""
_POST_EVERY_M = 12.5
_CLEAR_M = 0.8
"""Room that a fork leaves beside its branches: less than the distance of posts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roadside:
    """Trees and posts, one row each; `xy` is `[N, 2]` metres in the world."""

    xy: Floats
    height_m: Floats32
    width_m: Floats32
    shade: Floats32
    """Factor of the usual brightness."""
    tree: NDArray[np.bool_]
    """True if it is a tree; otherwise it is a white post with a dark band."""


class _Spot(NamedTuple):
    """One thing as the camera sees it, in pixels unless a name says otherwise; `scale` is pixels a metre."""

    column: float
    base: float
    scale: float
    height_m: float
    width_m: float
    light: float
    haze: float


def plant(rng: np.random.Generator, road: Road, look: Look, *, trees_per_km: float, posts: bool) -> Roadside:
    """Trees at random and posts at equal distances along both edges of the road."""
    length = (len(road.points) - 1) * road.spacing_m
    count = int(length * trees_per_km / 1000)
    tree_arc, tree_side = rng.uniform(0.0, length, count), rng.choice((-1.0, 1.0), count)
    tree_off = _edge(look, tree_side) + rng.uniform(3.5, 22.0, count)
    post_arc = np.repeat(np.arange(0.0, length, _POST_EVERY_M), 2) if posts else np.zeros(0)
    post_side = np.tile((-1.0, 1.0), len(post_arc) // 2)
    post_off = _edge(look, post_side) + 0.9
    arc, side = np.concatenate([tree_arc, post_arc]), np.concatenate([tree_side, post_side])
    here = road.points[(arc / road.spacing_m).astype(np.intp)].astype(np.float64)
    off = side * np.concatenate([tree_off, post_off])
    tree = np.arange(len(arc)) < count
    return Roadside(
        xy=np.stack([here[:, 0] - off * here[:, 3], here[:, 1] + off * here[:, 2]], axis=1),
        height_m=np.where(tree, rng.uniform(3.0, 9.0, len(arc)), 1.1).astype(np.float32),
        width_m=np.where(tree, rng.uniform(2.0, 5.0, len(arc)), 0.18).astype(np.float32),
        shade=rng.uniform(0.8, 1.15, len(arc)).astype(np.float32),
        tree=tree,
    )


def at_fork(sides: Sequence[Roadside], roads: Sequence[Road], look: Look) -> Roadside:
    """Collect what stands beside the branches of a fork, without what would stand on one of them."""
    xy = np.concatenate([side.xy for side in sides])
    reach = (max(look.lanes) + 0.5) * LANE_M + _CLEAR_M
    free = np.ones(len(xy), bool)
    for road in roads:
        centre = road.points[:: max(1, round(1 / road.spacing_m)), :2].astype(np.float64)
        apart = xy[:, None] - centre
        free &= (apart**2).sum(-1).min(1) > reach**2
    names = ("height_m", "width_m", "shade", "tree")
    values = {name: np.concatenate([getattr(side, name) for side in sides])[free] for name in names}
    return Roadside(xy=xy[free], **values)


def draw(picture: Floats32, camera: Camera, look: Look, things: Roadside, *, position: Floats, yaw_rad: float) -> None:
    """Draw `things` into `picture` `[H, W, 3]`, in place, far ones first."""
    cos, sin = np.cos(yaw_rad), np.sin(yaw_rad)
    apart = things.xy - position
    ahead, left = apart[:, 0] * cos + apart[:, 1] * sin, apart[:, 1] * cos - apart[:, 0] * sin
    seen = (np.stack([ahead, left, np.zeros_like(left)], axis=1) - camera.position_m) @ camera.rotation
    depth = np.maximum(seen[:, 2], 0.1)
    scale = camera.focal_px / depth
    column, base = camera.centre_px[0] + scale * seen[:, 0], camera.centre_px[1] + scale * seen[:, 1]
    reach = scale * things.width_m
    visible = (depth > NEAR_M) & (depth < FAR_M) & (column > -reach) & (column < camera.width + reach)
    haze = 1.0 - np.exp(-depth / look.haze_m)
    light = (look.headlights * np.exp(-depth / 30.0) + (1 - look.headlights)) * things.shade
    items, sizes = np.flatnonzero(visible), (things.height_m, things.width_m)
    for item in items[np.argsort(-depth[items], kind="stable")]:
        spot = _Spot(*(float(values[item]) for values in (column, base, scale, *sizes, light, haze)))
        (_draw_tree if things.tree[item] else _draw_post)(picture, look, spot)


def _edge(look: Look, side: Floats) -> Floats:
    """Distance from the ego lane's centre to the outer marking on that side (left is positive)."""
    return np.where(side > 0, look.lanes[0] + 0.5, look.lanes[1] + 0.5) * LANE_M


def _draw_tree(picture: Floats32, look: Look, spot: _Spot) -> None:
    """A trunk and an oval crown, lighter towards its top."""
    high, wide = spot.height_m * spot.scale, spot.width_m * spot.scale
    _fill(picture, spot, 0.04 * high, (0.0, 0.5), _tint(look.dirt * 0.45, look, spot))
    middle, half_high, half_wide = spot.base - 0.62 * high, max(0.38 * high, 0.5), max(0.5 * wide, 0.5)
    rows = _span(middle - half_high, middle + half_high, picture.shape[0])
    columns = _span(spot.column - half_wide, spot.column + half_wide, picture.shape[1])
    patch = picture[rows, columns]
    if patch.size:
        v = (np.arange(rows.start, rows.stop, dtype=np.float32) - np.float32(middle)) / np.float32(half_high)
        u = (np.arange(columns.start, columns.stop, dtype=np.float32) - np.float32(spot.column)) / np.float32(half_wide)
        inside = np.clip((1.05 - v[:, None] ** 2 - u**2) * 3, 0.0, 1.0)[..., None]
        crown = _tint(look.leaf, look, spot) * (1.0 - 0.25 * np.clip(v, -1, 1))[:, None, None]
        patch += (crown - patch) * inside


def _draw_post(picture: Floats32, look: Look, spot: _Spot) -> None:
    """A white post with a dark band near its top."""
    half = 0.5 * spot.width_m * spot.scale
    _fill(picture, spot, half, (0.0, 1.0), _tint(look.paint, look, spot))
    _fill(picture, spot, half, (0.6, 0.85), _tint(look.asphalt * 0.4, look, spot))


def _tint(colour: Floats32, look: Look, spot: _Spot) -> Floats32:
    """The colour as lit, and faded by haze."""
    lit = colour * np.float32(spot.light)
    return np.asarray(lit + (look.sky_low - lit) * np.float32(spot.haze), dtype=np.float32)


def _fill(picture: Floats32, spot: _Spot, half: float, heights: tuple[float, float], colour: Floats32) -> None:
    """Blend an upright rectangle in, by the share of each pixel it covers; `heights` are shares of the thing's."""
    bottom, top = (spot.base - share * (spot.height_m * spot.scale) for share in heights)
    rows, columns = (top, bottom), (spot.column - half, spot.column + half)
    high, wide = _span(*rows, picture.shape[0]), _span(*columns, picture.shape[1])
    patch = picture[high, wide]
    if patch.size:
        v, u = np.arange(high.start, high.stop), np.arange(wide.start, wide.stop)
        down = np.clip(np.minimum(rows[1], v + 0.5) - np.maximum(rows[0], v - 0.5), 0.0, 1.0)
        right = np.clip(np.minimum(columns[1], u + 0.5) - np.maximum(columns[0], u - 0.5), 0.0, 1.0)
        patch += (colour - patch) * (down[:, None] * right).astype(np.float32)[..., None]


def _span(low: float, high: float, limit: int) -> slice:
    """Pixels, counted at their centres, that [low, high] touches."""
    start = min(max(int(np.floor(low + 0.5)), 0), limit)
    return slice(start, max(min(int(np.floor(high + 0.5)) + 1, limit), start))

"""`synthetic:N`: generated drives, for demos, tests and pre-training where no recording may be shipped.

    road: what the road does and how the car drives    scene, roadside: how it looks    here: clips and samples

All of a clip follows from (seed, index), down to the noise of each frame. Clip ids carry the seed but not the mix or
the picture size, so give every mix a seed of its own.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.cameras import CAMERAS, FRONT_CAMERA, sort_cameras
from alpacache.driving.poses import Track, frame_indices, history_and_future
from alpacache.driving.sample import FUTURE_S, Floats, Sample, SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.recording import PictureReading, Reel, reels, sample_of
from alpacache.sources.road import CLIP_US, SHAPES, ClipKind, Drive, Road, Shape, make_drive
from alpacache.sources.roadside import Roadside, at_fork, draw, plant
from alpacache.sources.scene import LANE_M, Camera, Look, draw_look, expose, make_camera, paint_world
from alpacache.sources.source import SourceKind

DEFAULT_MIX: Mapping[str, float] = {"straight": 0.4, "early_curve": 0.2, "late_curve": 0.3, "curve_end": 0.1}
_MOST_CLIPS = 1_000_000
"""Most clips of a source, since all their ids are kept in memory."""
_FRONT_FOV_DEG = (55.0, 68.0)
"""Range of the front camera's field of view: narrower than the real one, to show 60 m of road in a small picture."""
_VIEWS = ((55.0, 1.0), (0.0, 1.0), (-55.0, 1.0), (145.0, 1.0), (180.0, 0.5), (-145.0, 1.0), (0.0, 0.5))
"""Yaw of each of `CAMERAS` in degrees, left positive, and its field of view relative to the front camera's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """The parts of a clip that stay the same in every frame."""

    drive: Drive
    roads: tuple[Road, ...]
    """The road, or the branches of a fork from left to right, so that nothing tells which one is taken."""
    look: Look
    roadside: Roadside
    above_ground_m: float
    pitch_rad: float
    fov_rad: float


class SyntheticSource:
    """`count` generated clips of 20 s with pictures and poses every 50 ms; any number of threads may load."""

    def __init__(
        self,
        count: int,
        seed: int = 0,
        mix: Mapping[str, float] | None = None,
        cameras: Sequence[str] = (FRONT_CAMERA,),
        size: tuple[int, int] = (256, 128),
    ) -> None:
        """`mix` gives weights to what roads do (`SHAPES`); `size` is a picture's width and height in pixels.

        Raises `UsageError` for a count below 1 or above a million, an unknown shape, and weights that are negative or
        all 0.
        """
        if not 1 <= count <= _MOST_CLIPS or seed < 0:
            raise UsageError(
                f"synthetic:{count} (seed {seed}): expected 1 to {_MOST_CLIPS:,} clips, a seed of 0 or more."
            )
        if min(size) < 16 or max(size) > 4096:
            raise UsageError(f"size {size} is out of range; width and height lie between 16 and 4096 pixels.")
        self.name = f"synthetic:{count}" + (f"-seed{seed}" if seed else "")
        self.seed, self.size, self.cameras = seed, size, sort_cameras(cameras)
        self.clip_ids: Sequence[str] = [f"synthetic-{seed}-{index:06d}" for index in range(count)]
        self._known = {clip_id: index for index, clip_id in enumerate(self.clip_ids)}
        mix = DEFAULT_MIX if mix is None else mix
        unknown = [name for name in mix if name not in SHAPES]
        if unknown:
            raise UsageError(f"unknown kind of road {', '.join(unknown)}; known: {', '.join(SHAPES)}.")
        total = sum(mix.values())
        if total <= 0 or min(mix.values()) < 0:
            raise UsageError(f"mix {dict(mix)}: weights must not be negative and one must be above 0.")
        self._mix = tuple((shape, mix[shape] / total) for shape in SHAPES if mix.get(shape, 0) > 0)

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant of a clip: 0 and 20 s for every one."""
        self._index(clip_id)
        return 0, CLIP_US

    def event_times_us(self, clip_id: str) -> tuple[int, ...]:
        """Moments at which curves begin."""
        return self._world(clip_id).drive.curve_starts_us

    @property
    def gives_routes(self) -> bool:
        """True: bends and forks have one."""
        return True

    def route_of(self, sample: Sample) -> str | None:
        """`turn left in 40 m` where a bend or a fork begins within the 6.4 s after t0."""
        drive, t0_us = self._world(sample.ref.clip_id).drive, sample.ref.t0_us
        for start_us, side in drive.turns:
            if t0_us < start_us <= t0_us + FUTURE_S * 1e6:
                here, there = np.interp([t0_us, start_us], drive.track.timestamps_us, drive.arc_m)
                return f"turn {side} in {round(there - here)} m"
        return None

    def clip_kind(self, clip_id: str) -> ClipKind:
        """Course of the road around t0 = 5.1 s."""
        return self._world(clip_id).drive.kind

    def track(self, clip_id: str) -> Track:
        return self._world(clip_id).drive.track

    def frame_times_us(self, clip_id: str, camera: str) -> NDArray[np.int64]:
        """The times of the poses: every camera takes a picture at each."""
        return self.track(clip_id).timestamps_us

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        drive, pictures = self.drive(clip_id), []
        for frame in frame_indices(drive.track.timestamps_us, times_us, where=clip_id):
            position, (_, _, z, w) = drive.track.xyz[frame, :2], drive.track.quaternion_xyzw[frame]
            yaw, arc = float(2 * np.arctan2(z, w)), float(drive.arc_m[frame])
            pictures.append(self.view(clip_id, camera, position=position, yaw_rad=yaw, arc_m=arc, frame=int(frame)))
        return np.stack(pictures)

    def view(
        self, clip_id: str, camera: str, *, position: Floats, yaw_rad: float, arc_m: float, frame: int
    ) -> NDArray[np.uint8]:
        """Render what a camera sees from anywhere near the road, `[3, H, W]`.

        Args:
            position, yaw_rad: of the vehicle in the clip's world, `[2]` metres.
            arc_m: about how far along the road that is.
            frame: number of the picture, counted in steps of 50 ms, which its noise depends on.
        """
        world, key = self._world(clip_id), [self.seed, self._index(clip_id), 2, CAMERAS.index(camera), frame]
        seen, look = self._camera(camera, world), world.look
        picture = paint_world(seen, look, world.roads, position=position, yaw_rad=yaw_rad, arc_m=arc_m)
        draw(picture, seen, look, world.roadside, position=position, yaw_rad=yaw_rad)
        return expose(picture, look, np.random.default_rng(key))

    def drive(self, clip_id: str) -> Drive:
        """The road that is driven, and how."""
        return self._world(clip_id).drive

    def half_lanes_m(self, clip_id: str) -> tuple[float, float]:
        """Distances (m) from the ego lane's centre to the road's outer markings, left and right."""
        left, right = self._world(clip_id).look.lanes
        return (left + 0.5) * LANE_M, (right + 0.5) * LANE_M

    def calibration(self, clip_id: str, camera: str) -> dict[str, Any]:
        """The camera's pinhole projection and its place on the vehicle."""
        view = self._camera(camera, self._world(clip_id))
        return {
            "model": "pinhole",
            "width": view.width,
            "height": view.height,
            "fx": view.focal_px,
            "fy": view.focal_px,
            "cx": view.centre_px[0],
            "cy": view.centre_px[1],
            "position_m": list(view.position_m),
            "rotation": view.rotation.tolist(),
        }

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Render one sample; `BadClipError` (`short_clip`) for a t0 without 1.5 s before or 6.4 s after it."""
        with self.one_pass([ref], cameras=cameras, frames=frames) as load:
            return load(ref)

    @contextmanager
    def one_pass(
        self, refs: Sequence[SampleRef], *, cameras: Sequence[str], frames: int
    ) -> Iterator[Callable[[SampleRef], Sample]]:
        """Render samples of one clip, each picture once."""
        clip_id, t0s_us, names = refs[0].clip_id, [ref.t0_us for ref in refs], sort_cameras(cameras)

        def reel(camera: str) -> Reel:
            def open_frames(stamps: NDArray[np.int64], wanted: Sequence[Sequence[int]]) -> PictureReading:
                def read(numbers: Sequence[int]) -> NDArray[np.uint8]:
                    return self.film(clip_id, camera, stamps[list(numbers)]).transpose(0, 2, 3, 1)

                return PictureReading(wanted, read, where=clip_id)

            return Reel(t0s_us, frames, partial(self.frame_times_us, clip_id, camera), open_frames)

        with reels(names, reel) as by_camera:

            def load(ref: SampleRef) -> Sample:
                poses = history_and_future(self.track(clip_id), ref.t0_us, where=clip_id)
                shots = {name: each.shot(ref.t0_us, where=clip_id) for name, each in by_camera.items()}
                return sample_of(ref, poses, shots, {name: self.calibration(clip_id, name) for name in names})

            yield load

    def _camera(self, name: str, world: _World) -> Camera:
        (width, height), (yaw_deg, zoom) = self.size, _VIEWS[CAMERAS.index(name)]
        return make_camera(
            width=width,
            height=height,
            fov_rad=world.fov_rad * zoom,
            yaw_rad=float(np.radians(yaw_deg)),
            pitch_rad=world.pitch_rad,
            above_ground_m=world.above_ground_m,
        )

    def _index(self, clip_id: str) -> int:
        if clip_id not in self._known:
            raise BadClipError("missing_clip", f"{clip_id}: not one of the {len(self._known)} clips of {self.name}.")
        return self._known[clip_id]

    def _world(self, clip_id: str) -> _World:
        return _make_world(self.seed, self._index(clip_id), self._mix)


@lru_cache(maxsize=32)
def _make_world(seed: int, index: int, mix: tuple[tuple[Shape, float], ...]) -> _World:
    """Draw a clip. Shape, drive and look have separate streams, so that a change of one leaves the others alone."""
    shapes, weights = zip(*mix, strict=True)
    shape = shapes[int(np.random.default_rng([seed, index, 0]).choice(len(shapes), p=np.array(weights)))]
    drive = make_drive(np.random.default_rng([seed, index, 1]), shape)
    rng = np.random.default_rng([seed, index, 3])
    look = draw_look(rng)
    roads: tuple[Road, ...] = (drive.road,)
    if drive.branch is not None:
        roads = (drive.road, drive.branch) if drive.kind.side == "left" else (drive.branch, drive.road)
    trees_per_km, posts = rng.uniform(40, 220), bool(rng.uniform() < 0.85)
    sides = [plant(rng, road, look, trees_per_km=trees_per_km, posts=posts) for road in roads]
    return _World(
        drive=drive,
        roads=roads,
        look=look,
        roadside=sides[0] if len(sides) == 1 else at_fork(sides, roads, look),
        above_ground_m=float(rng.uniform(1.6, 2.6)),
        pitch_rad=float(rng.uniform(-0.02, 0.06)),
        fov_rad=float(np.radians(rng.uniform(*_FRONT_FOV_DEG))),
    )


def _open(place: str, cameras: Sequence[str] | None) -> SyntheticSource:
    found = re.fullmatch(rf"([0-9]{{1,20}})(?::({'|'.join(SHAPES)}))?", place)
    if found is None:
        raise UsageError(
            f"'synthetic:{place[:40]}': expected synthetic:N with a number of clips, as in synthetic:200, or "
            f"synthetic:N:SHAPE with one of {', '.join(SHAPES)}."
        )
    count, shape, cameras = int(found[1]), found[2], cameras or (FRONT_CAMERA,)
    if shape is None:
        return SyntheticSource(count, cameras=cameras)
    source = SyntheticSource(count, seed=SHAPES.index(shape) + 1, mix={shape: 1.0}, cameras=cameras)
    source.name = f"synthetic:{count}:{shape}"
    return source


KIND = SourceKind(prefix="synthetic", usage=("synthetic:N",), open=_open)

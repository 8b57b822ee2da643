"""Closed loop: a model drives generated roads itself, and sees what its own driving leads to.

An open-loop measure asks how near one path is to the one that was driven. Here the car goes where the path leads: the
cameras are rendered at its own pose, the model predicts, the first half second is followed as the action space has it,
and the model is asked again. Only this shows whether small errors add up.

All roads are driven side by side, so that each step is one batch for the VLM and one for the expert.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.driver.driver import DrivenPaths, Driver
from alpacache.driver.moment import moment_of
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.driving.sample import DT_S, FUTURE_S, HISTORY_STEPS, STEP_US, Floats, Sample
from alpacache.errors import BadClipError
from alpacache.metrics.bootstrap import Interval, mean_difference, mean_share, weighted_mean
from alpacache.sources.blank import with_blank
from alpacache.sources.road import CLIP_US, POSE_STEP_US, Shape, lane_place
from alpacache.sources.scene import LANE_M
from alpacache.sources.synthetic import SyntheticSource

ROADS: tuple[Shape, ...] = ("straight", "late_curve", "s_curve")
"""Roads that show by themselves where they lead: straight on, a bend after a straight, an S. On a `fork` only a route
tells the right branch, so that is for models whose prompt takes one."""
KEPT_M = LANE_M / 2
"""Distance of the car's centre from the lane's that still counts as kept: as far as the markings."""
LOST_M = 8.0
"""Distance from the lane's centre at which a drive is given up."""
REPLAN_STEPS = 5
"""Steps of 0.1 s that are followed before the model is asked again."""
FLOW_STEPS = 10
_SEED = 4000
"""Seed of the roads, less the number of their kind: no other source of ours has it."""

Follow = Callable[[DrivenPaths], tuple[Floats, Floats]]
"""Chooses the positions `[64, 3]` and headings `[64]` (ego frame) that the car follows among the predicted paths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopRoad:
    """A generated road to drive."""

    source: SyntheticSource
    clip_id: str
    shape: Shape


@dataclass(slots=True, kw_only=True)
class RoadDrive:
    """Record of a car driving a road; grows while it drives. Step 0 is the clip's begin, steps are 0.1 s apart."""

    road: LoopRoad
    xyz: list[Floats]
    """`[3]` metres in the clip's world, a step each."""
    yaw: list[float]
    arc_m: list[float]
    """Distance along the road."""
    offset_m: list[float]
    """Offset to the left of the lane's centre."""
    pictures: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """Step -> what the front camera saw, `[3, H, W]`, when the model was asked."""
    begun: int = HISTORY_STEPS - 1
    """The step from which on the model drove."""
    lost: bool = False
    """True if the drive was given up."""

    def seen(self, camera: str, step: int) -> NDArray[np.uint8]:
        """Render what a camera sees from where the car was at a step, `[3, H, W]`."""
        return self.road.source.view(
            self.road.clip_id,
            camera,
            position=self.xyz[step][:2],
            yaw_rad=self.yaw[step],
            arc_m=self.arc_m[step],
            frame=step * STEP_US // POSE_STEP_US,
        )

    @property
    def left_at(self) -> int | None:
        """The first step at which the car was out of its lane; None if it never was."""
        return next((step for step in range(self.begun, len(self.offset_m)) if abs(self.offset_m[step]) > KEPT_M), None)

    @property
    def kept(self) -> bool:
        """Tell whether the car stayed in its lane throughout."""
        return self.left_at is None and not self.lost

    @property
    def distance_m(self) -> float:
        """Distance driven before the car left its lane, or in all."""
        end = len(self.arc_m) - 1 if self.left_at is None else self.left_at
        return max(0.0, self.arc_m[end] - self.arc_m[self.begun])

    @property
    def lateral_error_m(self) -> float:
        """Mean distance from the lane's centre, as long as the car was in its lane."""
        end = len(self.offset_m) if self.left_at is None else self.left_at
        return float(np.abs(self.offset_m[self.begun : max(end, self.begun + 1)]).mean())

    @property
    def jerk_mps3(self) -> float:
        """Root mean square of the jerk (m/s^3) while the model drove, along the path and across it."""
        xy = np.stack(self.xyz[self.begun - 3 :])[:, :2]
        return float(np.sqrt((np.diff(xy, n=3, axis=0) ** 2).sum(axis=1).mean()) / DT_S**3) if len(xy) > 3 else 0.0

    @property
    def track(self) -> Track:
        """The poses so far."""
        half = np.asarray(self.yaw) / 2
        zeros = np.zeros_like(half)
        return Track(
            timestamps_us=STEP_US * np.arange(len(self.xyz), dtype=np.int64),
            xyz=np.stack(self.xyz),
            quaternion_xyzw=np.stack([zeros, zeros, np.sin(half), np.cos(half)], axis=1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSummary:
    """Measures of a model's driving; intervals are over roads."""

    roads: int
    kept: Interval | None
    """Share of the roads on which the car stayed in its lane."""
    finished: Interval | None
    """Share of the roads that were driven to the end: the car was never `LOST_M` from its lane's middle."""
    distance_m: Interval | None
    lateral_error_m: Interval | None
    jerk_mps3: Interval | None
    by_shape: Mapping[str, tuple[int, int]]
    """Kind of road -> roads kept, roads driven."""
    more_kept: Interval | None = None
    """Share of kept roads less the first model's."""
    more_finished: Interval | None = None
    """Share of finished roads less the first model's."""


def loop_roads(count: int, *, shapes: Sequence[Shape] = ROADS, seed: int = 0) -> list[LoopRoad]:
    """Make so many roads, of each kind in turn; none of them is one that `synthetic:N` has."""
    sources = {}
    for number, shape in enumerate(shapes):
        here = len(range(number, count, len(shapes)))
        if here:
            sources[shape] = SyntheticSource(here, seed=_SEED + 100 * seed + number, mix={shape: 1.0})
    order = (shapes[place % len(shapes)] for place in range(count))
    taken = dict.fromkeys(shapes, 0)
    roads = []
    for shape in order:
        roads.append(LoopRoad(source=sources[shape], clip_id=sources[shape].clip_ids[taken[shape]], shape=shape))
        taken[shape] += 1
    return roads


def drive_roads(
    driver: Driver,
    roads: Sequence[LoopRoad],
    *,
    seconds: float = CLIP_US / 1e6,
    cameras: Sequence[str] = (FRONT_CAMERA,),
    paths: int = 1,
    flow_steps: int = FLOW_STEPS,
    follow: str = "first",
    seed: int = 0,
    pictures: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[RoadDrive]:
    """Let a model drive generated roads.

    The first 1.5 s of each are driven as recorded: the history that a model needs. What cameras see follows from the
    road and the car's own pose alone, and noise from the seed, the road and the time, so two models meet the same.

    Args:
        seconds: from the begin of the road, at most 20.
        follow: the `first` of the predicted paths, or their `mean`.
        pictures: number of roads whose pictures are kept.
        on_step: hears how many steps of how many are done.
    """
    if follow not in ("first", "mean") or not 2.0 <= seconds <= CLIP_US / 1e6:
        raise ValueError(f"follow is {follow!r} and seconds {seconds:g}; expected first or mean, and 2 to 20.")
    drives = [_begun(road) for road in roads]
    steps = range(HISTORY_STEPS - 1, round(seconds / DT_S), REPLAN_STEPS)
    observer = driver.observer
    routed = observer.takes_routes
    render = _Renderer(cameras, frames=observer.frames)
    for done, step in enumerate(steps):
        going, samples = [], []
        for number, drive in enumerate(drives):
            if drive.lost:
                continue
            try:
                sample = _moment(drive, step, render, cameras=cameras, frames=observer.frames, routed=routed)
            except BadClipError:  # it moves as no car can
                drive.lost = True
                continue
            if number < pictures:
                drive.pictures[step] = sample.frames[sample.cameras.index(cameras[0]), -1]
            going.append(drive)
            samples.append(with_blank(sample, observer.blank))
        if not going:
            break
        seen = observer.see_together(samples, [drive.track for drive in going])
        for drive, ahead in zip(
            going, driver.paths_together(seen, paths=paths, flow_steps=flow_steps, seed=seed), strict=True
        ):
            _go_on(drive, ahead, mean=follow == "mean")
        on_step(done + 1, len(steps))
    return drives


def summarise(drives: Sequence[RoadDrive], *, before: Sequence[RoadDrive] | None = None) -> LoopSummary:
    """Summarise drives, compared with the same roads as another model drove them `before`."""
    names = [f"{drive.road.shape} {drive.road.clip_id}" for drive in drives]
    kept, finished = ([float(end) for end in ends] for ends in _ends(drives))
    ones = np.ones(len(drives))
    before_kept, before_finished = ([], []) if before is None else _ends(before)
    mean = partial(weighted_mean, weights=ones, clips=names)
    shapes = list(dict.fromkeys(drive.road.shape for drive in drives))
    own = {shape: [drive.kept for drive in drives if drive.road.shape == shape] for shape in shapes}
    return LoopSummary(
        roads=len(drives),
        kept=mean_share(kept, names),
        finished=mean_share(finished, names),
        distance_m=mean([drive.distance_m for drive in drives]),
        lateral_error_m=mean([drive.lateral_error_m for drive in drives]),
        jerk_mps3=mean([drive.jerk_mps3 for drive in drives]),
        by_shape={shape: (sum(found), len(found)) for shape, found in own.items()},
        more_kept=None if before is None else mean_difference(before_kept, kept, names),
        more_finished=None if before is None else mean_difference(before_finished, finished, names),
    )


def _ends(drives: Sequence[RoadDrive]) -> tuple[list[bool], list[bool]]:
    """Tell for each road whether it was kept, and whether it was finished."""
    return [drive.kept for drive in drives], [not drive.lost for drive in drives]


def _begun(road: LoopRoad) -> RoadDrive:
    """A drive whose first 1.5 s are the recorded ones."""
    recorded = road.source.drive(road.clip_id)
    every, count = STEP_US // POSE_STEP_US, HISTORY_STEPS
    begin = slice(0, every * (count - 1) + 1, every)
    z, w = recorded.track.quaternion_xyzw[begin, 2:].T
    xyz, arcs = recorded.track.xyz[begin], recorded.arc_m[begin]
    places = [lane_place(recorded.road, at[:2], near_m=arc) for at, arc in zip(xyz, arcs.tolist(), strict=True)]
    return RoadDrive(
        road=road,
        xyz=list(xyz),
        yaw=(2 * np.arctan2(z, w)).tolist(),
        arc_m=[arc for arc, _ in places],
        offset_m=[offset for _, offset in places],
    )


class _Renderer:
    """Renders the pictures of the steps of drives, each once."""

    def __init__(self, cameras: Sequence[str], *, frames: int) -> None:
        self._cameras, self._frames = cameras, frames
        self._made: dict[tuple[str, int], dict[int, NDArray[np.uint8]]] = {}

    def __call__(self, drive: RoadDrive, step: int) -> NDArray[np.uint8]:
        """The newest pictures of all cameras at a step, `[cameras, frames, H, W, 3]`."""
        wanted = range(step - self._frames + 1, step + 1)
        shots = []
        for camera in self._cameras:
            made = self._made.setdefault((camera, id(drive)), {})
            for old in [number for number in made if number < wanted[0]]:
                del made[old]
            for number in wanted:
                if number not in made:
                    made[number] = drive.seen(camera, number)
            shots.append(np.stack([made[number] for number in wanted]).transpose(0, 2, 3, 1))
        return np.stack(shots)


def _moment(
    drive: RoadDrive, step: int, render: _Renderer, *, cameras: Sequence[str], frames: int, routed: bool
) -> Sample:
    """The moment as the car knows it at a step."""
    given: dict[str, Any] = {"cameras": cameras, "count": frames, "t0_us": step * STEP_US, "name": drive.road.clip_id}
    times = STEP_US * np.arange(step - frames + 1, step + 1, dtype=np.int64)
    route = _route(drive, step) if routed else None
    return moment_of(render(drive, step), times, drive.track, route=route, **given)


def _route(drive: RoadDrive, step: int) -> str | None:
    """Navigation text for a bend or fork that the car reaches within 6.4 s at its present speed."""
    recorded, here = drive.road.source.drive(drive.road.clip_id), drive.arc_m[step]
    reach = FUTURE_S * (here - drive.arc_m[step - REPLAN_STEPS]) / (REPLAN_STEPS * DT_S)
    for start_us, side in recorded.turns:
        there = float(np.interp(start_us, recorded.track.timestamps_us, recorded.arc_m))
        if 0 < there - here <= reach:
            return f"turn {side} in {round(there - here)} m"
    return None


def _go_on(drive: RoadDrive, ahead: DrivenPaths, *, mean: bool) -> None:
    """Follow the predicted path for half a second."""
    taken = ahead
    if mean:
        xyz, rot = ahead.xyz.mean(axis=0, keepdims=True), ahead.rot.mean(axis=0, keepdims=True)
        taken = replace(ahead, xyz=xyz, rot=rot)
    xyz, rot = taken.in_world()
    road = drive.road.source.drive(drive.road.clip_id).road
    for step in range(REPLAN_STEPS):
        position, turned = xyz[0, step], rot[0, step]
        arc, offset = lane_place(road, position[:2], near_m=drive.arc_m[-1])
        drive.xyz.append(position)
        drive.yaw.append(float(np.arctan2(turned[1, 0], turned[0, 0])))
        drive.arc_m.append(arc)
        drive.offset_m.append(offset)
        drive.lost |= abs(offset) > LOST_M

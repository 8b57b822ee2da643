"""Poses from the messages of robots: odometry, stamped poses, trees of frames, satellite fixes, twists.

All of them mean x forward, y left, z up (REP 103), in metres and radians, and quaternions have their scalar last; only
frames called `*_optical*` look along z. The header's stamp is when something was so, the log's time when it arrived.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.dead_reckoning import yaw_quaternions
from alpacache.converters.drive import Dropped, Point, increasing
from alpacache.converters.geodesy import convergence_rad, enu_m
from alpacache.converters.messages import Message, numbers, part
from alpacache.converters.transforms import BODY_FRAMES, FrameTree, is_pose, microseconds, stamp_of
from alpacache.driving.poses import MAX_GAP_US, Track
from alpacache.errors import UsageError

Stamps = Literal["header", "log"]
_OPTICAL = [0.5, -0.5, 0.5, 0.5]
"""Quaternion of the axes forward, left, up as seen from right, down, forward."""
STATIC = "/tf_static"
NO_FIX = -1
OTHER_CLOCK_MS = 86_400_000.0
"""Messages do not arrive a day late, but a simulated clock begins near 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPoses:
    """A track, and what is to be said of it."""

    track: Track
    point: Point
    facts: Mapping[str, Any]
    dropped: Sequence[Dropped]


class Clocked:
    """Rows with times, as messages come: by their own stamps or by their arrival."""

    def __init__(self, topic: str, stamps: Stamps) -> None:
        self.topic, self.stamps_ns = topic, list[int]()
        self._by, self._delays_ns, self._unset, self._bare = stamps, list[int](), 0, 0

    def time_of(self, message: Message, stamp: int | None) -> int | None:
        """The time of a row that is kept, noted in `stamps_ns`; None for one whose stamp was not set."""
        if self._by == "header":
            if stamp is None:
                self._bare += 1
                stamp = message.log_ns
            elif stamp == 0:
                self._unset += 1
                return None
            else:
                self._delays_ns.append(message.log_ns - stamp)
        else:
            stamp = message.log_ns
        self.stamps_ns.append(stamp)
        return stamp

    def check(self) -> None:
        """Raise `UsageError` if no message has a time."""
        if not self.stamps_ns:
            reason = f"{self.topic} holds no message"
            if self._unset:
                reason = f"the stamps of all {self._unset} messages of {self.topic} are 0, which means not set"
            raise UsageError(f"{reason}. With --stamp log the times of arrival are taken, which come later.")

    def facts(self) -> dict[str, Any]:
        """Facts on where times come from, and how much later messages arrived (ms)."""
        if self._by == "log" or self._bare:
            why = "asked for" if self._by == "log" else "the messages have no header"
            return {"topic": self.topic, "clock": f"time of arrival in the log ({why})"}
        delays = np.array(self._delays_ns) / 1e6
        late = {"median": float(np.median(delays)), "least": float(delays.min()), "most": float(delays.max())}
        if abs(late["median"]) > OTHER_CLOCK_MS:
            return {"topic": self.topic, "clock": "the header's stamp, of another clock than the log's"}
        return {"topic": self.topic, "clock": "the header's stamp", "arrival_after_stamp_ms": late}

    def dropped(self, what: str) -> list[Dropped]:
        if not self._unset:
            return []
        return [Dropped(what=what, count=self._unset, reason=f"{self.topic}: their stamp is 0, which means not set")]


class PoseReader:
    """Collects the poses of one topic while a log goes by; `topics` are those that it is to be shown."""

    def __init__(
        self,
        topic: str,
        kind: str,
        *,
        frames: Sequence[str] = (),
        heading: str | None = None,
        stamps: Stamps = "header",
    ) -> None:
        """`frames`: root and child of a tree of transforms, if they are given. Raises `UsageError` for other types."""
        if kind not in POSE_TYPES:
            known = ", ".join(sorted(POSE_TYPES))
            raise UsageError(f"{topic} is of type {kind or 'unknown'}, which holds no poses; these do: {known}.")
        self._kind, self._frames, self._heading = kind, tuple(frames), heading
        self._clock, self._rows, self._names = Clocked(topic, stamps), list[list[float]](), list[tuple[str, str]]()
        self._tree, self._headings = FrameTree(), _Headings(heading, stamps)
        self._no_fix = 0
        self.topics = {topic, STATIC, *([heading] if heading else [])}

    def take(self, message: Message) -> None:
        """Look at a message of one of `topics`."""
        if message.topic == STATIC and self._clock.topic != STATIC:
            self._tree.take(message.read(), static=True)
        elif message.topic == self._heading:
            self._headings.take(message)
        elif message.topic == self._clock.topic:
            value = message.read()
            if self._kind in _TREES:
                self._tree.take(value, static=False, time_of=partial(self._clock.time_of, message))
                return
            row = POSE_TYPES[self._kind](value)
            if self._kind == "sensor_msgs/NavSatFix" and part(value, "status", "status") == NO_FIX:
                self._no_fix += 1
            elif self._clock.time_of(message, stamp_of(value)) is not None:
                self._rows.append(row)
                names = (part(value, "header", "frame_id") or "", part(value, "child_frame_id") or "")
                self._names.append((str(names[0]), str(names[1])))

    def found(self) -> FoundPoses:
        """The track. Raises `UsageError` without enough to make one."""
        self._clock.check()
        facts: dict[str, Any] = {"type": self._kind, **self._clock.facts()}
        facts["axes"] = "x forward, y left, z up (REP 103); metres; quaternions with the scalar last"
        dropped = self._clock.dropped("poses")
        if self._kind in _TREES:
            return self._of_tree(facts, dropped)
        rows, times = np.array(self._rows, np.float64), microseconds(self._clock.stamps_ns)
        (frame, child), _ = Counter(self._names).most_common(1)[0]
        rows, times = self._of_one_frame(rows, times, (frame, child), dropped)
        if self._kind in _TWISTS:
            facts["twist_frame"] = child or frame or "not said; taken for the vehicle's"
            return self._of_twists(times, rows, facts, dropped)
        if self._kind == "sensor_msgs/NavSatFix":
            return self._of_fixes(times, rows, facts, dropped)
        sound = is_pose(rows)
        if (~sound).any():
            reason = f"{self._clock.topic}: not finite, or a quaternion that is no rotation"
            dropped.append(Dropped(what="poses", count=int((~sound).sum()), reason=reason))
        times, rows = _in_order(times[sound], rows[sound], facts, dropped, self._clock.topic)
        facts |= {"frame": frame, "body_frame": child or "not said by this type; taken for the vehicle's"}
        track = Track(timestamps_us=times, xyz=rows[:, :3], quaternion_xyzw=rows[:, 3:])
        return self._at_body(track, child.strip("/"), facts, dropped)

    def _of_one_frame(
        self, rows: NDArray[np.float64], times: NDArray[np.int64], wanted: tuple[str, str], dropped: list[Dropped]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Rows of the frames that most have: those of others are of another place, or of another body."""
        own = np.array([names == wanted for names in self._names])
        if not own.all():
            other = " -> ".join(self._names[int(np.argmin(own))])
            reason = f"{self._clock.topic}: of {other}, and most are of {' -> '.join(wanted)}"
            dropped.append(Dropped(what="poses", count=int((~own).sum()), reason=reason))
        return rows[own], times[own]

    def _of_tree(self, facts: dict[str, Any], dropped: list[Dropped]) -> FoundPoses:
        root, child = self._frames if len(self._frames) == 2 else (None, None)
        if child is None:
            child = next((frame for frame in BODY_FRAMES if frame in self._tree.moving), None)
            child = child or next((frame for frame in BODY_FRAMES if frame in self._tree.static), None)
        if child is None:
            frames = ", ".join(self._tree.frames[:20])
            raise UsageError(f"none of the frames is known as the vehicle's; say --pose TOPIC:ROOT,FRAME of {frames}.")
        chain = self._tree.chain(child, root)
        times, xyz, quaternion = self._tree.composed(chain)
        top = (self._tree.moving.get(chain[-1]) or self._tree.static[chain[-1]]).parent
        facts |= {"frame": top, "body_frame": child, "chain": [*reversed(chain)]}
        track = Track(timestamps_us=times, xyz=xyz, quaternion_xyzw=quaternion)
        return self._at_body(track, child, facts, dropped)

    def _of_twists(
        self, times: NDArray[np.int64], rows: NDArray[np.float64], facts: dict[str, Any], dropped: list[Dropped]
    ) -> FoundPoses:
        """Speeds and yaw rates integrated from the origin, of the longest stretch without a gap."""
        times, rows = _in_order(times, rows, facts, dropped, self._clock.topic)
        edges = [0, *(np.flatnonzero(np.diff(times) > MAX_GAP_US) + 1).tolist(), len(times)]
        first, last = max(pairwise(edges), key=lambda ends: ends[1] - ends[0])
        if last - first < len(times):
            reason = f"{self._clock.topic}: beyond a gap of more than {MAX_GAP_US / 1e6:.0f} s, with anything in it"
            dropped.append(Dropped(what="poses", count=len(times) - (last - first), reason=reason))
        times, rows = times[first:last], rows[first:last]
        dt = np.diff(times) / 1e6
        forward, left, turning = ((column[1:] + column[:-1]) / 2 for column in rows.T)
        yaw = np.concatenate([[0.0], np.cumsum(turning * dt)])
        middle = (yaw[1:] + yaw[:-1]) / 2
        steps = [forward * np.cos(middle) - left * np.sin(middle), forward * np.sin(middle) + left * np.cos(middle)]
        xyz = np.zeros((len(times), 3))
        xyz[1:, :2] = np.cumsum(np.stack(steps, axis=1) * dt[:, None], axis=0)
        facts |= {"frame": "the first row's", "integrated": "speed and yaw rate: of the right shape, and drifting"}
        track = Track(timestamps_us=times, xyz=xyz, quaternion_xyzw=yaw_quaternions(yaw))
        return FoundPoses(track=track, point="rear axle", facts=facts, dropped=dropped)

    def _of_fixes(
        self, times: NDArray[np.int64], rows: NDArray[np.float64], facts: dict[str, Any], dropped: list[Dropped]
    ) -> FoundPoses:
        """Fixes in east, north, up, at the times of the headings between them."""
        from scipy.interpolate import CubicSpline

        if self._no_fix:
            reason = f"{self._clock.topic}: status {NO_FIX}, no fix"
            dropped.append(Dropped(what="poses", count=self._no_fix, reason=reason))
        times, rows = _in_order(times, rows, facts, dropped, self._clock.topic)
        xyz = enu_m(*rows.T)
        at, yaw = self._headings.found(self._clock.topic)
        before = np.searchsorted(times, at, side="right") - 1
        inside = (before >= 0) & (before < len(times) - 1)
        gaps = np.diff(times, append=times[-1])
        inside &= gaps[np.clip(before, 0, len(times) - 1)] <= MAX_GAP_US
        if not inside.any():
            raise UsageError(f"{self._heading} and {self._clock.topic} have no time in common with fixes each second.")
        at, yaw = at[inside], yaw[inside]
        seconds = (at - times[0]) / 1e6
        north = convergence_rad(*rows[:, :2].T)
        track = Track(
            timestamps_us=at,
            xyz=CubicSpline((times - times[0]) / 1e6, xyz)(seconds),
            quaternion_xyzw=yaw_quaternions(yaw + np.interp(seconds, (times - times[0]) / 1e6, north)),
        )
        origin = dict(zip(("latitude_deg", "longitude_deg", "height_m"), rows[0].tolist(), strict=True))
        facts |= {"frame": "east, north, up of the first fix, exact on WGS 84", "origin": origin}
        facts |= {"heading": self._headings.facts(), "pitch_and_roll": "0"}
        return FoundPoses(track=track, point="antenna", facts=facts, dropped=dropped)

    def _at_body(self, track: Track, child: str, facts: dict[str, Any], dropped: list[Dropped]) -> FoundPoses:
        """The vehicle's poses where static transforms lead to it; else those of the point that was recorded."""
        from scipy.spatial.transform import Rotation

        if child and child not in BODY_FRAMES:
            for body in BODY_FRAMES:
                placed = self._tree.static_pose(body, child)
                if placed is not None:
                    at, turn = placed
                    rotation = Rotation.from_quat(track.quaternion_xyzw)
                    moved = track.xyz + rotation.apply(at)
                    turned = (rotation * Rotation.from_quat(turn)).as_quat()
                    facts |= {"moved": f"from {child} to {body} by {STATIC}", "body_frame": body}
                    return FoundPoses(
                        track=replace(track, xyz=moved, quaternion_xyzw=turned),
                        point="rear axle",
                        facts=facts,
                        dropped=dropped,
                    )
        point: Point = "rear axle"
        if "optical" in child:
            turned = (Rotation.from_quat(track.quaternion_xyzw) * Rotation.from_quat(_OPTICAL)).as_quat()
            track = replace(track, quaternion_xyzw=turned)
            facts["axes"] = f"{child} looks along z (right, down, forward), turned to forward, left, up; metres"
            point = "camera"
        elif "imu" in child:
            point = "imu"
        elif any(word in child for word in ("gps", "gnss", "antenna")):
            point = "antenna"
        return FoundPoses(track=track, point=point, facts=facts, dropped=dropped)


class _Headings:
    """Headings of an IMU's orientation (east is 0, anticlockwise) or of a compass (north is 0, clockwise)."""

    def __init__(self, topic: str | None, stamps: Stamps) -> None:
        self._topic = topic
        self._clock, self._yaw, self._from = Clocked(topic or "", stamps), list[float](), ""

    def take(self, message: Message) -> None:
        value = message.read()
        if part(value, "azimuth") is not None:  # compass_msgs/Azimuth: unit 0 is radians, orientation 1 is from north
            (azimuth,) = numbers(value, "azimuth")
            yaw = azimuth if part(value, "unit") == 0 else np.deg2rad(azimuth)
            yaw = yaw if part(value, "orientation") == 0 else np.pi / 2 - yaw
            self._from = "azimuth"
        else:
            x, y, z, w = numbers(part(value, "orientation") or part(value, "quaternion"), "x", "y", "z", "w")
            yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
            covariance = part(value, "orientation_covariance")
            if (
                covariance is not None and len(covariance) and covariance[0] == -1
            ) or not x * x + y * y + z * z + w * w:
                yaw = np.nan  # the sensor has no orientation
            self._from = "orientation: 0 is east, anticlockwise"
        if np.isfinite(yaw) and self._clock.time_of(message, stamp_of(value)) is not None:
            self._yaw.append(float(yaw))

    def found(self, fixes: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Times (us), increasing, and yaw (rad). Raises `UsageError`."""
        if self._topic is None:
            remedy = "name a topic with them, such as --heading /imu/data (sensor_msgs/Imu, compass_msgs/Azimuth)"
            raise UsageError(f"{fixes} has positions without headings; {remedy}.")
        self._clock.check()
        times = microseconds(self._clock.stamps_ns)
        order = increasing(times)
        return times[order], np.array(self._yaw)[order]

    def facts(self) -> dict[str, Any]:
        return {**self._clock.facts(), "from": self._from}


def _in_order(
    times: NDArray[np.int64], rows: NDArray[np.float64], facts: dict[str, Any], dropped: list[Dropped], topic: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Finite rows in the order of time, one at each; says what is left out. Raises `UsageError` for fewer than two."""
    finite = np.isfinite(rows).all(axis=1)
    if (~finite).any():
        dropped.append(Dropped(what="poses", count=int((~finite).sum()), reason=f"{topic}: not finite"))
    times, rows = times[finite], rows[finite]
    backwards = int((np.diff(times) < 0).sum())
    if backwards:
        facts["rows_put_in_order"] = backwards
    order = increasing(times)
    if len(order) < len(times):
        count = len(times) - len(order)
        dropped.append(Dropped(what="poses", count=count, reason=f"{topic}: a row of the same time is there already"))
    if len(order) < 2:
        raise UsageError(f"{topic} has {len(order)} usable rows; poses take at least two.")
    return times[order], rows[order]


def _pose(value: Any) -> list[float]:
    at, turn = part(value, "position"), part(value, "orientation")
    return [*numbers(at, "x", "y", "z"), *numbers(turn, "x", "y", "z", "w")]


def _twist(value: Any) -> list[float]:
    return [*numbers(part(value, "linear"), "x", "y"), *numbers(part(value, "angular"), "z")]


_TREES = ("tf2_msgs/TFMessage", "tf/tfMessage", "foxglove/FrameTransforms", "foxglove/FrameTransform")
_TWISTS: dict[str, Callable[[Any], list[float]]] = {
    "geometry_msgs/Twist": _twist,
    "geometry_msgs/TwistStamped": lambda value: _twist(part(value, "twist")),
    "geometry_msgs/TwistWithCovarianceStamped": lambda value: _twist(part(value, "twist", "twist")),
    **dict.fromkeys(
        ("autoware_vehicle_msgs/VelocityReport", "autoware_auto_vehicle_msgs/VelocityReport"),
        lambda value: numbers(value, "longitudinal_velocity", "lateral_velocity", "heading_rate"),
    ),
}
"""Types with speeds forward and left and a yaw rate."""
POSE_TYPES: Mapping[str, Callable[[Any], list[float]]] = {
    "nav_msgs/Odometry": lambda value: _pose(part(value, "pose", "pose")),
    "geometry_msgs/PoseWithCovarianceStamped": lambda value: _pose(part(value, "pose", "pose")),
    "geometry_msgs/PoseStamped": lambda value: _pose(part(value, "pose")),
    "foxglove/PoseInFrame": lambda value: _pose(part(value, "pose")),
    "sensor_msgs/NavSatFix": lambda value: numbers(value, "latitude", "longitude", "altitude"),
    **_TWISTS,
    **dict.fromkeys(_TREES, lambda value: []),
}
"""Type of a message with poses -> what it says, as a row of numbers."""

"""Trees of coordinate frames, as `tf2_msgs/TFMessage` and `foxglove.FrameTransforms` have them.

Each edge moves on its own clock: to compose several, each is interpolated at the times that are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.drive import increasing
from alpacache.converters.messages import numbers, part, stamp_ns, time_ns
from alpacache.errors import UsageError

MOST_EDGES = 10_000
BODY_FRAMES = ("base_link", "base_footprint", "ego/base_link", "ego_vehicle", "ego")
"""Frames that are a vehicle's, the likeliest first."""


@dataclass(slots=True)
class Edge:
    """Transforms from one frame to its parent: rows of nanoseconds, x y z, qx qy qz qw."""

    parent: str
    stamps_ns: list[int] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)

    def sorted(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Times (us), increasing, and rows, those of no rotation left out."""
        stamps, rows = microseconds(self.stamps_ns), np.array(self.rows, np.float64).reshape(-1, 7)
        sound = is_pose(rows)
        stamps, rows = stamps[sound], rows[sound]
        order = increasing(stamps)
        return stamps[order], rows[order]


def microseconds(stamps_ns: Sequence[int]) -> NDArray[np.int64]:
    """Nanoseconds as the nearest microseconds."""
    return (np.array(stamps_ns, np.int64) + 500) // 1000


def is_pose(rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which rows of x y z, qx qy qz qw are finite and have a quaternion of length 1 (within 5 %)."""
    norms = np.linalg.norm(np.nan_to_num(rows[:, 3:], nan=0.0, posinf=0.0, neginf=0.0), axis=1)
    sound: NDArray[np.bool_] = np.isfinite(rows).all(axis=1) & (np.abs(norms - 1) < 0.05)
    return sound


class FrameTree:
    """Edges by child frame; those of `/tf_static` hold at all times."""

    def __init__(self) -> None:
        self.moving: dict[str, Edge] = {}
        self.static: dict[str, Edge] = {}

    def take(
        self, value: Any, *, static: bool, time_of: Callable[[int | None], int | None] = lambda stamp: stamp
    ) -> None:
        """Add the transforms of a message; `time_of` makes a time of each one's stamp, or None of one to leave out."""
        transforms = part(value, "transforms")
        for item in [value] if transforms is None else transforms:
            parent = part(item, "header", "frame_id") or part(item, "parent_frame_id")
            child = part(item, "child_frame_id")
            if not isinstance(parent, str) or not isinstance(child, str):
                continue
            stamp = 0 if static else time_of(stamp_ns(item))
            if stamp is None:
                continue
            inner = part(item, "transform") or item
            move, turn = part(inner, "translation"), part(inner, "rotation")
            row = [*numbers(move, "x", "y", "z"), *numbers(turn, "x", "y", "z", "w")]
            edges = self.static if static else self.moving
            if len(edges) >= MOST_EDGES:
                raise UsageError(f"more than {MOST_EDGES:,} coordinate frames; is this log of one vehicle?")
            edge = edges.setdefault(child.strip("/"), Edge(parent.strip("/")))
            edge.stamps_ns.append(stamp)
            edge.rows.append(row)

    @property
    def frames(self) -> list[str]:
        edges = {**self.static, **self.moving}
        return sorted({*edges, *(edge.parent for edge in edges.values())})

    def chain(self, child: str, root: str | None) -> list[str]:
        """Frames from `child` up to the one below `root` (by default, the top). Raises `UsageError`."""
        found: list[str] = []
        frame = child
        while frame != root:
            edge = self.moving.get(frame) or self.static.get(frame)
            if edge is None and root is None and found:
                return found
            if edge is None or frame in found:
                frames = ", ".join(self.frames[:20])
                raise UsageError(f"no transform leads from {child} to {root or 'another frame'}; frames: {frames}.")
            found.append(frame)
            frame = edge.parent
        return found

    def composed(self, chain: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Times (us), positions and quaternions of the first frame of a chain in the parent of its last.

        The times are those of the edge with the most rows, as far as all moving ones reach.
        """
        from scipy.spatial.transform import Rotation, Slerp

        edges = [(frame in self.moving, (self.moving.get(frame) or self.static[frame]).sorted()) for frame in chain]
        if not all(len(times) for _, (times, _) in edges):
            raise UsageError(f"the transforms of {', '.join(chain)} hold no sound one.")
        moving = [times for moves, (times, _) in edges if moves]
        if not moving:
            raise UsageError(f"none of the transforms of {', '.join(chain)} moves.")
        times = max(moving, key=len)
        times = times[(times >= max(each[0] for each in moving)) & (times <= min(each[-1] for each in moving))]
        xyz, rotation = np.zeros((len(times), 3)), Rotation.identity(len(times))
        if not len(times):
            raise UsageError(f"the transforms of {', '.join(chain)} have no time in common.")
        for moves, (known, rows) in edges:
            if moves and len(known) > 1:
                at = np.stack([np.interp(times, known, column) for column in rows[:, :3].T], axis=1)
                turn = Slerp(known - times[0], Rotation.from_quat(rows[:, 3:]))(times - times[0])
            else:
                at, turn = (
                    np.tile(rows[-1, :3], (len(times), 1)),
                    Rotation.from_quat(np.tile(rows[-1, 3:], (len(times), 1))),
                )
            xyz, rotation = at + turn.apply(xyz), turn * rotation
        return times, xyz, rotation.as_quat()

    def static_pose(self, child: str, root: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Position and quaternion of `child` in `root` by static transforms, either way up; None without."""
        from scipy.spatial.transform import Rotation

        def up(frame: str) -> dict[str, tuple[Any, Any]]:
            at, turn = np.zeros(3), Rotation.identity()
            found = {frame: (at, turn)}
            while (edge := self.static.get(frame)) is not None and edge.parent not in found:
                _, rows = edge.sorted()
                if not len(rows):
                    break
                step = Rotation.from_quat(rows[-1, 3:])
                at, turn = rows[-1, :3] + step.apply(at), step * turn
                found[edge.parent] = (at, turn)
                frame = edge.parent
            return found

        below, above = up(child), up(root)
        shared = next((frame for frame in below if frame in above), None)
        if shared is None:
            return None
        (at, turn), (root_at, root_turn) = below[shared], above[shared]
        return root_turn.inv().apply(at - root_at), (root_turn.inv() * turn).as_quat()


def stamp_of(value: Any) -> int | None:
    """A message's own time."""
    own = stamp_ns(value)
    return own if own is not None else time_ns(part(value, "stamp"))

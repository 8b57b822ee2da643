"""Settings of `convert`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, Lt

from alpacache.config import Config, Name, Place, Written, number, parts
from alpacache.driving.cameras import FRONT_CAMERA, full_camera_name
from alpacache.errors import UsageError

Triple: TypeAlias = tuple[float, float, float]
_Metres = Annotated[float, Ge(-100), Le(100)]
_Degrees = Annotated[float, Ge(-360), Le(360)]
Mount: TypeAlias = Triple | Literal["estimate"]
_OFFSET = parts(number, "X,Y,Z", expected="three numbers: metres forward, left, up")
_MOUNT = parts(
    number,
    "YAW,PITCH,ROLL",
    expected="three numbers (degrees: left, nose down, right side down), or estimate",
    words=("estimate",),
)


def camera_topics(written: Any) -> tuple[tuple[str, str], ...]:
    """(Camera, topic) of each `NAME=TOPIC`; a topic alone is the front camera's. Raises `ValueError`, `UsageError`."""
    pairs = []
    for text in (written,) if isinstance(written, str) else written:
        name, equals, topic = text.partition("=") if not text.startswith("/") else (FRONT_CAMERA, "=", text)
        if not equals or not topic.strip():
            raise ValueError("NAME=TOPIC, such as front_wide=/camera/front/image_raw/compressed")
        pairs.append((full_camera_name(name.strip()), topic.strip()))
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("each camera once")
    return tuple(pairs)


def _checked_cameras(written: Any) -> tuple[str, ...]:
    return tuple(f"{name}={topic}" for name, topic in camera_topics(written))


def _checked_columns(written: Any) -> tuple[str, ...]:
    entries = (written,) if isinstance(written, str) else tuple(written)
    if not all(entry.partition("=")[0].strip() and entry.partition("=")[2].strip() for entry in entries):
        raise ValueError("NAME=COLUMN, such as speed_kmh=observation.state.vehicle.speed")
    return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig(Config):
    """Settings of `convert`."""

    kind: Name
    """Kind of recording: `mcap`, `rosbag`, `carla`, `lerobot`, `nuscenes`, `kitti`, `comma2k19`, `udacity`, `gps`."""
    input: Place
    """The log: a file or a folder, as the kind has it."""
    out: Place | None = None
    """Folder to write, new or begun by the same command; then read it as `folder:OUT`."""
    list: bool = False
    """Only show what is in the log, with a command that converts it."""
    check: bool = True
    """Look for wrong axes, units and clocks in what was written, as `alpacache check` does."""
    clip_seconds: Annotated[float, Ge(10), Le(1e5)] | None = None
    """Cut each drive into clips of so many seconds. Default: one clip a drive."""
    origin_offset: Annotated[tuple[_Metres, _Metres, _Metres], _OFFSET] | None = None
    """Middle of the rear axle on the ground, seen from the point of the log's poses, in the vehicle's axes: metres
    forward, left, up. Default: the kind's."""
    mount: Annotated[tuple[_Degrees, _Degrees, _Degrees] | Literal["estimate"], _MOUNT] | None = None
    """How the axes of the log's poses are turned as seen from the vehicle, in degrees (left, nose down, right side
    down), or `estimate`, on straights. Default: the kind's."""
    camera: Annotated[tuple[str, ...], Written(metavar="NAME=TOPIC", read=_checked_cameras, repeatable=True)] = field(
        default_factory=tuple
    )
    """Topic of a camera, such as `front_wide=/camera/front/compressed`; repeatable. Default: where there is one topic
    with pictures, that is the front camera."""
    pose: Name | None = None
    """Topic of the poses; of transforms also `TOPIC:ROOT,FRAME`. Default: the one there is."""
    heading: Name | None = None
    """Topic of the headings of satellite fixes: an IMU's orientation or a compass. Default: the one there is."""
    stamp: Literal["header", "log"] = "header"
    """Time of a message: the one it says itself, or that of its arrival in the log, which is later."""
    axes: Literal["right-handed", "left-handed"] | None = None
    """Handedness of the axes of poses where the log itself cannot make sure."""

    crop: bool = False
    """Cut the middle out of each picture in the shape of the model's, 16 : 9; they are encoded anew."""
    pad: bool = False
    """Put black around each picture up to that shape; they are encoded anew."""
    undistort: bool = False
    """Take the lens's distortion out, by the log's calibration; pictures are encoded anew."""
    map: Annotated[tuple[str, ...], Written(metavar="NAME=COLUMN", read=_checked_columns, repeatable=True)] = field(
        default_factory=tuple
    )
    """Column of a data set that holds a value, such as `latitude=observation.state.gps[0]`; repeatable. Default: the
    preset that fits."""
    film_start: Name | None = None
    """When the first frame of a film was taken, by the log beside it: a time in UTC, such as 2026-05-01T10:00:00.25Z,
    or seconds after the log's first row. Default: found from its turns."""
    wheelbase_m: Annotated[float, Gt(0), Le(20)] | None = None
    """Wheelbase of a vehicle whose poses are integrated from its steering. Default: 2.5."""
    full_lock_deg: Annotated[float, Gt(0), Lt(90)] | None = None
    """Angle of its wheels at full lock. Default: 23.5."""

    def _check_together(self) -> None:
        if self.out is None and not self.list:
            raise UsageError("--out missing; name the folder to write, or ask for --list.")
        if self.crop and self.pad:
            raise UsageError("--crop and --pad both make pictures of the model's shape; leave one of them out.")

"""`mcap` and `rosbag`: logs of ROS 1 and ROS 2, and MCAP files of others with messages of the same kinds.

Which topics are the cameras and the poses is chosen by the user, or by there being one alone that can be. Messages are
gone through once for times and poses; pictures are read again when they are written.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alpacache.converters.config import camera_topics
from alpacache.converters.cut_bag_log import MAGIC as BAG
from alpacache.converters.cut_bag_log import CutBagLog
from alpacache.converters.drive import Camera, Dropped, LoggedDrive
from alpacache.converters.kind import Kind, Listing
from alpacache.converters.mcap_log import MAGIC, McapLog
from alpacache.converters.messages import Message, MessageLog, Topic, part
from alpacache.converters.ros_pictures import PICTURE_TYPES, VIDEO_TYPES, PictureReader
from alpacache.converters.ros_poses import POSE_TYPES, STATIC, PoseReader, Stamps
from alpacache.converters.rosbag_log import RosbagLog
from alpacache.converters.unpacking import unpacked_files
from alpacache.driving.cameras import CAMERAS, FRONT_CAMERA
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.regular_file import read_regular, regular_size

METADATA = "metadata.yaml"
_MAX_METADATA_BYTES = 2**24
_CAMERA_INFO = "sensor_msgs/CameraInfo"
_BEST_POSES = ("/localization/kinematic_state",)
"""Topics whose meaning is known: Autoware's own poses of its base_link."""
_ORDER = (
    "nav_msgs/Odometry",
    "geometry_msgs/PoseStamped",
    "geometry_msgs/PoseWithCovarianceStamped",
    "tf2_msgs/TFMessage",
    "foxglove/FrameTransforms",
)
"""Types of poses that are suggested, the best first; others have to be asked for."""


def open_log(place: Path) -> MessageLog:
    """The log in a file or folder. Raises `SourceError` for one that holds none."""
    if place.is_file():
        return _log_of([place])
    if (place / METADATA).is_file():
        return _with_metadata(place)
    for ending in ("mcap", "bag", "db3"):
        if files := sorted(place.glob(f"*.{ending}"), key=_natural):
            return _log_of(files)
    raise SourceError(f"{place} holds no .mcap, .bag or .db3 file; name the folder that does.")


def drives(
    place: Path,
    *,
    camera: Sequence[str] = (),
    pose: str | None = None,
    heading: str | None = None,
    stamp: Stamps = "header",
) -> Iterator[LoggedDrive | Dropped]:
    """The one drive of a log."""
    log = open_log(place)
    topics = log.topics
    cameras = dict(camera_topics(camera)) if camera else _only_camera(topics)
    pose_topic, _, frames = (pose or _only_pose(topics)).partition(":")
    for name in (*cameras.values(), pose_topic, *([heading] if heading else [])):
        if name not in topics:
            raise UsageError(f"{name} is no topic of {place}; its topics: {', '.join(sorted(topics))[:2000]}.")
    poses = PoseReader(
        pose_topic,
        topics[pose_topic].type,
        frames=[frame.strip("/ ") for frame in frames.split(",")] if frames else (),
        heading=heading or _only_heading(topics),
        stamps=stamp,
    )
    pictures = {name: PictureReader(topic, topics[topic].type, stamps=stamp) for name, topic in cameras.items()}
    lenses = _lens_topics(cameras, topics)
    names = {topic: name for name, topic in cameras.items()}
    found_lenses: dict[str, Any] = {}

    def take(message: Message) -> None:
        if message.topic in names:
            pictures[names[message.topic]].take(message)
        elif message.topic in lenses:
            if lenses[message.topic] not in found_lenses:
                found_lenses[lenses[message.topic]] = _lens(message.read())
        else:
            poses.take(message)

    unread = _go_through(log.messages({*poses.topics, *names, *lenses}), take)
    found = poses.found()
    facts: dict[str, Any] = {"poses": found.facts, "cameras": {}}
    dropped, read = [*log.lost, *unread, *found.dropped], dict[str, Camera]()
    for name, reader in pictures.items():
        read[name], facts["cameras"][name], lost = reader.camera(log)
        dropped += [Dropped(what=f"{name} {drop.what}", count=drop.count, reason=drop.reason) for drop in lost]
        times, reach = read[name].times_us, found.track.timestamps_us
        if times[0] > reach[-1] or times[-1] < reach[0]:
            raise UsageError(
                f"{cameras[name]} ({times[0] / 1e6:.3f} to {times[-1] / 1e6:.3f} s) and {pose_topic} "
                f"({reach[0] / 1e6:.3f} to {reach[-1] / 1e6:.3f} s) have no time in common by their stamps; with "
                "--stamp log the times of arrival are taken."
            )
    yield LoggedDrive(
        name=place.resolve().stem or "log",
        cameras=read,
        track=found.track,
        point=found.point,
        calibration=found_lenses,
        dropped=dropped,
        facts=facts,
    )


def _go_through(messages: Iterable[Message], take: Callable[[Message], None]) -> list[Dropped]:
    """Give all messages to `take`; those that it cannot take are dropped, a row a topic with the first reason."""
    bad: dict[str, list[str]] = {}
    for message in messages:
        try:
            take(message)
        except BadClipError as error:
            bad.setdefault(message.topic, []).append(str(error).rstrip("."))
        except UsageError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # JSON has anything in any place.
            why = f"{message.topic} at {message.log_ns} ns is of another form than its type ({error})"
            bad.setdefault(message.topic, []).append(why)
    return [Dropped(what="messages", count=len(why), reason=why[0]) for why in bad.values()]


def list_topics(place: Path, *, kind: str) -> Listing:
    """Topics with types, rates and what they can be used as."""
    topics = open_log(place).topics
    rows = []
    for name in sorted(topics):
        topic = topics[name]
        rate = f"{(topic.count - 1) / topic.seconds:.1f}" if topic.seconds and topic.count > 1 else "-"
        rows.append([name, topic.type, str(topic.count), rate, f"{topic.seconds:.1f}", _use(topic)])
    pictures = [name for name in sorted(topics) if _use(topics[name]) == "camera"]
    notes = []
    cameras = [f"--camera {_camera_name(name)}={name}" for name in pictures[:1]]
    if len(pictures) > 1:
        notes.append(f"{len(pictures)} topics with pictures; name those you want, each as one of {', '.join(CAMERAS)}.")
    poses = _pose_topics(topics)
    if not pictures:
        notes.append("no topic with pictures; only poses would be written")
    if len(alike := [name for name in poses if topics[name].type == topics[poses[0]].type]) > 1 and (
        poses[0] not in _BEST_POSES
    ):
        notes.append(f"{len(alike)} topics have poses of the same kind: {', '.join(alike)}; name the one you mean.")
    if not poses:
        notes.append("no topic with poses; those with fixes or speeds can be named with --pose")
    pose = [f"--pose {poses[0]}"] if poses else []
    command = " ".join(["alpacache convert", kind, shlex.quote(str(place)), "--out drives", *cameras, *pose])
    return Listing(heads=("topic", "type", "messages", "Hz", "seconds", "use"), rows=rows, command=command, notes=notes)


def _log_of(files: Sequence[Path]) -> MessageLog:
    _check_regular(files)
    with files[0].open("rb") as file:
        head = file.read(16)
    if head.startswith(MAGIC):
        return McapLog(files)
    if head.startswith(b"SQLite format 3\0"):
        return RosbagLog(files)
    if head.startswith(BAG):
        try:
            return RosbagLog(files)
        except SourceError:  # without an index
            return CutBagLog(files)
    begins = head[:8].hex() or "nothing"
    raise SourceError(f"{files[0]} is neither MCAP nor a bag of ROS: it begins with {begins}.")


def _with_metadata(place: Path) -> MessageLog:
    """A folder of rosbag2. The names in its list are taken from the folder itself, wherever they point."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = read_regular(place / METADATA, limit_bytes=_MAX_METADATA_BYTES).decode()
        listed = YAML(typ="safe").load(text)["rosbag2_bagfile_information"]
        storage = str(listed["storage_identifier"])
        names = [Path(str(name)).name for name in listed["relative_file_paths"]]
        packed = str(listed.get("compression_mode") or "").lower()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError) as error:
        what = f"{place / METADATA} cannot be read ({type(error).__name__})"
        raise SourceError(f"{what}; name the files instead.") from error
    files = [place / name for name in names]
    if absent := [file.name for file in files if not os.path.lexists(file)]:
        raise SourceError(f"{place}: {', '.join(absent[:3])} of {METADATA} is not there; copy it, or name one file.")
    _check_regular(files)
    if packed == "file":
        folder, files = unpacked_files(files)
        return McapLog(files, keeps=folder) if storage == "mcap" else RosbagLog(files, keeps=folder)
    return McapLog(files, is_packed=packed == "message") if storage == "mcap" else RosbagLog([place])


def _check_regular(files: Sequence[Path]) -> None:
    """Raise `SourceError` for a FIFO and the like, which would block whoever opens it."""
    for file in files:
        try:
            regular_size(file)
        except OSError as error:
            raise SourceError(f"{file} cannot be read: {error}.") from error


def _natural(file: Path) -> list[Any]:
    """A key by which part 10 comes after part 9."""
    return [int(text) if text.isdigit() else text for text in re.split(r"(\d+)", file.name)]


def _use(topic: Topic) -> str:
    if topic.type in (*PICTURE_TYPES, *VIDEO_TYPES) and "depth" not in topic.name.lower():
        return "camera"
    if topic.type in POSE_TYPES and topic.name != STATIC:
        return "pose"
    return ""


def _only_camera(topics: Mapping[str, Topic]) -> dict[str, str]:
    """The one topic with pictures as the front camera; nothing where there is none."""
    found = [name for name, topic in sorted(topics.items()) if _use(topic) == "camera" and topic.count]
    if len(found) <= 1:
        return dict.fromkeys([FRONT_CAMERA][: len(found)], "".join(found))
    example = f"--camera {_camera_name(found[0])}={found[0]}"
    raise UsageError(f"{len(found)} topics have pictures: {', '.join(found)}. Name those you want, such as {example}.")


def _pose_topics(topics: Mapping[str, Topic]) -> list[str]:
    """Topics with poses, the likeliest first."""
    found = [name for name, topic in topics.items() if _use(topic) == "pose" and topic.type in _ORDER and topic.count]
    return sorted(found, key=lambda name: (name not in _BEST_POSES, _ORDER.index(topics[name].type), name))


def _only_pose(topics: Mapping[str, Topic]) -> str:
    found = _pose_topics(topics)
    best = [name for name in found if topics[name].type == topics[found[0]].type]
    if found and (found[0] in _BEST_POSES or len(best) == 1):
        return found[0]
    others = [name for name in sorted(topics) if _use(topics[name]) == "pose"]
    if not others:
        raise UsageError(f"no topic has poses; the topics: {', '.join(sorted(topics))[:2000]}.")
    raise UsageError(f"poses can be made of {', '.join(others)}; say which with --pose TOPIC.")


def _only_heading(topics: Mapping[str, Topic]) -> str | None:
    found = [name for name, topic in topics.items() if topic.type in ("sensor_msgs/Imu", "compass_msgs/Azimuth")]
    return found[0] if len(found) == 1 else None


def _camera_name(topic: str) -> str:
    """The short name of a camera whose words a topic has; else the front one's."""
    short = [name.removeprefix("camera_").rsplit("_", 1)[0] for name in CAMERAS]
    return next((name for name in short if name in topic), "front_wide")


def _lens_topics(cameras: Mapping[str, str], topics: Mapping[str, Topic]) -> dict[str, str]:
    """Topic of a camera's `camera_info`, which stands beside its pictures or one step above -> the camera."""
    found: dict[str, str] = {}
    for name, topic in cameras.items():
        parts = topic.split("/")
        places = ["/".join([*parts[:depth], "camera_info"]) for depth in (len(parts) - 1, len(parts) - 2) if depth > 1]
        found |= {place: name for place in places[::-1] if place in topics and topics[place].type == _CAMERA_INFO}
    return found


def _lens(value: Any) -> dict[str, Any]:
    """A `camera_info` as `calibration.json` has it."""
    lists: dict[str, Any] = {
        name: next((part(value, key) for key in keys if part(value, key) is not None), []) for name, keys in _MATRICES
    }
    return {
        "width": part(value, "width"),
        "height": part(value, "height"),
        "distortion_model": str(part(value, "distortion_model") or ""),
        **{name: [float(item) for item in values] for name, values in lists.items()},
    }


_MATRICES = (("K", ("k", "K")), ("D", ("d", "D")), ("R", ("r", "R")), ("P", ("p", "P")))
_TAKES = ("camera", "pose", "heading", "stamp")
_MODULES = ("mcap", "mcap_ros2", "rosbags")
MCAP = Kind(
    name="mcap",
    reads="an .mcap file, or a folder with the parts of one recording",
    drives=drives,
    takes=_TAKES,
    list_input=lambda place: list_topics(place, kind="mcap"),
    extra="ros",
    modules=_MODULES,
)
ROSBAG = Kind(
    name="rosbag",
    reads="a .bag or .db3 file, or a folder of rosbag2 with metadata.yaml",
    drives=drives,
    takes=_TAKES,
    list_input=lambda place: list_topics(place, kind="rosbag"),
    extra="ros",
    modules=_MODULES,
)

"""Names of PhysicalAI-AV's cameras. Configs need them, so nothing heavy is imported here."""

from collections.abc import Sequence

from alpacache.errors import UsageError

CAMERAS = (
    "camera_cross_left_120fov",
    "camera_front_wide_120fov",
    "camera_cross_right_120fov",
    "camera_rear_left_70fov",
    "camera_rear_tele_30fov",
    "camera_rear_right_70fov",
    "camera_front_tele_30fov",
)
"""PhysicalAI-AV camera names; the position is the camera index of the public code."""
FRONT_CAMERA = CAMERAS[1]


def sort_cameras(names: Sequence[str]) -> tuple[str, ...]:
    """Camera names in index order, without duplicates. Raises `UsageError` for unknown ones or none."""
    unknown = [name for name in names if name not in CAMERAS]
    if unknown or not names:
        raise UsageError(f"unknown camera {', '.join(unknown) or '(none given)'}; known: {', '.join(CAMERAS)}.")
    return tuple(sorted(set(names), key=CAMERAS.index))


def full_camera_name(name: str) -> str:
    """Expand `front_wide` to `camera_front_wide_120fov`; full names stay as they are. Raises `UsageError`."""
    matches = [camera for camera in CAMERAS if camera == name or camera.startswith(f"camera_{name}_")]
    if len(matches) != 1:
        raise UsageError(f"unknown camera {name!r}; known: {', '.join(CAMERAS)}, or short names such as front_wide.")
    return matches[0]

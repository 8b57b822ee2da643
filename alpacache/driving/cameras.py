"""Names of PhysicalAI-AV's cameras. Configs need them, so nothing heavy is imported here."""

from collections.abc import Mapping, Sequence
from typing import Any

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
SLOTS = (*CAMERAS[:3], CAMERAS[6])
"""The cameras that the models are trained with. A prompt that names none knows them by their place among its images."""


def sort_cameras(names: Sequence[str]) -> tuple[str, ...]:
    """Camera names in index order, without duplicates. Raises `UsageError` for unknown ones or none."""
    unknown = [name for name in names if name not in CAMERAS]
    if unknown or not names:
        raise UsageError(f"unknown camera {', '.join(unknown)[:200] or '(none given)'}; known: {', '.join(CAMERAS)}.")
    return tuple(sorted(set(names), key=CAMERAS.index))


def check_blank(cameras: Sequence[str], blank: Sequence[str]) -> None:
    """Raise `UsageError` where a camera is both given and to be blank."""
    if both := [name for name in sort_cameras(cameras) if name in blank]:
        raise UsageError(f"{', '.join(both)}: in --cameras and in --blank; take the recorded picture or a black one.")


def check_places(cameras: Sequence[str], blank: Sequence[str]) -> None:
    """Raise `UsageError` where cameras, with black pictures among them, stand in each other's places of `SLOTS`.

    For prompts that name no camera, of which black pictures are to keep the places.
    """
    names = sort_cameras([*cameras, *blank])
    apart = next(((name, slot) for name, slot in zip(names, SLOTS, strict=False) if name != slot), None)
    apart = apart or next(((name, "no camera") for name in names[len(SLOTS) :]), None)
    if not blank or apart is None:
        return
    where = "behind the last place" if apart[1] == "no camera" else f"in the place of {apart[1]}"
    if strangers := [name for name in names if name not in SLOTS]:
        remedy = f"Leave {', '.join(strangers)} out"
    else:
        last = SLOTS.index(names[-1]) + 1
        remedy = f"Pass --blank {','.join(slot for slot in SLOTS[:last] if slot not in cameras)}"
    raise UsageError(
        f"with --blank {','.join(blank)}, {apart[0]} would stand {where}: the prompt names no camera, the model knows "
        f"them by their order, {', '.join(SLOTS)}. {remedy}, or pass --camera-names if the model was trained with them."
    )


def full_camera_name(name: str) -> str:
    """Expand `front_wide` to `camera_front_wide_120fov`; full names stay as they are. Raises `UsageError`."""
    matches = [camera for camera in CAMERAS if camera == name or camera.startswith(f"camera_{name}_")]
    if len(matches) != 1:
        raise UsageError(
            f"unknown camera {name[:200]!r}; known: {', '.join(CAMERAS)}, or short names such as front_wide."
        )
    return matches[0]


def recorded_and_blank(identity: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Recorded and black cameras in a store's identity, both empty if it does not say."""
    names, blank = ([str(name) for name in identity.get(key) or ()] for key in ("cameras", "blank"))
    return [name for name in names if name not in blank], blank


def prompt_marks(identity: Mapping[str, Any]) -> tuple[bool | None, bool | None]:
    """Tell whether a store's prompts name cameras, and whether they number frames; None where its identity does not."""
    prompt = identity.get("prompt")
    if not isinstance(prompt, Mapping):
        return None, None
    template = prompt.get("template")
    return prompt.get("camera_names"), "frame 0 <|" in template if isinstance(template, str) else None


def marks_words(names: bool | None, numbers: bool | None) -> str:
    """`cameras named, frames not numbered`."""
    cameras, frames = ("" if given else "not " for given in (names, numbers))
    return f"cameras {cameras}named, frames {frames}numbered"


def camera_words(identity: Mapping[str, Any]) -> str:
    """Cameras that the VLM saw, for people; empty if a store's identity does not say."""
    recorded, blank = recorded_and_blank(identity)
    words = ", ".join(recorded) + (f", black pictures for {', '.join(blank)}" if blank else "")
    return f"{words}, changed by {', '.join(changes)}" if words and (changes := changes_of(identity)) else words


def changes_of(identity: Mapping[str, Any]) -> list[str]:
    """Changes made to a store's pictures since they were recorded; empty if its identity names none."""
    changes = identity.get("changes")
    return [str(change) for change in changes] if isinstance(changes, list) else []

"""Finds the film or the pictures of one camera in a clip's folder.

Pictures are frames by their numbers: 000000 is the first, and none is missing. An order of names alone would take a
folder that begins at 1, or that was cut out of a longer one, for a recording that begins there, and every picture would
be shown at another one's time. Hidden files, such as those that macOS puts beside each file, are left alone.
"""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from alpacache.errors import BadClipError

FILMS = (".mp4", ".m4v", ".mov", ".mkv")
"""Endings of films, in small letters."""
PICTURES: Mapping[str, Literal["JPEG", "PNG"]] = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
"""Ending of a picture, in small letters -> its format."""
_READ = "films as .mp4, .m4v, .mov or .mkv, pictures as .jpg, .jpeg or .png"


def find_film(clip: Path, camera: str, *, where: str) -> Path | None:
    """The camera's film in the folder `clip`; None if its pictures lie in a folder.

    Raises `BadClipError`: `missing_camera` if there is neither, `wrong_shape` if it is not clear which to take.
    """
    beside = sorted(entry.name for entry in clip.iterdir() if entry.stem == camera and not entry.is_dir())
    films = [name for name in beside if _ending(name) in FILMS]
    folder = clip / camera
    pictures = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    if len(films) > 1 or (films and pictures):
        present = " and ".join([*films, *([f"a folder {camera}/"] if pictures else [])])
        raise BadClipError("wrong_shape", f"{where}: {present} are both there. Which is it? Remove the other.")
    if films:
        return clip / films[0]
    if folder.is_dir():
        return None
    others = f"; {', '.join(beside)} is there, but {_READ} are read" if beside else ""
    raise BadClipError("missing_camera", f"{where}: neither {camera}.mp4 nor a folder {camera}/ exists{others}.")


def find_pictures(folder: Path, count: int, *, where: str) -> dict[int, str]:
    """Frame number -> name of the `count` pictures in a camera's folder.

    Raises `BadClipError` (`wrong_shape`) unless they are numbered from 0 on without a gap.
    """
    pictures: dict[int, str] = {}
    others: Counter[str] = Counter()
    for name in os.listdir(folder):  # noqa: PTH208 (paths are slow to make)
        if name.startswith("."):
            continue
        stem, dot, ending = name.rpartition(".")
        ending = f".{ending.lower()}" if dot else "no ending"
        if ending not in PICTURES:
            others[ending] += 1
            continue
        if not (stem.isascii() and stem.isdigit() and len(stem) <= 18):
            reason = f"{folder.name}/{name} is not a frame's number. Name pictures 000000.jpg, 000001.jpg, ..."
            raise BadClipError("wrong_shape", f"{where}: {reason}")
        if (twin := pictures.setdefault(int(stem), name)) is not name:
            reason = f"{' and '.join(sorted((twin, name)))} are both there. Which is it? Remove the other."
            raise BadClipError("wrong_shape", f"{where}: {reason}")
    missing = next((number for number in range(count) if number not in pictures), None)
    example = pictures[min(pictures)] if pictures else ""
    first = f"{missing or 0:06d}{Path(example).suffix} is missing (the first is {example})"
    if len(pictures) != count:
        present = f"{len(pictures)} images" if pictures else "no image that can be read"
        beside = ", ".join(f"{number} files with {ending}" for ending, number in others.most_common(3))
        beside = f" beside {beside}; {_READ} are read" if others else ""
        remedy = "Write one picture for each time, or the times of those that are there."
        if pictures and missing is not None and missing < max(pictures):
            beside += f"; {first}"
        raise BadClipError("wrong_shape", f"{where}: {present}, but {count} timestamps{beside}. {remedy}")
    if missing is not None:
        rule = "number the pictures from 000000 on without a gap, in the order of the timestamps"
        raise BadClipError("wrong_shape", f"{where}: {first}; {rule}.")
    return pictures


def picture_format(name: str) -> Literal["JPEG", "PNG"]:
    return PICTURES[_ending(name)]


def _ending(name: str) -> str:
    return Path(name).suffix.lower()

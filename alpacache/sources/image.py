"""Reads pictures that may come from a stranger.

A picture's size is checked before its pixels are allocated, and it goes to the decoder of its own format alone: neither
a decompression bomb nor a file of another kind under a .jpg name gets anywhere. A JPEG carries no checksum, and its
decoder makes up what is not there, so that one which was cut off is told by its end.
"""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError
from alpacache.regular_file import lfs_pointer

MAX_PIXELS = 50_000_000
"""Pixels of one frame; 8K video has 33 million."""
_ORIENTATION = 0x0112
"""EXIF tag."""
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
"""Markers of a JPEG: that of its first pixels, and the last one. Pixels never hold the latter."""
_MADE_UP = 128
"""Colour that the decoder gives to pixels whose data are missing."""


def read_image(
    file: Path | BinaryIO, kind: Literal["JPEG", "PNG"], *, where: str, about_px: int | None = None
) -> NDArray[np.uint8]:
    """`[H, W, 3]` RGB, upright as EXIF says. Raises `BadClipError`: `undecodable_video`, `wrong_shape`.

    A JPEG of which `about_px` pixels across are enough is decoded at half, a quarter or an eighth of its size, which is
    faster.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        encoded = file.read_bytes() if isinstance(file, Path) else file.read()
        with Image.open(io.BytesIO(encoded), formats=(kind,)) as image:
            check_size(*image.size, where=where)
            if image.mode.startswith(("I", "F")):
                reason = "a grey image of 16 bits; write 8 bits a colour."
                raise BadClipError("wrong_shape", f"{where}: {reason}")
            if kind == "PNG":
                image.load()  # its EXIF may lie behind its pixels: what is wrong with them is not wrong with that
            turn = _exif_turn(image)
            if about_px is not None:
                image.draft(None, (about_px, 1))
            image.load()
            if kind == "JPEG" and _is_cut_off(image, encoded):
                raise OSError("it was cut off: data are missing at its end")
            upright = image if turn is None else image.transpose(turn)
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # raised before the size is known
        raise BadClipError(
            "wrong_shape", f"{where}: a picture of far more than {MAX_PIXELS:,} pixels, the most that is read."
        ) from error
    except (OSError, SyntaxError) as error:
        unknown = isinstance(error, UnidentifiedImageError)  # whose text holds an address
        reason = lfs_pointer(file) or ("it is none" if unknown else str(error))
        raise BadClipError("undecodable_video", f"{where}: no readable {kind} image ({reason}).") from error


def _is_cut_off(image: Any, encoded: bytes) -> bool:
    """Tell whether a loaded JPEG lacks pixels: without an end, or with one that comes too early."""
    import av

    at = 2
    while (marker := encoded[at : at + 2])[:1] == b"\xff" and marker != _SCAN:
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    if encoded.find(_END, at) < 0:
        return True
    width, height = image.size
    corner = image.crop((max(0, width - 4), max(0, height - 4), width, height)).convert("RGB")
    if any(extremes != (_MADE_UP, _MADE_UP) for extremes in corner.getextrema()):
        return False
    decoder = av.CodecContext.create("mjpeg", "r")  # a strict one, which takes its time
    decoder.options = {"err_detect": "explode"}
    try:
        decoder.decode(av.Packet(encoded))
    except av.error.InvalidDataError:
        return True
    return False


def stack(frames: Sequence[NDArray[np.uint8]], *, where: str) -> NDArray[np.uint8]:
    """`[H, W, 3]` frames of one size as `[frames, 3, H, W]`, a view of an array with its colours last.

    Raises `BadClipError` (`wrong_shape`) for different sizes.
    """
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        shown = ", ".join(map(str, sizes))
        raise BadClipError("wrong_shape", f"{where}: frames of different sizes (height, width): {shown}; expected one.")
    return np.stack(frames).transpose(0, 3, 1, 2)


def check_size(width: int, height: int, *, where: str) -> None:
    """Refuse frames larger than any camera's."""
    if width * height > MAX_PIXELS:
        raise BadClipError("wrong_shape", f"{where}: frames of {width} x {height} pixels; at most {MAX_PIXELS:,}.")


def _exif_turn(image: Any) -> Any:
    """Pillow's transposition that shows the image upright; None if it is, or if its EXIF cannot be read."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, ArithmeticError, struct.error):
        return None

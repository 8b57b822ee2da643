"""Pictures of other cameras in the shape that the models were trained with: cropped, padded, without distortion.

A picture that is changed has to be decoded and encoded anew; nothing is changed unless it is asked for. What was done
goes to the clip's provenance, and its lens with it.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.converters.drive import Arrays, Camera, Dropped, Film, LoggedDrive, Packets, Pictures
from alpacache.converters.remux import decoded
from alpacache.driving.sample import Floats
from alpacache.errors import BadClipError
from alpacache.sources.image import MAX_PIXELS, check_size, read_image

Picture = NDArray[np.uint8]
ASPECT = 1920 / 1080
"""Width over height of the pictures that the models were trained with."""
FISHEYE = ("equidistant", "fisheye")
POLYNOMIAL = ("plumb_bob", "rational_polynomial")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reframe:
    """Changes made to each picture, in this order."""

    undistort: bool = False
    """Take the lens's distortion out, as the log's calibration has it; the matrix stays."""
    crop: bool = False
    """Cut the middle of `ASPECT` out."""
    pad: bool = False
    """Put black beside or above and below, up to `ASPECT`."""

    @property
    def changes(self) -> list[str]:
        """Changes that are made, in this order, as an index of recordings names them."""
        return [name for name in ("undistort", "crop", "pad") if getattr(self, name)]

    def drives(self, drives: Iterable[LoggedDrive | Dropped]) -> Iterator[LoggedDrive | Dropped]:
        """The drives with their pictures and lenses changed; one without the lens that it takes is `Dropped`."""
        for drive in drives:
            try:
                yield drive if isinstance(drive, Dropped) else self._drive(drive)
            except BadClipError as error:
                yield Dropped(what="drives", count=1, reason=str(error))

    def _drive(self, drive: LoggedDrive) -> LoggedDrive:
        cameras: dict[str, Camera] = {}
        lenses = dict(drive.calibration)
        for name, camera in drive.cameras.items():
            places = self._places(drive, name) if self.undistort else None
            cameras[name] = Arrays(times_us=camera.times_us, read=partial(self._read, camera, places, drive.name))
            if name in lenses:
                lenses[name] = self.lens(lenses[name])
        shape = f", to {ASPECT:.4g} : 1" if self.crop or self.pad else ""
        facts = {**drive.facts, "pictures": f"changed: {', '.join(self.changes)}{shape}"}
        return replace(drive, cameras=cameras, calibration=lenses, facts=facts)

    def lens(self, lens: Mapping[str, Any]) -> dict[str, Any]:
        """The lens of the changed pictures, in the form of a ROS `camera_info`."""
        changed = dict(lens)
        if self.undistort:
            changed |= {"D": [], "distortion_model": "plumb_bob"}
        if (self.crop or self.pad) and lens.get("width") and lens.get("height"):
            left, top, width, height = self.box(int(lens["width"]), int(lens["height"]))
            changed |= {"width": width, "height": height}
            for key, row in (("K", 3), ("P", 4)):
                if len(matrix := list(lens.get(key) or [])) == 3 * row:
                    matrix[2], matrix[row + 2] = matrix[2] - left, matrix[row + 2] - top
                    changed[key] = matrix
        return changed

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, width and height of the changed picture, in pixels of the one before; beyond it is black."""
        wide = width > ASPECT * height
        if self.crop:
            new = (round(ASPECT * height), height) if wide else (width, round(width / ASPECT))
        elif self.pad:
            new = (width, round(width / ASPECT)) if wide else (round(ASPECT * height), height)
        else:
            new = (width, height)
        return (width - new[0]) // 2, (height - new[1]) // 2, *new

    def _read(self, camera: Camera, places: "Places | None", where: str, begin: int, end: int) -> Iterator[Picture]:
        for picture in _pictures(camera, begin, end, where=where):
            yield self._framed(picture if places is None else places.sample(picture, where=where), where=where)

    def _framed(self, picture: Picture, *, where: str) -> Picture:
        height, width = picture.shape[:2]
        left, top, new_width, new_height = self.box(width, height)
        check_size(new_width, new_height, where=where)
        if left >= 0 and top >= 0:
            return np.ascontiguousarray(picture[top : top + new_height, left : left + new_width])
        framed = np.zeros((new_height, new_width, 3), np.uint8)
        framed[-top : -top + height, -left : -left + width] = picture
        return framed

    def _places(self, drive: LoggedDrive, name: str) -> "Places":
        lens = drive.calibration.get(name)
        if not lens or len(lens.get("K") or []) != 9:
            reason = f"{drive.name}: the log has no calibration of {name}; leave --undistort out"
            raise BadClipError("wrong_shape", reason)
        return Places.of(lens, where=f"{drive.name}: {name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Place of each pixel of an undistorted picture in the recorded one."""

    columns: Floats
    """`[H, W]`."""
    rows: Floats

    @classmethod
    def of(cls, lens: Mapping[str, Any], *, where: str) -> "Places":
        """The places for a lens. Raises `BadClipError` for a model of distortion that is not known."""
        try:
            width, height = int(lens["width"]), int(lens["height"])
            matrix = np.array(lens["K"], dtype=np.float64).reshape(3, 3)
            coefficients = [float(value) for value in lens.get("D") or []]
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            raise BadClipError("wrong_shape", f"{where}: the calibration has another form ({error})") from error
        if not 0 < width * height <= MAX_PIXELS:
            raise BadClipError("wrong_shape", f"{where}: a calibration for {width} x {height} pixels")
        (fx, _, cx), (_, fy, cy), _ = matrix.tolist()
        if not (fx > 0 and fy > 0 and np.isfinite([*matrix.flat, *coefficients]).all()):
            reason = f"focal lengths {fx:g} and {fy:g}, as of a camera that was never calibrated, or values not finite"
            raise BadClipError("wrong_shape", f"{where}: the calibration has {reason}; leave --undistort out")
        x, y = np.meshgrid((np.arange(width) - cx) / fx, (np.arange(height) - cy) / fy)
        seen_x, seen_y = _distorted(x, y, str(lens.get("distortion_model") or ""), coefficients, where=where)
        return cls(columns=fx * seen_x + cx, rows=fy * seen_y + cy)

    def sample(self, picture: Picture, *, where: str) -> Picture:
        """The undistorted picture, between pixels by their distances; black where nothing was recorded."""
        height, width = picture.shape[:2]
        if (height, width) != self.rows.shape:
            expected = f"its calibration is for {self.rows.shape[1]} x {self.rows.shape[0]}"
            raise BadClipError("wrong_shape", f"{where}: a picture of {width} x {height} pixels, and {expected}.")
        inside = (self.columns >= 0) & (self.columns <= width - 1) & (self.rows >= 0) & (self.rows <= height - 1)
        left = np.clip(np.floor(self.columns), 0, width - 2).astype(np.intp)
        top = np.clip(np.floor(self.rows), 0, height - 2).astype(np.intp)
        right_share = (self.columns - left).astype(np.float32)[..., None]
        low_share = (self.rows - top).astype(np.float32)[..., None]
        upper = picture[top, left] * (1 - right_share) + picture[top, left + 1] * right_share
        lower = picture[top + 1, left] * (1 - right_share) + picture[top + 1, left + 1] * right_share
        mixed = upper * (1 - low_share) + lower * low_share
        sampled: Picture = np.where(inside[..., None], np.clip(np.rint(mixed), 0, 255), 0).astype(np.uint8)
        return sampled


def _distorted(x: Floats, y: Floats, model: str, coefficients: list[float], *, where: str) -> tuple[Floats, Floats]:
    """Normalised places of a pinhole as the lens shows them: OpenCV's and ROS's models."""
    if not any(coefficients):
        return x, y
    if model.lower() in FISHEYE:
        k1, k2, k3, k4 = [*coefficients, 0.0, 0.0, 0.0, 0.0][:4]
        radius = np.maximum(np.hypot(x, y), 1e-12)
        angle = np.arctan(radius)
        scale = angle * (1 + k1 * angle**2 + k2 * angle**4 + k3 * angle**6 + k4 * angle**8) / radius
        return x * scale, y * scale
    if model.lower() not in POLYNOMIAL:
        known = ", ".join((*POLYNOMIAL, *FISHEYE))
        raise BadClipError("wrong_shape", f"{where}: the lens's distortion is {model[:40]!r}; known: {known}")
    k1, k2, p1, p2, k3, k4, k5, k6 = [*coefficients, *[0.0] * 8][:8]
    square = x**2 + y**2
    radial = (1 + square * (k1 + square * (k2 + square * k3))) / (1 + square * (k4 + square * (k5 + square * k6)))
    return (
        x * radial + 2 * p1 * x * y + p2 * (square + 2 * x**2),
        y * radial + p1 * (square + 2 * y**2) + 2 * p2 * x * y,
    )


def _pictures(camera: Camera, begin: int, end: int, *, where: str) -> Iterator[Picture]:
    match camera:
        case Pictures():
            for data in camera.read(begin, end):
                yield read_image(io.BytesIO(data), "PNG" if data.startswith(b"\x89PNG") else "JPEG", where=where)
        case Arrays():
            yield from camera.read(begin, end)
        case Film():
            yield from decoded(camera.path, camera.first + begin, camera.first + end)
        case Packets():
            yield from _unpacked(camera, begin, end, where=where)


def _unpacked(camera: Packets, begin: int, end: int, *, where: str) -> Iterator[Picture]:
    """Frames of packets, decoded from the first on."""
    import av

    codec: Any = av.CodecContext.create(camera.codec, "r")
    number = 0
    try:
        for data in chain(camera.read(), [None]):
            for frame in codec.decode(None if data is None else av.Packet(data)):
                if begin <= number < end:
                    check_size(frame.width, frame.height, where=where)
                    yield frame.to_ndarray(format="rgb24")
                number += 1
                if number >= end:
                    return
    except av.error.FFmpegError as error:
        raise BadClipError("undecodable_video", f"{where}: packet {number} cannot be decoded ({error}).") from error

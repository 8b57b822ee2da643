"""Pictures resized as Alpamayo's training recipe does: in float, neither clamped nor rounded."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from alpacache.driving.picture_size import fit_size


def to_processor_size(
    frames: NDArray[np.uint8], *, patch: int, merge: int, min_pixels: int, max_pixels: int
) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """Resize frames `[..., 3, H, W]` to the image processor's size, as uint8, so that it leaves them alone.

    Returns them with the largest and the mean error that this adds to `pixel_values`, on their scale of -1 to 1:
    rounding costs at most 1 / 255, and values that the resize pushes below 0 or above 1, at hard edges, are clipped.
    Raises `ValueError` for a picture whose processor size would itself be resized again.
    """
    height, width = frames.shape[-2:]
    limits = {"factor": patch * merge, "min_pixels": min_pixels, "max_pixels": max_pixels}
    fitted = fit_size(height, width, **limits)
    if fit_size(*fitted, **limits) != fitted:
        raise ValueError(f"an image of {height}x{width} would be resized again after {fitted[0]}x{fitted[1]}.")
    if fitted == (height, width):
        return frames, (0.0, 0.0)
    pictures = frames.reshape(-1, *frames.shape[-3:])
    stored = np.empty((*pictures.shape[:2], *fitted), np.uint8)
    largest, total = 0.0, 0.0
    for number, picture in enumerate(pictures):  # one at a time: float copies of all are large
        seen = resized(picture, fitted)
        kept = (seen * 255.0).round_().clamp_(0, 255).to(torch.uint8)
        off = (kept.float().div_(255.0) - seen).abs_().mul_(2.0)
        stored[number] = kept.numpy()
        largest, total = max(largest, off.max().item()), total + off.mean().item()
    return stored.reshape(*frames.shape[:-2], *fitted), (largest, total / len(pictures))


def resized(picture: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """A uint8 picture `[3, H, W]` as float32, resized to `size` (height, width); black is 0, white is 1.

    Antialiased bicubic, neither clamped nor rounded, so a resized picture may overshoot. One channel at a time: a
    picture that lies as decoded, colours last, then needs no copy but the one to float.
    """
    planes = _tensor_of(picture)
    return torch.cat([_fitted(plane[None, None], size) for plane in planes], dim=1)[0]


def _tensor_of(picture: NDArray[np.uint8]) -> Tensor:
    """A picture as a tensor, copied where it is read-only or lies backwards, as `bgr[..., ::-1]` does."""
    forwards = picture.copy(order="K") if min(picture.strides) < 0 else picture
    return torch.from_numpy(np.require(forwards, requirements="W"))


def _fitted(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 `[N, C, H, W]` in float32, resized where it is of another size."""
    whole = planes.float().div_(255.0)
    if planes.shape[2:] != size:
        whole = F.interpolate(whole, size, mode="bicubic", antialias=True, align_corners=False)
    return whole


class PicturesToDevice:
    """Resizes pictures on a device, to which they go through two page-locked places in turn.

    All of torch's threads copy into a place, while the device fetches from the other; a copy from ordinary memory is
    made by one thread, and the caller waits for it. On a GPU all channels are resized at once, for there starting a
    kernel takes longer than most copies. For one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: list[Tensor] = []
        self._fetched: list[torch.cuda.Event] = []
        self._turn = 0

    def resized(self, pictures: Iterable[NDArray[np.uint8]], size: tuple[int, int]) -> Iterator[Tensor]:
        """What `resized` makes of each picture, on the device."""
        for picture in pictures:
            yield _fitted(self._sent(picture).contiguous()[None], size)[0]

    def _sent(self, picture: NDArray[np.uint8]) -> Tensor:
        planes = _tensor_of(picture)
        if self._device.type != "cuda":
            return planes.to(self._device)
        lies = planes.permute(1, 2, 0)  # as decoded, colours last
        if not self._places or self._places[0].numel() < lies.numel():
            torch.cuda.synchronize(self._device)
            self._places = [torch.empty(lies.numel(), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._fetched = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        place, fetched = self._places[self._turn][: lies.numel()].view(lies.shape), self._fetched[self._turn]
        self._turn = 1 - self._turn
        fetched.synchronize()
        place.copy_(lies)
        there = place.to(self._device, non_blocking=True)
        fetched.record(torch.cuda.current_stream(self._device))
        return there.permute(2, 0, 1)


class ResizedPictures:
    """Resized pictures of one recording, of which samples near each other in time share some.

    Those that a sample wants are kept for the next, and with them any that are no older.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], Tensor] = {}

    def of(
        self, names: Sequence[tuple[int, int]], pictures: Iterable[NDArray[np.uint8]], size: tuple[int, int]
    ) -> Iterator[Tensor]:
        """What `resized` makes of each picture of a sample; `names` are its camera's number and its time (us).

        Samples come in the order of their times.
        """
        oldest_us = min(time_us for _, time_us in names)
        self._kept = {name: picture for name, picture in self._kept.items() if name[1] >= oldest_us}
        for name, picture in zip(names, pictures, strict=True):
            if name not in self._kept:
                self._kept[name] = resized(picture, size)
            yield self._kept[name]

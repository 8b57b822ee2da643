"""Frames to the VLM's patches, without torchvision.

The default path is the training recipe's: resize in float, neither clamped nor rounded. The public sampler resizes
uint8 images instead; the two differ by up to 0.14, so the path is part of a store's identity.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

PROCESSOR = "recipe-float-bicubic-antialias-v1"
"""Name of this image path in a store's identity."""


def fit_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size near `height x width` with sides divisible by `factor` and an area between the two limits.

    Source: the resize rule of Qwen2-VL's image processor (behaviour).
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {height}x{width} is degenerate; expected an aspect ratio below 200.")
    fitted = round(height / factor) * factor, round(width / factor) * factor
    area = fitted[0] * fitted[1]
    if min_pixels <= area <= max_pixels:
        return fitted
    limit, rounding = (max_pixels, math.floor) if area > max_pixels else (min_pixels, math.ceil)
    scale = math.sqrt(limit / (height * width))
    return max(factor, rounding(height * scale / factor) * factor), max(
        factor, rounding(width * scale / factor) * factor
    )


def image_tokens(height: int, width: int, *, patch: int, merge: int, min_pixels: int, max_pixels: int) -> int:
    """Image tokens that one frame of this size becomes in the prompt."""
    fitted = fit_size(height, width, factor=patch * merge, min_pixels=min_pixels, max_pixels=max_pixels)
    return fitted[0] * fitted[1] // (patch * merge) ** 2


def to_processor_size(
    frames: NDArray[np.uint8], *, patch: int, merge: int, min_pixels: int, max_pixels: int
) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """Frames `[..., 3, H, W]` as uint8 at the size that `to_patches` makes of them, which then leaves it alone.

    Also the largest and the mean difference of the `pixel_values` that this costs: rounding is at most 1 / 255 on their
    scale of -1 to 1, and where the resize overshoots 0 or 1, at hard edges, what is beyond is cut off.
    Raises `ValueError` for a picture whose processor size is not one itself.
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
        seen = _scaled(picture, fitted)
        kept = (seen * 255.0).round_().clamp_(0, 255).to(torch.uint8)
        off = (kept.float().div_(255.0) - seen).abs_().mul_(2.0)
        stored[number] = kept.numpy()
        largest, total = max(largest, off.max().item()), total + off.mean().item()
    return stored.reshape(*frames.shape[:-2], *fitted), (largest, total / len(pictures))


def to_patches(
    frames: NDArray[np.uint8], *, patch: int, merge: int, temporal: int, min_pixels: int, max_pixels: int
) -> tuple[Tensor, Tensor]:
    """Frames `[N, 3, H, W]` RGB to `pixel_values [patches, 3 * temporal * patch^2]` and `image_grid_thw [N, 3]`.

    uint8 / 255 in float32, antialiased bicubic resize, then to -1 .. 1; each frame stands for `temporal` equal ones.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [N, 3, H, W].")
    count, channels, height, width = frames.shape
    fitted = fit_size(height, width, factor=patch * merge, min_pixels=min_pixels, max_pixels=max_pixels)
    pixels = torch.empty(count, channels, *fitted)
    for number, frame in enumerate(frames):
        # One at a time: memory for the float copies of all would be mapped and cleared anew for every sample.
        pixels[number] = _scaled(frame, fitted)
    pixels.sub_(0.5).div_(0.5)
    rows, columns = fitted[0] // patch, fitted[1] // patch
    blocks = pixels.reshape(count, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    # tokens by merged block, then the block's patches; within a patch channel, time, row, column
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    blocks = blocks.expand(*blocks.shape[:6], temporal, *blocks.shape[7:])
    grid = torch.tensor([[1, rows, columns]]).repeat(count, 1)
    return blocks.reshape(count * rows * columns, channels * temporal * patch * patch), grid


def _scaled(picture: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """`[3, H, W]` as float32 from 0 to 1, resized where it has another size; there it may overshoot.

    One channel at a time: a picture that lies as decoded, colours last, needs no other copy than that to float.
    """
    channels = torch.from_numpy(np.require(picture, requirements="W"))
    return torch.cat([_scaled_channel(channel, size) for channel in channels])


def _scaled_channel(channel: Tensor, size: tuple[int, int]) -> Tensor:
    """`[H, W]` uint8 to `[1, h, w]`."""
    pixels = channel.float().div_(255.0)[None, None]
    if channel.shape != size:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    return pixels[0]

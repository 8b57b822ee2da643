"""Frames to the VLM's patches, without torchvision.

The default path is the training recipe's: resize in float, neither clamped nor rounded. The public sampler resizes
uint8 images instead; the two differ by up to 0.14, so the path is part of a store's identity.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.driving.picture_size import fit_size
from alpacache.driving.resizing import resized

PROCESSOR = "recipe-float-bicubic-antialias-v1"
"""Name of this image path in a store's identity."""


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
        pixels[number] = resized(frame, fitted)
    pixels.sub_(0.5).div_(0.5)
    rows, columns = fitted[0] // patch, fitted[1] // patch
    blocks = pixels.reshape(count, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    # tokens by merged block, then the block's patches; within a patch channel, time, row, column
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    blocks = blocks.expand(*blocks.shape[:6], temporal, *blocks.shape[7:])
    grid = torch.tensor([[1, rows, columns]]).repeat(count, 1)
    return blocks.reshape(count * rows * columns, channels * temporal * patch * patch), grid

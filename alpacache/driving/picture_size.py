"""The size at which a model's image processor sees a picture: arithmetic alone, for planning without torch."""

import math


def check_sides(height: int, width: int) -> None:
    """Raise `ValueError` for a picture too long and thin for the image processor."""
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {height}x{width} is degenerate; expected an aspect ratio of at most 200.")


def fit_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Size near `height x width` with sides divisible by `factor` and an area between the two limits.

    Source: the resize rule of Qwen2-VL's image processor (behaviour).
    """
    check_sides(height, width)
    fitted = round(height / factor) * factor, round(width / factor) * factor
    area = fitted[0] * fitted[1]
    if min_pixels <= area <= max_pixels:
        return fitted
    limit, rounding = (max_pixels, math.floor) if area > max_pixels else (min_pixels, math.ceil)
    scale = math.sqrt(limit / (height * width))
    height, width = (max(factor, rounding(side * scale / factor) * factor) for side in (height, width))
    return height, width


def image_tokens(height: int, width: int, *, patch: int, merge: int, min_pixels: int, max_pixels: int) -> int:
    """Image tokens that one frame of this size becomes in the prompt."""
    fitted = fit_size(height, width, factor=patch * merge, min_pixels=min_pixels, max_pixels=max_pixels)
    return fitted[0] * fitted[1] // (patch * merge) ** 2

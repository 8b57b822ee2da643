"""Swapped red and blue are found on generated roads; a camera's cast and missing colours are not taken for it."""

import numpy as np
import pytest

from alpacache.checks.colours import judge_colours, looks_swapped
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.synthetic import SyntheticSource

CASTS = {"none": (1, 1, 1), "warm": (1.1, 1, 0.8), "cold": (0.8, 1, 1.1), "dark": (0.4, 0.4, 0.4)}


def hwc(picture):
    return np.ascontiguousarray(picture.transpose(1, 2, 0))


@pytest.fixture(scope="module")
def pictures():
    """One of each of 24 generated drives: seasons, times of day, weather."""
    source = SyntheticSource(24, seed=9)
    return [source.film(clip, FRONT_CAMERA, np.array([5_000_000]))[0] for clip in source.clip_ids]


@pytest.mark.parametrize("cast", CASTS)
def test_swapped_channels_are_told_from_a_cast(pictures, cast):
    seen = [np.clip(one * np.reshape(CASTS[cast], (3, 1, 1)), 0, 255).astype(np.uint8) for one in pictures]
    right = [looks for one in seen if (looks := looks_swapped(hwc(one))) is not None]
    swapped = [looks for one in seen if (looks := looks_swapped(hwc(one[::-1]))) is not None]
    assert len(right) >= 12
    assert sum(right) == 0
    assert sum(swapped) >= len(swapped) / 2
    assert judge_colours(right).status == "ok"
    assert judge_colours(swapped).status == "warn"


def test_pictures_without_green_are_not_judged():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (1, 90, 160), np.uint8).repeat(3, 0)
    assert looks_swapped(hwc(grey)) is None
    assert looks_swapped(np.zeros((90, 160, 3), np.uint8)) is None
    assert judge_colours([]).found == "not judged: no picture with enough green in it"


def test_the_verdict_says_the_share():
    check = judge_colours([True] * 9 + [False] * 3)
    assert check.found == "red and blue look swapped in 9 of 12 pictures (75 %)"
    assert "cv2.COLOR_BGR2RGB" in check.remedy
    assert judge_colours([True] + [False] * 9).status == "ok"

import numpy as np
import pytest

from alpacache.alpamayo.inputs import to_patches
from alpacache.driving.picture_size import fit_size
from alpacache.driving.resizing import resized, to_processor_size


@pytest.mark.parametrize(("height", "width"), [(360, 640), (120, 200)], ids=["smaller", "larger"])
def test_processor_size_says_what_8_bits_and_cut_off_edges_cost(height, width):
    """Black and white blocks, where the resize overshoots most."""
    limits = {"patch": 16, "merge": 2, "min_pixels": 40_000, "max_pixels": 60_000}
    blocks = np.random.default_rng(0).integers(0, 2, (2, 3, height // 8, width // 8), dtype=np.uint8)
    frames = (blocks * 255).repeat(8, 2).repeat(8, 3)
    before = frames.copy()
    stored, (largest, mean) = to_processor_size(frames[None], **limits)
    fitted = fit_size(height, width, factor=32, min_pixels=40_000, max_pixels=60_000)
    assert stored.shape == (1, 2, 3, *fitted)
    direct, through = (to_patches(each, temporal=2, **limits)[0] for each in (frames, stored[0]))
    off = (direct.double() - through.double()).abs()
    assert largest == pytest.approx(off.max().item(), abs=1e-6)
    assert mean == pytest.approx(off.mean().item(), abs=1e-6)
    assert 1 / 255 < largest < 0.5
    inside = (direct > -1) & (direct < 1)
    assert off[inside].max() <= 1 / 255 + 1e-6
    np.testing.assert_array_equal(frames, before)


def test_pictures_of_processor_size_are_left_alone():
    limits = {"patch": 16, "merge": 2, "min_pixels": 40_000, "max_pixels": 60_000}
    frames = np.random.default_rng(0).integers(0, 255, (1, 3, 160, 288), dtype=np.uint8)
    stored, deviation = to_processor_size(frames, **limits)
    np.testing.assert_array_equal(stored, frames)
    assert deviation == (0.0, 0.0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_pictures_that_lie_backwards_are_seen_as_their_copies(axis):
    turned = np.random.default_rng(0).integers(0, 255, (3, 40, 60), dtype=np.uint8)
    view = np.flip(np.flip(turned, axis).copy(), axis)
    assert view.strides[axis] < 0
    assert resized(view, (20, 30)).equal(resized(turned, (20, 30)))

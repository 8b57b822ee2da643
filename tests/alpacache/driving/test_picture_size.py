import pytest

from alpacache.driving.picture_size import fit_size

LIMITS = {"min_pixels": 163_840, "max_pixels": 196_608}


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (900, 1600), (720, 1280)])
def test_common_frames_become_720_patches(height, width):
    assert fit_size(height, width, factor=32, **LIMITS) == (320, 576)


def test_degenerate_images_are_refused():
    with pytest.raises(ValueError, match="degenerate"):
        fit_size(2, 500, factor=32, **LIMITS)

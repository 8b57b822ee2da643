"""The sheet shows frames, the path in them where the calibration is known, and the path from above."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from alpacache.checks.contact_sheet import _moment, contact_sheet_png
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import SampleRef
from alpacache.sources.synthetic import SyntheticSource


@pytest.fixture(scope="module")
def samples():
    source = SyntheticSource(4)
    refs = [SampleRef(clip_id=clip_id, t0_us=5_100_000) for clip_id in source.clip_ids]
    return [source.load(ref, cameras=[FRONT_CAMERA], frames=1) for ref in refs]


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_every_sample_has_a_frame_and_a_path(samples):
    drawn = pixels(contact_sheet_png(samples, title="four $clips"))
    assert drawn.shape[0] > 500
    assert drawn.shape[1] > 1500
    painted = np.abs(drawn - 255).sum(axis=-1) > 60
    assert 0.2 < painted.mean() < 0.9
    orange = (drawn[..., 0] - drawn[..., 2] > 150) & (drawn[..., 1] < 130)
    assert orange.sum() > 4 * 20  # an arrow a clip


def test_the_path_is_drawn_only_where_the_calibration_is_known(samples):
    known = pixels(contact_sheet_png(samples[:1], title=""))
    for calibration in (None, {FRONT_CAMERA: {"model": "unheard of"}}):
        other = pixels(contact_sheet_png([dataclasses.replace(samples[0], calibration=calibration)], title=""))
        assert other.shape == known.shape
        changed = np.abs(known - other).sum(axis=-1) > 200
        below = changed[known.shape[0] // 2 :, : known.shape[1] // 2]  # the road, under the frame's horizon
        assert below.sum() > 50


def test_no_samples_are_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        contact_sheet_png([], title="")


def test_a_moment_since_1970_is_a_date():
    assert _moment(5_100_000) == "5.1 s"
    assert _moment(1_700_000_000_400_000) == "2023-11-14 22:13:20 UTC"

"""Pictures in another shape, and without their lens's distortion."""

import io

import numpy as np
import pytest
from PIL import Image

from alpacache.converters.drive import Arrays, Dropped, LoggedDrive, Pictures
from alpacache.converters.reframe import Places, Reframe
from alpacache.driving.poses import Track
from alpacache.errors import BadClipError

FRONT = "camera_front_wide_120fov"
LENS = {"width": 90, "height": 40, "distortion_model": "plumb_bob", "K": [50.0, 0, 44, 0, 50, 20, 0, 0, 1]}


def picture():
    """Red tells the column, green the row."""
    rows, columns = np.mgrid[:40, :90]
    return np.stack([columns * 2, rows * 5, 0 * rows + 9], axis=2).astype(np.uint8)


def drive(camera, lens=None):
    times = camera.times_us
    track = Track(timestamps_us=times, xyz=np.zeros((2, 3)), quaternion_xyzw=np.tile([0, 0, 0, 1.0], (2, 1)))
    calibration = {} if lens is None else {FRONT: lens}
    return LoggedDrive(name="a", cameras={FRONT: camera}, track=track, point="camera", calibration=calibration)


def arrays(*pictures):
    return Arrays(times_us=np.arange(len(pictures)) * 100_000, read=lambda begin, end: iter(pictures[begin:end]))


def shown(reframe, source):
    (found,) = reframe.drives([source])
    return list(found.cameras[FRONT].read(0, 2)), found


def test_cropped_and_padded_to_sixteen_to_nine():
    (one, _), found = shown(Reframe(crop=True), drive(arrays(picture(), picture()), LENS))
    assert one.shape == (40, 71, 3)
    np.testing.assert_array_equal(one, picture()[:, 9:80])
    lens = found.calibration[FRONT]
    assert (lens["width"], lens["height"], lens["K"][2], lens["K"][5]) == (71, 40, 35, 20)
    (one, _), found = shown(Reframe(pad=True), drive(arrays(picture(), picture()), LENS))
    assert one.shape == (51, 90, 3)
    assert not one[:5].any()
    np.testing.assert_array_equal(one[6:46], picture())
    assert found.calibration[FRONT]["K"][5] == 26
    tall = np.full((90, 40, 3), 7, np.uint8)
    assert shown(Reframe(crop=True), drive(arrays(tall, tall)))[0][0].shape == (22, 40, 3)
    assert shown(Reframe(pad=True), drive(arrays(tall, tall)))[0][0].shape == (90, 160, 3)
    assert "crop" in shown(Reframe(crop=True), drive(arrays(tall, tall)))[1].facts["pictures"]


def test_files_are_decoded():
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "PNG")
    files = Pictures(times_us=np.array([0, 100_000]), read=lambda begin, end: iter([file.getvalue()] * (end - begin)))
    (one, _), _ = shown(Reframe(crop=True), drive(files))
    np.testing.assert_array_equal(one, picture()[:, 9:80])


@pytest.mark.parametrize(
    ("model", "coefficients", "seen"),
    [
        ("plumb_bob", [0.1, -0.02, 0.003, 0.004, 0.001], (0.410243, 0.205322)),
        ("rational_polynomial", [0.1, 0, 0, 0, 0, 0.05, 0, 0], (0.403960, 0.201980)),
        ("equidistant", [0.1, 0, 0, 0], (0.382789, 0.191395)),
    ],
)
def test_each_pixel_is_taken_from_where_the_lens_shows_it(model, coefficients, seen):
    lens = LENS | {"distortion_model": model, "D": coefficients}
    places = Places.of(lens, where="a")
    row, column = 30, 64  # x = 0.4, y = 0.2
    assert places.columns[row, column] == pytest.approx(44 + 50 * seen[0], abs=1e-3)
    assert places.rows[row, column] == pytest.approx(20 + 50 * seen[1], abs=1e-3)
    (one, _), found = shown(Reframe(undistort=True), drive(arrays(picture(), picture()), lens))
    assert one[row, column, 0] == pytest.approx(2 * places.columns[row, column], abs=0.51)
    assert one[row, column, 1] == pytest.approx(5 * places.rows[row, column], abs=0.51)
    assert (found.calibration[FRONT]["D"], found.calibration[FRONT]["K"]) == ([], LENS["K"])


def test_what_is_outside_is_black_and_no_distortion_changes_nothing():
    far = LENS | {"D": [1.0, 0, 0, 0, 0]}
    (one, _), _ = shown(Reframe(undistort=True), drive(arrays(picture(), picture()), far))
    assert not one[0, 0].any()
    (one, _), _ = shown(Reframe(undistort=True), drive(arrays(picture(), picture()), LENS | {"D": []}))
    np.testing.assert_array_equal(one, picture())


def test_without_a_lens_or_of_another_size_it_is_refused():
    (found,) = Reframe(undistort=True).drives([drive(arrays(picture(), picture()))])
    assert isinstance(found, Dropped)
    assert "leave --undistort out" in found.reason
    odd = LENS | {"distortion_model": "odd", "D": [0.1]}
    (found,) = Reframe(undistort=True).drives([drive(arrays(picture(), picture()), odd)])
    assert "'odd'; known: plumb_bob" in found.reason
    for broken, said in (
        ({"K": [0.0] * 9}, "as of a camera that was never calibrated"),
        ({"K": [50.0, 0, np.nan, 0, 50, 20, 0, 0, 1]}, "or values not finite"),
        ({"D": [np.inf]}, "or values not finite"),
        ({"D": ["x"]}, "another form"),
        ({"width": None}, "another form"),
    ):
        (found,) = Reframe(undistort=True).drives([drive(arrays(picture(), picture()), LENS | broken)])
        assert said in found.reason
    small = np.zeros((20, 20, 3), np.uint8)
    with pytest.raises(BadClipError, match="20 x 20 pixels, and its calibration is for 90 x 40"):
        shown(Reframe(undistort=True), drive(arrays(small, small), LENS))

"""Projection as the devkit and our own renderer have it, and lines where they belong."""

import io

import numpy as np
import pytest
from PIL import Image

from alpacache.pictures.front_view import draw_paths, project

FORWARD = [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
"""Camera (x right, y down, z forward) to vehicle (x forward, y left, z up), looking straight on."""
PINHOLE = {
    "model": "pinhole", "width": 640, "height": 360, "fx": 400.0, "fy": 410.0, "cx": 320.0, "cy": 180.0,
    "position_m": [1.5, 0.0, 1.2], "rotation": FORWARD,
}  # fmt: skip
FTHETA = {
    "model": "ftheta", "width": 1920, "height": 1080, "cx": 960.0, "cy": 540.0,
    "fw_poly": [0.0, 900.0, 5.0, -40.0, 3.0], "bw_poly": [0.0, 1 / 900.0, 0.0, 0.0, 0.0],
    "position_m": [1.7, 0.1, 1.4], "rotation": FORWARD,
}  # fmt: skip


def test_a_pinhole_point_lies_where_similar_triangles_put_it():
    pixels = project([[11.5, 2.0, 0.0], [21.5, -2.0, 1.2], [0.0, 0.0, 0.0]], PINHOLE)
    assert pixels[0] == pytest.approx([320 - 400 * 0.2, 180 + 410 * 0.12])
    assert pixels[1] == pytest.approx([320 + 400 * 0.1, 180])
    assert np.isnan(pixels[2]).all()


def test_ftheta_is_the_devkits():
    models = pytest.importorskip("physical_ai_av.utils.camera_models", reason="the devkit is an extra")
    model = models.FThetaCameraModel(
        width=1920,
        height=1080,
        principal_point=np.array([960.0, 540.0]),
        th2r=np.polynomial.Polynomial(FTHETA["fw_poly"]),
        r2th=np.polynomial.Polynomial(FTHETA["bw_poly"]),
    )
    points = np.array([[20.0, 3.0, 0.0], [5.0, -4.0, 0.2], [60.0, 0.5, 1.0], [4.0, 8.0, 2.0]])
    rays = (points - FTHETA["position_m"]) @ np.array(FORWARD)
    assert project(points, FTHETA) == pytest.approx(model.ray2pixel(rays), rel=1e-12)


def test_points_behind_or_far_beside_the_camera_are_unseen():
    assert np.isnan(project([[-5.0, 0.0, 0.0], [1.8, 9.0, 1.4]], FTHETA)).all()


def test_the_road_of_a_generated_drive_is_where_it_was_painted():
    """The generated camera knows the ground place of each of its pixels; projecting it back gives the pixel."""
    from alpacache.sources.synthetic import SyntheticSource

    name = "camera_cross_left_120fov"
    source = SyntheticSource(1, cameras=[name])
    clip = source.clip_ids[0]
    camera, lens = source._camera(name, source._world(clip)), source.calibration(clip, name)
    assert (lens["width"], lens["height"]) == (256, 128)
    some = np.arange(0, len(camera.ground), 97)
    ground = np.column_stack([camera.ground_xy[some], np.zeros(len(some))])
    pixels = project(ground, lens)
    expected = np.column_stack([camera.ground[some] % 256, camera.ground[some] // 256])
    seen = np.isfinite(pixels).all(axis=1)
    assert seen.mean() > 0.5
    assert pixels[seen] == pytest.approx(expected[seen], abs=0.05)


def test_lines_are_drawn_on_the_road_and_nowhere_else():
    buffer = io.BytesIO()
    Image.new("RGB", (320, 180), "#808080").save(buffer, "JPEG", quality=95)
    path = np.column_stack([np.linspace(3, 60, 64), np.zeros(64), np.zeros(64)])
    left = path + np.linspace(0, 8, 64)[:, None] * [0, 1, 0]
    drawn = draw_paths(buffer.getvalue(), PINHOLE, path, {"base": ("#d55e00", left[None])})
    with Image.open(io.BytesIO(drawn)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    changed = np.abs(pixels - 128).sum(axis=-1) > 40
    assert not changed[:80].any()
    assert changed[90:, 150:170].any()
    orange = (pixels[..., 0] - pixels[..., 2] > 80) & changed
    assert orange[:, :155].any()
    assert not orange[:, 200:].any()


@pytest.mark.parametrize("broken", [{"model": "other"}, {"fx": None}, {"rotation": [1.0]}])
def test_a_calibration_that_cannot_be_used_is_refused(broken):
    with pytest.raises(ValueError, match=r"calibration|camera model|reshape"):
        project([[5.0, 0.0, 0.0]], PINHOLE | broken)

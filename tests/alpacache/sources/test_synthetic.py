import subprocess
import sys

import numpy as np
import pytest

from alpacache.driving.cameras import CAMERAS, FRONT_CAMERA
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource

T0 = 5_100_000


def kind_of(source, clip):
    """Course of the road around t0 = 5.1 s."""
    return source._world(clip).drive.kind


def load(source, clip, *, t0=T0, cameras=(FRONT_CAMERA,), frames=1):
    return source.load(SampleRef(clip_id=clip, t0_us=t0), cameras=cameras, frames=frames)


def yaw(rot):
    return np.arctan2(rot[..., 1, 0], rot[..., 0, 0])


def pixels(sample, points):
    """Where points of the ego frame at t0 lie in the front picture."""
    lens = sample.calibration[FRONT_CAMERA]
    seen = (points - np.array(lens["position_m"])) @ np.array(lens["rotation"])
    return np.stack(
        [lens["cx"] + lens["fx"] * seen[:, 0] / seen[:, 2], lens["cy"] + lens["fy"] * seen[:, 1] / seen[:, 2]], axis=1
    )


def test_a_sample_has_the_contract_shapes():
    source = SyntheticSource(2, cameras=CAMERAS)
    sample = load(source, source.clip_ids[1], cameras=CAMERAS, frames=4)
    assert source.clip_ids == ["synthetic-0-000000", "synthetic-0-000001"]
    assert sample.frames.shape == (7, 4, 3, 128, 256)
    assert sample.frames.dtype == np.uint8
    assert sample.frame_timestamps_us[3].tolist() == [4_800_000, 4_900_000, 5_000_000, 5_100_000]
    assert sample.cameras == CAMERAS
    assert sample.future_xyz.shape == (64, 3)


def test_clips_are_deterministic_also_in_another_process():
    code = (
        "from alpacache.sources.synthetic import SyntheticSource as S; import hashlib;"
        "from alpacache.driving.cameras import FRONT_CAMERA; from alpacache.driving.sample import SampleRef;"
        "s = S(3, seed=4); ref = SampleRef(clip_id=s.clip_ids[2], t0_us=5100000);"
        "x = s.load(ref, cameras=[FRONT_CAMERA], frames=2);"
        "print(hashlib.sha256(x.frames.tobytes() + x.future_xyz.tobytes()).hexdigest())"
    )
    runs = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(runs) == 1
    source = SyntheticSource(3, seed=4)
    a, b = (load(source, source.clip_ids[2], frames=2) for _ in range(2))
    np.testing.assert_array_equal(a.frames, b.frames)
    other = load(SyntheticSource(3, seed=5), "synthetic-5-000002", frames=2)
    assert (other.frames != a.frames).mean() > 0.5


def test_late_curves_have_a_straight_history_and_the_heading_they_claim():
    source = SyntheticSource(60, seed=1, mix={"late_curve": 1})
    changes = []
    for clip in source.clip_ids:
        kind = kind_of(source, clip)
        poses = source._world(clip).drive.track
        sample = load(source, clip)
        assert kind.shape == "late_curve"
        assert 0.2 <= kind.onset_s <= 2.0
        np.testing.assert_allclose(sample.history_xyz[:, 1], 0, atol=1e-4)
        np.testing.assert_allclose(yaw(sample.history_rot), 0, atol=1e-6)
        assert yaw(sample.future_rot[-1]) == pytest.approx(kind.heading_change_rad, abs=1e-4)
        assert kind.side == ("left" if kind.heading_change_rad > 0 else "right")
        speed = np.linalg.norm(np.diff(poses.xyz, axis=0), axis=1) / 0.05
        assert 4.0 < speed.min() < speed.max() < 22.0
        changes.append(kind.heading_change_rad)
    changes = np.abs(changes)
    assert 0.15 < changes.min() < 0.35
    assert 1.0 < changes.max() < 1.4
    assert {kind_of(source, clip).strength for clip in source.clip_ids} == {"gentle", "sharp"}


def test_each_shape_is_what_it_says():
    for shape in ("straight", "early_curve", "curve_end"):
        source = SyntheticSource(20, seed=2, mix={shape: 1})
        for clip in source.clip_ids:
            sample, kind = load(source, clip), kind_of(source, clip)
            turned_before, turned_after = abs(yaw(sample.history_rot[0])), abs(yaw(sample.future_rot[-1]))
            if shape == "straight":
                assert turned_before + turned_after < 0.03
                assert (kind.side, kind.strength, kind.onset_s) == ("none", "straight", None)
            elif shape == "early_curve":
                assert kind.onset_s < -0.7
                assert turned_after > 0.15
            else:
                assert turned_after < 0.4
                assert turned_before > 0.02


def test_mix_weighs_shapes():
    source = SyntheticSource(400, mix={"straight": 0.9, "late_curve": 0.1})
    shapes = [kind_of(source, clip).shape for clip in source.clip_ids]
    assert shapes.count("straight") == pytest.approx(360, abs=20)
    assert set(shapes) == {"straight", "late_curve"}


def test_poses_follow_the_heading():
    """The path is tangent to the heading: a consistent vehicle, not two independent tracks."""
    source = SyntheticSource(10, mix={"early_curve": 1})
    for clip in source.clip_ids:
        future = load(source, clip)
        steps = np.diff(future.future_xyz[:, :2], axis=0)
        between = (yaw(future.future_rot[1:]) + yaw(future.future_rot[:-1])) / 2
        np.testing.assert_allclose(np.arctan2(steps[:, 1], steps[:, 0]), between, atol=2e-3)


def test_the_picture_shows_the_road_where_it_will_be_driven():
    """Along the true path lies asphalt; along the mirrored path of a sharp curve, far out, lies something else."""
    source = SyntheticSource(40, seed=3, mix={"late_curve": 1})
    on, off = [], []
    for clip in source.clip_ids:
        sample = load(source, clip)
        picture = sample.frames[0, 0].astype(float)
        look = source._world(clip).look
        for path, found in ((sample.future_xyz, on), (sample.future_xyz * [1, -1, 1], off)):
            far = path[(path[:, 0] > 8) & (path[:, 0] < 30) & (np.abs(path[:, 1]) > 5.0)]
            places = np.round(pixels(sample, far)).astype(int)
            places = places[(places[:, 0] >= 0) & (places[:, 0] < 256) & (places[:, 1] < 128)]
            colours = picture[:, places[:, 1], places[:, 0]].T
            light = colours.mean(axis=1, keepdims=True)
            hue = look.asphalt / look.asphalt.mean()
            found += np.abs(colours / light - hue).sum(axis=1).tolist()
    assert len(on) > 60
    assert np.median(on) < 0.15
    assert np.median(off) > 0.25


def test_side_cameras_see_the_same_world_turned():
    source = SyntheticSource(1, cameras=CAMERAS)
    sample = load(source, source.clip_ids[0], cameras=CAMERAS)
    forward = {camera: np.array(lens["rotation"])[:, 2] for camera, lens in sample.calibration.items()}
    assert forward["camera_cross_left_120fov"][1] > 0.7
    assert forward["camera_cross_right_120fov"][1] < -0.7
    assert forward["camera_rear_tele_30fov"][0] < -0.99
    assert sample.calibration["camera_front_tele_30fov"]["fx"] > 1.8 * sample.calibration[FRONT_CAMERA]["fx"]


def test_other_sizes_and_times():
    source = SyntheticSource(1, size=(96, 64))
    assert load(source, source.clip_ids[0], t0=T0 + 30_000).frames.shape == (1, 1, 3, 64, 96)
    refs, _ = select(source, t0="every:2")
    assert [ref.t0_us // 1_000_000 for ref in refs] == [2, 4, 6, 8, 10, 12]
    with pytest.raises(BadClipError, match="is needed") as error:
        load(source, source.clip_ids[0], t0=14_000_000)
    assert error.value.kind == "short_clip"


def test_events_are_curve_starts():
    source = SyntheticSource(5, mix={"late_curve": 1})
    for clip in source.clip_ids:
        assert source.event_times_us(clip)[0] == pytest.approx(T0 + kind_of(source, clip).onset_s * 1e6, abs=1)


def test_bad_arguments():
    for arguments in (
        {"count": 0},
        {"count": 1_000_001},
        {"count": 1, "seed": -1},
        {"count": 1, "mix": {"hill": 1}},
        {"count": 1, "mix": {}},
    ):
        with pytest.raises(UsageError):
            SyntheticSource(**arguments)
    for number in ("99999999999999999999", "9" * 5000, "²", "-1", "1.5", ""):
        with pytest.raises(UsageError, match=r"^'?synthetic:.{0,300}expected"):
            open_source(f"synthetic:{number}")
    with pytest.raises(UsageError, match="16 and 4096"):
        SyntheticSource(1, size=(1_000_000, 1_000_000))
    with pytest.raises(BadClipError, match="not one of the 1 clips"):
        SyntheticSource(1).times_us("synthetic-0-000001")


def test_open_source_makes_one():
    source = open_source("synthetic:12")
    assert len(source.clip_ids) == 12
    assert source.name == "synthetic:12"

"""Rates of 10 a second are not counted to the hundredth, and positions that were interpolated along lines are named."""

from dataclasses import replace

import numpy as np
import pytest

from alpacache.checks.recordings import Recording, check_frames, check_poses, corner_period_s


def interpolated(track, period_s, begin_s=0.0):
    """The track with positions on straight lines between points so far apart; headings stay as they are."""
    seconds = (track.timestamps_us - track.timestamps_us[0]) / 1e6
    points = np.arange(begin_s, seconds[-1] + 2 * period_s, period_s)
    lines = [np.interp(seconds, points, np.interp(points, seconds, column)) for column in track.xyz.T]
    return replace(track, xyz=np.stack(lines, axis=1))


@pytest.mark.parametrize("begin_s", [0.0, 0.037], ids=["at poses", "between poses"])
@pytest.mark.parametrize("period_s", [0.5, 0.96, 2.0])
def test_lines_between_points_are_named(drive, period_s, begin_s):
    for hz in (10, 50):
        assert corner_period_s(interpolated(drive(hz=hz), period_s, begin_s)) == pytest.approx(period_s, abs=0.01)
    check = check_poses(interpolated(drive(), period_s, begin_s))
    assert check.status == "warn"
    assert f"along straight lines between points {period_s:.2g} s apart" in check.found


@pytest.mark.parametrize("grid_m", [0.0, 0.001, 0.01, 0.1])
@pytest.mark.parametrize("hz", [10, 50])
def test_a_drive_bends_and_a_grid_is_no_line(drive, hz, grid_m):
    track = drive(hz=hz)
    straight = replace(track, xyz=10.01 * np.outer(np.arange(len(track.xyz)) / hz, [1.0, 0.0, 0.0]))
    for each in (track, straight):
        each = replace(each, xyz=np.round(each.xyz / grid_m) * grid_m) if grid_m else each
        assert corner_period_s(each) is None
    assert check_poses(track).status == "ok"


@pytest.mark.parametrize(("hz", "status"), [(9.65, "ok"), (9.5, "ok"), (9.3, "warn")])
def test_rates_from_9_5_on_count_as_10(drive, camera, hz, status):
    track = drive()
    times = track.timestamps_us[0] + np.round(np.arange(len(track.xyz)) * 1e6 / hz).astype(np.int64)
    track = replace(track, timestamps_us=times)
    checks = (check_poses(track), check_frames(Recording(track=track, frame_times_us={camera: times}, missing={})))
    for check in checks:
        assert check.status == status
        assert ("fewer than 10" in check.found) == (status == "warn")

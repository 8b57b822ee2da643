"""The lag between pictures and poses is measured where turns allow, and not judged where they do not."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from alpacache.checks.check import worst
from alpacache.checks.clocks import (
    BEYOND,
    LAG_STEP_S,
    LAGS_S,
    PAIRS,
    STEP_US,
    Sideways,
    choose,
    judge_clocks,
    judge_pairing,
    lag_curve,
    own_lag_curve,
)
from alpacache.checks.lag_picture import lag_curve_png
from alpacache.checks.motion import motion_of
from alpacache.checks.source import check_source

pytestmark = pytest.mark.system  # films of whole drives


def checks_of(source, **arguments):
    report = check_source(source, t0="every:20", **arguments)
    return report, {check.name: check for check in report.checks}


@pytest.mark.parametrize("late_s", [0.0, 0.1, -0.23, -0.5, 1.4])
def test_the_lag_is_measured(drive, panorama, late_s):
    report, checks = checks_of(panorama({"town": drive()}, late_s=late_s))
    assert report.lag_curve.best_s == pytest.approx(late_s, abs=0.05)
    assert report.lag_curve.error_s < 0.05
    assert checks["clocks"].status == ("ok" if abs(late_s) < 0.2 else "warn")
    if abs(late_s) > 0.2:
        found = f"pictures are stamped {abs(late_s):.1f} s {'late' if late_s > 0 else 'early'}"
        assert found in checks["clocks"].found
    assert {name for name, check in checks.items() if check.status != "ok"} <= {"clocks", "mirrored"}


@pytest.mark.parametrize(("drift", "late_s"), [(0.02, 0.0), (-0.05, 0.0), (0.03, 0.5), (-0.02, -0.4)])
def test_a_clock_that_drifts_is_measured(drive, panorama, drift, late_s):
    report, checks = checks_of(panorama({"town": drive()}, drift=drift, late_s=late_s))
    assert report.lag_curve.drift == pytest.approx(drift, abs=0.002)
    assert report.lag_curve.drift_error < 0.002
    first_s, last_s = report.lag_curve.span_s
    assert first_s == pytest.approx(late_s, abs=0.15)
    assert last_s == pytest.approx(late_s + 59 * drift, abs=0.15)
    assert checks["clocks"].status == "warn"
    assert f"runs {100 * abs(drift):.1f} % {'faster' if drift > 0 else 'slower'}" in checks["clocks"].found
    assert checks["mirrored"].status == "ok"


def test_a_clock_that_drifts_is_measured_over_short_clips_together(drive, panorama):
    clips = {}
    for number in range(3):
        track, part = drive(), slice(200 * number, 200 * number + 200)
        clips[f"{number}"] = replace(
            track,
            timestamps_us=track.timestamps_us[part],
            xyz=track.xyz[part],
            quaternion_xyzw=track.quaternion_xyzw[part],
        )
    report, checks = checks_of(panorama(clips, drift=0.03))
    assert report.lag_curve.drift == pytest.approx(0.03, abs=0.005)
    assert checks["clocks"].status == "warn"
    report, checks = checks_of(panorama(clips))
    assert report.lag_curve.drift is None
    assert checks["clocks"].status == "ok"


def test_a_drive_as_it_is_has_no_warning(drive, panorama):
    report, checks = checks_of(panorama({"town": drive()}))
    assert [name for name, check in checks.items() if check.status != "ok"] == []
    assert checks["clocks"].found == "pictures and poses agree to 0.1 s"
    curve = report.lag_curve
    assert curve.likeness[curve.lags_s.index(0.0)] > 0.95
    assert curve.clips == ("town",)


def test_one_long_left_handed_drive_is_judged(drive, panorama):
    track = drive()
    mirrored = replace(track, xyz=track.xyz * [1, -1, 1], quaternion_xyzw=track.quaternion_xyzw * [-1, 1, -1, 1])
    source = panorama({"town": track})
    source.track = lambda clip_id: mirrored
    source.film = panorama({"town": track}).film
    _, checks = checks_of(source)
    assert checks["mirrored"].status == "fail"
    assert checks["clocks"].status == "ok"
    assert checks["clocks"].is_judged
    _, checks = checks_of(panorama({"town": track}, mirrored=True, late_s=0.6))
    assert "0.6 s late" in checks["clocks"].found


@pytest.mark.parametrize("rate", [0.0, 0.2], ids=["straight", "circle"])
def test_without_changes_of_course_nothing_is_judged(drive, panorama, rate):
    track = drive()
    seconds = (track.timestamps_us - track.timestamps_us[0]) / 1e6
    yaw = rate * seconds
    ahead = 8.0 * seconds if rate == 0 else 8.0 / rate * np.sin(yaw)
    aside = 0.0 * seconds if rate == 0 else 8.0 / rate * (1 - np.cos(yaw))
    quaternion = Rotation.from_euler("z", yaw[:, None]).as_quat()
    track = replace(track, xyz=np.stack([ahead, aside, 0 * yaw], axis=1), quaternion_xyzw=quaternion)
    _, checks = checks_of(panorama({"clip": track}, late_s=0.7))
    assert checks["clocks"].status == "ok"
    assert not checks["clocks"].is_judged


def seen(clip_id, late_s, bends, *, length=50):
    """What is seen of a clip whose heading turns by `(begin, end, rad/s)`, in pictures of 230 pixels a radian."""
    seconds = 0.2 * np.arange(length) + 0.1
    fine = np.arange(-10.0, 30.0, 0.01)
    heading = np.cumsum(sum(rate * ((fine >= begin) & (fine < end)) for begin, end, rate in bends)) * 0.01
    lags_s = LAG_STEP_S * np.arange(-BEYOND, len(LAGS_S) + BEYOND) + LAGS_S[0]

    def turned(at_s):
        return np.interp(at_s + 0.1, fine, heading) - np.interp(at_s - 0.1, fine, heading)

    noise = np.random.default_rng(int(clip_id)).normal(0, 0.3, length)
    return Sideways(
        clip_id=clip_id,
        pairs_us=np.round(1e6 * (seconds[:, None] + [-0.1, 0.1])).astype(np.int64),
        seconds=seconds,
        shift_px=230 * turned(seconds - late_s) + noise,
        turned_rad=turned(seconds[:, None] - lags_s),
    )


def test_a_clip_that_turns_little_is_told_by_the_others():
    town = ((1, 2.5, 0.3), (4, 5, -0.5), (7, 8, 0.6))
    ramp = ((-10, 3, 0.06), (3, 6, 0.09), (6, 12, 0.12))  # as much turning at most lags, with other focal lengths
    for late_s, status in ((0.0, "ok"), (0.2, "ok"), (0.8, "warn"), (-0.8, "warn")):
        parts = [*(seen(f"{number}", 0.0, town) for number in range(3)), seen("3", late_s, ramp)]
        together = lag_curve(parts)
        assert judge_clocks(together).found == "pictures and poses agree to 0.1 s"
        assert lag_curve(parts[-1:]).best_s is None
        checks = [judge_clocks(own_lag_curve(part, together)) for part in parts]
        assert [check.status for check in checks] == ["ok", "ok", "ok", status]
        if status == "warn":
            assert f"pictures are stamped 0.8 s {'late' if late_s > 0 else 'early'}" in checks[-1].found
    steady = seen("4", 0.8, ((-10, 30, 0.1),))
    assert not judge_clocks(own_lag_curve(steady, together)).is_judged


def test_pictures_of_other_clips_are_told_with_the_clip_that_they_fit(drive):
    bends = {"0": ((1, 3, 0.4), (5, 7, -0.5)), "1": ((2, 5, -0.4), (7, 9, 0.3)), "2": ((0, 2, -0.5), (4, 8, 0.3))}
    parts = {clip_id: seen(clip_id, 0.0, bends[clip_id]) for clip_id in bends}
    times_us = np.arange(0, 10_000_001, 200_000)
    fine = np.arange(-10.0, 30.0, 0.01)
    motions = {}
    for clip_id, turns in bends.items():
        rate = sum(rate * ((fine >= begin) & (fine < end)) for begin, end, rate in turns)
        heading = np.interp(times_us / 1e6, fine, np.cumsum(rate) * 0.01)
        motions[clip_id] = replace(motion_of(drive(seconds=12)), times_us=times_us, heading_rad=heading)
    together = lag_curve(list(parts.values()))
    assert all(judge_pairing(part, motions, together) is None for part in parts.values())
    for curve in (together, None):  # of two clips whose pictures are exchanged, nothing is known together
        check = judge_pairing(replace(parts["0"], clip_id="1"), motions, curve)
        assert check.status == "fail"
        assert re.search(r"explain \d+ % of how the pictures move sideways, those of 0 (9\d|100) %", check.found)
    elsewhere = seen("1", 0.0, ((0, 1, 0.6), (3, 4, -0.6), (6, 7, 0.6)))
    assert judge_pairing(elsewhere, motions, together).status == "warn"
    assert judge_pairing(elsewhere, motions, None) is None
    assert judge_pairing(replace(elsewhere, shift_px=0.1 * elsewhere.shift_px), motions, together) is None


def test_exchanged_pictures_are_named_by_check(drive, panorama):
    track = drive()
    clips = {}
    for number in range(3):
        part = slice(200 * number, 200 * number + 200)
        clips[f"{number}"] = replace(
            track,
            timestamps_us=track.timestamps_us[:200],
            xyz=track.xyz[part],
            quaternion_xyzw=track.quaternion_xyzw[part],
        )
    source = panorama(clips)
    whole = source.film
    source.film = lambda clip_id, camera, times_us: whole({"0": "2", "2": "0"}.get(clip_id, clip_id), camera, times_us)
    report, checks = checks_of(source)
    assert checks["clocks"].status == "warn"
    assert checks["clocks"].found.startswith("2 of 3 clips, such as 0: the poses' turns explain")
    assert "those of 2 9" in checks["clocks"].found
    assert "exchanged" in checks["clocks"].remedy
    assert [worst(clip.checks) for clip in report.clips] == ["fail", "ok", "fail"]


def test_of_many_clips_those_that_turn_most_are_looked_at(drive):
    town = motion_of(drive())
    straight = replace(town, heading_rad=0 * town.heading_rad)
    chosen = choose({f"{number}": town if number in (7, 11) else straight for number in range(20)})
    assert list(chosen) == ["7", "11"]
    lengths = [[part.end_us - part.begin_us for part in parts] for parts in chosen.values()]
    assert lengths == [[pytest.approx(5e6, rel=0.05)] * 2] * 2
    early, late = chosen["7"]
    assert early.end_us < town.times_us[0] + 30e6 < late.begin_us
    suspects = choose({f"{number}": town if number != 3 else straight for number in range(20)}, suspects=["18", "3"])
    assert "18" in suspects
    assert "3" not in suspects
    chosen = choose({f"{number}": town for number in range(20)})
    assert sum(part.end_us - part.begin_us for parts in chosen.values() for part in parts) <= PAIRS * STEP_US * 1.05


def test_the_curve_is_drawn(drive, panorama):
    report, _ = checks_of(panorama({"town": drive()}, late_s=0.5))
    with Image.open(io.BytesIO(lag_curve_png(report.lag_curve, title="town"))) as image:
        assert image.size == (704, 352)
        assert np.asarray(image.convert("L")).std() > 10
    assert not judge_clocks(None).is_judged

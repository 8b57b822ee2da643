"""Along-track and cross-track errors tell a wrong speed from a wrong line."""

import math

import numpy as np
import pytest

from alpacache.metrics.path_frame import ONSET_KEY, TRACK_KEYS, error_after_onset, track_errors

TIMES = np.arange(1, 65) * 0.1


def circle(speed, radius=50.0, *, beside=0.0):
    """A left turn from the origin: positions `[64, 3]` and rotations `[64, 3, 3]`; `beside` metres to its left."""
    angle = speed * TIMES / radius
    inner = radius - beside
    xyz = np.stack([inner * np.sin(angle), radius - inner * np.cos(angle), np.zeros(64)], axis=-1)
    rot = np.zeros((64, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(angle)
    rot[:, 1, 0] = np.sin(angle)
    rot[:, 0, 1], rot[:, 2, 2] = -rot[:, 1, 0], 1.0
    return xyz, rot


def at(errors, kind):
    return [errors[f"{kind}_track@{horizon_s}"] for horizon_s in (2.0, 4.0, 6.4)]


def test_a_wrong_speed_on_the_driven_line_is_all_along_track():
    truth, rot = circle(8.0)
    errors = track_errors(np.stack([circle(9.0)[0], circle(7.0)[0]]), truth, rot)
    assert list(errors) == list(TRACK_KEYS)
    assert at(errors, "along") == pytest.approx([2.0, 4.0, 6.4], rel=0.01)
    assert max(at(errors, "cross")) < 0.35  # the faster one ends 6.4 m beyond the line, which goes on straight there
    assert max(at(track_errors(circle(7.0)[0][None], truth, rot), "cross")) < 0.01


def test_a_wrong_line_at_the_driven_place_is_all_cross_track():
    truth, rot = circle(8.0)
    errors = track_errors(circle(8.0, beside=1.5)[0][None], truth, rot)
    assert at(errors, "cross") == pytest.approx([1.5, 1.5, 1.5], abs=0.01)
    assert max(at(errors, "along")) < 0.1


@pytest.mark.parametrize("jitter", [0.0, 0.01])
def test_a_standing_car_is_judged_along_its_heading(jitter):
    truth = np.zeros((64, 3)) + jitter * np.random.default_rng(0).standard_normal((64, 3))
    creeping = np.stack([0.5 * TIMES, np.full(64, 0.25), np.zeros(64)], axis=-1)
    errors = track_errors(creeping[None], truth, np.tile(np.eye(3), (64, 1, 1)))
    assert at(errors, "along") == pytest.approx([1.0, 2.0, 3.2], abs=5 * jitter + 1e-9)
    assert at(errors, "cross") == pytest.approx([0.25] * 3, abs=5 * jitter + 1e-9)


def test_the_error_after_the_onset_of_a_turn_leaves_out_what_came_before():
    truth, rot = circle(10.0)  # turns by 5 degrees in 0.44 s, at the fifth waypoint
    pred = truth + np.array([0.0, 2.0, 0.0])
    pred[:4] = truth[:4]
    assert error_after_onset(pred[None], truth, rot) == pytest.approx(2.0)
    assert math.isnan(error_after_onset(pred[None], truth, np.tile(np.eye(3), (64, 1, 1)))), ONSET_KEY


def test_short_paths_are_refused():
    truth, rot = circle(8.0)
    with pytest.raises(ValueError, match="ends before"):
        track_errors(truth[None, :60], truth[:60], rot[:60])

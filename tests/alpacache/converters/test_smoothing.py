"""The smoothers on drives that are known."""

import numpy as np
import pytest

from alpacache.converters.smoothing import fused, headings_of, smoothed


def drive(rate_hz=10, seconds=30.0):
    """Times (s), east and north (m), yaw (rad), speed (m/s), yaw rate (rad/s) of a slalom."""
    times = np.arange(0, seconds, 0.001)
    rate = 0.3 * np.sin(0.5 * times)
    speed = 9 + 2 * np.sin(0.3 * times)
    yaw = 0.7 + np.concatenate([[0], np.cumsum((rate[1:] + rate[:-1]) / 2 * 0.001)])
    way = np.concatenate([[[0, 0]], np.cumsum(np.stack([speed * np.cos(yaw), speed * np.sin(yaw)], 1)[:-1] * 0.001, 0)])
    step = 1000 // rate_hz
    return times[::step], way[::step], yaw[::step], speed[::step], rate[::step]


def test_what_has_no_noise_passes_to_a_centimetre():
    times, way, yaw, speed, _ = drive()
    velocity = np.stack([speed * np.cos(yaw), speed * np.sin(yaw)], axis=1)
    result = smoothed(times, np.stack([way, velocity], axis=2), np.full((len(times), 2, 2), [0.3, 0.15]))
    np.testing.assert_allclose(result.states[:, :, 0] - way, 0, atol=0.01)
    inner = slice(10, -10)
    heading = np.arctan2(result.states[inner, 1, 1], result.states[inner, 0, 1])
    np.testing.assert_allclose(np.rad2deg(heading - yaw[inner]), 0, atol=0.05)


def test_noise_is_smoothed_by_what_the_spreads_say():
    times, way, yaw, speed, _ = drive(seconds=120)
    rng = np.random.default_rng(2)
    values = np.stack([way, np.stack([speed * np.cos(yaw), speed * np.sin(yaw)], axis=1)], axis=2)
    sigmas = np.full(values.shape, [0.5, 0.2])
    result = smoothed(times, values + rng.normal(size=values.shape) * sigmas, sigmas)
    off = result.states[:, :, 0] - way
    assert off.std() < 0.2
    assert 0.5 < (off / result.spreads[:, :, 0]).std() < 1.5
    without = values.copy()
    without[:, :, 1] = np.nan
    alone = smoothed(times, without, sigmas)
    assert alone.spreads[60, 0, 1] > result.spreads[60, 0, 1]


def test_speed_and_yaw_rate_carry_over_rare_fixes():
    times, way, yaw, speed, rate = drive(seconds=60)
    rng = np.random.default_rng(5)
    measured = np.full((len(times), 3), np.nan)
    measured[::10, :2] = way[::10] + rng.normal(size=(len(times[::10]), 2)) * 0.5
    found = fused(times, speed * 0.98, rate + 0.01, measured, np.full((len(times), 3), 0.5), first_yaw_rad=0.3)
    assert found.states[-1, 4] == pytest.approx(1 / 0.98 - 1, abs=0.005)
    assert found.states[-1, 3] == pytest.approx(0.01, abs=0.001)
    assert np.abs(found.states[:, :2] - way).max() < 0.6
    assert np.abs(np.rad2deg(found.states[:, 2] - yaw)).max() < 1.0


def test_headings_are_held_at_stops_and_a_leg_backwards_is_known():
    forth, back, stop = [(5.0, 1.0)] * 30, [(-2.0, -0.4)] * 5, [(0.01, -0.02)] * 4
    found = headings_of(np.array([*stop, *forth, *stop, *back, *stop, *forth]), standing_mps=0.8)
    np.testing.assert_allclose(found.yaw_rad, np.arctan2(1, 5), atol=1e-9)
    assert found.held.sum() == 12
    assert np.flatnonzero(found.reversing).tolist() == [38, 39, 40, 41, 42]
    assert headings_of(np.zeros((5, 2)), standing_mps=0.8) is None

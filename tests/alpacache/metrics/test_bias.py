"""The slope of an unbiased, a halved and a straight-driving model, and its interval against a reference."""

import numpy as np
import pytest
from scipy import stats

from alpacache.metrics.bias import (
    HORIZONS_S,
    Departure,
    bias_slope,
    departures_at,
    fit_slope,
    mean_departure,
)


def arc(turn_rate_degps: float, speed_mps: float = 10.0) -> tuple[np.ndarray, np.ndarray]:
    yaw = np.deg2rad(turn_rate_degps) * 0.1 * np.arange(1, 65)
    middle = yaw - np.deg2rad(turn_rate_degps) * 0.05
    steps = 0.1 * speed_mps * np.stack([np.cos(middle), np.sin(middle), 0 * yaw], axis=-1)
    rot = np.zeros((64, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0], rot[:, 0, 1], rot[:, 2, 2] = np.sin(yaw), -np.sin(yaw), 1.0
    return np.cumsum(steps, axis=0), rot


def departures(heading: np.ndarray) -> list[Departure]:
    return [Departure(heading=(0.0, 0.0, float(one)), lateral=(0.0, 0.0, 10.0 * float(one))) for one in heading]


def test_departure_is_unwrapped_at_every_horizon() -> None:
    result = mean_departure(*(part[None] for part in arc(40.0)), np.eye(3))

    assert np.rad2deg(result.heading) == pytest.approx([80.0, 160.0, 256.0])
    assert result.lateral == tuple(arc(40.0)[0][[19, 39, 63], 1])
    assert departures_at([result], "heading", 4.0) == pytest.approx([np.deg2rad(160.0)])


def test_mean_departure_of_two_opposite_paths_is_straight() -> None:
    left, right = arc(30.0), arc(-30.0)

    result = mean_departure(np.stack([left[0], right[0]]), np.stack([left[1], right[1]]), np.eye(3))

    assert result.heading == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert result.lateral == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize(("share", "intercept"), [(1.0, 0.0), (0.5, 0.1), (0.0, -0.2)])
def test_slope_of_an_exact_line(share: float, intercept: float) -> None:
    truth = np.linspace(-1.0, 1.0, 9)

    result = fit_slope(truth, share * truth + intercept)

    assert result is not None
    assert (result.slope, result.low, result.high) == pytest.approx((share, share, share), abs=1e-12)
    assert (result.intercept, result.n, result.clips) == (pytest.approx(intercept, abs=1e-12), 9, None)


def test_slope_and_interval_equal_scipy() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(0.3, 1.0, 40)
    pred = 0.6 * truth - 0.1 + rng.normal(0.0, 0.4, 40)
    reference = stats.linregress(truth, pred)
    half = stats.t.ppf(0.975, 38) * reference.stderr

    result = fit_slope(truth, pred)

    assert result is not None
    assert result.slope == pytest.approx(reference.slope, rel=1e-12)
    assert result.intercept == pytest.approx(reference.intercept, rel=1e-12)
    assert (result.low, result.high) == pytest.approx((reference.slope - half, reference.slope + half), rel=1e-9)


def test_interval_covers_the_true_slope_19_times_in_20() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(0.0, 1.0, 15)
    covered = 0
    for _ in range(400):
        result = fit_slope(truth, 0.7 * truth + rng.normal(0.0, 0.5, 15))
        assert result is not None
        covered += result.low <= 0.7 <= result.high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize("truth", [np.linspace(-1, 1, 4), np.zeros(50), np.full(50, 0.3)])
def test_no_slope_without_samples_or_spread(truth: np.ndarray) -> None:
    assert fit_slope(truth, truth) is None


def test_noise_around_straight_road_gives_no_slope() -> None:
    heading = np.random.default_rng(3).normal(0.0, np.deg2rad(0.05), 100)
    clips = [f"clip-{index}" for index in range(100)]
    found = departures(heading)
    assert bias_slope(found, found, clips, quantity="heading", horizon_s=6.4) is None


def test_samples_of_one_clip_are_not_independent() -> None:
    rng = np.random.default_rng(4)
    per_clip = rng.normal(0.0, 0.5, 30)
    truth = np.repeat(per_clip, 10)
    pred = 0.5 * truth + np.repeat(rng.normal(0.0, 0.2, 30), 10)
    clips = [f"clip-{index // 10}" for index in range(300)]

    by_clip = bias_slope(departures(truth), departures(pred), clips, quantity="heading", horizon_s=6.4)
    by_sample = fit_slope(truth, pred)

    assert by_clip is not None
    assert by_sample is not None
    assert (by_clip.slope, by_clip.intercept, by_clip.n) == (by_sample.slope, by_sample.intercept, 300)
    assert (by_clip.clips, by_sample.clips) == (30, None)
    # Ten copies of each clip carry no more than one: the honest interval is about sqrt(10) times as wide.
    assert 2.0 < (by_clip.high - by_clip.low) / (by_sample.high - by_sample.low) < 4.5


def test_lateral_and_heading_are_fitted_apart() -> None:
    heading = np.linspace(-0.5, 0.5, 21)
    truth = departures(heading)
    pred = [Departure(heading=one.heading, lateral=(0.0, 0.0, 0.0)) for one in truth]
    clips = [str(index) for index in range(21)]

    by_heading = bias_slope(truth, pred, clips, quantity="heading", horizon_s=6.4)
    by_lateral = bias_slope(truth, pred, clips, quantity="lateral", horizon_s=6.4)

    assert by_heading is not None
    assert by_lateral is not None
    assert (by_heading.slope, by_lateral.slope) == (pytest.approx(1.0), pytest.approx(0.0))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"ends before 6\.4 s"):
        mean_departure(*(part[None, :60] for part in arc(1.0)), np.eye(3))
    with pytest.raises(ValueError, match="expected two of \\[N\\]"):
        fit_slope(np.zeros(5), np.zeros(6))
    with pytest.raises(ValueError, match="not finite"):
        fit_slope(np.arange(6.0), np.full(6, np.inf))
    with pytest.raises(ValueError, match="not in tuple"):
        departures_at(departures(np.zeros(1)), "heading", 3.0)
    assert HORIZONS_S == (2.0, 4.0, 6.4)

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
    assert result.heading_noise is None, "one path does not tell how far others would be"
    assert departures_at([result], "heading", 4.0) == pytest.approx([np.deg2rad(160.0)])


def test_mean_departure_of_two_opposite_paths_is_straight() -> None:
    left, right = arc(30.0), arc(-30.0)

    result = mean_departure(np.stack([left[0], right[0]]), np.stack([left[1], right[1]]), np.eye(3))

    assert result.heading == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    assert result.lateral == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)
    turned = np.deg2rad([60.0, 120.0, 192.0])
    assert result.heading_noise == pytest.approx(turned**2), "two values +-v have variance 2 v^2, their mean half of it"


@pytest.mark.parametrize(("share", "intercept"), [(1.0, 0.0), (0.5, 0.1), (0.0, -0.2)])
def test_slope_of_an_exact_line(share: float, intercept: float) -> None:
    truth = np.linspace(-1.0, 1.0, 12)

    result = fit_slope(truth, share * truth + intercept)

    assert result is not None
    assert (result.slope, result.low, result.high) == pytest.approx((share, share, share), abs=1e-12)
    assert (result.intercept, result.n, result.clips) == (pytest.approx(intercept, abs=1e-12), 12, 12)


def test_slope_equals_scipy() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(0.3, 1.0, 400)
    pred = 0.6 * truth - 0.1 + rng.normal(0.0, 0.4, 400)
    reference = stats.linregress(truth, pred)
    half = stats.t.ppf(0.975, 398) * reference.stderr

    result = fit_slope(truth, pred)

    assert result is not None
    assert result.slope == pytest.approx(reference.slope, rel=1e-12)
    assert result.intercept == pytest.approx(reference.intercept, rel=1e-12)
    # Errors are alike, so Student's t is right here, and so is this.
    assert (result.low, result.high) == pytest.approx((reference.slope - half, reference.slope + half), abs=0.3 * half)


def test_interval_covers_the_true_slope_19_times_in_20() -> None:
    rng = np.random.default_rng(2)
    hits = {"growing": 0, "taken or not": 0}
    for _ in range(200):
        truth = rng.normal(0.0, 1.0, 60)
        errors = {"growing": 0.3 * truth * rng.normal(size=60), "taken or not": ((rng.random(60) < 0.7) - 0.7) * truth}
        for name, error in errors.items():
            result = fit_slope(truth, 0.7 * truth + error + rng.normal(0.0, 0.02, 60))
            assert result is not None
            hits[name] += result.low <= 0.7 <= result.high
    assert {name: 0.91 <= count / 200 <= 0.985 for name, count in hits.items()} == dict.fromkeys(hits, True), hits


def test_calibration_of_a_model_without_bias_is_1_however_little_it_knows() -> None:
    rng = np.random.default_rng(6)
    for known in (0.8, 0.5):
        seen = rng.normal(0.0, np.sqrt(known), 4000)
        truth = seen + rng.normal(0.0, np.sqrt(1 - known), 4000)
        paths = seen[:, None] + rng.normal(0.0, np.sqrt(1 - known), (4000, 6))

        result = fit_slope(truth, paths.mean(axis=1), noise=paths.var(axis=1, ddof=1) / 6)

        assert result is not None
        assert result.calibration is not None
        assert (result.slope, result.r2) == pytest.approx((known, known), abs=0.04)
        assert result.calibration.estimate == pytest.approx(1.0, abs=0.05)
        assert result.calibration.low < 1 < result.calibration.high < result.calibration.low + 0.15
        # The noise of six paths hides a part of the slope: what regression on predicted gives is less than 1.
        assert np.polyfit(paths.mean(axis=1), truth, 1)[0] < result.calibration.low


def test_calibration_is_unknown_where_predictions_are_noise() -> None:
    rng = np.random.default_rng(7)
    truth, paths = rng.normal(size=200), rng.normal(0.0, 0.1, (200, 6))

    result = fit_slope(truth, paths.mean(axis=1), noise=paths.var(axis=1, ddof=1) / 6)

    assert result is not None
    assert result.calibration is not None
    assert not result.calibration.low > 1.1
    # A slope of such predictions, and the R² that would follow from it, are chance.
    assert not result.calibration.is_bounded
    assert np.isnan(result.calibration.estimate)
    assert result.r2 is None
    assert result.calibration.high == np.inf
    assert fit_slope(truth, paths.mean(axis=1)).calibration is None  # type: ignore[union-attr]


def test_few_clips_or_few_turns_have_a_slope_and_no_interval() -> None:
    truth = np.linspace(-1, 1, 9)
    few = fit_slope(truth, 0.5 * truth)
    one_bend = np.where(np.arange(50) == 3, 1.0, 0.001 * np.arange(50))
    rare = fit_slope(one_bend, 0.5 * one_bend)

    assert few is not None
    assert rare is not None
    assert (few.slope, few.clips, few.low, few.high) == (pytest.approx(0.5), 9, -np.inf, np.inf)
    assert (rare.slope, rare.clips, rare.low, rare.high) == (pytest.approx(0.5), 50, -np.inf, np.inf)
    assert rare.effective_clips == pytest.approx(1.0, abs=0.1)


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
    assert (by_clip.slope, by_clip.intercept) == pytest.approx((by_sample.slope, by_sample.intercept), rel=1e-12)
    assert (by_clip.clips, by_sample.clips) == (30, 300)
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

"""Intervals against their closed forms, and that before and after are compared clip by clip."""

import numpy as np
import pytest

from alpacache.metrics.bootstrap import (
    mean_difference,
    mean_share,
    r_squared,
    range_text,
    slope_interval,
    splitting_units,
)


def ids(count: int, samples_each: int = 1) -> list[str]:
    return [f"clip-{index // samples_each}" for index in range(count * samples_each)]


def test_mean_difference_has_the_width_of_the_normal_interval() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(5.0, 10.0, 400)
    gain = rng.normal(-1.0, 1.0, 400)

    result = mean_difference(before, before + gain, ids(400))

    assert result is not None
    assert result.estimate == pytest.approx(gain.mean())
    half = 1.96 * gain.std() / 20
    # Unpaired, the spread of `before` would make it ten times as wide.
    assert (result.low, result.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.02)
    assert (result.n, result.clips) == (400, 400)


def test_a_constant_gain_has_no_width() -> None:
    before = np.random.default_rng(1).normal(size=50)
    result = mean_difference(before, before - 0.25, ids(10, 5))
    assert result is not None
    assert (result.low, result.high) == pytest.approx((-0.25, -0.25))


def test_clips_are_split_not_samples() -> None:
    gain = np.repeat(np.random.default_rng(2).normal(size=40), 25)

    by_clip = mean_difference(0 * gain, gain, ids(40, 25))
    by_sample = mean_difference(0 * gain, gain, ids(1000))

    assert by_clip is not None
    assert by_sample is not None
    assert (by_clip.high - by_clip.low) / (by_sample.high - by_sample.low) == pytest.approx(5.0, rel=0.15)


def test_same_seed_same_interval() -> None:
    before, after = np.random.default_rng(3).normal(size=(2, 30))
    assert mean_difference(before, after, ids(30)) == mean_difference(before, after, ids(30))
    assert mean_difference(before, after, ids(30)) != mean_difference(before, after, ids(30), seed=1)


def test_slope_difference_is_paired() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=200)
    noise = rng.normal(0.0, 2.0, 200)
    before, after = 0.1 * truth + noise, 0.9 * truth + noise

    difference = slope_interval(truth, after, ids(200), over=before)
    alone = slope_interval(truth, after, ids(200))

    assert difference is not None
    assert alone is not None
    assert (difference.estimate, difference.low, difference.high) == pytest.approx((0.8, 0.8, 0.8))
    assert alone.low < alone.estimate < alone.high
    # Standard error of a slope: sigma / (sqrt(n) * spread of truth).
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * noise.std() / np.sqrt(200) / truth.std(), rel=0.15)
    assert alone.estimate == pytest.approx(np.polyfit(truth, after, 1)[0])


def test_few_clips_give_an_estimate_without_bounds() -> None:
    values = np.arange(9.0)
    found = [
        mean_difference(0 * values, values, ids(1, 9)),
        mean_difference(0 * values, values, ids(9)),
        slope_interval(values, values, ids(9)),
        slope_interval(values, values, ids(9), over=0 * values),
        mean_share(values / 8, ids(3, 3)),
    ]
    assert [interval and interval.estimate for interval in found] == pytest.approx([4.0, 4.0, 1.0, 1.0, 0.5])
    assert all(interval and (interval.low, interval.high) == (-np.inf, np.inf) for interval in found)
    assert mean_difference([], [], []) is None


def test_one_heavy_clip_gives_no_bounds() -> None:
    clips = ["long"] * 60 + ids(20)
    found = mean_difference(np.zeros(80), np.arange(80.0), clips)
    assert found is not None
    assert (found.clips, found.low, found.high) == (21, -np.inf, np.inf)
    assert found.effective_clips == pytest.approx(80**2 / (60**2 + 20))


def test_blocks_stand_for_clips_where_these_are_few_and_long() -> None:
    times_s = [5.0, 59.0, 61.0, 200.0]
    assert splitting_units(["a"] * 4, times_s) == ["a 0", "a 0", "a 1", "a 3"]
    assert splitting_units(["a", "a", "b", "b"], [5.0, 65.0, 5.0, 65.0]) == ["a 0", "a 1", "b 0", "b 1"]
    assert splitting_units(["a"] * 4, times_s, block_s=20.0) == [f"a {time_s // 20.0:.0f}" for time_s in times_s]
    many = ids(10, 2)
    assert splitting_units(many, [float(t) for t in range(0, 2000, 100)]) == many


def test_twelve_clips_that_all_have_it_do_not_prove_it() -> None:
    every = mean_share(np.ones(12), ids(12))
    none = mean_share(np.zeros(24), ids(12, 2))
    assert every is not None
    assert none is not None
    assert (every.estimate, every.high) == (1.0, 1.0)
    assert 0.6 < every.low < 0.9
    assert (none.estimate, none.low, none.high) == pytest.approx((0.0, 0.0, 1 - every.low), abs=0.05)


def test_ranges_are_written_with_the_bounds_they_have() -> None:
    assert range_text(0.851, 0.964) == "[0.85, 0.96]"
    assert range_text(-0.001, np.inf) == "[0.00, ..]"
    assert range_text(-np.inf, np.inf) == ""
    assert range_text(-0.5, 0.25, "+.1f") == "[-0.5, +0.2]"


def test_no_slope_where_truth_does_not_vary() -> None:
    assert slope_interval(np.zeros(9), np.arange(9.0), ids(9)) is None


def test_ids_must_match() -> None:
    with pytest.raises(ValueError, match="8 clip ids for 9 samples"):
        mean_difference(np.zeros(9), np.zeros(9), ids(8))


def test_explained_is_the_share_of_the_squared_error_done_away_with() -> None:
    rng = np.random.default_rng(5)
    truth, noise = rng.normal(size=2000), 0.5 * rng.normal(size=2000)

    found = r_squared(truth, truth + noise, 0 * truth, ids(1000, 2))
    difference = r_squared(truth, truth + noise, 0 * truth, ids(1000, 2), over=truth + 2 * noise)
    perfect = r_squared(truth, truth, 0 * truth, ids(1000, 2))

    assert found is not None
    assert difference is not None
    assert perfect is not None
    assert found.estimate == pytest.approx(1 - (noise**2).sum() / (truth**2).sum())
    assert found.low < 0.75 < found.high < found.low + 0.06
    assert difference.estimate == pytest.approx(3 * (1 - found.estimate))
    assert (perfect.low, perfect.high) == pytest.approx((1.0, 1.0))
    assert (found.n, found.clips) == (2000, 1000)
    assert r_squared(truth, truth, truth, ids(1000, 2)) is None
    alone = r_squared(truth, truth, 0 * truth, ["one"] * 2000)
    assert alone is not None
    assert (alone.estimate, alone.low, alone.high) == (1.0, -np.inf, np.inf)

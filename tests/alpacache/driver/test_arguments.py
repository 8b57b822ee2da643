"""What is no number, array or list of names is refused by its own name, not taken for another."""

import numpy as np
import pytest
import torch

from alpacache.driver.arguments import array, camera_names, counts, noise_draws, whole
from alpacache.errors import UsageError


@pytest.mark.parametrize("value", [5_100_000.0, 5.1, True, "5", None, float("nan"), np.float64(2)])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(UsageError, match=r"t0_us is .*; expected whole microseconds"):
        whole(value, "t0_us", expected="whole microseconds")


def test_whole_numbers_of_any_kind_are_taken_within_limits():
    assert [type(whole(value, "n", expected="")) for value in (3, np.int64(3), np.uint8(3))] == [int, int, int]
    for value in (0, 5):
        with pytest.raises(UsageError, match=f"frames is {value}; expected 1 to 4"):
            whole(value, "frames", expected="1 to 4", least=1, most=4)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((2.5, 1, 0), "paths is 2.5"),
        ((True, 1, 0), "paths is True"),
        ((1, "3", 0), "flow_steps is '3'"),
        ((1, 1.5, 0), r"flow_steps is 1\.5"),
        ((1, 0, 0), "flow_steps is 0"),
        ((1, 1, None), "seed is None"),
        ((1, 1, -1), "seed is -1"),
    ],
)
def test_counts_and_seeds_are_whole(given, match):
    assert counts(np.int64(6), 10, 0) == (6, 10, 0)
    with pytest.raises(UsageError, match=match):
        counts(*given)


@pytest.mark.parametrize("names", ["front_wide", None, 3, [3]])
def test_cameras_are_a_list_of_names(names):
    assert camera_names(np.array(["front_wide"]), "cameras") == ["camera_front_wide_120fov"]
    assert camera_names((), "blank") == []
    with pytest.raises(UsageError, match=r"cameras is .*; expected a list of names"):
        camera_names(names, "cameras")


@pytest.mark.parametrize("values", ["abc", [[0, 1], [2]]])
def test_what_makes_no_array_is_named(values):
    with pytest.raises(UsageError, match="drive: poses make no array of numbers"):
        array(values, "drive: poses", np.float64)


def test_noise_may_be_an_array_and_is_finite():
    values = np.random.default_rng(0).standard_normal((2, 64, 2))
    expected = torch.from_numpy(values).float()
    for noise in (values, values.tolist(), torch.from_numpy(values).requires_grad_(), values[:, ::-1][:, ::-1]):
        assert torch.equal(noise_draws(noise, (2, 64, 2)), expected)
    for broken in ([[0]], values[:1]):
        with pytest.raises(UsageError, match=r"noise is \[1, .*\]; expected \[2, 64, 2\]"):
            noise_draws(broken, (2, 64, 2))
    values[1, 3, 0] = np.nan
    with pytest.raises(UsageError, match="noise holds NaN"):
        noise_draws(values, (2, 64, 2))

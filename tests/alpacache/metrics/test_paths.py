"""The numbers of the public evaluation, and the cases where a plausible shortcut gives others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from alpacache.metrics.paths import (
    EXTRA_KEYS,
    PUBLIC_KEYS,
    corner_distance,
    displacement,
    extra_metrics,
    min_ade,
)

GOLDEN = Path(__file__).parents[2] / "data" / "alpamayo_tiny"


def straight(speed_mps: float, offset_m: float = 0.0) -> np.ndarray:
    times_s = 0.1 * np.arange(1, 65)
    return np.stack([speed_mps * times_s, np.full(64, offset_m), np.zeros(64)], axis=-1)


@pytest.mark.parametrize("clip", [0, 1, 2])
def test_golden_parity(clip: int) -> None:
    arrays = load_file(GOLDEN / "cases.safetensors")
    expected = json.loads((GOLDEN / "cases.json").read_text())["cases"][clip]["metrics"]
    pred, pred_rot, truth, truth_rot = (
        arrays[f"clip{clip}.{name}"] for name in ("pred_xyz", "pred_rot", "ego_future_xyz", "ego_future_rot")
    )

    result = min_ade(pred, truth) | corner_distance(pred, pred_rot, truth, truth_rot)

    assert set(result) == set(expected) == set(PUBLIC_KEYS)
    for key, value in expected.items():
        assert result[key] == pytest.approx(value, rel=1e-4), key


def test_best_sample_is_picked_once_over_the_full_horizon() -> None:
    truth = straight(10.0)
    early = straight(10.0)
    early[10:, 1] += 5.0
    steady = straight(10.0, offset_m=1.0)

    result = min_ade(np.stack([early, steady]), truth)

    assert result["min_ade"] == pytest.approx(1.0)
    assert result["min_ade/by_t=0.5"] == pytest.approx(1.0), "the early sample would have given 0"
    assert result["ade"] == pytest.approx(5.0 * 54 / 64)
    assert result["ade/by_t=3.0"] == pytest.approx(5.0 * 20 / 30)


def test_height_is_ignored_by_ade_and_counted_by_corners() -> None:
    truth = straight(5.0)
    raised = truth + np.array([0.0, 0.0, 3.0])
    upright = np.broadcast_to(np.eye(3), (64, 3, 3))

    assert min_ade(raised[None], truth)["min_ade"] == 0.0
    assert corner_distance(raised[None], upright[None], truth, upright) == {"corner_distance": pytest.approx(3.0)}


def test_corner_distance_of_a_box_turned_about_its_centre() -> None:
    truth = straight(0.0)
    upright = np.broadcast_to(np.eye(3), (64, 3, 3))
    half_turn = np.broadcast_to(np.diag([-1.0, -1.0, 1.0]), (64, 3, 3))

    result = corner_distance(truth[None], half_turn[None], truth, upright)

    assert result["corner_distance"] == pytest.approx(np.hypot(4.0, 3.0))


def test_corner_distance_takes_the_nearest_sample_at_each_time() -> None:
    truth = straight(0.0)
    upright = np.broadcast_to(np.eye(3), (64, 3, 3))
    first_half, second_half = straight(0.0), straight(0.0)
    first_half[32:, 0] += 2.0
    second_half[:32, 0] += 2.0

    both = corner_distance(np.stack([first_half, second_half]), np.stack([upright, upright]), truth, upright)

    assert both["corner_distance"] == 0.0


@pytest.mark.parametrize(("offset_m", "missed"), [(2.0, 0.0), (2.01, 1.0)])
def test_extra_metrics(offset_m: float, missed: float) -> None:
    truth = straight(10.0)
    pred = np.stack([straight(10.0, offset_m=7.0), straight(10.0, offset_m=offset_m)])

    result = extra_metrics(pred, truth)

    assert set(result) == set(EXTRA_KEYS)
    assert result == {"fde": pytest.approx(7.0), "min_fde": pytest.approx(offset_m), "miss_rate": missed}


def test_float32_tensors_are_summed_in_float64() -> None:
    truth = torch.from_numpy(straight(10.0)).to(torch.float32)
    pred = truth[None] + torch.tensor([3.0, 4.0, 0.0])

    assert min_ade(pred, truth)["min_ade"] == pytest.approx(5.0, rel=1e-6)
    assert displacement(pred, truth).dtype == np.float64


@pytest.mark.parametrize(
    ("pred", "truth", "message"),
    [
        (np.zeros((64, 3)), np.zeros((64, 3)), "expected \\[K, 64, 3\\]"),
        (np.zeros((0, 64, 3)), np.zeros((64, 3)), "expected \\[K, 64, 3\\]"),
        (np.zeros((6, 60, 3)), np.zeros((64, 3)), "pred has shape \\(6, 60, 3\\)"),
        (np.zeros((6, 64, 3)), np.zeros((64, 2)), "expected \\[T, 3\\]"),
        (np.full((6, 64, 3), np.nan), np.zeros((64, 3)), "pred holds values that are not finite"),
        (np.zeros((6, 40, 3)), np.zeros((40, 3)), "has no error at 5.0 s"),
    ],
)
def test_bad_input_is_named(pred: np.ndarray, truth: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        min_ade(pred, truth)


def test_corner_distance_names_bad_rotations() -> None:
    truth = straight(1.0)
    with pytest.raises(ValueError, match="pred_rot has shape \\(64, 3, 3\\), expected \\(1, 64, 3, 3\\)"):
        corner_distance(truth[None], np.zeros((64, 3, 3)), truth, np.zeros((64, 3, 3)))

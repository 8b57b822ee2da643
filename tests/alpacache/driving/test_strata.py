"""Which stratum a driven path falls into, at and on either side of each threshold."""

import numpy as np
import pytest

from alpacache.driving.strata import (
    LATE_CURVE,
    STRAIGHT_HISTORY,
    STRATA,
    Strata,
    classify,
    direction_of,
    driven_heading,
    heading,
    speed_band,
    turn_of,
    turns_ahead,
)

Poses = tuple[np.ndarray, np.ndarray]


def rotations(yaw: np.ndarray) -> np.ndarray:
    rot = np.zeros((len(yaw), 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0], rot[:, 0, 1] = np.sin(yaw), -np.sin(yaw)
    rot[:, 2, 2] = 1.0
    return rot


def drive(speed_mps: float, turn_rate_degps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """History and future of a drive in the ego frame at t0, from the turn rate of its 79 steps."""
    yaw = np.concatenate([[0.0], np.cumsum(np.deg2rad(turn_rate_degps) * 0.1)])
    middle = (yaw[1:] + yaw[:-1]) / 2
    steps = 0.1 * speed_mps * np.stack([np.cos(middle), np.sin(middle), np.zeros(79)], axis=-1)
    xyz = np.concatenate([np.zeros((1, 3)), np.cumsum(steps, axis=0)])
    rot = rotations(yaw)
    xyz, rot = (xyz - xyz[15]) @ rot[15], rot[15].T @ rot
    return xyz[:16], rot[:16], xyz[16:], rot[16:]


def turn_rate(history_degps: float, future_degps: float) -> np.ndarray:
    return np.concatenate([np.full(15, history_degps), np.full(64, future_degps)])


def test_straight_road() -> None:
    result = classify(*drive(10.0, turn_rate(0.0, 0.0)))

    assert result.labels == ("all", "straight", STRAIGHT_HISTORY, "medium")
    assert (result.heading_change_rad, result.lateral_offset_m) == (0.0, 0.0)
    assert result.mean_speed_mps == pytest.approx(10.0)


def test_sharp_left_that_nothing_announces() -> None:
    result = classify(*drive(10.0, turn_rate(0.0, 8.0)))

    assert result.labels == ("all", "sharp", "left", STRAIGHT_HISTORY, LATE_CURVE, "medium")
    assert np.rad2deg(result.heading_change_rad) == pytest.approx(51.2)
    radius_m = 10.0 / np.deg2rad(8.0)
    assert result.lateral_offset_m == pytest.approx(radius_m * (1 - np.cos(np.deg2rad(51.2))), rel=1e-3)


def test_curve_already_driven_in_history_is_not_late() -> None:
    assert classify(*drive(10.0, turn_rate(-3.0, -3.0))).labels == ("all", "gentle", "right", "medium")


def test_curve_that_began_just_before_t0_is_not_late() -> None:
    rate = turn_rate(0.0, 6.0)
    rate[12:15] = 2.0

    assert np.sum(rate[:15]) * 0.1 < 1.5, "within the tolerance of the whole history"
    assert not classify(*drive(10.0, rate)).straight_history_late_curve


def test_standing_at_t0_is_no_straight_history() -> None:
    history_xyz, history_rot, future_xyz, future_rot = drive(5.0, turn_rate(0.0, 10.0))
    assert classify(history_xyz, history_rot, future_xyz, future_rot).straight_history_late_curve
    assert not classify(0.0 * history_xyz, history_rot, future_xyz, future_rot).straight_history_late_curve


@pytest.mark.parametrize("degrees", [0.5, 5.0])
def test_headings_of_a_standing_car_are_no_turn(degrees: float) -> None:
    """At a red light headings drift by degrees and positions jitter by a centimetre; nothing of it is driven."""
    rng = np.random.default_rng(0)
    past, past_rot, future, _ = drive(0.0, turn_rate(0.0, 0.0))
    yaw = np.deg2rad(degrees * np.linspace(0, 3, 64) + degrees * rng.standard_normal(64))
    future = future + 0.01 * rng.standard_normal((64, 3))

    result = classify(past, past_rot, future, rotations(yaw))

    assert (result.turn, result.direction, result.heading_change_rad) == ("straight", "none", 0.0)
    assert turns_ahead(past_rot[None], future[None], rotations(yaw)[None]) == ["straight"]


def test_a_turn_at_walking_pace_counts_and_a_stop_within_it_does_not() -> None:
    rates = turn_rate(0.0, 10.0)
    assert classify(*drive(0.6, rates)).heading_change_rad == pytest.approx(np.deg2rad(64.0), rel=1e-6)
    *_, future, rot = drive(2.0, rates)
    future, rot = future.copy(), rot.copy()
    future[30:], rot[40:] = future[30], rotations(np.full(24, 1.5))  # stands, and its heading jumps
    held = driven_heading(np.concatenate([np.zeros((1, 3)), future]), np.concatenate([np.eye(3)[None], rot]))
    assert np.ptp(held[36:]) == 0.0
    assert held[-1] == pytest.approx(np.deg2rad(31 + 4), abs=np.deg2rad(1.5))


def test_heading_is_unwrapped_past_a_half_turn() -> None:
    result = classify(*drive(8.0, turn_rate(0.0, -35.0)))

    assert np.rad2deg(result.heading_change_rad) == pytest.approx(-224.0)
    assert result.direction == "right"
    assert heading(rotations(np.deg2rad([170.0, 190.0, 350.0]))) == pytest.approx(np.deg2rad([170.0, 190.0, 350.0]))


@pytest.mark.parametrize(
    ("heading_deg", "lateral_m", "turn", "direction"),
    [
        (4.9, 2.0, "straight", "none"),
        (5.0, 0.0, "gentle", "left"),
        (-0.5, 2.1, "gentle", "left"),
        (0.5, -3.5, "gentle", "right"),
        (-6.0, 2.5, "gentle", "right"),
        (29.9, 20.0, "gentle", "left"),
        (-30.0, -20.0, "sharp", "right"),
    ],
)
def test_turn_and_direction(heading_deg: float, lateral_m: float, turn: str, direction: str) -> None:
    change = float(np.deg2rad(heading_deg)) + np.sign(heading_deg) * 1e-12
    assert (turn_of(change, lateral_m), direction_of(change, lateral_m)) == (turn, direction)


@pytest.mark.parametrize(
    ("speed_mps", "band"),
    [(0.0, "stopped"), (0.49, "stopped"), (0.5, "slow"), (5.0, "medium"), (14.9, "medium"), (15.0, "fast")],
)
def test_speed_bands(speed_mps: float, band: str) -> None:
    assert speed_band(speed_mps) == band


def test_labels_are_known_strata_in_their_order() -> None:
    every = Strata(
        turn="gentle",
        direction="right",
        straight_history=True,
        straight_history_late_curve=True,
        speed="stopped",
        heading_change_rad=0.0,
        lateral_offset_m=0.0,
        mean_speed_mps=0.0,
    )
    assert every.labels == ("all", "gentle", "right", STRAIGHT_HISTORY, LATE_CURVE, "stopped")
    assert sorted(every.labels, key=STRATA.index) == list(every.labels)


def test_bad_shapes_and_values_are_named() -> None:
    history_xyz, history_rot, future_xyz, future_rot = drive(5.0, turn_rate(0.0, 0.0))
    with pytest.raises(ValueError, match="future has shapes \\(64, 3\\) and \\(16, 3, 3\\)"):
        classify(history_xyz, history_rot, future_xyz, history_rot)
    with pytest.raises(ValueError, match="history holds values that are not finite"):
        classify(history_xyz * np.nan, history_rot, future_xyz, future_rot)


def test_the_largest_curvature_is_that_of_the_sharpest_second_to_either_side():
    for side in (1, -1):
        rates = np.zeros(79)
        rates[40:60] = side * 20.0  # at 8 m/s, for two seconds
        found = classify(*drive(8.0, rates))
        assert found.largest_curvature_pm == pytest.approx(np.deg2rad(20.0) / 8.0, rel=0.02)
    assert classify(*drive(8.0, turn_rate(0.0, 0.0))).largest_curvature_pm == pytest.approx(0.0, abs=1e-9)
    assert classify(*drive(0.2, turn_rate(10.0, 10.0))).largest_curvature_pm < 0.09  # it all but stands

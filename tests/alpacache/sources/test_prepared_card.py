import numpy as np
import pytest
from datasets import load_from_disk

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import split_of
from alpacache.driving.strata import STRATA, classify
from alpacache.sources.prepared_card import histogram, mean_curvature, render_card
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource


def circle(radius_m, speed_mps, *, side=1):
    """Strata of a circle driven at constant speed."""
    t = np.arange(-15, 65) * 0.1
    yaw = side * speed_mps * t / radius_m
    xyz = np.stack([radius_m * np.sin(abs(yaw)) * np.sign(t), side * radius_m * (1 - np.cos(yaw)), 0 * t], axis=1)
    rot = np.zeros((80, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(yaw)
    rot[:, 1, 0] = np.sin(yaw)
    rot[:, 0, 1], rot[:, 2, 2] = -rot[:, 1, 0], 1
    return classify(xyz[:16], rot[:16], xyz[16:], rot[16:])


@pytest.mark.parametrize(("radius_m", "side"), [(20.0, 1), (50.0, -1), (500.0, 1)])
def test_curvature_is_that_of_the_circle(radius_m, side):
    assert mean_curvature(circle(radius_m, 8.0, side=side)) == pytest.approx(side / radius_m, rel=1e-3)


def test_a_standing_vehicle_has_none():
    assert mean_curvature(circle(20.0, 0.5)) is None


def test_histogram_bounds_and_sides():
    found = histogram([0.0, 0.0009, -0.0009, 0.001, -0.02, 0.02, 0.02, 0.5, None])
    assert found["edges_per_m"] == [0.001, 0.003, 0.01, 0.03, 0.1]
    assert found["left"] == [1, 1, 0, 2, 0, 1]
    assert found["right"] == [2, 0, 0, 1, 0, 0]
    assert found["standing"] == 1


def test_numbers_of_a_dataset_are_those_of_its_samples(tmp_path):
    source = SyntheticSource(30, size=(32, 16))
    refs, _ = select(source, t0="every:6")
    record = prepare(source, refs, tmp_path / "out", cameras=[FRONT_CAMERA], frames=1).provenance
    loaded = [source.load(ref, cameras=[FRONT_CAMERA], frames=1) for ref in refs]
    strata = [classify(s.history_xyz, s.history_rot, s.future_xyz, s.future_rot) for s in loaded]
    assert record["strata"] == {name: sum(name in each.labels for each in strata) for name in STRATA}
    assert record["strata"]["sharp"] > 0
    assert record["curvature"] == histogram([mean_curvature(one) for one in strata])
    assert record["splits"]["train"]["samples"] + record["splits"]["val"]["samples"] == record["samples"] == 60
    val = sum(split_of(clip_id) == "val" for clip_id in source.clip_ids)
    assert record["splits"]["val"] == {"clips": val, "samples": 2 * val}
    assert val > 0
    card = (tmp_path / "out/README.md").read_text()
    assert card == render_card(record)
    assert "| all | 60 | 30 |" in card
    assert f"| sharp | {record['strata']['sharp']} |" in card
    bands = [line for line in card.splitlines() if " left " in line and " right " in line]
    counted = [
        sum(int(word) for word in line.split("left")[1].replace("#", "").split() if word.isdigit()) for line in bands
    ]
    assert counted == [
        sum(pair) for pair in zip(record["curvature"]["left"], record["curvature"]["right"], strict=True)
    ]
    assert len(load_from_disk(str(tmp_path / "out"))) == 60

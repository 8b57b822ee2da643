"""Whether drives go the way that their navigation texts say, and texts that no moment can come to."""

import json

import numpy as np
import pytest

from alpacache.checks.routes import ClipRoutes, clear_side, judge_routes, merge_routes, routes_text
from alpacache.checks.source import check_source
from alpacache.driving.strata import Strata
from alpacache.sources.registry import open_source
from alpacache.sources.routes import RouteFile, Routes


def driven(heading_deg=0.0, lateral_m=0.0):
    return Strata(
        turn="gentle",
        direction="none",
        straight_history_late_curve=False,
        speed="medium",
        heading_change_rad=float(np.deg2rad(heading_deg)),
        lateral_offset_m=lateral_m,
        mean_speed_mps=10.0,
    )


@pytest.mark.parametrize(
    ("heading_deg", "lateral_m", "side"),
    [(12, 0, "left"), (-12, -8, "right"), (3, 2.5, "left"), (9, 1.9, "straight"), (12, -2.5, "straight")],
)
def test_a_path_turns_clearly_by_heading_or_offset_unless_they_differ(heading_deg, lateral_m, side):
    assert clear_side(driven(heading_deg, lateral_m)) == side


def clip(*moments):
    told = ClipRoutes()
    for number, (route, heading_deg) in enumerate(moments):
        told.add(f"clip@{number}#0", route, driven(heading_deg))
    return told


def judged(*moments):
    report = merge_routes({"clip": clip(*moments)})
    return report, judge_routes(report)


def test_moments_are_counted_by_command_and_those_that_contradict_are_named():
    moments = [
        ("turn left", 20),
        ("keep left", -20),
        ("turn right in 90 m", 0),
        ("straight on", 20),
        ("to the shop", 1),
    ]
    report, check = judged(*moments, (None, 20))
    assert (report.moments, report.routed) == (6, 5)
    assert report.commands == {"left": 2, "right": 1, "straight": 1, "none": 1}
    assert (report.clear, report.contradicted) == (2, ("clip@1#0",))
    assert check.status == "warn"
    assert check.found == (
        "5 of 6 moments have one; 2 left; 1 right; 1 straight; 1 without a command; 1 of 2 that clearly turn (50%) "
        "turn the other way, such as in clip"
    )


def test_one_of_many_proves_nothing_and_most_of_many_do():
    assert judged(*[("left", 20)] * 9, ("left", -20))[1].status == "ok"
    assert judged(*[("left", -20)] * 8, *[("right", -20)] * 2)[1].status == "fail"
    assert judged(*[("left", -20)] * 7, ("right", -20))[1].status == "warn"  # too few to be sure


def test_no_routes_are_none_and_without_the_option_they_are_not_judged():
    report, check = judged((None, 20))
    assert (check.status, check.found, routes_text(report)) == ("warn", "none", "none")
    assert not judge_routes(None).is_judged


def test_rows_that_no_moment_comes_to_are_counted():
    told = ClipRoutes()
    told.add_rows(np.array([-5, -1, 0, 7, 11]), (0, 10), holds=True)
    assert (told.rows, told.outside) == (5, 2)  # what stands at -1 holds at 0
    told.add_rows(np.array([-1, 0, 10, 11]), (0, 10), holds=False)
    assert told.outside == 2


@pytest.mark.ci
def test_generated_routes_go_with_their_drives_and_those_of_a_file_may_not(tmp_path):
    source = open_source("synthetic:12:fork")
    report = check_source(source, samples=12, routes=Routes("source", source)).routes
    assert report.routed == report.moments == report.clear == 12
    assert (report.contradicted, report.outside) == ((), 0)
    opposite = {"left": "right", "right": "left"}
    entries = []
    for clip_id in source.clip_ids:
        side = next(side for _, side in source._world(clip_id).drive.turns)
        entries.append({"clip_id": clip_id, "t0_relative": 5_100_000, "nav_text": f"turn {opposite[side]}"})
    entries.append({"clip_id": source.clip_ids[1], "t0_relative": 10**12, "nav_text": "turn left"})
    (tmp_path / "routes.json").write_text(json.dumps(entries))
    routes = Routes("source", source, file=RouteFile(str(tmp_path / "routes.json")))
    told = check_source(source, samples=12, routes=routes)
    check = next(check for check in told.checks if check.name == "routes")
    assert (check.status, told.ok) == ("fail", False)
    assert "12 of 12 that clearly turn (100%) turn the other way" in check.found
    assert f"1 of 13 rows lie outside of their clip's time, such as in {source.clip_ids[1]}" in check.found

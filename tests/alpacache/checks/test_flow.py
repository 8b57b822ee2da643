"""The camera's height follows from the flow of the road, and tells positions in a wrong unit."""

from dataclasses import replace

import numpy as np
import pytest

from alpacache.checks.film import look_at_film
from alpacache.checks.flow import Flow, flow_of, judge_scale
from alpacache.checks.motion import motion_of
from alpacache.checks.order import judge_order
from alpacache.checks.source import check_source
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.sources.synthetic import SyntheticSource

pytestmark = pytest.mark.system


@pytest.mark.parametrize("seed", [2, 3])
def test_the_flow_measures_focal_length_times_height(seed):
    source = SyntheticSource(1, seed=seed, size=(320, 160))
    clip = source.clip_ids[0]
    flow = flow_of(look_at_film(source, clip, motion_of(source.track(clip)), number=0, clips=1).glimpses)
    lens = source.calibration(clip, FRONT_CAMERA)
    assert flow.reach_px_m == pytest.approx(lens["fx"] / 320 * 256 * lens["position_m"][2], rel=0.25)
    assert (flow.backwards, flow.clips_against) == (0, ())
    assert flow.steps >= 10


def test_moments_in_reverse_are_seen_among_others():
    source = SyntheticSource(1, seed=3, size=(320, 160))
    clip = source.clip_ids[0]
    glimpses = look_at_film(source, clip, motion_of(source.track(clip)), number=0, clips=1).glimpses
    turned = [replace(each, pictures=each.pictures[::-1]) for each in glimpses[::2]]
    whole, mixed = flow_of(glimpses), flow_of([*turned, *glimpses[1::2]])
    assert mixed.steps >= 0.8 * whole.steps
    assert 0.3 * mixed.steps < mixed.backwards < 0.7 * mixed.steps
    check = judge_order(mixed, [], 40, as_text=None)
    assert check.status == "warn"
    assert "the road goes away in place of coming nearer at" in check.found


def test_pictures_in_which_no_road_moves_tell_no_direction():
    source = SyntheticSource(1, seed=3, size=(320, 160))
    clip = source.clip_ids[0]
    glimpses = look_at_film(source, clip, motion_of(source.track(clip)), number=0, clips=1).glimpses
    rng = np.random.default_rng(0)
    still = glimpses[0].pictures[:1]  # a picture that stands still, but for its noise
    noisy = [
        replace(each, pictures=(still + rng.normal(0, 6, each.pictures.shape)).clip(0, 255).astype(np.uint8))
        for each in glimpses
    ]
    assert flow_of(noisy).steps == 0


def scaled(source, factor):
    """The source with positions in another unit, and as if its turns had not been sharp enough to tell."""
    whole = source.track
    source.track = lambda clip_id: replace(whole(clip_id), xyz=whole(clip_id).xyz * factor)
    return source


@pytest.mark.parametrize(
    ("factor", "said"), [(1.0, None), (3.6, "too large"), (3.28, "too large"), (1 / 3.6, "too small")]
)
def test_a_wrong_unit_is_named_at_any_speed(drive, panorama, factor, said):
    """On a road of wide bends, where poses look like those of a faster or slower drive."""
    track = drive()
    wide = replace(track, xyz=track.xyz * 1.6)
    report = check_source(scaled(panorama({"road": wide}), factor), t0="every:3")
    checks = {check.name: check for check in report.checks}
    if said is None:
        assert {name for name, check in checks.items() if check.status != "ok"} == set()
        return
    assert checks["scale"].status == "warn" or checks["speed"].status == "fail"
    assert said in checks["scale"].remedy + checks["speed"].remedy
    assert checks["order"].status == "ok"


def test_verdicts():
    assert not judge_scale(None, 200.0).is_judged
    assert not judge_scale(Flow(steps=40, backwards=0, clips_against=(), reach_px_m=None), 200.0).is_judged
    flow = Flow(steps=40, backwards=0, clips_against=(), reach_px_m=300.0)
    check = judge_scale(flow, 200.0)
    assert (check.status, check.found) == (
        "ok",
        "for each metre of the poses the road moves as if seen from 1.5 m above",
    )
    assert judge_scale(replace(flow, reach_px_m=1080.0), 200.0).status == "warn"
    assert "3.4 times too large" in judge_scale(replace(flow, reach_px_m=1080.0), 200.0).remedy
    assert judge_scale(replace(flow, reach_px_m=83.0), 200.0).status == "warn"
    halved = judge_scale(replace(flow, reach_px_m=150.0), 200.0)  # a camera behind a windscreen, positions times 0.5
    assert (halved.status, "2.1 times too small" in halved.remedy) == ("warn", True)
    assert judge_scale(replace(flow, reach_px_m=83.0), None).status == "ok"  # of a picture of 120 degrees
    assert judge_scale(replace(flow, reach_px_m=60.0), None).status == "warn"
    assert "1.7 m above, if the picture is 72 degrees wide" in judge_scale(flow, None).found

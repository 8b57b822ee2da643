"""The plan of stage one's memory: which home, how many samples at once, and what it says where nothing fits."""

from dataclasses import replace

import pytest

from alpacache.alpamayo.families import RELEASED
from alpacache.errors import UsageError
from alpacache.planning.prefill_plan import (
    PrefillWork,
    choose_plan,
    hiding_group,
    place_of,
    place_weights,
    streamed_plan,
)

GIB = 2**30
WORK = PrefillWork(
    geometry=RELEASED.geometry,
    tokens=809,
    image_tokens=720,
    stored_bytes=70_000_000,
    pixel_bytes=8_850_000,
    rows=8,
    ahead=20,
    samples=1000,
)


def choose(device_gib, host_gib, work=WORK, **how):
    return choose_plan(work, device_bytes=int(device_gib * GIB), host_bytes=int(host_gib * GIB), **how)


@pytest.mark.parametrize(
    ("device_gib", "host_gib", "home"),
    [(23.5, 8, "gpu"), (15.5, 64, "ram"), (7.5, 64, "ram"), (7.5, 14, "files"), (3.2, 64, "ram")],
)
def test_weights_live_in_the_first_home_that_fits(device_gib, host_gib, home):
    plan = choose(device_gib, host_gib)
    assert plan.home == home
    assert plan.device_bytes <= device_gib * GIB
    assert home == "gpu" or plan.host_bytes < host_gib * GIB
    assert plan.device_bytes == plan.device_table()[-1][1] == sum(size for _, size in plan.device_table()[:-1])


def test_measured_peaks_are_met_within_a_twentieth():
    """On an H200 (`extract --memory-budget` at 718 and 2,686 tokens, int8): GiB reserved."""
    one = replace(WORK, tokens=718, image_tokens=632, stored_bytes=62_200_000)
    four = replace(WORK, tokens=2686, image_tokens=2528, stored_bytes=232_700_000, rows=2)
    resident = [(one, 17.78), (four, 18.03)]
    for work, peak in resident:
        assert choose(23.5, 64, work).device_bytes / GIB == pytest.approx(peak, rel=0.05)
    streamed = [(one, "ram", 32, 3.45), (four, "ram", 8, 3.45), (one, "files", 192, 6.79), (four, "files", 52, 7.39)]
    for work, home, group, peak in streamed:
        plan = streamed_plan(work, home, group=group, rows=work.rows, tower_streams=False)
        assert plan.device_bytes / GIB == pytest.approx(peak, rel=0.05)


def test_a_group_is_as_large_as_hides_its_weights_or_as_there_are_samples():
    plan = choose(15.5, 64)
    assert plan.group == hiding_group(WORK, plan) >= 16
    assert plan.group % plan.rows == 0
    assert choose(15.5, 64, replace(WORK, samples=8)).group == 8
    assert choose(7.5, 9).group < hiding_group(WORK, choose(7.5, 9))  # RAM holds no more


def test_little_memory_takes_fewer_rows_and_streams_the_tower():
    assert choose(15.5, 64).rows == 8
    small = choose(2.0, 64)
    assert small.tower_streams
    assert choose(3.2, 64).rows <= 8
    with pytest.raises(UsageError, match="GiB of GPU memory"):
        choose(2.0, 64, exact_rows=True)


def test_what_fits_nowhere_is_refused_with_what_is_needed():
    with pytest.raises(UsageError, match=r"stage one would take \d\.\d\d GiB of GPU memory .* 0\.50 and") as refusal:
        choose(0.5, 64)
    assert "--memory-budget" in str(refusal.value)
    with pytest.raises(UsageError, match=r"(?s)with the weights in RAM .* leave --weights out"):
        choose(15.5, 8, asked="ram")


@pytest.mark.parametrize(
    ("device_gib", "how", "remedy"),
    [
        (11.5, {}, "are allowed. Pass --reasoning none, or take a larger --memory-budget or GPU."),
        (23.5, {"asked": "ram"}, "are allowed. With --weights ram they stay in RAM: leave it out."),
        (11.5, {"asked": "files"}, "are allowed. With --weights files they stay in the files: pass --reasoning none."),
        (17.0, {"exact_rows": True}, "are allowed. Pass --reasoning none, lower --batch-size, or take a larger"),
    ],
)
def test_rollouts_are_refused_with_what_would_help(device_gib, how, remedy):
    message = r"reasoning rollouts need the VLM's weights on the GPU, (\d+\.\d) GiB"
    with pytest.raises(UsageError, match=message) as refusal:
        choose(device_gib, 64, replace(WORK, rollouts=True), **how)
    assert remedy in str(refusal.value)


def test_only_the_layers_that_run_have_to_come():
    few = replace(WORK, run_layers=6)
    for tower_streams in (False, True):
        places = [place_of(WORK.geometry, 2, "ram", tower_streams=tower_streams, run_layers=run) for run in (None, 6)]
        layer = 2 * WORK.geometry.vlm.layer_parameters
        assert places[0].streamed - places[1].streamed == places[0].on_host - places[1].on_host == 30 * layer
        assert places[0].on_device == places[1].on_device
    assert place_of(WORK.geometry, 2, "gpu", run_layers=6) == place_of(WORK.geometry, 2, "gpu")
    assert (choose(15.5, 10).home, choose(15.5, 10, few).home) == ("files", "ram")
    assert hiding_group(few, choose(15.5, 64, few)) < hiding_group(WORK, choose(15.5, 64))  # the tower takes its time


@pytest.mark.parametrize(
    ("device_gib", "host_gib", "home", "tower_streams"),
    [
        (17.0, 0, "gpu", False),
        (14.0, 64, "ram", False),
        (14.0, 12, "files", False),
        (1.25, 64, "ram", True),
        (1.25, 12, "files", True),
        (0.5, 64, None, True),
        (14.0, 2, None, True),
    ],
)
def test_weights_alone_go_where_a_plan_would_have_them(device_gib, host_gib, home, tower_streams):
    room = {"device_bytes": int(device_gib * GIB), "host_bytes": int(host_gib * GIB)}
    place = place_weights(WORK.geometry, 2, **room)
    assert (place and place.home) == home
    if place is not None:
        assert place.tower_streams == tower_streams
        assert place == place_of(WORK.geometry, 2, home, tower_streams=tower_streams)
        nothing = replace(WORK, tokens=1, image_tokens=1, stored_bytes=0, pixel_bytes=0, rows=1, ahead=0, samples=1)
        beside = choose_plan(nothing, device_bytes=room["device_bytes"] + 2**28, host_bytes=room["host_bytes"] + 2**28)
        assert (beside.home, beside.tower_streams) == (home, tower_streams)

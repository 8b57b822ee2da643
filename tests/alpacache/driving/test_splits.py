"""Splits by time: every tenth block is held out, no window of one side reaches into the other."""

import re

import numpy as np
import pytest

from alpacache.driving.sample import SampleRef, split_of
from alpacache.driving.splits import WINDOW_US, TimeSplit, count_overlapping, covered_us, parse_split, side_of


def sides(split, clip_id="drive", seconds=640, step_us=100_000):
    times = range(0, seconds * 1_000_000, step_us)
    return {side: [t0 for t0 in times if split.side(clip_id, t0) == side] for side in ("train", "val", None)}


@pytest.mark.parametrize("text", ["time:20", "time:20:12", "time:60:8:7", "time:8:8"])
def test_windows_of_the_two_sides_never_meet(text):
    split = parse_split(text)
    for clip_id in ("a", "b", "c"):
        found = sides(split, clip_id)
        train, val = (np.array(found[side]) for side in ("train", "val"))
        apart = np.abs(train[:, None] - val).min()
        assert split.gap_us <= apart <= split.gap_us + 100_000
        refs = {name: [SampleRef(clip_id=clip_id, t0_us=int(t0)) for t0 in times] for name, times in found.items()}
        assert count_overlapping(refs["val"], refs["train"]) == 0
        assert 0.05 <= len(val) / sum(map(len, found.values())) <= 0.2


def test_blocks_are_whole_evenly_spread_and_settled_by_seed_and_clip():
    split = TimeSplit(block_us=20_000_000)
    blocks = {clip: {t0 // 20_000_000 for t0 in sides(split, clip)["val"]} for clip in "abcdefgh"}
    assert {len(found) for found in blocks.values()} <= {3, 4}
    assert all(np.diff(sorted(found)).tolist() == [10] * (len(found) - 1) for found in blocks.values())
    assert len({min(found) for found in blocks.values()}) > 2
    assert len(sides(split, "a")["val"]) in (600, 800)
    firsts = {min(sides(parse_split(f"time:20:8:{seed}"), "a")["val"]) for seed in range(4)}
    assert len(firsts) > 1
    assert sides(split, "a") == sides(parse_split("time:20:8:0"), "a")


def test_the_side_of_a_moment_is_fixed():
    """Stores outlive programs: what was held out must stay so."""
    split = parse_split("time:60")
    found = [min(sides(split, clip)["val"]) // 60_000_000 for clip in ("drive-a", "drive-b", "drive-c")]
    assert found == [1, 6, 0]
    assert side_of(None, "drive-a", 0) == split_of("drive-a")


@pytest.mark.parametrize(
    "text",
    ["time", "time:", "time:7", "time:60:7.9", "time:20:30", "time:nan", "time:60:8:-1", "time:60:8:1:2", "blocks:3"],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=re.escape("clip, or time:BLOCK_S[:GAP_S[:SEED]]")):
        parse_split(text)


def test_overlap_is_counted_by_windows_of_8_s():
    def refs(*seconds, clip="a"):
        return [SampleRef(clip_id=clip, t0_us=round(second * 1e6)) for second in seconds]

    trained = refs(10, 30)
    assert count_overlapping(refs(2, 2.000001, 17.999999, 18, 22, 22.5, 38), trained) == 3
    assert count_overlapping(refs(10, clip="b"), trained) == 0
    assert covered_us([*trained, *refs(5, clip="b")]) == {"a": 20_000_000 + WINDOW_US, "b": WINDOW_US}

"""Whether paths obey: counted by path, recalled where the driven path obeys, and swapped."""

import math

import numpy as np
import pytest

from alpacache.metrics.commands import share_obeying, summarise_command, summarise_swap
from alpacache.metrics.corridor import side_chosen


def ending(*lateral_m):
    """Paths that end so far to the left."""
    paths = np.zeros((len(lateral_m), 64, 3))
    paths[:, :, 1] = np.asarray(lateral_m)[:, None] * np.linspace(0, 1, 64)
    return paths


def test_a_path_obeys_where_it_ends_on_the_commanded_side():
    paths = ending(3.0, -3.0, 1.9, -2.0)
    assert [share_obeying(paths, command) for command in ("left", "right", "straight", "none")] == [0.25, 0.25, 0.5, 0]


def test_recall_is_over_samples_whose_driven_path_obeys():
    truth = [ending(5.0)[0], ending(0.0)[0], ending(-5.0)[0]]
    paths = {"a": [ending(3.0, 0.0), ending(3.0, 3.0), ending(0.0, 0.0)], "b": [ending(4.0, 4.0)] * 3}
    found = summarise_command("left", truth, paths, ["x", "y", "z"])
    assert (found.samples, found.driven) == (3, 1)
    assert (found.models["a"].obeyed, found.models["a"].recall) == (0.5, 0.5)
    assert (found.models["b"].obeyed, found.models["b"].recall) == (1.0, 1.0)
    assert found.models["a"].recall_interval.low == -math.inf  # of a single clip
    nobody = summarise_command("right", truth[:2], {"a": paths["a"][:2]}, ["x", "y"])
    assert (nobody.driven, nobody.models["a"].recall) == (0, None)
    several = summarise_command("left", [truth[0]] * 12, {"a": [ending(3.0)] * 12}, list("abcdefghijkl"))
    assert 0.6 < several.models["a"].recall_interval.low < 0.9  # twelve of twelve do not prove it
    assert several.models["a"].recall_interval.high == 1.0


def test_a_model_that_reads_routes_changes_sides_and_one_that_does_not_stays():
    commands, clips = ["left", "right", "left"], ["x", "y", "z"]
    given = [ending(4.0, 4.0), ending(-4.0, -4.0), ending(4.0, 0.0)]
    reads = summarise_swap(commands, given, [-paths for paths in given], clips)
    assert (reads.given, reads.swapped, reads.samples) == (pytest.approx(5 / 6), pytest.approx(5 / 6), 3)
    assert reads.follows == pytest.approx(2 / 3)  # half of the paths are not most of them
    assert reads.shift_m == pytest.approx((8 + 8 + 4) / 3)
    deaf = summarise_swap(commands, given, given, clips)
    assert (deaf.swapped, deaf.follows, deaf.shift_m) == (0.0, 0.0, 0.0)


def test_the_side_chosen_counts_however_far_paths_go_and_only_where_there_is_one():
    assert side_chosen(ending(0.5, -0.5, 6.0, 0.0), ending(5.0)[0]) == 0.5
    assert side_chosen(ending(0.5, -0.5, -6.0, 0.0), ending(-5.0)[0]) == 0.5
    assert math.isnan(side_chosen(ending(3.0), ending(2.0)[0]))

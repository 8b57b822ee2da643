"""Damaged samples: which are left out, and what takes their places."""

import pytest

from alpacache.training.data_order import DamagedSamples, check_overlap
from cache_store import CorruptSampleError


class Data:
    """Samples of some ids, of which some cannot be read."""

    def __init__(self, ids, broken=()):
        self.ids, self.broken = ids, broken

    def __len__(self):
        return len(self.ids)

    def sample_id(self, index):
        return self.ids[index]

    def error_of(self, index):
        return error_of(self.ids[index]) if index in self.broken else None


def error_of(sample_id):
    return CorruptSampleError("a flipped bit", sample_id, "kv")


def leave_out(damaged, name):
    """For good: it fails at two turns."""
    assert damaged.leave_out(error_of(name)) is False
    assert damaged.leave_out(error_of(name)) is True


def test_the_next_sound_sample_takes_the_place():
    damaged = DamagedSamples(Data("abcdef", broken={0, 5}), "skip")
    assert damaged.replace([(7, 5)]) == [(7, 5)]
    for name in "fa":
        leave_out(damaged, name)
    assert damaged.replace([(7, 5), (8, 0), (9, 3)]) == [(7, 1), (8, 1), (9, 3)]
    assert len(damaged.indices) == 2
    assert 5 in damaged.indices
    assert damaged.state() == {"damaged": ["a", "f"], "damaged_indices": [0, 5]}
    again = DamagedSamples(Data("abcdef"), "skip")
    again.indices = set(damaged.state()["damaged_indices"])
    assert again.replace([(7, 5)]) == [(7, 1)]


def test_a_sample_that_is_missed_once_comes_at_its_next_turn():
    data = Data("abcdef", broken={2})
    damaged = DamagedSamples(data, "skip")
    assert damaged.leave_out(error_of("c"), until=4) is False
    assert damaged.replace([(3, 2), (4, 2)]) == [(3, 3), (4, 2)]
    assert damaged.state()["damaged"] == []
    damaged.delivered([(2, 2), (3, 1)])  # another stood in for it
    assert damaged.awaits
    damaged.delivered([(4, 2), (5, 1)])
    assert (damaged.awaits, damaged.passing, damaged.indices) == (False, {2}, set())
    assert damaged.leave_out(error_of("c"), until=20) is False  # another fault, which may pass as well
    assert damaged.leave_out(error_of("c"), until=30) is True
    assert (damaged.indices, damaged.passing) == ({2}, set())


@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_a_sample_that_can_be_read_by_its_turn_is_not_left_out(on_damage):
    damaged = DamagedSamples(Data("abcdef"), on_damage)
    for _ in range(3):
        assert damaged.leave_out(error_of("c"), until=4) is None
    assert damaged.replace([(3, 2)]) == [(3, 2)]
    assert damaged.passing == {2}
    if on_damage == "skip":
        assert damaged.leave_out(error_of("c"), until=4) is False  # it fails there again
    else:
        with pytest.raises(CorruptSampleError):
            damaged.leave_out(error_of("c"), until=4)


def test_what_does_not_come_again_is_tried_at_the_end():
    data = Data("abcdef", broken={1, 2})
    damaged = DamagedSamples(data, "skip")
    for name in "bc":
        assert damaged.leave_out(error_of(name), until=4) is False
    data.broken = {1}
    assert [error.sample_id for error in damaged.settle()] == ["b"]
    assert (damaged.indices, damaged.passing, damaged.awaits) == ({1}, {2}, False)


def test_of_two_samples_of_an_id_the_damaged_one_is_left_out():
    damaged = DamagedSamples(Data("abcabc", broken={4}), "skip")
    leave_out(damaged, "b")
    assert damaged.state()["damaged_indices"] == [4]


@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_the_error_is_raised_where_damage_stops_or_is_too_much(on_damage):
    damaged = DamagedSamples(Data("abcd", broken={0, 1, 2}), on_damage)
    if on_damage == "skip":
        leave_out(damaged, "a")
        leave_out(damaged, "b")
        with pytest.raises(CorruptSampleError):
            damaged.leave_out(error_of("a"))  # it is left out, and yet it was read
    with pytest.raises(CorruptSampleError):
        damaged.leave_out(error_of("c"))


def test_shared_drives_and_overlapping_windows_are_counted():
    class Samples(Data):
        @property
        def store_ranges(self):
            return [range(len(self.ids))]

    def told(trained, validated):
        lines = check_overlap(Samples(trained), ["s"], Samples(validated), val_store="v", allowed=False)
        return " ".join(lines)

    trained = [f"a@{second}000000#0" for second in range(20, 60)]
    assert told(trained, ["b@30000000#0"]) == ""
    beside = told(trained, ["a@12000000#0", "a@67000000#0", "b@5000000#0"])
    assert "1 of 2 clips of --val v are trained on, at other times: none of 3 windows overlaps" in beside
    within = told(trained, ["a@13000000#0", "a@67000000#0", "b@5000000#0"])
    assert "1 of 2 clips of --val v are trained on, and 1 of its 3 windows of 8 s overlap" in within

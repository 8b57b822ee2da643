"""Damaged samples: which are left out, and what takes their places."""

from types import SimpleNamespace

import pytest

from alpacache.training.data_order import DamagedSamples
from cache_store import CorruptSampleError


class Data:
    """Samples of some ids, of which some cannot be read."""

    prefix_fields = ("kv",)

    def __init__(self, ids, broken=()):
        self.ids, self.broken = ids, broken

    def __len__(self):
        return len(self.ids)

    def sample_id(self, index):
        return self.ids[index]

    def locate(self, index):
        def read(sample_id, fields):
            if index in self.broken:
                raise error_of(sample_id)

        return SimpleNamespace(read=read), self.ids[index]


def error_of(sample_id):
    return CorruptSampleError("a flipped bit", sample_id, "kv")


def test_the_next_sound_sample_takes_the_place():
    damaged = DamagedSamples(Data("abcdef"), "skip")
    assert damaged.replace([(7, 5)]) == [(7, 5)]
    for name in "fa":
        damaged.leave_out(error_of(name))
    assert damaged.replace([(7, 5), (8, 0), (9, 3)]) == [(7, 1), (8, 1), (9, 3)]
    assert len(damaged.indices) == 2
    assert 5 in damaged.indices
    assert damaged.state() == {"damaged": ["a", "f"], "damaged_indices": [0, 5]}
    again = DamagedSamples(Data("abcdef"), "skip")
    again.indices = set(damaged.state()["damaged_indices"])
    assert again.replace([(7, 5)]) == [(7, 1)]


def test_of_two_samples_of_an_id_the_damaged_one_is_left_out():
    damaged = DamagedSamples(Data("abcabc", broken={4}), "skip")
    damaged.leave_out(error_of("b"))
    assert damaged.state()["damaged_indices"] == [4]


@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_the_error_is_raised_where_damage_stops_or_is_too_much(on_damage):
    damaged = DamagedSamples(Data("abcd"), on_damage)
    if on_damage == "skip":
        damaged.leave_out(error_of("a"))
        damaged.leave_out(error_of("b"))
        with pytest.raises(CorruptSampleError):
            damaged.leave_out(error_of("a"))  # it is left out, and yet it was read
    with pytest.raises(CorruptSampleError):
        damaged.leave_out(error_of("c"))

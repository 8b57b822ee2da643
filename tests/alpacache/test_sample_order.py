"""The global order: every epoch as long as the data set, found from the seed alone, balanced where asked for."""

from collections import Counter

import numpy as np
import pytest

from alpacache.sample_order import GlobalOrder, balanced_epoch, epoch_order, members

TURNS = ["straight"] * 90 + ["gentle"] * 8 + ["sharp"] * 2


def places(order, first, end):
    return [order[position] for position in range(first, end)]


def test_every_epoch_is_a_permutation_and_they_differ():
    order = GlobalOrder(3, 100)
    first, second = places(order, 0, 100), places(order, 100, 200)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    again = GlobalOrder(3, 100)
    assert [again[place] for place in (150, 3, 199)] == [second[50], first[3], second[99]]
    assert np.array_equal(epoch_order(3, 0, 100), first)


def test_strata_have_equal_shares_of_every_epoch_and_over_epochs():
    order = GlobalOrder(0, 100, turns=TURNS)
    total = Counter()
    for epoch in range(6):
        shares = Counter(TURNS[index] for index in places(order, epoch * 100, (epoch + 1) * 100))
        assert sorted(shares.values()) == [33, 33, 34]
        total += shares
    assert set(total.values()) == {200}


def test_any_stretch_is_nearly_balanced():
    """So is a batch: strata are spread over the epoch, not only counted in it."""
    order = GlobalOrder(1, 300, turns=TURNS * 3)
    for start in range(0, 300, 30):
        shares = Counter((TURNS * 3)[index] for index in places(order, start, start + 30))
        assert all(8 <= shares[turn] <= 12 for turn in ("straight", "gentle", "sharp"))


def test_a_stratum_is_walked_without_replacement_across_epochs():
    order = GlobalOrder(2, 100, turns=TURNS)
    walked = places(order, 0, 600)
    for turn in ("straight", "gentle", "sharp"):
        indices = [index for index, kind in enumerate(TURNS) if kind == turn]
        seen = [index for index in walked if TURNS[index] == turn]
        assert len(seen) == 200
        for start in range(0, len(seen) - len(indices) + 1, len(indices)):
            assert sorted(seen[start : start + len(indices)]) == indices
    straight = [index for index in walked if TURNS[index] == "straight"]
    assert straight[:90] != straight[90:180]
    pairs = [index for index in walked if TURNS[index] == "sharp"]
    assert {tuple(pairs[start : start + 2]) for start in range(0, 200, 2)} == {(98, 99), (99, 98)}


def test_the_balanced_order_is_a_function_of_seed_and_epoch():
    whole = places(GlobalOrder(5, 100, turns=TURNS), 0, 500)
    resumed = GlobalOrder(5, 100, turns=TURNS)
    assert places(resumed, 437, 500) == whole[437:]
    assert places(resumed, 12, 40) == whole[12:40]
    assert balanced_epoch(5, 3, members(TURNS)).tolist() == whole[300:400]
    assert places(GlobalOrder(6, 100, turns=TURNS), 0, 100) != whole[:100]
    assert whole[:100] != whole[100:200]


def test_absent_strata_get_no_share():
    order = GlobalOrder(0, 10, turns=["gentle"] * 9 + ["straight"])
    assert Counter(places(order, 0, 10))[9] == 5
    only = GlobalOrder(0, 10, turns=["sharp"] * 10)
    assert sorted(places(only, 0, 10)) == list(range(10))
    assert places(only, 0, 10) != list(range(10))


@pytest.mark.parametrize("size", [1, 3, 4096, 5000])
def test_blocks_of_permutations_join_without_a_seam(size):
    """An epoch boundary in the middle of a block or of a permutation loses and repeats nothing."""
    turns = ["straight"] * size + ["sharp"] * 3
    order = GlobalOrder(0, size + 3, turns=turns)
    seen = [index for index in places(order, 0, 5 * (size + 3)) if index < size]
    for start in range(0, len(seen) - size + 1, size):
        assert sorted(seen[start : start + size]) == list(range(size))


def test_strata_of_another_number_of_samples_are_refused():
    with pytest.raises(ValueError, match="10 samples need as many strata, got 100"):
        GlobalOrder(0, 10, turns=TURNS)

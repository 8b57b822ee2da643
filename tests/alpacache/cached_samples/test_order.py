"""The global order: every epoch as long as the data set, found from the seed alone, balanced where asked for."""

from collections import Counter

import numpy as np
import pytest

from alpacache.cached_samples.order import (
    GlobalOrder,
    WeightedGroup,
    epoch_order,
    make_groups,
)

TURNS = ["straight"] * 90 + ["gentle"] * 8 + ["sharp"] * 2


def balanced(seed, count, turns):
    return GlobalOrder(seed, count, groups=make_groups([(range(count), 1.0)], turns))


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
    order = balanced(0, 100, TURNS)
    total = Counter()
    for epoch in range(6):
        shares = Counter(TURNS[index] for index in places(order, epoch * 100, (epoch + 1) * 100))
        assert sorted(shares.values()) == [33, 33, 34]
        total += shares
    assert set(total.values()) == {200}


def test_any_stretch_is_nearly_balanced():
    """So is a batch: strata are spread over the epoch, not only counted in it."""
    order = balanced(1, 300, TURNS * 3)
    for start in range(0, 300, 30):
        shares = Counter((TURNS * 3)[index] for index in places(order, start, start + 30))
        assert all(8 <= shares[turn] <= 12 for turn in ("straight", "gentle", "sharp"))


def test_a_stratum_is_walked_without_replacement_across_epochs():
    order = balanced(2, 100, TURNS)
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
    whole = places(balanced(5, 100, TURNS), 0, 500)
    resumed = balanced(5, 100, TURNS)
    assert places(resumed, 437, 500) == whole[437:]
    assert places(resumed, 12, 40) == whole[12:40]
    assert epoch_order(5, 3, 100, make_groups([(range(100), 1.0)], TURNS)).tolist() == whole[300:400]
    assert places(balanced(6, 100, TURNS), 0, 100) != whole[:100]
    assert whole[:100] != whole[100:200]


def test_absent_strata_get_no_share():
    order = balanced(0, 10, ["gentle"] * 9 + ["straight"])
    assert Counter(places(order, 0, 10))[9] == 5
    only = balanced(0, 10, ["sharp"] * 10)
    assert sorted(places(only, 0, 10)) == list(range(10))
    assert places(only, 0, 10) != list(range(10))


@pytest.mark.parametrize("size", [1, 3, 4096, 5000])
def test_blocks_of_permutations_join_without_a_seam(size):
    """An epoch boundary in the middle of a block or of a permutation loses and repeats nothing."""
    turns = ["straight"] * size + ["sharp"] * 3
    order = balanced(0, size + 3, turns)
    seen = [index for index in places(order, 0, 5 * (size + 3)) if index < size]
    for start in range(0, len(seen) - size + 1, size):
        assert sorted(seen[start : start + size]) == list(range(size))


def test_stores_have_their_weights_of_every_epoch_and_strata_parts_of_it():
    stores = [(range(90), 3.0), (range(90, 100), 1.0)]
    order = GlobalOrder(0, 100, groups=make_groups(stores, None))
    for epoch in range(4):
        drawn = places(order, epoch * 100, (epoch + 1) * 100)
        assert sum(index >= 90 for index in drawn) == 25
        assert Counter(index for index in drawn if index >= 90).most_common(1)[0][1] <= 3
    turns = ["straight"] * 80 + ["sharp"] * 10 + ["straight"] * 10
    groups = make_groups(stores, turns)
    assert [round(group.share, 3) for group in groups] == [0.375, 0.375, 0.25]
    order = GlobalOrder(0, 100, groups=groups)
    drawn = places(order, 0, 800)
    assert sum(80 <= index < 90 for index in drawn) == 300
    assert sum(index >= 90 for index in drawn) == 200


def test_a_share_of_less_than_one_sample_an_epoch_comes_in_some_epochs():
    groups = [WeightedGroup(members=np.arange(9), share=0.96), WeightedGroup(members=np.array([9]), share=0.04)]
    drawn = [sum(index == 9 for index in epoch_order(0, epoch, 10, groups)) for epoch in range(50)]
    assert all(len(epoch_order(0, epoch, 10, groups)) == 10 for epoch in range(50))
    assert sum(drawn) == 20


def weighted(weights, turns=None, shares=((1.0, None),)):
    ends = [len(weights) if end is None else end for _, end in shares]
    ranges = [(range(start, end), share) for start, end, (share, _) in zip([0, *ends], ends, shares, strict=False)]
    return make_groups(ranges, turns, of_samples=np.asarray(weights, float))


def test_samples_have_the_places_that_their_weights_are_due_in_every_epoch():
    weights = np.random.default_rng(0).choice([0.25, 1.0, 3.0, 7.5], 400)
    order = GlobalOrder(5, 400, groups=weighted(weights))
    due = order.due
    assert due == pytest.approx(400 * weights / weights.sum())
    total = np.zeros(400)
    for epoch in range(30):
        counts = np.bincount(places(order, epoch * 400, (epoch + 1) * 400), minlength=400)
        assert counts.sum() == 400
        assert (np.abs(counts - due) < 1).all()
        for weight in set(weights):  # kinds of samples are no groups, and yet none runs away
            assert abs(counts[weights == weight].sum() - due[weights == weight].sum()) < 25
        total += counts
        assert (np.abs(total - (epoch + 1) * due) < 2).all()
    again = GlobalOrder(5, 400, groups=weighted(weights))
    assert places(again, 400, 800) == places(order, 400, 800)
    assert places(GlobalOrder(6, 400, groups=weighted(weights)), 0, 400) != places(order, 0, 400)


def test_weights_of_samples_count_within_stores_and_turns():
    weights = [1.0 + index % 3 for index in range(200)]
    groups = weighted(weights, TURNS * 2, shares=((3.0, 100), (1.0, None)))
    order = GlobalOrder(0, 200, groups=groups)
    for epoch in range(5):
        epoch_places = places(order, epoch * 200, (epoch + 1) * 200)
        assert sum(index < 100 for index in epoch_places) == 150
        counts = Counter((TURNS * 2)[index] for index in epoch_places if index < 100)
        assert sorted(counts.values()) == [50, 50, 50]


def test_a_sample_that_comes_often_is_spread_over_the_epoch():
    order = places(GlobalOrder(0, 100, groups=weighted([50.0, *[0.5] * 99])), 0, 100)
    assert 50 <= order.count(0) <= 51
    assert all(3 <= order[start : start + 10].count(0) <= 7 for start in range(0, 100, 10))


def test_weights_that_are_alike_take_every_sample_once():
    for weight in (0.1, 1 / 3, 7.0):
        order = GlobalOrder(0, 997, groups=weighted([weight] * 997))
        for epoch in range(3):
            assert sorted(places(order, epoch * 997, (epoch + 1) * 997)) == [*range(997)]

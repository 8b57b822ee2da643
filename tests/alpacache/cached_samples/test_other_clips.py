"""Whose prefix the control takes: never one of the same clip, each once where clips allow it, by ids and seed alone."""

import random

import pytest

from alpacache.cached_samples.other_clips import other_clips
from alpacache.errors import UsageError


def ids(*counts):
    return [f"clip-{clip}@{1_000_000 * t0}#0" for clip, count in enumerate(counts) for t0 in range(count)]


def clip(sample_id):
    return sample_id.partition("@")[0]


@pytest.mark.parametrize("counts", [(1, 1), (1,) * 9, (3, 3), (4, 1, 3), (2, 5, 1, 1, 1), (1, 2, 3, 4, 5)])
def test_each_sample_has_one_of_another_clip_and_each_is_taken_once(counts):
    samples = ids(*counts)
    for seed in range(20):
        partners = other_clips(samples, seed=seed)
        assert sorted(partners) == list(range(len(samples)))
        assert all(clip(samples[own]) != clip(samples[other]) for own, other in enumerate(partners))


@pytest.mark.parametrize("counts", [(5, 1), (9, 2, 3), (1, 40)])
def test_a_clip_of_more_than_half_of_the_samples_meets_the_others_again_and_again(counts):
    samples = ids(*counts)
    partners = other_clips(samples, seed=0)
    assert all(clip(samples[own]) != clip(samples[other]) for own, other in enumerate(partners))
    largest = max(range(len(counts)), key=counts.__getitem__)
    taken = [partners[own] for own, name in enumerate(samples) if clip(name) == f"clip-{largest}"]
    spread = [taken.count(other) for other in set(taken)]
    assert max(spread) - min(spread) <= 1


def test_only_ids_and_seed_decide():
    samples = ids(2, 3, 1, 4, 2)
    pairs = dict(zip(samples, (samples[other] for other in other_clips(samples, seed=7)), strict=True))
    mixed = random.Random(1).sample(samples, len(samples))
    assert dict(zip(mixed, (mixed[other] for other in other_clips(mixed, seed=7)), strict=True)) == pairs
    seeds = {tuple(other_clips(samples, seed=seed)) for seed in range(10)}
    assert len(seeds) > 5


def test_samples_of_one_clip_are_refused_with_the_count():
    with pytest.raises(UsageError, match="all 3 samples are of one clip; judge samples of two clips or more"):
        other_clips(ids(3), seed=0)

"""Random numbers as functions of their key."""

import numpy as np
import pytest
import torch

from alpacache import randomness
from alpacache.errors import UsageError


def test_a_key_gives_the_same_numbers_and_another_key_others():
    first = randomness.noise(0, 17, draws=3)
    assert first.shape == (3, 64, 2)
    assert torch.equal(first, randomness.noise(0, 17, draws=3))
    assert not torch.equal(first, randomness.noise(0, 18, draws=3))
    assert not torch.equal(first, randomness.noise(1, 17, draws=3))
    assert torch.equal(first[:2], randomness.noise(0, 17, draws=2))


def test_numbers_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = randomness.noise(0, 5, draws=1)
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(first, randomness.noise(0, 5, draws=1))


def test_noise_is_standard_normal():
    many = torch.cat([randomness.noise(0, place, draws=8) for place in range(200)])
    assert abs(float(many.mean())) < 0.005
    assert abs(float(many.std()) - 1) < 0.005


def test_times_are_stratified_over_the_draws():
    for place in range(50):
        u = randomness.times(0, place, draws=4, schedule="uniform") / 0.999
        assert (u * 4).long().tolist() == [0, 1, 2, 3]


def test_a_negative_seed_is_the_users_mistake():
    with pytest.raises(UsageError, match="seed is -1; expected 0 or more"):
        randomness.numpy_generator(-1, 3)


def test_numpy_generators_are_those_of_numpy():
    assert np.array_equal(randomness.numpy_generator(3, 2).permutation(9), np.random.default_rng([3, 2]).permutation(9))
    spawned = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(1, 2)))
    assert np.array_equal(randomness.numpy_generator(3, key=(1, 2)).permutation(9), spawned.permutation(9))

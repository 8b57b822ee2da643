"""Targets of a batch's new samples: when, where and how often they are solved."""

import threading

import numpy as np
import pytest
import torch

from alpacache.cached_samples.ring_source import BatchTargets
from alpacache.errors import DataError
from alpacache.gpu.device import restored_torch_threads


@pytest.fixture(autouse=True)
def _keep_threads():
    with restored_torch_threads():
        yield


class Solver:
    def __init__(self, error=None):
        self.calls, self.error = [], error

    def __call__(self, indices, poses):
        self.calls.append((threading.current_thread().name, list(indices), [array.tolist() for array in poses]))
        if self.error is not None:
            raise self.error
        return torch.tensor([float(index) for index in indices]), ["straight"] * len(indices)


def add_in_thread(targets, place, name):
    adding = threading.Thread(
        target=targets.add, args=(place, 10 * place, [np.array(place), np.array(-place)]), name=name
    )
    adding.start()
    adding.join()


@pytest.mark.parametrize(("ahead", "solved_in"), [(True, "second"), (False, "MainThread")])
def test_a_batch_is_solved_once_whole_and_in_the_order_of_its_places(ahead, solved_in):
    solve = Solver()
    targets = BatchTargets(2, solve, ahead=ahead)
    add_in_thread(targets, 3, "first")
    assert solve.calls == []
    add_in_thread(targets, 1, "second")
    assert len(solve.calls) == ahead
    actions, turns = targets.result()
    assert actions.tolist() == [10.0, 30.0]
    assert turns == ["straight"] * 2
    assert solve.calls == [(solved_in, [10, 30], [[1, 3], [-1, -3]])]


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_is_the_loops_and_not_the_reading_threads(ahead):
    targets = BatchTargets(1, Solver(DataError("sample 'x': its path")), ahead=ahead)
    targets.add(0, 0, [np.zeros(1)])
    with pytest.raises(DataError, match="sample 'x': its path"):
        targets.result()


def test_the_loop_waits_for_a_solve_that_is_underway():
    begun, go_on = threading.Event(), threading.Event()

    def solve(indices, poses):
        begun.set()
        assert go_on.wait(10)
        return torch.zeros(1), ["left"]

    targets = BatchTargets(1, solve, ahead=True)
    adding = threading.Thread(target=targets.add, args=(0, 0, [np.zeros(1)]))
    adding.start()
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    assert targets.result()[1] == ["left"]
    adding.join()

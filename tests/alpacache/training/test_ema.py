"""The average of the weights: what it counts, how it goes on, and how it is brought up to a step in between."""

import pytest
import torch

from alpacache.training.ema import WeightAverage, up_to_date
from alpacache.training.run_directory import (
    RunCheckpoint,
    RunDirectory,
    read_checkpoint,
    read_trained,
)


def trained(weight, average, first, last):
    """Steps that add their number to the weight."""
    for step in range(first, last + 1):
        weight += step
        average.after(step)


def whole(weight, average):
    return up_to_date(average.tensors(), {"w": weight}, **average.state)["w"].item()


def test_a_run_shorter_than_an_update_is_counted():
    weight = torch.zeros(1)
    average = WeightAverage({"w": weight}, decay=0.999, every=100)
    assert whole(weight, average) == 0
    trained(weight, average, 1, 50)
    assert weight.item() == 1275
    assert average.tensors()["w"].item() == 0
    assert average.state == {"decay": 0.999, "behind": 50}
    assert whole(weight, average) == pytest.approx((1 - 0.999**50) * 1275)


def test_the_steps_after_the_last_update_are_counted_and_looking_changes_nothing():
    weight = torch.zeros(1)
    average = WeightAverage({"w": weight}, decay=0.5, every=2)
    trained(weight, average, 1, 4)
    assert average.state["behind"] == 0
    assert whole(weight, average) == average.tensors()["w"].item() == 0.25 * 0.75 * 3 + 0.75 * 10
    trained(weight, average, 5, 5)
    assert whole(weight, average) == 0.5 * 8.0625 + 0.5 * 15
    assert average.tensors()["w"].item() == 8.0625
    trained(weight, average, 6, 6)
    assert average.tensors()["w"].item() == 0.25 * 8.0625 + 0.75 * 21


@pytest.mark.parametrize("end", [3, 4, 5])
def test_it_goes_on_from_any_step_to_the_same_bits(end):
    weight, copy = torch.zeros(1), torch.zeros(1)
    average, resumed = (WeightAverage({"w": tensor}, decay=0.9, every=4) for tensor in (weight, copy))
    trained(weight, average, 1, end)
    copy.copy_(weight)
    resumed.load(average.tensors(), average.state["behind"])
    for tensor, each in ((weight, average), (copy, resumed)):
        trained(tensor, each, end + 1, 11)
    assert torch.equal(average.tensors()["w"], resumed.tensors()["w"])
    assert average.state == resumed.state == {"decay": 0.9, "behind": 3}


def test_an_average_that_begins_between_updates_counts_the_steps_since():
    weight = torch.zeros(1)
    average = WeightAverage({"w": weight}, decay=0.5, every=4)
    trained(weight, average, 4, 4)
    assert average.tensors()["w"].item() == 0.5 * 4


def test_a_checkpoint_in_between_is_read_with_the_average_of_its_own_step(tmp_path, run_state):
    weight = torch.zeros(1)
    average = WeightAverage({"w": weight}, decay=0.999, every=100)
    trained(weight, average, 1, 50)
    state = run_state(average=average.state)
    content = RunCheckpoint(model={"w": weight}, optimizer={}, average=average.tensors(), state=state)
    path = RunDirectory(tmp_path).save(50, content, keep=9)
    assert read_trained(path, average=False).model == {"w": weight}
    trained_content = read_trained(path, average=True)
    assert trained_content.average == {}
    assert trained_content.model["w"].item() == whole(weight, average)
    assert read_checkpoint(path, average=True).average["w"].item() == 0  # what a resumed run goes on from

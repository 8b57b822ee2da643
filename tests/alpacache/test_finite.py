"""What is not finite is seen wherever it stands, in every type of number."""

import math

import pytest
import torch

from alpacache.finite import is_finite, not_finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_element_is_enough(dtype, value):
    tensor = torch.ones(3, 1000, dtype=dtype)
    assert is_finite(tensor).item() is True
    tensor[1, 777] = value
    assert is_finite(tensor).item() is False
    assert is_finite(tensor.T[776]).item() is True


def test_names_of_those_that_are_not_finite():
    bad = torch.tensor([0.0, math.nan])
    tensors = {"a": bad, "codes": torch.tensor([3], dtype=torch.uint8), "none": torch.zeros(0), "b": torch.ones(2)}
    assert not_finite(tensors | {"c": bad.requires_grad_()}) == ["a", "c"]
    assert not_finite({}) == []

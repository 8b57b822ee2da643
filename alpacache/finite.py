"""Tests for numbers that are not finite, made where they arise: one NaN spreads to all that it is multiplied with."""

from collections.abc import Mapping

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> Tensor:
    """Tell whether all elements are finite: a bool `[]` on the tensor's device, for which nothing waits.

    One pass without a copy, at the speed of memory; NaN is its own minimum and maximum.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    least, greatest = torch.aminmax(tensor.detach())
    return least.isfinite() & greatest.isfinite()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with an element that is not finite, in order. Waits once for their device."""
    if not tensors:
        return []
    flags = torch.stack([is_finite(tensor) for tensor in tensors.values()]).tolist()
    return [name for name, finite in zip(tensors, flags, strict=True) if not finite]

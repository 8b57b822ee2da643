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
    """Names of the tensors with an element that is not finite, in order. Waits once for each of their devices."""
    flags = {name: is_finite(tensor) for name, tensor in tensors.items()}
    finite: dict[str, bool] = {}
    for device in {flag.device for flag in flags.values()}:
        there = {name: flag for name, flag in flags.items() if flag.device == device}
        finite |= zip(there, torch.stack([*there.values()]).tolist(), strict=True)
    return [name for name in tensors if not finite[name]]

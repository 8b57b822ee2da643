"""Checks of a driver's arguments: what is no number, array or list of names is refused by its own name."""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from alpacache.driving.cameras import full_camera_name
from alpacache.errors import UsageError


def whole(value: Any, what: str, *, expected: str, least: int | None = None, most: int | None = None) -> int:
    """The whole number `value`, within the limits. Raises `UsageError`: a float would make other random numbers."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise UsageError(f"{what} is {_shown(value)}; expected {expected}.")
    return number


def counts(paths: Any, flow_steps: Any, seed: Any) -> tuple[int, int, int]:
    """Paths, flow steps and the seed of a call."""
    return (
        whole(paths, "paths", expected="a whole number, 1 or more", least=1),
        whole(flow_steps, "flow_steps", expected="a whole number, 1 or more", least=1),
        whole(seed, "seed", expected="a whole number, 0 or more", least=0),
    )


def camera_names(names: Any, what: str) -> list[str]:
    """Full names of cameras. Raises `UsageError` for what is no list of known ones."""
    listed = None if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if listed is None or not all(isinstance(name, str) for name in listed):
        raise UsageError(f"{what} is {_shown(names)}; expected a list of names, as in ['front_wide'].")
    return [full_camera_name(name) for name in listed]


def array(values: Any, what: str, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """`values` as an array. Raises `UsageError` for what is none, such as rows of several lengths."""
    try:
        return np.asarray(values, dtype)
    except (TypeError, ValueError):
        raise UsageError(f"{what} make no array of numbers; expected one, all of its rows of one length.") from None


def noise_draws(noise: Any, shape: tuple[int, ...]) -> Tensor:
    """Noise of this shape, a tensor or an array, as finite float32. Raises `UsageError` for any other."""
    draws = noise if isinstance(noise, Tensor) else torch.from_numpy(array(noise, "noise", np.float32).copy())
    if draws.shape != shape:
        raise UsageError(f"noise is {list(draws.shape)}; expected {list(shape)}, one draw a path.")
    draws = draws.detach().float()
    if not draws.isfinite().all():
        raise UsageError("noise holds NaN or infinity; expected standard normal numbers.")
    return draws


def _shown(value: Any) -> str:
    return repr(value)[:100]

"""Places a driver's VLM: all weights on the device, or layer by layer where a memory budget is below them."""

from typing import TYPE_CHECKING

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.family import Geometry
from alpacache.errors import CheckpointError, UsageError
from alpacache.gpu.host_memory import available_bytes
from alpacache.planning.prefill_plan import WeightsPlace, place_of, place_weights

if TYPE_CHECKING:
    from alpacache.alpamayo import FrozenVLM

_SPARE_BYTES = 3 * 2**29
"""GPU memory for activations, prefix, graphs and libraries beside the weights."""


def check_holds_vlm(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` where there is no VLM, as in an export of the expert alone."""
    _ = checkpoint.config  # of what is no checkpoint at all, that is said first
    home, prefix = checkpoint.vlm_home
    if not home.with_prefix(f"{prefix}model."):
        raise CheckpointError(
            f"{home.model} holds no VLM: an export with --expert-only is the expert alone. Pass the model that it was "
            "trained on as --vlm MODEL, in Python load_driver(vlm=...)."
        )


def open_vlm(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    dtype: torch.dtype,
    compiled: bool,
    memory_budget: int | None,
    beside_bytes: int,
) -> "FrozenVLM":
    """The frozen VLM, within a budget of bytes of device memory if one is given.

    Weights that do not fit beside the expert (`beside_bytes`) come for each look from where `extract` would have them
    too: page-locked RAM, or the checkpoint's files where RAM has no room for them.

    Raises `UsageError` for a budget below what streaming takes.
    """
    from alpacache.alpamayo import load_vlm

    place = None
    if memory_budget is not None:
        place = _place(geometry_of(checkpoint), device, dtype.itemsize, memory_budget, beside_bytes)
    if place is None or place.home == "gpu":
        vlm = load_vlm(checkpoint, dtype=dtype, device=device)
    else:
        from alpacache.alpamayo.streamed_vlm import load_streamed_vlm

        streams = place.tower_streams
        vlm = load_streamed_vlm(checkpoint, dtype=dtype, device=device, home=place.home, tower_streams=streams)
    if compiled:
        vlm.compile()
    return vlm


def _place(
    geometry: Geometry, device: torch.device, itemsize: int, memory_budget: int, beside_bytes: int
) -> WeightsPlace:
    """The place of the weights within a budget. Raises `UsageError` where there is none."""
    spare, available = (_SPARE_BYTES if device.type == "cuda" else 0), available_bytes()
    room = memory_budget - beside_bytes - spare
    place = place_weights(geometry, itemsize, device_bytes=room, host_bytes=available)
    if place is not None:
        return place
    least = place_of(geometry, itemsize, "files", tower_streams=True)
    if least.on_device > room:
        raise UsageError(
            f"the memory budget of {_gib(memory_budget)} is too small: the expert takes {_gib(beside_bytes)}, the "
            f"layers of the VLM that come in turn {_gib(least.on_device)}, and activations {_gib(spare)}."
        )
    raise UsageError(
        f"{_gib(available)} of RAM are available, too few to read the VLM's layers through ({_gib(least.on_host)}) and "
        "leave 2 GiB to others. Free RAM, or pass a larger memory budget."
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"

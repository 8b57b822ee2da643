"""Places a driver's VLM: all weights on the device, or layer by layer where a memory budget is below them."""

from typing import TYPE_CHECKING, Literal

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.errors import UsageError
from alpacache.gpu.host_memory import available_bytes
from alpacache.planning.prefill_plan import all_weights_bytes, weights_in_turn_bytes

if TYPE_CHECKING:
    from alpacache.alpamayo import FrozenVLM

_SPARE_BYTES = 3 * 2**29
"""GPU memory for activations, prefix, graphs and libraries beside the weights."""
_RAM_LEFT_BYTES = 4 * 2**30
"""Host memory that is left to others where weights live there."""


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

    Weights that do not fit beside the expert (`beside_bytes`) come for each look from page-locked RAM, or from the
    checkpoint's files where RAM has no room for them.

    Raises `UsageError` for a budget below what streaming takes.
    """
    from alpacache.alpamayo import load_vlm

    geometry, room = geometry_of(checkpoint), None
    all_bytes = all_weights_bytes(geometry, dtype.itemsize)
    if memory_budget is not None:
        room = memory_budget - beside_bytes - (_SPARE_BYTES if device.type == "cuda" else 0)
    if room is None or all_bytes <= room:
        vlm = load_vlm(checkpoint, dtype=dtype, device=device)
    else:
        from alpacache.alpamayo.streamed_vlm import load_streamed_vlm

        tower_streams = weights_in_turn_bytes(geometry, dtype.itemsize, tower_streams=False) > room
        needed = weights_in_turn_bytes(geometry, dtype.itemsize, tower_streams=tower_streams)
        if needed > room:
            raise UsageError(
                f"the memory budget of {_gib(memory_budget)} is too small: the expert takes {_gib(beside_bytes)}, the "
                f"layers of the VLM that come in turn {_gib(needed)}, and activations {_gib(_SPARE_BYTES)}."
            )
        fits = all_bytes + _RAM_LEFT_BYTES <= available_bytes()
        home: Literal["ram", "files"] = "ram" if fits else "files"
        vlm = load_streamed_vlm(checkpoint, dtype=dtype, device=device, home=home, tower_streams=tower_streams)
    if compiled:
        vlm.compile()
    return vlm


def _gib(size_bytes: int | None) -> str:
    return f"{(size_bytes or 0) / 2**30:.2f} GiB"

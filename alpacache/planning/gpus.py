"""GPUs by name, with the rates that the times of both stages scale with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from alpacache.errors import UsageError
from alpacache.masking import masked

_SHOWN = 16
"""Characters of an unknown name that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Rates of a card, which the times of both stages scale with."""

    name: str
    tflops: float
    """Dense bfloat16 operations a second, in 10^12."""
    memory_gb_s: float
    """Memory bandwidth, in 10^9 bytes a second."""
    memory_gb: float
    """Size that the card is named by; about as many GiB."""
    bus_gb_s: float = 25.0
    """Rate between RAM and the card, each way, both at once, in 10^9 bytes a second: PCIe 4.0 with 16 lanes, half of it
    with 8. PCIe 5.0 counts as 50 (page-locked samples reach an H100 at 54)."""


MEASURED = "h100"
"""The GPU that all seconds in `time_model` were measured on."""
GPUS: Mapping[str, Gpu] = {
    "h100": Gpu(name="H100 SXM 80GB", tflops=989, memory_gb_s=3350, memory_gb=80, bus_gb_s=50),
    "h200": Gpu(name="H200 SXM 141GB", tflops=989, memory_gb_s=4800, memory_gb=141, bus_gb_s=50),
    "a100": Gpu(name="A100 SXM 80GB", tflops=312, memory_gb_s=2039, memory_gb=80),
    "l40s": Gpu(name="L40S", tflops=362, memory_gb_s=864, memory_gb=48),
    "a6000": Gpu(name="RTX A6000", tflops=154.8, memory_gb_s=768, memory_gb=48),
    "5090": Gpu(name="GeForce RTX 5090", tflops=209.5, memory_gb_s=1792, memory_gb=32, bus_gb_s=50),
    "4090": Gpu(name="GeForce RTX 4090", tflops=165.2, memory_gb_s=1008, memory_gb=24),
    "3090": Gpu(name="GeForce RTX 3090", tflops=71, memory_gb_s=936, memory_gb=24),
    "4080": Gpu(name="GeForce RTX 4080", tflops=97.5, memory_gb_s=717, memory_gb=16),
    "4070": Gpu(name="GeForce RTX 4070", tflops=58.3, memory_gb_s=504, memory_gb=12),
    "3060": Gpu(name="GeForce RTX 3060 12GB", tflops=25.5, memory_gb_s=360, memory_gb=12),
    "4060": Gpu(name="GeForce RTX 4060", tflops=30.2, memory_gb_s=272, memory_gb=8, bus_gb_s=12.5),
}


def card_of(device_name: str) -> Gpu | None:
    """The entry of the table for a device's own name, such as "NVIDIA GeForce RTX 4090"; None if there is none."""
    return {_plain(gpu.name): gpu for gpu in GPUS.values()}.get(_plain(device_name))


def _plain(name: str) -> str:
    """A card's name without maker, memory and slot; "Ti" and "Laptop GPU" are other cards."""
    return re.sub(r"^NVIDIA |[ -](SXM\d?|PCIe|\d+GB|HBM\w*)\b", "", name)


def gpu_named(name: str) -> Gpu:
    """Look up a GPU by a name such as `4090` or `RTX 4090`. Raises `UsageError` for one that is not in the table."""
    gpu = GPUS.get(name.lower().removeprefix("rtx").strip())
    if gpu is None:
        shown = masked(name)  # also of a secret that went astray no more than its beginning
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        raise UsageError(f"gpu is {shown!r}; known: {', '.join(GPUS)}. On the machine itself --probe measures.")
    return gpu

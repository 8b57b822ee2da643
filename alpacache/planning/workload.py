"""What a training step is to hold, and the table of what it takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alpacache.alpamayo.geometry import EXPERT_LINEARS, HEAD_TENSORS
from alpacache.planning.config import CONTEXT_BYTES
from alpacache.prefix.layout import PrefixLayout

_BYTES = {"adamw": 4.0, "adamw8": 3.0 + 3 * 2 / 128}
"""State of a bf16 parameter: two bf16 moments; residual, two codes and three bf16 scales a group of 128."""


def trained_counts(shapes: Mapping[str, tuple[int, ...]], which: str, lora_rank: int) -> tuple[int, int]:
    """Parameters of the expert, and how many of them (or of adapters and head) `choose_trainable` would return.

    `shapes`: of the expert's tensors by their names in the checkpoint.
    """
    counts = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(".freqs")}
    head = sum(count for name, count in counts.items() if name.startswith(HEAD_TENSORS))
    linears = [
        shape
        for name, shape in shapes.items()
        if name.startswith("expert.layers.") and name.split(".")[-2] in EXPERT_LINEARS and name.endswith(".weight")
    ]
    adapters = sum(lora_rank * (outputs + inputs) for outputs, inputs in linears)
    return sum(counts.values()), {"all": sum(counts.values()), "head": head, "lora": head + adapters}[which]


VAL_BATCH = 2
"""Samples of a validation batch: enough to keep a GPU busy, few enough not to be what decides on the memory."""
MAX_DRAWS = 8
"""More draws of one sample tell next to nothing new."""
_GATE = ".mlp.gate_proj.weight"
"""Of every layer one: `[intermediate, hidden]`."""
BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained, on what, as far as memory depends on it."""

    parameters: int
    """Of expert and projections."""
    trained: int
    """Of them, or of the adapters and the head."""
    layers: int
    hidden: int
    intermediate: int
    layout: PrefixLayout
    longest: int
    """Tokens of the longest prefix."""
    batch_size: int
    trainable: str
    optimizer: str
    """`adamw8` or `adamw`."""
    compiled: bool
    validates: bool
    pinned_bytes: int | None = None
    """Of samples kept in host memory; None: only the ring's."""

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        layout: PrefixLayout,
        longest: int,
        *,
        trainable: str,
        lora_rank: int,
        **rest: Any,
    ) -> "Workload":
        """`shapes`: of the tensors of expert and projections, by name in the checkpoint."""
        parameters, trained = trained_counts(shapes, trainable, lora_rank)
        gates = [shape for name, shape in shapes.items() if name.endswith(_GATE)]
        intermediate, hidden = gates[0]
        return cls(
            parameters=parameters,
            trained=trained,
            layers=len(gates),
            hidden=hidden,
            intermediate=intermediate,
            layout=layout,
            longest=longest,
            trainable=trainable,
            **rest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes, and the settings they are for."""

    micro_batch: int
    checkpointing: bool
    draws: int
    decoded_layers: int
    """Of a micro-batch, kept decoded: what there is room for need not be decoded again for the backward."""
    weights: int
    gradients: int
    moments: int
    prefixes: int
    """Two batches of stored samples."""
    decoding: int
    """The decoded layers."""
    activations: int
    shared: int
    """Of gradients and activations, what is first the one and then the other."""
    validation: int
    workspace: int
    pinned: int
    """Page-locked host memory."""

    @property
    def device_bytes(self) -> int:
        """Peak of what the allocator will have reserved."""
        parts = self.weights + self.gradients + self.moments + self.prefixes + self.decoding
        return parts + self.activations - self.shared + self.validation + self.workspace

    def device_table(self) -> list[tuple[str, int]]:
        """What `device_bytes` is made of, and it: what, bytes."""
        return [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("moments", self.moments),
            ("prefix buffers", self.prefixes),
            ("decoded layers", self.decoding),
            ("activations", self.activations),
            ("activations' memory that gradients use again", -self.shared),
            ("validation", self.validation),
            ("workspace", self.workspace),
            ("sum, to be reserved", self.device_bytes),
        ]

    def table(self) -> list[tuple[str, int]]:
        """Lines of the table: what, bytes."""
        beside = [("CUDA context, beside it", CONTEXT_BYTES), ("pinned host memory", self.pinned)]
        return [*self.device_table(), *beside]


def state_bytes(name: str, parameter_count: int) -> int:
    """About what the state of bf16 parameters takes; `name`: `adamw8` or `adamw`."""
    return round(_BYTES[name] * parameter_count)

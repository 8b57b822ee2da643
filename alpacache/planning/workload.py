"""Workload of a training step, as far as memory and time depend on it, and the plan of the memory it takes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from alpacache.alpamayo.family import EXPERT_LINEARS, HEAD_TENSORS
from alpacache.planning.config import CONTEXT_BYTES
from alpacache.prefix.layout import PrefixLayout, TailRoom

_BYTES = {"adamw": 4.0, "adamw8": 3.0 + 3 * 2 / 128}
"""Optimizer state of a bf16 parameter: two bf16 moments; or a residual, two codes and three scales for each 128."""


STATE_PLACES = 4
"""Places on the GPU for groups of optimizer state that lives in RAM: while one is updated, one leaves and one arrives,
each of which takes as long."""
VAL_BATCH = 2
"""Samples of a validation batch: enough to keep a GPU busy, too few to decide on the memory."""
MAX_DRAWS = 8
"""Most draws a sample: more tell next to nothing new."""
_GATE = ".mlp.gate_proj.weight"
"""A tensor that each layer has once: `[intermediate, hidden]`."""
BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Model, data and settings of a training, as far as memory and time depend on them; for `plan` and `train`."""

    parameters: int
    """Parameters of expert and projections."""
    trained: int
    """Trained parameters: of those, or of adapters and head."""
    layers: int
    hidden: int
    intermediate: int
    layout: PrefixLayout
    longest: int
    """Length of the longest prefix in tokens."""
    batch_size: int
    trainable: str
    optimizer: str
    """`adamw8` or `adamw`."""
    compiled: bool
    validates: bool
    tail_room: TailRoom | None = None
    """Lengths of stored prefixes and of tails, where tails of reasoning rollouts may come."""
    pinned_bytes: int | None = None
    """Size of samples kept in host memory; None: only the ring's."""
    captured: bool = True
    """True if a step may be one CUDA graph."""


def expert_sizes(shapes: Mapping[str, tuple[int, ...]], trainable: str, lora_rank: int) -> dict[str, int]:
    """Fields of a `Workload` that follow from the `shapes` of the tensors of expert and projections.

    Keys of `shapes` are names in the checkpoint. Trained are the parameters that `choose_trainable` would return.
    """
    counts = {name: math.prod(shape) for name, shape in shapes.items() if not name.endswith(".freqs")}
    head = sum(count for name, count in counts.items() if name.startswith(HEAD_TENSORS))
    linears = [
        shape
        for name, shape in shapes.items()
        if name.startswith("expert.layers.") and name.split(".")[-2] in EXPERT_LINEARS and name.endswith(".weight")
    ]
    adapters = sum(lora_rank * (outputs + inputs) for outputs, inputs in linears)
    everything = sum(counts.values())
    gates = [shape for name, shape in shapes.items() if name.endswith(_GATE)]
    intermediate, hidden = gates[0]
    return {
        "parameters": everything,
        "trained": {"all": everything, "head": head, "lora": head + adapters}[trainable],
        "layers": len(gates),
        "hidden": hidden,
        "intermediate": intermediate,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """GPU memory in bytes, and the settings it is for."""

    micro_batch: int
    checkpointing: bool
    draws: int
    decoded_layers: int
    """Layers of a micro-batch that stay decoded, so that the backward need not decode them again."""
    streamed_layers: int = 0
    """Layers whose optimizer state is in RAM, and on the GPU when they are updated."""
    backwards: int = 1
    """2: a first one for the gradient's norm and a second one for updates, so that no layer's gradient is kept."""
    captured: bool = True
    """True if a step is one CUDA graph; with streamed state and one backward it keeps gradients in memory of their
    own."""
    weights: int
    gradients: int
    moments: int
    """State of the optimizer that stays on the GPU."""
    arriving: int = 0
    """Places for state that comes from RAM."""
    streamed: int = 0
    """State of the optimizer in RAM."""
    prefixes: int
    """Two batches of stored samples."""
    decoding: int
    """The decoded layers."""
    activations: int
    shared: int
    """Memory of activations that gradients use again."""
    validation: int
    workspace: int
    pinned: int
    """Page-locked host memory, with the optimizer's."""

    @property
    def device_bytes(self) -> int:
        """Peak of what the allocator reserves."""
        return self.device_table()[-1][1]

    def device_table(self) -> list[tuple[str, int]]:
        """Lines that make up `device_bytes`, and the sum: (what, bytes)."""
        parts = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("moments", self.moments),
            *([("moments on their way from and to RAM", self.arriving)] if self.arriving else []),
            ("prefix buffers", self.prefixes),
            ("decoded layers", self.decoding),
            ("activations", self.activations),
            ("activations' memory that gradients use again", -self.shared),
            ("validation", self.validation),
            ("workspace", self.workspace),
        ]
        return [*parts, ("sum, to be reserved", sum(size for _, size in parts))]

    def table(self) -> list[tuple[str, int]]:
        """Lines of the table with what lies beside the allocator: (what, bytes)."""
        beside = [("CUDA context, beside it", CONTEXT_BYTES), ("pinned host memory", self.pinned)]
        if self.streamed:
            beside.append((f"of that, moments of {self.streamed_layers} layers", self.streamed))
        return [*self.device_table(), *beside]

    @property
    def settings(self) -> str:
        """The chosen settings, for people."""
        how = f"micro-batches of {self.micro_batch}, {'' if self.checkpointing else 'no '}checkpointing"
        how += ", gradients made twice" if self.backwards == 2 else ""
        return how + (f", moments of {self.streamed_layers} layers in RAM" if self.streamed_layers else "")


def told_pinned(plan: MemoryPlan, locked_bytes: int, available_bytes: int, *, in_memory: bool = False) -> str:
    """Say that RAM has no room for what would be page-locked, by all processes of the machine, and what to do."""
    state, remedies = "", ["Free RAM", "leave --in-memory out" if in_memory else "lower --batch-size"]
    if plan.streamed:
        state = f", {plan.streamed / 2**30:.2f} of it optimizer state that the GPU has no room for"
        remedies += ["raise --memory-budget", "use --trainable lora"]
    return (
        f"{locked_bytes / 2**30:.2f} GiB would be page-locked in RAM{state}, but {available_bytes / 2**30:.2f} GiB are "
        f"available. {', '.join(remedies[:-1])}, or {remedies[-1]}."
    )


def halved(size: int) -> list[int]:
    """The size, then half of the one before, rounded up, down to 1."""
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def state_bytes(name: str, parameter_count: int) -> int:
    """Size of the optimizer state of bf16 parameters, about; `name`: `adamw8` or `adamw`."""
    return round(_BYTES[name] * parameter_count)

"""An expert of one's own size in the place of a checkpoint's, its weights drawn from a seed.

The cache holds keys and values, not what attends to them: any text model with the VLM's KV heads and head size can. To
everything else such an expert is a checkpoint like any other, whose tensors under `EXPERT_PARTS` happen to be drawn
instead of read; VLM, prompt, action space and the Fourier frequencies are those of the checkpoint that it stands in.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alpacache import randomness
from alpacache.alpamayo.backbone import LAYER_MAP, expert_config, vlm_config
from alpacache.alpamayo.checkpoint import SINGLE, Checkpoint
from alpacache.alpamayo.families import parse_config
from alpacache.alpamayo.family import EXPERT_PARTS, AlpamayoConfig
from alpacache.alpamayo.foreign_files import TensorInfo
from alpacache.errors import CheckpointError, UsageError
from alpacache.layer_choice import layers_text, spread_layers

_PROJECTION_STD = 0.02
"""What the public code draws the action projections with: transformers' default, as the model's config has no other."""
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
_LAYERS, _TRUNK = "expert.layers.", "action_in_proj.encoder.trunk."
_GATE = "mlp.gate_proj.weight"
_MOST_HEADS = 1024
_INTERMEDIATE_STEP = 32
"""A width of the MLP that is not given is a multiple of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """Sizes of a new expert, what its layers attend to, and the seed of its weights."""

    layer_map: tuple[int, ...]
    """The VLM's layer that each layer attends to."""
    width: int
    """Channels of the hidden states."""
    intermediate: int
    """Width of the MLP."""
    heads: int
    """Query heads, a multiple of the VLM's KV heads."""
    seed: int

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the expert that say so in `config.json`."""
        return {
            "num_hidden_layers": len(self.layer_map),
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layer_map": list(self.layer_map)}


def plan_expert(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kv_heads: int,
    head_dim: int,
    held: Sequence[int],
    layers: int | None,
    width: int | None,
    intermediate: int | None,
    heads: int | None,
    layer_map: Sequence[int] | None,
    seed: int,
) -> ExpertSpec:
    """Fill in what is left open (None) of a new expert, in the proportions of a model's own.

    Args:
        shapes: of the model's own tensors under `EXPERT_PARTS`.
        held: the VLM's layers that can be attended to, rising.

    Raises `UsageError` for sizes that cannot be, and for layers that are not held.
    """
    first, own_layers = f"{_LAYERS}0.", sum(name.endswith(_GATE) for name in shapes)
    if not own_layers:
        raise UsageError("the model has no expert whose form a new one could have; pass a checkpoint with one.")
    own_intermediate, own_width = shapes[f"{first}{_GATE}"]
    own_heads = shapes[f"{first}self_attn.q_proj.weight"][0] // head_dim
    if layer_map is None:
        layer_map = spread_layers(layers or min(own_layers, len(held)), held)
    if layers is not None and layers != len(layer_map):
        raise UsageError(f"expert_map names {len(layer_map)} layers, and expert_layers is {layers}; leave one out.")
    if lost := sorted(set(layer_map) - set(held)):
        raise UsageError(
            f"expert_map names layers {layers_text(lost)} of the VLM; there are keys and values of layers "
            f"{layers_text(held)}."
        )
    width = width or own_width
    share = width / own_width
    if intermediate is None:
        intermediate = _INTERMEDIATE_STEP * max(1, round(own_intermediate * share / _INTERMEDIATE_STEP))
    if heads is None:
        heads = kv_heads * min(max(1, round(own_heads * share / kv_heads)), _MOST_HEADS // kv_heads)
    if heads % kv_heads:
        raise UsageError(f"expert_heads is {heads}; expected a multiple of the VLM's {kv_heads} KV heads.")
    return ExpertSpec(layer_map=tuple(layer_map), width=width, intermediate=intermediate, heads=heads, seed=seed)


def new_shapes(
    shapes: Mapping[str, tuple[int, ...]], spec: ExpertSpec, *, kv_heads: int, head_dim: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of expert and projections of another size, by those of a checkpoint's own."""
    keys, queries = kv_heads * head_dim, spec.heads * head_dim
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": spec.width}
    outputs |= {"gate_proj": spec.intermediate, "up_proj": spec.intermediate, "down_proj": spec.width}
    inputs = {"o_proj": queries, "down_proj": spec.intermediate}
    last = max((name for name in shapes if name.startswith(_TRUNK)), key=_place).split(".")[3]

    def resized(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        part = name.split(".")[-2]
        if name.endswith(".freqs") or part in ("q_norm", "k_norm"):
            return shape
        if name.startswith(_TRUNK):
            return (spec.width, *shape[1:]) if name.startswith(f"{_TRUNK}{last}.") else shape
        if name.startswith("action_out_proj."):
            return (shape[0], spec.width)[: len(shape)]
        return (outputs[part], inputs.get(part, spec.width))[: len(shape)] if part in outputs else (spec.width,)

    new = {name: resized(name, shape) for name, shape in shapes.items() if not name.startswith(_LAYERS)}
    first = f"{_LAYERS}0."
    for name, shape in shapes.items():
        if name.startswith(first):
            behind = name.removeprefix(first)
            new |= {f"{_LAYERS}{layer}.{behind}": resized(name, shape) for layer in range(len(spec.layer_map))}
    return new


def _place(name: str) -> int:
    """Place of a tensor's module in the encoder of actions."""
    return int(name.split(".")[3])


class NewExpert(Checkpoint):
    """A checkpoint with a new expert in the place of its own."""

    def __init__(self, base: Checkpoint, spec: ExpertSpec) -> None:
        super().__init__(base.model, revision=base._wanted_revision, vlm=base._other_vlm)
        self.base, self.spec = base, spec

    @cached_property
    def config(self) -> AlpamayoConfig:
        raw = copy.deepcopy(dict(self.base.config.raw))
        block: Any = raw
        for key in self.base.config.family.expert_block:
            if not isinstance(block.get(key), Mapping):
                raise CheckpointError(f"config.json of {self.model} has no {key}, so no other size can be asked for.")
            block = block[key]
        block |= self.spec.config
        raw[LAYER_MAP] = list(self.spec.layer_map)
        return parse_config(raw, self.file("config.json"))

    @cached_property
    def drawn(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors whose values are drawn."""
        own = self.base.shapes(*EXPERT_PARTS)
        if "expert.norm.weight" not in own:
            raise CheckpointError(f"{self.model} has no expert that a new one could have its form from.")
        text = vlm_config(self.base).text_config
        shapes = new_shapes(own, self.spec, kv_heads=text.num_key_value_heads, head_dim=text.head_dim)
        return {name: shape for name, shape in shapes.items() if not name.endswith(".freqs")}

    @cached_property
    def names(self) -> dict[str, str]:
        kept = {name: shard for name, shard in self.base.names.items() if not name.startswith("expert.")}
        return kept | dict.fromkeys(self.drawn, SINGLE)

    def infos(self, names: Mapping[str, str]) -> dict[str, TensorInfo]:
        dtype = self.config.dtype
        drawn = {
            name: TensorInfo(
                shard=SINGLE, dtype=_DTYPES[dtype], shape=shape, offset=0, nbytes=math.prod(shape) * dtype.itemsize
            )
            for name, shape in self.drawn.items()
            if name in names
        }
        return self.base.infos({name: shard for name, shard in names.items() if name not in drawn}) | drawn

    def shapes(self, *prefixes: str) -> dict[str, tuple[int, ...]]:
        kept = {name: shape for name, shape in self.base.shapes(*prefixes).items() if name in self.names}
        return kept | {name: shape for name, shape in self.drawn.items() if name.startswith(prefixes)}

    def read(self, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        yield from self.base.read({name: shard for name, shard in names.items() if name not in self.drawn})
        std = float(expert_config(self).initializer_range)
        for name in sorted(names.keys() & self.drawn.keys()):
            width = std if name.startswith("expert.") else _PROJECTION_STD
            yield name, draw(name, self.drawn[name], self.spec.seed, width).to(self.config.dtype)

    def fingerprint(self, *prefixes: str, under: str = "") -> str:
        if prefixes != EXPERT_PARTS:
            return self.base.fingerprint(*prefixes, under=under)
        content = [self.spec.to_json(), sorted(self.drawn.items())]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def draw(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """Initial values of a tensor, float32, by seed and name alone.

    As the public code has them: linear layers normal with this standard deviation and no bias, norms 1.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    return std * torch.randn(shape, generator=randomness.generator("expert", seed, name))


def begun_with(base: Checkpoint, state: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a run began with, by the run's state: `base`, or that with a new expert in it."""
    spec = state.get("new_expert")
    return base if spec is None else NewExpert(base, ExpertSpec(**{**spec, "layer_map": tuple(spec["layer_map"])}))

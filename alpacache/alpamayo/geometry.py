"""Sizes of a model, as far as plans depend on them.

The weights are gated, so whoever has no access yet must be able to plan too: a family's `Released` needs no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

HEAD_TENSORS = ("action_in_proj.", "action_out_proj.", "expert.norm.")
"""Names under which `--trainable head` trains."""
EXPERT_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last parts of the names of the expert's linear layers, which adapters go on."""
EXPERT_PARTS = ("expert.", "action_in_proj.", "action_out_proj.")
"""Names under which the weights of expert and projections lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Sizes that a model's cache and its training depend on."""

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    """Channels of a key or value."""
    vlm_hidden: int
    """Channels of the VLM's hidden states."""
    vlm_parameters: int
    expert_shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors of expert and projections, by name in the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """Sizes of a family's public checkpoint."""

    geometry: Geometry
    text_tokens: int
    """Tokens of the direct prompt, all but the images and their two markers each."""
    question_tokens: int
    """Tokens of the reasoning prompt behind the history."""
    patch: int
    """Pixels along a side of an image patch."""
    merge: int
    """Patches along a side that become one image token."""
    min_pixels: int
    max_pixels: int

    @property
    def pixels(self) -> dict[str, int]:
        """Arguments of `image_tokens`."""
        return {name: getattr(self, name) for name in ("patch", "merge", "min_pixels", "max_pixels")}


def expert_shapes(
    *, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, projection: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an expert and its projections, by R1's names.

    Args:
        projection: channels of the MLP that reads 3 x 20 Fourier features.
    """
    queries, keys = heads * head_dim, kv_heads * head_dim
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    trunk = {
        **{"0.weight": (projection, 60), "0.bias": (projection,), "2.weight": (projection,)},
        **{"3.weight": (projection, projection), "3.bias": (projection,), "5.weight": (projection,)},
        **{"6.weight": (hidden, projection), "6.bias": (hidden,)},
    }
    return {
        **{f"expert.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in layer.items()},
        **{f"action_in_proj.encoder.trunk.{name}": shape for name, shape in trunk.items()},
        "expert.norm.weight": (hidden,),
        "action_in_proj.norm.weight": (hidden,),
        "action_in_proj.norm.bias": (hidden,),
        "action_out_proj.weight": (2, hidden),
        "action_out_proj.bias": (2,),
    }

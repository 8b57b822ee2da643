"""Sizes of a model, as far as plans depend on them: from a checkpoint's configs and headers, or the released ones.

The weights are gated, so whoever has no access yet must be able to plan too: `RELEASED` needs no file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from alpacache.alpamayo.backbone import vlm_config
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.errors import CheckpointError

HEAD_TENSORS = ("action_in_proj.", "action_out_proj.", "expert.norm.")
EXPERT_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


EXPERT_PARTS = ("expert.", "action_in_proj.", "action_out_proj.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What a model's cache and its training depend on."""

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    """Of keys and values."""
    vlm_hidden: int
    vlm_parameters: int
    expert_shapes: Mapping[str, tuple[int, ...]]
    """Of expert and projections, by name in the checkpoint."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Geometry":
        """From configs and safetensors headers; no weight is read. Raises `CheckpointError` without a VLM."""
        text = vlm_config(checkpoint).text_config
        home, prefix = checkpoint.vlm_home
        vlm = home.shapes(prefix) if prefix else home.shapes("model.", "lm_head.")
        if not vlm:
            raise CheckpointError(f"{home.model} has no tensor of a VLM; pass a complete checkpoint.")
        return cls(
            model=checkpoint.model,
            layers=text.num_hidden_layers,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vlm_hidden=text.hidden_size,
            vlm_parameters=sum(map(math.prod, vlm.values())),
            expert_shapes=checkpoint.shapes(*EXPERT_PARTS),
        )


def _released_shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, queries, keys = 2048, 8256, 16 * 128, 8 * 128
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {f"expert.layers.{number}.{name}.weight": shape for number in range(36) for name, shape in layer.items()}
    trunk = {"0.weight": (512, 60), "0.bias": (512,), "2.weight": (512,), "3.weight": (512, 512), "3.bias": (512,)}
    trunk |= {"5.weight": (512,), "6.weight": (hidden, 512), "6.bias": (hidden,)}
    shapes |= {f"action_in_proj.encoder.trunk.{name}": shape for name, shape in trunk.items()}
    return shapes | {
        "expert.norm.weight": (hidden,),
        "action_in_proj.norm.weight": (hidden,),
        "action_in_proj.norm.bias": (hidden,),
        "action_out_proj.weight": (2, hidden),
        "action_out_proj.bias": (2,),
    }


RELEASED = Geometry(
    model="released geometry (Alpamayo-R1-10B)",
    layers=36,
    kv_heads=8,
    head_dim=128,
    vlm_hidden=4096,
    vlm_parameters=8_800_000_000,
    expert_shapes=_released_shapes(),
)
"""Of `nvidia/Alpamayo-R1-10B`; the VLM's parameters are the public card's 8.2 and 0.6 billion."""

RELEASED_TEXT_TOKENS = 81
"""Of R1's direct prompt, all but images (counted with its tokenizer: 809 tokens for one camera's four images)."""
RELEASED_QUESTION_TOKENS = 24
"""Of its reasoning prompt, behind the history (13 more than the direct prompt has there: 822 tokens against 809)."""
RELEASED_PIXELS = {"patch": 16, "merge": 2, "min_pixels": 163_840, "max_pixels": 196_608}

"""A family of Alpamayo models as the rest of the project sees it, and the settings and sizes of one checkpoint.

A family is one `Family` in a module of its own, listed in `families.FAMILIES`. Nothing outside those modules asks which
family a checkpoint belongs to: it asks the family's description.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alpacache.alpamayo.prompt import PromptFormat
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import HISTORY_STEPS

HEAD_TENSORS = ("action_in_proj.", "action_out_proj.", "expert.norm.")
"""Names under which `--trainable head` trains."""
EXPERT_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last parts of the names of the expert's linear layers, which adapters go on."""
EXPERT_PARTS = ("expert.", "action_in_proj.", "action_out_proj.")
"""Names under which the weights of expert and projections lie, behind `Family.expert_prefix`."""
OWN_PARTS = (*EXPERT_PARTS, "action_space.")
"""The same with the constants of the action space, where weights hold them: all that stage two reads."""
SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        *("prompt_start", "prompt_end", "image_start", "image_pre_tkn", "image_end"),
        *("traj_history_start", "traj_history_pre_tkn", "traj_history_end", "cot_start", "cot_end"),
        *("meta_action_start", "meta_action_end", "traj_future_start", "traj_future_pre_tkn", "traj_future_end"),
        *("traj_history", "traj_future", "vectorized_wm", "vectorized_wm_start", "vectorized_wm_end"),
        *("vectorized_wm_pre_tkn", "route_start", "route_pad", "route_end"),
        *("question_start", "question_end", "answer_start", "answer_end"),
    )
)
"""R1's names, in the order in which their ids follow the trajectory tokens. 1.5 renames nine at unchanged ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryTokens:
    """The ego history as tokens of the prompt: the bins that the displacements between poses fall into."""

    first_id: int
    """Token id of the first bin."""
    bins: int
    low: tuple[float, ...]
    """Lower edge (m) of x, y and z; what lies below is clamped."""
    high: tuple[float, ...]
    from_origin: bool = True
    """True if the first pose's displacement from zero comes before those between poses."""

    @property
    def count(self) -> int:
        """Tokens of a history."""
        return 3 * (HISTORY_STEPS - 1 + self.from_origin)

    def encode(self, history_xyz: NDArray[np.float32]) -> NDArray[np.int64]:
        """Ids `[count]` of the displacements of the history `[16, 3]` (m, ego frame at t0), x, y, z for each step.

        Bins are rounded half to even.
        """
        poses = history_xyz.astype(np.float32)
        steps = np.diff(np.vstack([np.zeros((int(self.from_origin), 3), np.float32), poses]), axis=0)
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        bins = np.round((steps - low) / (high - low) * np.float32(self.bins - 1))
        ids: NDArray[np.int64] = np.clip(bins, 0, self.bins - 1).astype(np.int64).reshape(-1)
        return ids + self.first_id


@dataclass(frozen=True, slots=True, kw_only=True)
class VLMSizes:
    """Sizes of the VLM that the memory of stage one depends on."""

    layer_parameters: int
    """Parameters of one text layer."""
    tower_parameters: int
    """Parameters of the vision tower."""
    embedding_parameters: int
    """Parameters of the embedding table; the vocabulary head has as many."""
    intermediate: int
    query_width: int
    """Channels of all queries of a token."""
    vision_hidden: int
    vision_intermediate: int
    merged: int
    """Patches of an image token."""
    deepstack: int
    """Text layers that get features of the tower's inner blocks."""


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
    vlm: VLMSizes
    expert_shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors of expert and projections, by name in the checkpoint."""

    def parameters_run(self, layers: int | None) -> int:
        """The VLM's parameters without the text layers behind the first `layers`; None: all."""
        left_out = 0 if layers is None else self.layers - layers
        return self.vlm_parameters - left_out * self.vlm.layer_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """Sizes of a family's public checkpoint, for plans by those who have no access to the gated weights yet."""

    geometry: Geometry
    text_tokens: int
    """Tokens of the direct prompt, all but the images and what stands before each of them."""
    answer_tokens: int
    """Tokens of the direct prompt behind the history."""
    question_tokens: int
    """Tokens of the reasoning prompt behind the history."""
    camera_tokens: tuple[int, ...] = (0,) * len(CAMERAS)
    """Tokens of each camera's title, by its index."""
    frame_tokens: int = 0
    """Tokens of the number before an image."""
    pixels: Mapping[str, int]
    """Arguments of `image_tokens`."""

    def direct_tokens(self, cameras: Sequence[str], *, frames: int, image_tokens: int) -> int:
        """Length of the direct prompt with images of so many tokens, two markers each."""
        titles = sum(self.camera_tokens[CAMERAS.index(camera)] for camera in cameras)
        return self.text_tokens + titles + len(cameras) * frames * (image_tokens + 2 + self.frame_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpamayoConfig:
    """Settings from a checkpoint's `config.json`, in the same form for every family."""

    raw: Mapping[str, Any]
    """The file as it is."""
    family: "Family"
    """The family that the file names; `recognition` tells which one the checkpoint is of."""
    dtype: torch.dtype
    """bfloat16 or float32: constants absent from the weights are rounded to it."""
    vlm_name_or_path: str | None = None
    """Hub id or path of the VLM's own config and tokenizer; a path may be relative to the checkpoint. None: they are
    the checkpoint's."""
    vlm: Mapping[str, Any] | None = None
    """The VLM's own config; None where it is a file of its own."""
    vocab_size: int
    traj_vocab_size: int
    """Trajectory tokens, of history and future together."""
    traj_token_start: int
    """Id of `<i0>`, the first of them."""
    traj_token_ids: Mapping[str, int]
    """Ids of `history`, `future`, and their `_start` and `_end`."""
    min_pixels: int
    """Smallest area of an image that the VLM sees; smaller ones are enlarged."""
    max_pixels: int
    history: HistoryTokens
    action_space: UnicycleActionSpace
    """Action space with the constants of the config, not rounded."""
    action_in_proj: Mapping[str, Any]
    """Arguments of `ActionInProjection`."""
    expert_text: Mapping[str, Any] | None = None
    """All settings of the expert's text model; None: the VLM's."""
    expert_overrides: Mapping[str, Any]
    """Settings of the expert's text model that differ from these."""
    never_sampled: tuple[range, ...]
    """Token ids that no reasoning rollout has."""
    turn_end: int | None = None
    """Id of `<|im_end|>`, where the family's config says it."""

    @property
    def sha256(self) -> str:
        """Hash of the config's meaning (keys sorted), part of a store's identity."""
        return hashlib.sha256(json.dumps(self.raw, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Everything in which one family of models differs from the others."""

    name: str
    """Common name: `r1`, `1.5`, `2`."""
    package: str
    """First part of the `_target_` names in `config.json`, by which the file's schema is chosen; also its
    `model_type`."""
    architecture: str
    """The class that the public code loads, in `architectures`."""
    read_config: Callable[["Family", Mapping[str, Any], Path], AlpamayoConfig]
    """Checks a parsed `config.json` of this family against its schema; the path is for errors."""
    prompt: PromptFormat
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS
    """Added behind the trajectory tokens, in the order of their ids."""
    own_tokens: tuple[str, ...] = ()
    """Special tokens whose names stand in tokenizer files of this family alone."""
    stores_constants: bool
    """True if a checkpoint's weights hold the projection's frequencies and the action space's constants."""
    nested: bool = False
    """True if `config.json` holds the VLM's and the expert's whole configs, and the VLM's other files lie beside it."""
    expert_block: tuple[str, ...] = ("expert_cfg",)
    """Keys in `config.json` that lead to the settings of the expert's text model."""
    expert_prefix: str = ""
    """What a checkpoint's files put before the names of the tensors of expert and projections."""
    rounds_target: bool = True
    """True if the public training rounds the velocity to learn to the dtype of the one predicted."""
    released: Released | None = None
    """None where no plan is made without a checkpoint."""


def released_expert_shapes(*, layers: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a released expert and its projections, without its model class; a test compares the two.

    All of them have 16 query heads over 8 KV heads of 128 channels, and a projection of 512.
    """
    head_dim, projection = 128, 512
    queries, keys = 16 * head_dim, 8 * head_dim
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
        **dict.fromkeys(("expert.norm.weight", "action_in_proj.norm.weight", "action_in_proj.norm.bias"), (hidden,)),
        "action_out_proj.weight": (2, hidden),
        "action_out_proj.bias": (2,),
    }

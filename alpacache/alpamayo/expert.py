"""Stage two's model: the action expert, its two projections and its action space.

The expert is transformers' Qwen3-VL text model, unmodified. The prefix KV comes first, then the 64 action tokens, which
see all of the prefix and (by default) each other in both directions. Layer i attends to the keys and values of layer
`layer_map[i]` of the VLM: of the released models to layer i, of an expert of one's own size to any.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3VLTextConfig, Qwen3VLTextModel

from alpacache.alpamayo.backbone import (
    additive_mask,
    cache_argument,
    check_finite,
    described_by,
    expert_config,
    layer_map_of,
    load_module,
)
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.prefix_attention import PREFIX_ATTENTION, Prefix, PrefixCall
from alpacache.alpamayo.projection import ActionInProjection
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.errors import CheckpointError
from alpacache.finite import is_finite
from alpacache.prefix.packed import PackedPrefixes, pack
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures

_ATTENTIONS = (PREFIX_ATTENTION, "sdpa", "eager")
SPACE_CONSTANTS = ("accel_mean", "accel_std", "curvature_mean", "curvature_std")


class ActionExpert(nn.Module):
    """`(noisy action, t, prefix) -> velocity`. Parameter names are the checkpoint's state-dict keys."""

    def __init__(
        self,
        expert: Qwen3VLTextModel,
        action_in_proj: ActionInProjection,
        action_out_proj: nn.Linear,
        action_space: UnicycleActionSpace,
        layer_map: Sequence[int] | None = None,
        *,
        rounds_target: bool = True,
    ) -> None:
        """
        Args:
            layer_map: the VLM's layer that each layer attends to; None: that of the same number.
            rounds_target: whether training rounds the velocity to learn to this model's dtype.
        """
        super().__init__()
        self.rounds_target = rounds_target
        self.expert = expert
        self.layer_map = tuple(range(len(expert.layers)) if layer_map is None else layer_map)
        self.prefix_layers = tuple(sorted(set(self.layer_map)))
        """The VLM's layers that a `Prefix` for this expert holds, in this order."""
        for layer, attended in zip(expert.layers, self.layer_map, strict=True):
            layer.self_attn.prefix_layer = self.prefix_layers.index(attended)
        self.action_in_proj, self.action_out_proj = action_in_proj, action_out_proj
        self.action_space = action_space

    @property
    def dtype(self) -> torch.dtype:
        return self.action_out_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.action_out_proj.weight.device

    def batch(self, prefixes: Sequence[PrefixFeatures | EncodedPrefix]) -> PackedPrefixes:
        """Pack prefixes on the expert's device; reuse the result for several velocities of the same samples.

        They may have more of the VLM's layers than the expert attends to.
        """
        attended = [prefix.of_layers(self.prefix_layers) for prefix in prefixes]
        return pack(attended, device=self.device, dtype=self.dtype)

    def velocity(
        self,
        noisy_action: Tensor,
        t: Tensor,
        prefixes: Sequence[PrefixFeatures | EncodedPrefix] | Prefix,
        causal: bool = False,
    ) -> Tensor:
        """Velocity of the flow at noisy actions.

        Args:
            noisy_action: `[B, K, 64, 2]`, K noise draws of each of B samples, normalised actions.
            t: `[B, K]`; 0 is noise, 1 is data.
            prefixes: B prefixes of any lengths, or the result of `batch`, or another `Prefix` of `prefix_layers`.
            causal: let an action token see only itself and earlier ones; for parity with the public training step
                under transformers 4.57 with sdpa or eager attention (FlashAttention 2 and transformers 5 are not
                causal). Inference and the default here are not causal.

        Returns `[B, K, 64, 2]`, in the dtype of the output projection (bfloat16 under autocast).
        """
        batch = self.batch(prefixes) if isinstance(prefixes, Sequence) else prefixes
        samples, draws, tokens = noisy_action.shape[:3]
        if samples != batch.lengths.shape[0] or t.shape != (samples, draws):
            raise ValueError(
                f"noisy_action {list(noisy_action.shape)}, t {list(t.shape)} and {batch.lengths.shape[0]} prefixes "
                "disagree; expected [B, K, 64, 2], [B, K] and B prefixes."
            )
        if isinstance(batch, PackedPrefixes) and batch.layout.layers != len(self.prefix_layers):
            raise ValueError(
                f"the prefixes have {batch.layout.layers} layers; the expert attends to {len(self.prefix_layers)}, "
                f"which are {list(self.prefix_layers)} of the VLM's."
            )
        device = self.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            embeds = self.action_in_proj(noisy_action.to(device).flatten(0, 1), t.to(device).flatten())
            starts = batch.starts.repeat_interleave(draws)
            positions = (torch.arange(tokens, device=device) + starts[:, None]).expand(3, -1, -1)
            attended = self._attended(batch, draws, tokens, causal=causal, dtype=embeds.dtype)
            output = self.expert(inputs_embeds=embeds, position_ids=positions, **attended)
            velocity: Tensor = self.action_out_proj(output.last_hidden_state)
        return velocity.view(samples, draws, tokens, 2)

    def _attended(self, batch: Prefix, draws: int, tokens: int, *, causal: bool, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments that tell the text model of the prefix: our attention's, or stock attention's cache and mask."""
        if self.expert.config._attn_implementation == PREFIX_ATTENTION:
            return {"prefix_call": PrefixCall(prefix=batch, causal=causal), "use_cache": False}
        cache = DynamicCache()  # each sample's prefix, once per draw
        for layer, attended in enumerate(self.layer_map):
            keys, values = batch.layer(self.prefix_layers.index(attended))
            cache.update(keys.repeat_interleave(draws, 0), values.repeat_interleave(draws, 0), layer)
        valid = torch.arange(keys.shape[2], device=self.device) < batch.lengths[:, None]
        valid = valid.repeat_interleave(draws, 0)[:, None, None].expand(-1, 1, tokens, -1)
        own = torch.ones(tokens, tokens, dtype=torch.bool, device=self.device)
        own = (own.tril() if causal else own).expand(*valid.shape[:2], -1, -1)
        mask = additive_mask(torch.cat([valid, own], dim=-1), dtype)
        return {"attention_mask": mask, cache_argument(self.expert): cache, "use_cache": True}


def load_expert(
    model: str | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = PREFIX_ATTENTION,
) -> ActionExpert:
    """Load `expert.*`, the action projections and the action space of a checkpoint; the VLM is never touched.

    Args:
        model: directory or hub id in the public layout.
        dtype: of the parameters; None means the checkpoint's. Constants keep the checkpoint's rounding either way.
        attention: "prefix" attends to the prefix where it lies; "sdpa" and "eager" are transformers' own over a
            concatenated cache, the reference that it is tested against.

    Raises `CheckpointError` listing every missing, unexpected or misshapen tensor.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(str(model))
    if attention not in _ATTENTIONS:
        raise ValueError(f"attention is {attention!r}; expected one of {', '.join(_ATTENTIONS)}.")
    config = expert_config(checkpoint)
    config._attn_implementation = attention
    rounded_to = checkpoint.config.dtype
    files = described_by(checkpoint)
    load = partial(load_module, checkpoint, described_by=files, dtype=dtype or rounded_to, device=torch.device(device))

    text_model, in_projection, out_projection = expert_modules(checkpoint, config)
    return ActionExpert(
        load("expert.", text_model),
        load("action_in_proj.", in_projection),
        load("action_out_proj.", out_projection),
        action_space(checkpoint),
        layer_map_of(checkpoint),
        rounds_target=checkpoint.config.family.rounds_target,
    )


def expert_modules(
    checkpoint: Checkpoint, config: Qwen3VLTextConfig
) -> tuple[Callable[[], Qwen3VLTextModel], Callable[[], ActionInProjection], Callable[[], nn.Linear]]:
    """What makes the expert of this config and its two projections, weights aside: the modules of `EXPERT_PARTS`."""

    def text_model() -> Qwen3VLTextModel:
        model = Qwen3VLTextModel(config)
        del model.embed_tokens
        return model

    def in_projection() -> ActionInProjection:
        settings, stored = checkpoint.config.action_in_proj, "action_in_proj.sinus.0.freqs" in checkpoint.names
        rounded_to = checkpoint.config.dtype
        return ActionInProjection(config.hidden_size, **settings, rounded_to=rounded_to, persistent_constants=stored)

    return text_model, in_projection, lambda: nn.Linear(config.hidden_size, 2)


def action_space(checkpoint: Checkpoint) -> UnicycleActionSpace:
    """A checkpoint's action space.

    Constants come from the weights, which override the config; where they are absent, from the config, rounded.
    """
    config, names = checkpoint.config, checkpoint.with_prefix("action_space.")
    space = config.action_space
    constants: dict[str, Any]
    if names:
        if lost := [name for name in SPACE_CONSTANTS if f"action_space.{name}" not in names]:
            raise CheckpointError(f"{checkpoint.model} lacks {', '.join('action_space.' + name for name in lost)}.")
        if wrong := [name for name, info in checkpoint.infos(names).items() if math.prod(info.shape) != 1]:
            raise CheckpointError(f"{checkpoint.model}: {', '.join(wrong)} must be single numbers.")
        stored = dict(checkpoint.read(names))
        check_finite(checkpoint, {name: is_finite(tensor) for name, tensor in stored.items()})
        constants = {name: float(stored[f"action_space.{name}"]) for name in SPACE_CONSTANTS}
    else:
        constants = {name: float(torch.tensor(getattr(space, name)).to(config.dtype)) for name in SPACE_CONSTANTS}
    return replace(space, **constants)

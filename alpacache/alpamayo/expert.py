"""Stage two's model: the action expert, its two projections and its action space.

The expert is transformers' Qwen3-VL text model as it is; what is ours is the order of things around it: prefix KV
first, then the 64 action tokens, which see all of the prefix and (by default) each other in both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3VLTextModel

from alpacache.action_space import UnicycleActionSpace
from alpacache.alpamayo.backbone import empty_weights, expert_config
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.prefix import PrefixFeatures
from alpacache.alpamayo.projection import ActionInProjection
from alpacache.errors import CheckpointError

_CONSTANTS = ("accel_mean", "accel_std", "curvature_mean", "curvature_std")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixBatch:
    """Ragged prefixes padded on the right to one length, on the expert's device and in its dtype."""

    keys: Tensor
    """`[layers, B, kv_heads, T, head_dim]`, zeros beyond each sample's length."""
    values: Tensor
    lengths: Tensor
    """`[B]` int64."""
    starts: Tensor
    """`[B]` int64 position of each sample's first action token."""


class ActionExpert(nn.Module):
    """`(noisy action, t, prefix) -> velocity`. Parameter names are the checkpoint's state-dict keys."""

    def __init__(
        self,
        expert: Qwen3VLTextModel,
        action_in_proj: ActionInProjection,
        action_out_proj: nn.Linear,
        action_space: UnicycleActionSpace,
    ) -> None:
        super().__init__()
        self.expert = expert
        self.action_in_proj = action_in_proj
        self.action_out_proj = action_out_proj
        self.action_space = action_space

    @property
    def dtype(self) -> torch.dtype:
        return self.action_out_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.action_out_proj.weight.device

    def batch(self, prefixes: Sequence[PrefixFeatures]) -> PrefixBatch:
        """Pad prefixes into one batch; reuse it for several velocities of the same samples."""
        longest = max(prefix.prefix_len for prefix in prefixes)
        first = prefixes[0].keys
        shape = (first.shape[0], len(prefixes), first.shape[1], longest, first.shape[3])
        keys = torch.zeros(shape, device=self.device, dtype=self.dtype)
        values = torch.zeros_like(keys)
        for row, prefix in enumerate(prefixes):
            keys[:, row, :, : prefix.prefix_len] = prefix.keys
            values[:, row, :, : prefix.prefix_len] = prefix.values
        return PrefixBatch(
            keys=keys,
            values=values,
            lengths=torch.tensor([prefix.prefix_len for prefix in prefixes], device=self.device),
            starts=torch.tensor([prefix.start_position for prefix in prefixes], device=self.device),
        )

    def velocity(
        self, noisy_action: Tensor, t: Tensor, prefixes: Sequence[PrefixFeatures] | PrefixBatch, causal: bool = False
    ) -> Tensor:
        """Velocity of the flow at noisy actions.

        Args:
            noisy_action: `[B, K, 64, 2]`, K noise draws of each of B samples, normalised actions.
            t: `[B, K]`; 0 is noise, 1 is data.
            prefixes: B prefixes of any lengths, or what `batch` made of them.
            causal: let an action token see only itself and earlier ones; for parity with the public training step
                run with sdpa. Inference and the default here are not causal.

        Returns `[B, K, 64, 2]`, in the dtype of the output projection (bfloat16 under autocast).
        """
        batch = prefixes if isinstance(prefixes, PrefixBatch) else self.batch(prefixes)
        samples, draws, tokens = noisy_action.shape[:3]
        if samples != batch.lengths.shape[0] or t.shape != (samples, draws):
            raise ValueError(
                f"noisy_action {list(noisy_action.shape)}, t {list(t.shape)} and {batch.lengths.shape[0]} prefixes "
                "disagree; expected [B, K, 64, 2], [B, K] and B prefixes."
            )
        device = self.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            embeds = self.action_in_proj(noisy_action.to(device).flatten(0, 1), t.to(device).flatten())
            starts = batch.starts.repeat_interleave(draws)
            positions = (torch.arange(tokens, device=device) + starts[:, None]).expand(3, -1, -1)
            output = self.expert(
                inputs_embeds=embeds,
                position_ids=positions,
                attention_mask=_mask(batch, draws, tokens, causal=causal, dtype=embeds.dtype),
                past_key_values=_cache(batch, draws),
                use_cache=True,
            )
            velocity: Tensor = self.action_out_proj(output.last_hidden_state)
        return velocity.view(samples, draws, tokens, 2)


def load_expert(
    model: str | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> ActionExpert:
    """Load `expert.*`, the action projections and the action space of a checkpoint; the VLM is never touched.

    Args:
        model: directory or hub id in the public layout.
        dtype: of the parameters; None means the checkpoint's. Constants keep the checkpoint's rounding either way.

    Raises `CheckpointError` listing every missing, unexpected or misshapen tensor.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(str(model))
    config = expert_config(checkpoint)
    config._attn_implementation = attention
    rounded_to = getattr(torch, checkpoint.config.dtype)
    block = checkpoint.config.section("action_in_proj_cfg")
    checkpoint.config.section("action_out_proj_cfg")
    with empty_weights(dtype or rounded_to, torch.device(device)):
        expert = Qwen3VLTextModel(config)
        del expert.embed_tokens
        in_proj = ActionInProjection(
            config.hidden_size,
            **{
                key: block[key]
                for key in ("hidden_size", "num_fourier_feats", "max_freq", "num_enc_layers")
                if key in block
            },
            rounded_to=rounded_to,
            persistent_constants="action_in_proj.sinus.0.freqs" in checkpoint.names,
        )
        out_proj = nn.Linear(config.hidden_size, 2)
    result = ActionExpert(expert, in_proj, out_proj, _action_space(checkpoint, rounded_to))
    for name, part in (("expert.", expert), ("action_in_proj.", in_proj), ("action_out_proj.", out_proj)):
        checkpoint.fill(part, name)
    return result


def _action_space(checkpoint: Checkpoint, rounded_to: torch.dtype) -> UnicycleActionSpace:
    """Constants from the weights (they override the config); where they are absent, the config's, rounded."""
    stored = dict(checkpoint.read(checkpoint.with_prefix("action_space.")))
    if stored:
        lost = [name for name in _CONSTANTS if f"action_space.{name}" not in stored]
        if lost:
            raise CheckpointError(f"{checkpoint.model} lacks {', '.join('action_space.' + name for name in lost)}.")
        return checkpoint.config.action_space({name: float(stored[f"action_space.{name}"]) for name in _CONSTANTS})
    block = checkpoint.config.section("action_space_cfg")
    return checkpoint.config.action_space(
        {name: float(torch.tensor(block[name]).to(rounded_to)) for name in _CONSTANTS}
    )


def _cache(batch: PrefixBatch, draws: int) -> DynamicCache:
    """Each sample's prefix, once per draw, as the cache the text model appends to."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        cache.update(keys.repeat_interleave(draws, 0), values.repeat_interleave(draws, 0), layer)
    return cache


def _mask(batch: PrefixBatch, draws: int, tokens: int, *, causal: bool, dtype: torch.dtype) -> Tensor:
    """Additive mask `[B K, 1, tokens, T + tokens]`: 0 where attention is allowed."""
    longest = batch.keys.shape[3]
    valid = torch.arange(longest, device=batch.lengths.device) < batch.lengths[:, None]
    valid = valid.repeat_interleave(draws, 0)[:, None, None].expand(-1, 1, tokens, -1)
    own = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device)
    own = own.tril() if causal else own
    allowed = torch.cat([valid, own.expand(*valid.shape[:2], -1, -1)], dim=-1)
    return torch.zeros(allowed.shape, dtype=dtype, device=valid.device).masked_fill(~allowed, torch.finfo(dtype).min)

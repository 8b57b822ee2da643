"""What the frozen VLM leaves behind for one sample: the prefix that the action expert attends to."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixFeatures:
    """The VLM's KV cache of one sample, after rotary embedding, and its last hidden state.

    Cut right after `<|traj_future_start|>` where the prompt contains it. No batch axis and no padding: ragged batches
    are made by whoever attends.
    """

    keys: Tensor
    """`[layers, kv_heads, prefix_len, head_dim]`."""
    values: Tensor
    """`[layers, kv_heads, prefix_len, head_dim]`."""
    hidden: Tensor | None
    """`[prefix_len, vlm_hidden]` after the final norm; None where it was not kept."""
    rope_delta: int
    """M-RoPE position of a text token minus its index."""
    prefix_len: int
    start_position: int
    """Position of the first action token. Usually `rope_delta + prefix_len`, but a field of its own: a reasoning
    rollout that never emits `<|traj_future_start|>` counts one token more than its KV holds."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PrefixFeatures":
        """The same prefix elsewhere; dtype conversion applies to keys, values and hidden."""
        return PrefixFeatures(
            keys=self.keys.to(device, dtype),
            values=self.values.to(device, dtype),
            hidden=None if self.hidden is None else self.hidden.to(device, dtype),
            rope_delta=self.rope_delta,
            prefix_len=self.prefix_len,
            start_position=self.start_position,
        )

"""What the frozen VLM leaves behind for one sample: the prefix that the action expert attends to.

A store may hold it quantised. Such a prefix stays encoded for as long as it can, so that the small form is what lies in
RAM and crosses the bus.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.prefix.codecs import tensor_codec
from cache_store import KVCodec


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

    def with_tail(self, stem_len: int, tail: "Tail") -> "PrefixFeatures":
        """The prefix of this one's first `stem_len` tokens and another tail, without hidden states."""
        keys, values = (
            torch.cat([mine[:, :, :stem_len], theirs.to(mine)], dim=2)
            for mine, theirs in ((self.keys, tail.keys), (self.values, tail.values))
        )
        return PrefixFeatures(
            keys=keys,
            values=values,
            hidden=None,
            rope_delta=self.rope_delta,
            prefix_len=keys.shape[2],
            start_position=tail.start_position,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What follows the stem in one reasoning rollout: the question, and the text that the VLM generated."""

    keys: Tensor
    """`[layers, kv_heads, N, head_dim]`."""
    values: Tensor
    """`[layers, kv_heads, N, head_dim]`."""
    token_ids: NDArray[np.int64]
    """`[N]`, up to and including `<|traj_future_start|>`; `[N + 1]` where that never came, or as the last token."""
    start_position: int
    """Position of the first action token: rope delta + stem length + all of `token_ids`."""
    text: str
    """The generated part of the tokens, for people: bytes that are no text, and NUL, are U+FFFD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrefix:
    """A prefix as a quantising codec stored it; carries no hidden state."""

    data: Tensor
    """Encoded keys and values, uint8, flat."""
    codec: KVCodec
    shape: tuple[int, ...]
    """`(layers, 2, kv_heads, prefix_len, head_dim)` of the decoded keys and values."""
    rope_delta: int
    prefix_len: int
    start_position: int

    def to(self, device: torch.device | str) -> "EncodedPrefix":
        """The same prefix elsewhere, still encoded."""
        return replace(self, data=self.data.to(device))

    def decode(self) -> PrefixFeatures:
        """Keys and values in bfloat16, on the device where the encoded bytes are."""
        kv = tensor_codec(self.codec).decode(self.data, self.shape)
        return PrefixFeatures(
            keys=kv[:, 0],
            values=kv[:, 1],
            hidden=None,
            rope_delta=self.rope_delta,
            prefix_len=self.prefix_len,
            start_position=self.start_position,
        )

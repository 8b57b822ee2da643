"""The prefix of one sample: the frozen VLM's keys and values, which the action expert attends to.

A store may hold it quantised. Such a prefix stays encoded as long as possible, so that the small form is what lies in
RAM and crosses the bus.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache.prefix.codecs import tensor_codec
from cache_store import KVCodec
from cache_store.kv.layered import LayeredCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixFeatures:
    """The VLM's KV cache of one sample, after rotary embedding, and its last hidden state.

    Cut right after `<|traj_future_start|>` where the prompt contains it. No batch axis and no padding: `packed` makes
    ragged batches.
    """

    keys: Tensor
    """`[layers, kv_heads, prefix_len, head_dim]`."""
    values: Tensor
    """`[layers, kv_heads, prefix_len, head_dim]`."""
    hidden: Tensor | None
    """`[prefix_len, vlm_hidden]` after the final norm; None if it was not kept."""
    rope_delta: int
    """M-RoPE position of a text token minus its index."""
    prefix_len: int
    start_position: int
    """Position of the first action token: usually `rope_delta + prefix_len`, but one more for a reasoning rollout that
    never emits `<|traj_future_start|>`, as its last token has no KV."""
    positions: Tensor | None = None
    """`[3, prefix_len]` M-RoPE positions, on the CPU; None where they are not known."""
    layers: tuple[int, ...] | None = None
    """The VLM's layers that keys and values are of; None: all, from the first."""

    def of_layers(self, layers: Sequence[int]) -> "PrefixFeatures":
        """Keys and values of these of the VLM's layers alone. Raises `ValueError` for one that this prefix lacks."""
        places = layer_places(layers, self.layers, self.keys.shape[0])
        if places is None:
            return self
        return replace(self, keys=self.keys[places], values=self.values[places], layers=tuple(layers))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PrefixFeatures":
        """This prefix on another device, keys, values and hidden in another dtype."""
        hidden = None if self.hidden is None else self.hidden.to(device, dtype)
        return replace(self, keys=self.keys.to(device, dtype), values=self.values.to(device, dtype), hidden=hidden)

    def with_tail(self, stem_len: int, tail: "Tail") -> "PrefixFeatures":
        """The first `stem_len` tokens of this prefix, followed by another tail; without hidden states."""
        keys, values = (
            torch.cat([mine[:, :, :stem_len], theirs.to(mine)], dim=2)
            for mine, theirs in ((self.keys, tail.keys), (self.values, tail.values))
        )
        return replace(
            self,
            keys=keys,
            values=values,
            hidden=None,
            prefix_len=keys.shape[2],
            start_position=tail.start_position,
            positions=None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What follows the stem: of a reasoning rollout the question and the text that the VLM generated, of a sample with
    a route the direct prompt's end with another one."""

    keys: Tensor
    """`[layers, kv_heads, N, head_dim]`."""
    values: Tensor
    """`[layers, kv_heads, N, head_dim]`."""
    token_ids: NDArray[np.int64]
    """`[N]`, up to and including `<|traj_future_start|>`; `[N + 1]` if that never came, or came as the last token."""
    start_position: int
    """Position of the first action token: rope delta + stem length + all of `token_ids`."""
    text: str
    """The generated tokens as text, for people; NUL and bytes that are no UTF-8 are U+FFFD. Or the other route."""

    @property
    def positions(self) -> Tensor:
        """`[3, N]` M-RoPE positions: text, one after the other on all axes."""
        first = self.start_position - len(self.token_ids)
        return torch.arange(first, first + self.keys.shape[2]).expand(3, -1)

    def of_layers(self, layers: Sequence[int]) -> "Tail":
        """The tail with keys and values of these layers alone, of one that has them of all."""
        places = list(layers)
        return replace(self, keys=self.keys[places], values=self.values[places])


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrefix:
    """A prefix in the bytes of a codec, without hidden states."""

    data: Tensor
    """Encoded keys and values, uint8, flat."""
    codec: KVCodec
    shape: tuple[int, ...]
    """Shape `(layers, 2, kv_heads, prefix_len, head_dim)` of the decoded keys and values."""
    rope_delta: int
    prefix_len: int
    start_position: int
    layers: tuple[int, ...] | None = None
    """The VLM's layers that are held, as in `PrefixFeatures`."""

    def of_layers(self, layers: Sequence[int]) -> "PrefixFeatures | EncodedPrefix":
        """Keys and values of these of the VLM's layers alone, still encoded where the codec goes layer by layer.

        Raises `ValueError` for one that this prefix lacks.
        """
        places = layer_places(layers, self.layers, self.shape[0])
        if places is None:
            return self
        if not isinstance(self.codec, LayeredCodec):
            return self.decode().of_layers(layers)
        starts = self.codec.layer_starts(self.shape)
        data = torch.cat([self.data[starts[place] : starts[place + 1]] for place in places])
        shape, codec = (len(places), *self.shape[1:]), self.codec.of_layers(places)
        return replace(self, data=data, codec=codec, shape=shape, layers=tuple(layers))

    def to(self, device: torch.device | str) -> "EncodedPrefix":
        """This prefix on another device, still encoded."""
        return replace(self, data=self.data.to(device))

    def decode(self) -> PrefixFeatures:
        """Keys and values in bfloat16, on the device of the encoded bytes."""
        kv = tensor_codec(self.codec).decode(self.data, self.shape)
        return PrefixFeatures(
            keys=kv[:, 0],
            values=kv[:, 1],
            hidden=None,
            rope_delta=self.rope_delta,
            prefix_len=self.prefix_len,
            start_position=self.start_position,
            layers=self.layers,
        )


def layer_places(wanted: Sequence[int], held: Sequence[int] | None, count: int) -> list[int] | None:
    """Places of the wanted layers among those `held` (None: the first `count`); None where they are just these.

    Raises `ValueError` for a layer that is not there.
    """
    there = list(range(count)) if held is None else list(held)
    if list(wanted) == there:
        return None
    if lost := sorted(set(wanted) - set(there)):
        raise ValueError(f"the prefix has no keys and values of layers {lost}; it has those of {there}.")
    return [there.index(layer) for layer in wanted]

"""Where the bytes of one encoded prefix lie."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from alpacache.prefix import codecs
from cache_store import KVCodec

LEAST_DECODED = 2
"""Decoded layers that there is room for: while one is attended to, another is decoded."""


@dataclass(frozen=True, kw_only=True)
class PrefixLayout:
    """What one row of bytes means, given the number of its tokens."""

    layers: int
    kv_heads: int
    head_dim: int
    codec: KVCodec | None
    """None: plain elements, `[layer, 2, kv_head, token, channel]`."""
    dtype: torch.dtype = torch.bfloat16
    """Of plain elements."""

    def shape(self, tokens: int) -> tuple[int, ...]:
        """`[layer, 2, kv_head, token, channel]` of a sample's keys and values."""
        return (self.layers, 2, self.kv_heads, tokens, self.head_dim)

    def size_bytes(self, tokens: int) -> int:
        """Bytes of a sample of so many tokens."""
        if self.codec is None:
            return self.layers * 2 * self.kv_heads * tokens * self.head_dim * self.dtype.itemsize
        return self.codec.encoded_bytes(self.shape(tokens))

    def row_bytes(self, tokens: int) -> int:
        """Bytes of a row that takes so many tokens: aligned, and kernels may read whole words at its end."""
        size = self.size_bytes(tokens) + 8
        return size + -size % 256

    def layer_start(self, layer: int, tokens: int) -> int:
        """Where a layer's bytes begin."""
        if self.codec is None:
            return layer * (self.size_bytes(tokens) // self.layers)
        return sum(sum(self.codec.layer_bytes(before, self.shape(tokens))) for before in range(layer))

    @cached_property
    def starts(self) -> list[tuple[int, int, int]]:
        """Where each layer begins, as (a, b, c) of `a + b * tokens + c * key groups`, for kernels that know both."""
        return [self._linear(partial(self.layer_start, layer)) for layer in range(self.layers)]

    def key_bytes(self, layer: int) -> tuple[int, int, int]:
        """Bytes of a layer's keys, in the same form."""
        codec = self.codec
        if codec is None:
            return 0, 0, self.kv_heads * self.head_dim * self.dtype.itemsize
        return self._linear(lambda tokens: codec.layer_bytes(layer, self.shape(tokens))[0])

    def _linear(self, size: Callable[[int], int]) -> tuple[int, int, int]:
        group = 1 if self.codec is None else self.codec.key_group
        # One group of 1 and of 2 tokens, then 2 groups: three points of a plane.
        one, two, more = (size(tokens) for tokens in (1, 2, group + 1))
        per_token = two - one if group > 1 else 0
        per_group = more - one - group * per_token
        return one - per_token - per_group, per_token, per_group

    def decode(self, row: Tensor, layer: int, tokens: int) -> Tensor:
        """`[2, kv_head, token, channel]` of one layer of a sample, from its row of bytes."""
        begin, end = self.layer_start(layer, tokens), self.layer_start(layer + 1, tokens)
        if self.codec is None:
            return row[begin:end].view(self.dtype).view(self.shape(tokens)[1:])
        return codecs.decode_layer(self.codec, layer, row[begin:end], self.shape(tokens))

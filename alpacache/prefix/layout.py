"""Meaning of the bytes of one packed prefix, and places of its decoded layers."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.tensor_codec import TensorCodec
from cache_store import KVCodec

LEAST_DECODED = 2
"""Decoded layers that there is room for: while one is attended to, another is decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailRoom:
    """Lengths that rows have room for where tails of reasoning rollouts may come in place of the direct one."""

    stored: int
    """Tokens of the longest prefix as it is stored: stem and direct tail."""
    tail: int
    """Tokens of the longest rollout's tail."""

    @property
    def longest(self) -> int:
        """More tokens than any stem with any tail has, by one or more, as the direct tail is not in it."""
        return self.stored + self.tail


@dataclass(frozen=True, kw_only=True)
class PrefixLayout:
    """Layout of one row of bytes, given its number of tokens."""

    layers: int
    kv_heads: int
    head_dim: int
    codec: KVCodec | None
    """Codec of the rows; None: plain elements, `[layer, 2, kv_head, token, channel]`."""
    dtype: torch.dtype = torch.bfloat16
    """Dtype of plain elements."""
    most_bytes: int | None = None
    """Bytes of the largest sample that comes, where the codec has no fixed size; None: not known."""

    @cached_property
    def tensor_codec(self) -> TensorCodec[Any]:
        """The codec in torch, for rows that have one."""
        assert self.codec is not None
        return tensor_codec(self.codec)

    @property
    def is_heavy(self) -> bool:
        """True if rows have a codec whose decoding is many times the work of reading (`KVCodec.heavy`)."""
        return self.codec is not None and self.codec.heavy

    def shape(self, tokens: int) -> tuple[int, ...]:
        """`[layer, 2, kv_head, token, channel]` of a sample's keys and values."""
        return (self.layers, 2, self.kv_heads, tokens, self.head_dim)

    def size_bytes(self, tokens: int) -> int:
        """Bytes of a sample of so many tokens; the most, where the codec has no fixed size."""
        if self.codec is None:
            return math.prod(self.shape(tokens)) * self.dtype.itemsize
        most = self.codec.encoded_bytes(self.shape(tokens))
        return most if self.codec.fixed_size or self.most_bytes is None else min(most, self.most_bytes)

    def can_be(self, size_bytes: int, tokens: int) -> bool:
        """Tell whether a sample of so many tokens can have so many bytes."""
        if self.codec is None or self.codec.fixed_size:
            return size_bytes == self.size_bytes(tokens)
        return self.codec.least_bytes(self.shape(tokens)) <= size_bytes <= self.size_bytes(tokens)

    def row_bytes(self, tokens: int) -> int:
        """Bytes of a row that takes so many tokens: aligned, with room for kernels to read whole words at its end."""
        size = self.size_bytes(tokens) + 8
        return size + -size % 256

    def row_sizes(self, longest: int, tails: TailRoom | None) -> tuple[int, int]:
        """Bytes of a row for up to `longest` tokens, and of the row beside it where tails stay apart, as encoded.

        Plain elements are joined in the row itself.
        """
        if tails is None or self.codec is None:
            return self.row_bytes(longest), 0
        return self.row_bytes(tails.stored), self.row_bytes(tails.tail)

    def read_bytes(self, longest: int, tails: TailRoom | None) -> int:
        """Bytes of a host buffer that takes all that is read of a sample's keys and values."""
        if tails is None:
            return self.row_bytes(longest)
        return self.row_bytes(tails.stored) + self.row_bytes(tails.tail)

    def decode(self, row: Tensor, layer: int, tokens: int) -> Tensor:
        """`[2, kv_head, token, channel]` of one layer of a sample, from its row of bytes."""
        if self.codec is not None:
            return self.tensor_codec.decode_layer(row, layer, self.shape(tokens))
        size = self.size_bytes(tokens) // self.layers
        return row[layer * size : (layer + 1) * size].view(self.dtype).view(self.shape(tokens)[1:])

    @property
    def is_ordered(self) -> bool:
        """True if decoded keys have their channels in an order of each head's own."""
        return self.codec is not None and self.tensor_codec.is_ordered(self.head_dim)

    def scratch_shape(self, samples: int, longest: int) -> tuple[int, int]:
        """Rows and bytes of the scratch memory for layers that are decoded together, of samples up to `longest` tokens.

        What `TensorCodec.decode_batch` writes there: the layers, and behind them the orders of their key channels.
        """
        row = self.order_at(longest, self.tensor_codec.layers_together)
        return samples, row + -row % 256

    def order_at(self, longest: int, index: int = 0) -> int:
        """Byte of a row of scratch at which the order `[kv_head, channel]` of its layer `index` begins."""
        decoded = self.tensor_codec.layers_together * math.prod(self.shape(longest)[1:]) * torch.bfloat16.itemsize
        return decoded + index * self.kv_heads * self.head_dim

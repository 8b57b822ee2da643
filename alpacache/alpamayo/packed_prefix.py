"""Prefixes of a batch as they are stored: one sample's bytes a row, keys and values still encoded where they were.

A row is what a store holds of a sample, so that filling one is a single copy; its first bytes count, the rest is
whatever was there before. A batch picks rows by number: a ring of rows can be filled for the next batch while this one
is read, at addresses that never change, which is what a captured CUDA graph needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache import codecs
from alpacache.alpamayo.prefix import EncodedPrefix, PrefixFeatures
from cache_store import KVCodec

if TYPE_CHECKING:
    from alpacache.alpamayo.prefix_decoding import LayersAhead  # needs Triton


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


@dataclass(frozen=True, kw_only=True)
class PackedPrefixes:
    """The prefixes of B samples, of any lengths."""

    layout: PrefixLayout
    data: Tensor
    """`[rows, row_bytes]` uint8."""
    rows: Tensor
    """`[B]` int64: each sample's row."""
    lengths: Tensor
    """`[B]` int64 tokens, each at least 1."""
    starts: Tensor
    """`[B]` int64 position of each sample's first action token."""
    longest: int
    """No length is above it. Known on the host, so that no kernel launch waits for the device."""
    dtype: torch.dtype
    """What `layer` returns: the expert's."""
    ahead: "LayersAhead | None" = None
    """What decodes this batch's layers ahead and keeps those it has room for; None decodes a layer when it is used."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, kv_heads, longest, head_dim]` of one layer, zeros beyond each sample's length.

        The reference: it waits for the device. The kernels read the rows themselves.
        """
        shape = (2, len(self.rows), self.layout.kv_heads, self.longest, self.layout.head_dim)
        padded = torch.zeros(shape, dtype=self.dtype, device=self.data.device)
        for place, (row, tokens) in enumerate(zip(self.rows.tolist(), self.lengths.tolist(), strict=True)):
            padded[:, place, :, :tokens] = self.layout.decode(self.data[row], index, tokens)
        return padded[0], padded[1]


def pack(
    prefixes: Sequence[PrefixFeatures | EncodedPrefix], *, device: torch.device, dtype: torch.dtype
) -> PackedPrefixes:
    """Prefixes of any lengths as one batch on a device, for an expert of this dtype.

    They stay encoded if all have one codec; a float32 prefix for a bfloat16 expert is rounded.
    """
    layout = _layout(prefixes, dtype)
    lengths = [prefix.prefix_len for prefix in prefixes]
    data = torch.empty(len(prefixes), layout.row_bytes(max(lengths)), dtype=torch.uint8, device=device)
    for row, prefix in zip(data, prefixes, strict=True):
        row[: layout.size_bytes(prefix.prefix_len)] = _row_bytes(prefix, layout).to(device)
    return PackedPrefixes(
        layout=layout,
        data=data,
        rows=torch.arange(len(prefixes), device=device),
        lengths=torch.tensor(lengths, device=device),
        starts=torch.tensor([prefix.start_position for prefix in prefixes], device=device),
        longest=max(lengths),
        dtype=dtype,
    )


def _layout(prefixes: Sequence[PrefixFeatures | EncodedPrefix], dtype: torch.dtype) -> PrefixLayout:
    first = prefixes[0]
    codec = None
    if isinstance(first, EncodedPrefix):
        layers, _, kv_heads, _, head_dim = first.shape
        if all(isinstance(prefix, EncodedPrefix) and prefix.codec == first.codec for prefix in prefixes):
            codec = first.codec
    else:
        layers, kv_heads, _, head_dim = first.keys.shape
    lossless = all(isinstance(p, EncodedPrefix) or p.keys.dtype == torch.bfloat16 for p in prefixes)
    plain = torch.bfloat16 if lossless else dtype
    return PrefixLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, codec=codec, dtype=plain)


def _row_bytes(prefix: PrefixFeatures | EncodedPrefix, layout: PrefixLayout) -> Tensor:
    if isinstance(prefix, EncodedPrefix):
        if layout.codec is not None:
            return prefix.data
        prefix = prefix.decode()
    if prefix.keys.shape[0] != layout.layers or prefix.keys.shape[1::2] != (layout.kv_heads, layout.head_dim):
        raise ValueError(
            f"prefix keys are {list(prefix.keys.shape)}; expected [{layout.layers}, {layout.kv_heads}, T, "
            f"{layout.head_dim}] as of the first prefix of the batch."
        )
    kv = torch.stack([prefix.keys, prefix.values], dim=1).to(layout.dtype)
    return kv.flatten().view(torch.uint8)

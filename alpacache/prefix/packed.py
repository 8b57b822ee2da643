"""Prefixes of a batch as they are stored: one sample's bytes a row, keys and values still encoded if they were.

A row is what a store holds of a sample, so that filling one is a single copy; behind the sample's bytes is whatever was
there before. A batch picks rows by number: a ring of rows can be filled for the next batch while this one
is read, at addresses that never change, which is what a captured CUDA graph needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures

if TYPE_CHECKING:
    from alpacache.prefix.layers_ahead import LayersAhead


@dataclass(frozen=True, kw_only=True)
class PackedTails:
    """Encoded tails of reasoning rollouts, which take the place of the direct ones in the prefixes of B samples."""

    data: Tensor
    """`[rows, row_bytes]` uint8; a sample's tail has the row that its prefix has."""
    stored: Tensor
    """`[B]` int64: tokens that each sample's own row holds, stem and direct tail."""
    stems: Tensor
    """`[B]` int64: how many of these are attended to: all of them where a sample keeps its direct tail."""
    lengths: Tensor
    """`[B]` int64: tokens of each tail, 0 where a sample keeps its direct one."""
    longest: int
    """Upper bound of `lengths`."""


@dataclass(frozen=True, kw_only=True)
class PackedPrefixes:
    """The prefixes of B samples, of any lengths."""

    layout: PrefixLayout
    data: Tensor
    """`[rows, row_bytes]` uint8."""
    rows: Tensor
    """`[B]` int64: each sample's row."""
    lengths: Tensor
    """`[B]` int64 tokens, each at least 1; with a tail those of stem and tail."""
    starts: Tensor
    """`[B]` int64 position of each sample's first action token."""
    longest: int
    """Upper bound of the lengths, known on the host, so that no kernel launch waits for the device. With `tails` it is
    no less than what is stored and above all lengths: tokens beyond a tail have a place too."""
    dtype: torch.dtype
    """Dtype of what `layer` returns: the expert's."""
    ahead: "LayersAhead | None" = None
    """Decodes this batch's layers ahead and keeps those it has room for; None: a layer is decoded when it is used."""
    tails: PackedTails | None = None
    """Tails of rollouts for some or all of these samples; only of encoded rows."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, kv_heads, longest, head_dim]` of one layer, zeros beyond each sample's length.

        The reference, which waits for the device; the kernels read the rows themselves.
        """
        shape = (2, len(self.rows), self.layout.kv_heads, self.longest, self.layout.head_dim)
        padded = torch.zeros(shape, dtype=self.dtype, device=self.data.device)
        places = zip(self.rows.tolist(), self.lengths.tolist(), strict=True)
        if self.tails is None:
            for place, (row, tokens) in enumerate(places):
                padded[:, place, :, :tokens] = self.layout.decode(self.data[row], index, tokens)
            return padded[0], padded[1]
        lengths = zip(self.tails.stored.tolist(), self.tails.stems.tolist(), strict=True)
        for place, ((row, tokens), (stored, stem)) in enumerate(zip(places, lengths, strict=True)):
            padded[:, place, :, :stem] = self.layout.decode(self.data[row], index, stored)[:, :, :stem]
            if tokens > stem:
                tail = self.layout.decode(self.tails.data[row], index, tokens - stem)
                padded[:, place, :, stem:tokens] = tail
        return padded[0], padded[1]


@dataclass(frozen=True, kw_only=True)
class NoPrefix:
    """No prefix for any of B samples: action tokens attend to each other alone. What an expert does blind."""

    starts: Tensor
    """`[B]` int64 position of each sample's first action token."""

    @property
    def lengths(self) -> Tensor:
        """`[B]` int64 zeros."""
        return torch.zeros_like(self.starts)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """There are no keys and values. Raises `ValueError`."""
        raise ValueError("there is no prefix; attention other than the project's own needs one.")


def pack(
    prefixes: Sequence[PrefixFeatures | EncodedPrefix], *, device: torch.device, dtype: torch.dtype
) -> PackedPrefixes:
    """Prefixes of any lengths as one batch on a device, for an expert of this dtype.

    They stay encoded if all share a codec; a float32 prefix for a bfloat16 expert is rounded.
    """
    first = prefixes[0]
    layers, _, kv_heads, _, head_dim = first.shape if isinstance(first, EncodedPrefix) else first.keys[:, None].shape
    codecs = {prefix.codec if isinstance(prefix, EncodedPrefix) else None for prefix in prefixes}
    codec = codecs.pop() if len(codecs) == 1 else None
    lossless = all(isinstance(p, EncodedPrefix) or p.keys.dtype == torch.bfloat16 for p in prefixes)
    plain = torch.bfloat16 if lossless else dtype
    layout = PrefixLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, codec=codec, dtype=plain)
    lengths = [prefix.prefix_len for prefix in prefixes]
    data = torch.empty(len(prefixes), layout.row_bytes(max(lengths)), dtype=torch.uint8, device=device)
    for row, prefix in zip(data, prefixes, strict=True):
        encoded = _row_bytes(prefix, layout)
        row[: len(encoded)] = encoded.to(device)
    return PackedPrefixes(
        layout=layout,
        data=data,
        rows=torch.arange(len(prefixes), device=device),
        lengths=torch.tensor(lengths, device=device),
        starts=torch.tensor([prefix.start_position for prefix in prefixes], device=device),
        longest=max(lengths),
        dtype=dtype,
    )


def _row_bytes(prefix: PrefixFeatures | EncodedPrefix, layout: PrefixLayout) -> Tensor:
    if isinstance(prefix, EncodedPrefix):
        if layout.codec is not None:
            return prefix.data
        prefix = prefix.decode()
    if prefix.keys.shape[0] != layout.layers or prefix.keys.shape[1::2] != (layout.kv_heads, layout.head_dim):
        raise ValueError(
            f"prefix keys are {list(prefix.keys.shape)}; expected [{layout.layers}, {layout.kv_heads}, T, "
            f"{layout.head_dim}] like the first prefix of the batch."
        )
    kv = torch.stack([prefix.keys, prefix.values], dim=1).to(layout.dtype)
    return kv.flatten().view(torch.uint8)

"""The torch side of `LayeredCodec`: many layers are encoded at a time, and one is decoded at a time."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from alpacache.gpu.device import has_kernels
from alpacache.prefix import codec_passes
from alpacache.prefix.tensor_codec import TensorCodec
from cache_store.kv.layered import MAX_VALUE, LayeredCodec, Part, Segment, scale_table

Layered = TypeVar("Layered", bound=LayeredCodec)
_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16}


class SegmentedRows:
    """The bytes of keys or values of several layers that have the same segments, `[layers, bytes]`."""

    def __init__(self, segments: list[Segment], data: Tensor) -> None:
        self._segments, self._data = {segment.name: segment for segment in segments}, data

    def bytes_of(self, name: str) -> Tensor:
        """Place of a segment in each layer's row, `[layers, bytes]`."""
        segment = self._segments[name]
        return self._data[:, segment.offset : segment.offset + segment.size_bytes]

    def put(self, name: str, array: Tensor) -> None:
        """Store in each layer's row its part of `[layers, ...]`."""
        segment = self._segments[name]
        assert tuple(array.shape[1:]) == segment.shape, name
        self.bytes_of(name).copy_(array.to(_DTYPES[segment.dtype]).contiguous().flatten(1).view(torch.uint8))

    def put_base(self, needed: Tensor) -> Tensor:
        """Store the bases of scales that reach each layer's largest needed one; return their tables `[layers, 256]`.

        These are `base_for` and `scale_table` by the bits of float32, so that the device need not be asked. The
        exponents of all scales are normal; a number that is not has an exponent below the least base.
        """
        largest = needed.flatten(1).amax(1, keepdim=True)
        exponent = (largest.view(torch.int32) >> 23) - 126
        base = torch.where(largest > 0, (exponent - 15).clamp(-100, 112), 0)
        self.put("base", base)
        tables: Tensor = (scales_on(self._data.device, 0).view(torch.int32) + (base << 23)).view(torch.float32)
        return tables

    def get(self, name: str) -> Tensor:
        """A copy of a segment's array, of the only layer."""
        segment = self._segments[name]
        raw = self.bytes_of(name)[0].clone()
        return raw.view(_DTYPES[segment.dtype]).reshape(segment.shape)

    def get_scales(self) -> Tensor:
        """The scales that the segments `base` and `scale` stand for. Waits for the device."""
        return scales_on(self._data.device, int(self.get("base")[0]))[self.get("scale").long()]


class LayeredTensorCodec(TensorCodec[Layered]):
    """Keys and values of a layer into their segments and back."""

    @abstractmethod
    def _encode_part(self, part: Part, layer: int, x: Tensor, out: SegmentedRows, passes: ModuleType) -> None:
        """Fill in all segments of `x`, bfloat16 `[layers, head, token, channel]` of layers like this one."""

    @abstractmethod
    def _decode_part(self, part: Part, layer: int, data: SegmentedRows, shape: tuple[int, ...]) -> Tensor:
        """float32 `[head, token, channel]`, which is `shape`, of one layer."""

    def encode_async(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        kv, passes = kv.to(torch.bfloat16).contiguous(), passes_on(kv.device)
        shape = tuple(kv.shape)
        data = torch.empty(self._codec.encoded_bytes(shape), dtype=torch.uint8, device=kv.device)
        starts = self._codec.layer_starts(shape)
        for first, count in alike(self._codec, shape, passes.AT_ONCE):
            rows = data[starts[first] : starts[first + count]].view(count, -1)
            self._encode_rows(kv[first : first + count], first, rows, passes)
        return data, torch.stack(torch.aminmax(kv)).abs().lt(MAX_VALUE).all()

    def encode_layer(self, kv: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        kv, passes = kv.to(torch.bfloat16).contiguous(), passes_on(kv.device)
        size = sum(self._codec.layer_bytes(layer, tuple(kv.shape)))
        rows = torch.empty(len(kv), size, dtype=torch.uint8, device=kv.device)
        self._encode_rows(kv, layer, rows, passes)
        return rows, torch.stack(torch.aminmax(kv.flatten(1), dim=1)).abs().lt(MAX_VALUE).all(0)

    def _encode_rows(self, kv: Tensor, layer: int, rows: Tensor, passes: ModuleType) -> None:
        """Encode `[rows, 2, head, token, channel]`, all as layer `layer`, into `[rows, bytes]`."""
        for index, (part, where, segments) in enumerate(self._codec.parts(layer, tuple(kv.shape))):
            self._encode_part(part, layer, kv[:, index], SegmentedRows(segments, rows[:, where]), passes)

    def decode_layer(self, data: Tensor, layer: int, shape: tuple[int, ...]) -> Tensor:
        row = data[None, self._codec.layer_starts(shape)[layer] :]
        return torch.stack(
            [
                self._decode_part(part, layer, SegmentedRows(segments, row[:, where]), shape[2:]).to(torch.bfloat16)
                for part, where, segments in self._codec.parts(layer, shape)
            ]
        )


def passes_on(device: torch.device) -> ModuleType:
    """The module whose functions touch every value: `encode_kernels` on a GPU with Triton, else `codec_passes`."""
    if has_kernels(device):
        from alpacache.prefix import encode_kernels

        return encode_kernels
    return codec_passes


def alike(codec: LayeredCodec, shape: tuple[int, ...], at_once: int) -> Iterator[tuple[int, int]]:
    """First layer and number of layers that are encoded at once: of the same bits, and not too many values."""
    most = max(1, at_once // max(1, math.prod(shape[2:])))
    first = 0
    for layer in range(1, shape[0] + 1):
        if layer == shape[0] or layer - first == most or codec.bits_of(layer) != codec.bits_of(first):
            yield first, layer - first
            first = layer


@cache
def scales_on(device: torch.device, base: int) -> Tensor:
    """`scale_table` on a device, float32 `[256]`, for as long as the process lives: captured graphs read it."""
    return torch.from_numpy(np.ascontiguousarray(scale_table(base))).to(device)

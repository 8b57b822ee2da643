"""The affine codecs in torch.

What passes over every value is in `codec_passes`, for GPUs in `encode_kernels`; here is what is done for each group,
or once a layer.
"""

from functools import lru_cache, reduce
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache.prefix import codec_passes
from alpacache.prefix.codec_passes import Groups
from alpacache.prefix.layered import LayeredTensorCodec, SegmentedRows
from cache_store.kv.affine import MAX_ZERO, AffineCodec, planes
from cache_store.kv.layered import Part

if TYPE_CHECKING:
    from alpacache.prefix.packed import PackedPrefixes


class AffineTensorCodec(LayeredTensorCodec[AffineCodec]):
    """Codes that stand for `(code - zero) * scale`."""

    def is_ordered(self, channels: int) -> bool:
        return len(self._codec.key_classes(8, channels)) > 1

    def _encode_part(self, part: Part, layer: int, x: Tensor, out: SegmentedRows, passes: ModuleType) -> None:
        bits = self._codec.bits_of(layer)
        if part == "key":
            self._encode_keys(self._codec.key_classes(bits[0], x.shape[-1]), x, out, passes)
        else:
            self._encode_values(bits[1], x, out, passes)

    def _encode_keys(self, classes: list[tuple[int, int]], x: Tensor, out: SegmentedRows, passes: ModuleType) -> None:
        low, high = passes.key_extremes(x, self._codec.key_group)
        largest, order = torch.maximum(low.abs(), high.abs()), None
        if len(classes) > 1:
            order = torch.argsort(-_weights(passes, x, high - low, largest), dim=-1, stable=True)
            out.put("order", order)
            low, high, largest = (torch.gather(a, -1, order[:, :, None].expand_as(a)) for a in (low, high, largest))
        levels, least = _levels(tuple(classes), x.device), largest / float(MAX_ZERO)
        needed = torch.maximum((high - low) / levels, least)
        groups = Groups(sums=low + high, needed=needed, least=least, levels=levels, table=out.put_base(needed))
        index, zero, codes = passes.fit_keys(x, order, groups, self._codec.key_group)
        out.put("scale", index)
        out.put("zero", zero)
        _put_codes(passes, out, classes, codes)

    def _encode_values(self, bits: int, x: Tensor, out: SegmentedRows, passes: ModuleType) -> None:
        low, high = passes.value_extremes(x, self._codec.value_group_of(x.shape[-1]))
        low, high, levels = low.clamp(max=0), high.clamp(min=0), _levels(((1, bits),), x.device)
        needed = (high - low) / levels
        groups = Groups(sums=low + high, needed=needed, least=None, levels=levels, table=out.put_base(needed))
        index, zero, codes = passes.fit_values(x, groups)
        out.put("scale", index)
        out.put("zero", zero)
        _put_codes(passes, out, [(x.shape[-1], bits)], codes)

    def _decode_part(self, part: Part, layer: int, data: SegmentedRows, shape: tuple[int, ...]) -> Tensor:
        key_bits, value_bits = self._codec.bits_of(layer)
        scale, zero = data.get_scales(), data.get("zero").float()
        if part == "value":
            codes = _get_codes(data, [(shape[2], value_bits)])
            grouped = codes.reshape(*shape[:2], -1, self._codec.value_group_of(shape[2]))
            return ((grouped - zero[..., None]) * scale[..., None]).flatten(2)
        classes = self._codec.key_classes(key_bits, shape[2])
        groups = torch.arange(shape[1], device=zero.device) // self._codec.key_group
        x = (_get_codes(data, classes) - zero[:, groups]) * scale[:, groups]
        if len(classes) == 1:
            return x
        order = data.get("order").long()
        return torch.empty_like(x).scatter_(2, order[:, None].expand_as(x), x)

    def decode_batch(self, prefixes: "PackedPrefixes", layer: int, scratch: Tensor) -> None:
        from alpacache.prefix import decode_kernels  # needs Triton

        decode_kernels.decode_affine(self._codec, prefixes, layer, scratch)


def _weights(passes: ModuleType, x: Tensor, spans: Tensor, largest: Tensor) -> Tensor:
    """Weights of each key channel's errors, float64 `[layer, head, channel]`; see `cache_store.kv.affine`."""
    most = largest.flatten(1).amax(1).clamp(min=2.0**-100)
    energy: Tensor = passes.energy(x, most)
    energy = energy + torch.roll(energy, x.shape[-1] // 2, dims=-1)
    return energy.double() * codec_passes.energy(spans, most).double()


@lru_cache(maxsize=16)
def _levels(classes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Greatest code of each channel, float32."""
    widths = [width for count, width in classes for _ in range(count)]
    return torch.tensor([2.0**width - 1 for width in widths], device=device)


def _put_codes(passes: ModuleType, out: SegmentedRows, classes: list[tuple[int, int]], codes: Tensor) -> None:
    first = 0
    for index, (count, width) in enumerate(classes):
        done = 0
        for plane in planes(width):
            passes.pack(codes, first, count, done, plane, out.bytes_of(f"codes.{index}.{plane}"))
            done += plane
        first += count


def _get_codes(data: SegmentedRows, classes: list[tuple[int, int]]) -> Tensor:
    """float32 `[head, token, channel]` in stored order."""
    codes = []
    for index, (_, width) in enumerate(classes):
        done, shifted = 0, []
        for plane in planes(width):
            packed = data.get(f"codes.{index}.{plane}")
            parts = [(packed >> (i * plane)) & (2**plane - 1) for i in range(8 // plane)]
            shifted.append(torch.stack(parts, -1).flatten(-2).to(torch.int16) << done)
            done += plane
        codes.append(reduce(torch.bitwise_or, shifted).float())
    return torch.cat(codes, -1)

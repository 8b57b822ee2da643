"""The codec `fp8` in torch."""

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache.prefix.codec_passes import scales, search
from alpacache.prefix.layered import LayeredTensorCodec, SegmentedRows
from cache_store.kv.fp8 import Fp8Codec
from cache_store.kv.layered import Part

if TYPE_CHECKING:
    from alpacache.prefix.packed import PackedPrefixes


class Fp8TensorCodec(LayeredTensorCodec[Fp8Codec]):
    """PyTorch's own float8_e4m3fn, scaled by token."""

    def _encode_part(self, part: Part, layer: int, x: Tensor, out: SegmentedRows, passes: ModuleType) -> None:
        needed = x.abs().amax(-1, keepdim=True).float() / 448.0
        table = out.put_base(needed)
        index = search(table, needed)
        out.put("scale", index)
        scaled = (x / scales(table, index)).clamp(-448, 448)
        out.put("codes", scaled.to(torch.float8_e4m3fn).view(torch.uint8))

    def _decode_part(self, part: Part, layer: int, data: SegmentedRows, shape: tuple[int, ...]) -> Tensor:
        return data.get("codes").view(torch.float8_e4m3fn).float() * data.get_scales()

    def decode_batch(self, prefixes: "PackedPrefixes", layer: int, scratch: Tensor) -> None:
        from alpacache.prefix import decode_kernels  # needs Triton

        decode_kernels.decode_fp8(self._codec, prefixes, layer, scratch)

"""The torch counterpart of each kind of codec."""

from functools import lru_cache
from typing import Any

import torch

from alpacache.gpu.device import has_kernels
from alpacache.prefix.affine import AffineTensorCodec
from alpacache.prefix.fp8 import Fp8TensorCodec
from alpacache.prefix.tensor_codec import TensorCodec
from alpacache.prefix.transform import TransformTensorCodec
from cache_store import KVCodec

TENSOR_CODECS: dict[str, type[TensorCodec[Any]]] = {
    "affine": AffineTensorCodec,
    "fp8": Fp8TensorCodec,
    "transform": TransformTensorCodec,
}
"""Kind -> class, for the kinds of `cache_store.kv.registry`."""


@lru_cache(maxsize=64)
def tensor_codec(codec: KVCodec) -> TensorCodec[Any]:
    """Return the torch side of this codec."""
    return TENSOR_CODECS[codec.kind](codec)


def forget_tables(device: torch.device) -> None:
    """Free what is kept of learnt codecs on this device and in RAM; only where no captured graph reads it."""
    tensor_codec.cache_clear()
    if has_kernels(device):
        from alpacache.prefix import transform_kernels

        transform_kernels.forget_tables()

"""The torch counterpart of each kind of codec."""

from functools import lru_cache
from typing import Any

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

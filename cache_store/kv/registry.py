"""The kinds of codecs there are, and the named settings that users choose from."""

from collections.abc import Callable
from typing import Any

from cache_store.errors import FormatError
from cache_store.kv.affine import AffineCodec
from cache_store.kv.codec import KVCodec
from cache_store.kv.fp8 import Fp8Codec
from cache_store.kv.learnt import LearntCodec
from cache_store.kv.transform import TransformCodec

KINDS: dict[str, type[KVCodec]] = {codec.kind: codec for codec in (AffineCodec, Fp8Codec, TransformCodec)}
"""Kind -> the class that reads a document of that kind."""

CODECS: dict[str, KVCodec] = {
    "fp8": Fp8Codec(),
    "int8": AffineCodec(),
    "int5": AffineCodec(key_bits=(5,), value_bits=(5,)),
    "int4": AffineCodec(key_bits=(4,), value_bits=(4,)),
}
"""Codecs that `--codec` takes beside `bf16`, which stores keys and values as they are. The affine ones take just below
8.5, 5.5 and 4.5 bits a value: with key groups of 64 instead of 72, `order` and `base` would come on top of that."""


def codec_named(name: str) -> KVCodec | None:
    """The codec that `--codec` calls so; None for `bf16`. That of `transform:RATE` has no tables yet.

    Raises `ValueError` with what is allowed for any other name.
    """
    if name == "bf16" or name in CODECS:
        return CODECS.get(name)
    found = TransformCodec.named(name)
    if found is None:
        raise ValueError(" or ".join(["bf16", *CODECS, "transform:RATE"]))
    return found


def codec_name(written: str) -> str:
    """The name that stores have of a codec that is called so: `transform:2` for `transform:2.0` too.

    Raises `ValueError` with what is allowed for a name of no codec.
    """
    codec = codec_named(written)
    return codec.name if isinstance(codec, TransformCodec) else written


def codec_from_json(document: Any, where: str, read_tables: Callable[[str], bytes] | None = None) -> KVCodec:
    """The codec of an untrusted document, such as a store's identity holds; `FormatError` names `where` it stands.

    `read_tables` reads the tables of a calibrated codec by their hash; without it such a codec has none.
    """
    kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(f"{where}: a codec is an object with a kind among {', '.join(KINDS)}, got {kind!r}.")
    codec = KINDS[kind].from_json(document, where)
    if isinstance(codec, LearntCodec) and read_tables is not None:
        return codec.with_tables(read_tables, where)
    return codec

"""How tests/data/store_v1 was made. It is never made again: every later version must read these very bytes."""

import sys

import numpy as np

from cache_store import CODECS, CacheWriter, Field


def values(i: int) -> dict[str, object]:
    kv = (0x3F00 + (np.arange(2 * 2 * 1 * (5 + i) * 64).reshape(2, 2, 1, 5 + i, 64) * 37 + i) % 512).astype(np.uint16)
    return {
        "kv": kv,
        "kv_int8": CODECS["int8"].encode(kv),
        "kv_int5": CODECS["int5"].encode(kv),
        "smooth": np.linspace(0, i, 400, dtype=np.float32),
        "n": np.array(5 + i),
        "flags": np.array([True, False, i == 1]),
        "text": f"sample {i}: näher, 前へ",
    }


FIELDS = [
    Field(name="kv", dtype="bfloat16", axes=("layer", "key_value", "head", "token", "channel"), chunk_mb=0.002),
    Field(name="kv_int8", dtype="uint8", axes=("byte",), chunk_mb=0.001),
    Field(name="kv_int5", dtype="uint8", axes=("byte",)),
    Field(name="smooth", dtype="float32", axes=("i",), units="m", compression="zstd"),
    Field(name="n", dtype="int64", layout="packed"),
    Field(name="flags", dtype="bool", axes=("i",), layout="packed"),
    Field(name="text", dtype="str", layout="text"),
]

if __name__ == "__main__":
    with CacheWriter(sys.argv[1], fields=FIELDS, identity={"model": "v1"}, provenance={"made": "once"}) as writer:
        for i in range(2):
            writer.write(f"v1/{i}", values(i))
        writer.quarantine("v1/bad", "kind", "reason", "traceback")

"""A small schema with every layout and dtype family, and a store with two samples of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_store import CacheWriter, Field

IDENTITY = {"model": {"id": "tiny", "revision": "r1"}, "cameras": ["front", "left"], "frames": 4}
PROVENANCE = {"versions": {"zarr": "3"}, "hardware": "a laptop"}


def make_fields() -> list[Field]:
    return [
        Field(
            name="kv",
            dtype="bfloat16",
            axes=("layer", "key_value", "head", "token", "channel"),
            layout="array",
            chunk_mb=0.0005,
        ),
        Field(name="hidden", dtype="float32", axes=("token", "channel"), units="1", layout="array"),
        Field(name="mask", dtype="bool", axes=("token",), layout="packed"),
        Field(name="length", dtype="int64", axes=(), units="token", layout="packed"),
        Field(name="path", dtype="float64", axes=("step", "xyz"), units="m", layout="packed"),
        Field(name="prompt", dtype="str", axes=(), layout="text"),
        Field(name="cameras", dtype="str", axes=("camera",), layout="text"),
        Field(name="tail.a.kv", dtype="uint16", axes=("token",), layout="array", required=False),
        Field(name="note", dtype="str", axes=(), layout="text", required=False),
    ]


def make_sample(seed: int, tokens: int = 7, **extra: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "kv": rng.integers(0, 2**16, (5, 2, 2, tokens, 4)).astype(np.uint16),
        "hidden": rng.standard_normal((tokens, 3), np.float32),
        "mask": rng.integers(0, 2, tokens).astype(bool),
        "length": np.array(tokens, np.int64),
        "path": rng.standard_normal((4, 3)),
        "prompt": "drive on, vorwärts, 前へ",
        "cameras": ["front", "left"],
        **extra,
    }


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same fields, dtypes, shapes and bits."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        array = np.array(value)
        assert got[name].shape == array.shape, name
        if array.dtype.kind == "U":
            assert got[name].dtype.kind == "U"
            assert got[name].tolist() == array.tolist(), name
        else:
            assert got[name].dtype == array.dtype, name
            assert got[name].tobytes() == array.tobytes(), name


class Kit:
    """What tests of a store need besides the store."""

    identity = IDENTITY
    provenance = PROVENANCE
    fields = staticmethod(make_fields)
    sample = staticmethod(make_sample)
    assert_equal = staticmethod(assert_equal)

    @staticmethod
    def writer(path: Path) -> CacheWriter:
        return CacheWriter(path, fields=make_fields(), identity=IDENTITY, provenance=PROVENANCE)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Samples `clip/1@5#0` (7 tokens) and `clip/2@5#0` (11 tokens, with the optional fields)."""
    path = tmp_path / "store"
    with Kit.writer(path) as writer:
        assert writer.write("clip/1@5#0", make_sample(1))
        more = {"tail.a.kv": np.arange(3, dtype=np.uint16), "note": "wet road"}
        assert writer.write("clip/2@5#0", make_sample(2, 11, **more))
    return path

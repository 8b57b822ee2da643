"""Stage one with weights that are not resident: the bytes of the resident way, and what interrupts it."""

import numpy as np
import pytest

import alpacache
from alpacache.extraction.config import ExtractConfig
from alpacache.planning import prefill_plan
from cache_store import CacheReader

HOMES = ("ram", "files")


def config(checkpoint, store, **changes):
    given = {"source": "synthetic:5", "model": str(checkpoint), "store": str(store), "frames": 1, "device": "cpu"}
    return ExtractConfig(**given | {"deterministic": True} | changes)


def contents(store):
    """Every stored array's bytes, by sample and name."""
    reader = CacheReader(store)
    found = {}
    for sample_id in reader.sample_ids:
        for name, value in reader.read(sample_id).items():
            array = np.asarray(value)
            found[sample_id, name] = (array.dtype.str, array.shape, array.tobytes())
    return found


def assert_same_bytes(tmp_path, checkpoint, homes=HOMES, **changes):
    expected = alpacache.extract(config(checkpoint, tmp_path / "gpu", **changes))
    assert expected.memory is None
    for home in homes:
        report = alpacache.extract(config(checkpoint, tmp_path / home, weights=home, **changes))
        assert report.memory.home == home
        assert report.extracted == expected.extracted > 0
        assert contents(tmp_path / home) == contents(tmp_path / "gpu")


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_same_bytes_in_every_codec(codec, tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(prefill_plan, "_MOST_GROUP", 2)  # three groups
    assert_same_bytes(tmp_path, tiny_checkpoint, codec=codec, homes=HOMES if codec == "int8" else ("ram",))

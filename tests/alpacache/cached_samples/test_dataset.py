"""Stores as one indexed set: what may be mixed, how large samples are, and what kind they are."""

import pytest

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.strata import classify
from alpacache.errors import UsageError
from alpacache.extraction.config import ExtractConfig
from cache_store import CODECS

pytestmark = pytest.mark.system  # a whole extraction


@pytest.fixture(scope="module")
def stores(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("dataset")
    common = {"model": str(tiny_checkpoint), "device": "cpu"}
    for name, settings in (
        ("one", {"frames": 1}),
        ("two", {"frames": 2}),
        ("int8", {"frames": 1, "codec": "int8"}),
        ("int4", {"frames": 1, "codec": "int4"}),
    ):
        config = ExtractConfig(source="synthetic:3", store=str(root / name), **common, **settings)
        assert alpacache.extract(config).extracted == 3
    return root


def test_sizes_and_lengths_come_from_the_records(tiny_checkpoint, stores):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    for names in (["one"], ["one", "two"], ["int8"]):
        dataset = CachedDataset([stores / name for name in names], checkpoint)
        prefixes = [dataset.load(index).prefix for index in range(len(dataset))]
        assert dataset.kv_bytes.tolist() == [dataset.layout.size_bytes(prefix.prefix_len) for prefix in prefixes]
        assert dataset.longest == max(prefix.prefix_len for prefix in prefixes)
        assert dataset.layout.codec == (CODECS["int8"] if names == ["int8"] else None)
    assert dataset.locate(2)[0].path == stores / "int8"
    assert dataset.locate(2)[1] == dataset.sample_id(2)


def test_a_data_set_of_no_store_is_refused(tiny_checkpoint):
    with pytest.raises(UsageError, match=r"^stores is empty; expected a directory or s3://"):
        CachedDataset([], Checkpoint(str(tiny_checkpoint)))


def test_stores_of_other_codecs_do_not_mix(tiny_checkpoint, stores):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    with pytest.raises(UsageError, match=r"int8 cannot be mixed with .*one:\n  codec: .*\n") as caught:
        CachedDataset([stores / "one", stores / "int8"], checkpoint)
    assert "extract the other again with the same settings" in str(caught.value)
    with pytest.raises(UsageError, match=r"codec_definition.key_bits"):
        CachedDataset([stores / "int8", stores / "int4"], checkpoint)


def test_turns_are_those_of_the_recorded_paths(tiny_checkpoint, stores):
    dataset = CachedDataset([stores / "one", stores / "two"], Checkpoint(str(tiny_checkpoint)))
    assert dataset.turns == [classify(*dataset.poses(index)).turn for index in range(6)]

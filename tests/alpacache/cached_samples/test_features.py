"""What a store holds of a sample's prefix and tails: written equals read, for every codec."""

import numpy as np
import pytest
import torch

from alpacache.alpamayo import Checkpoint, Tail
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import (
    checked,
    store_fields,
    tail_arrays,
    tail_count,
)
from alpacache.errors import BadClipError, UsageError
from alpacache.prefix.codecs import tensor_codec
from cache_store import CODECS, CacheReader, verify


def kv_of(tail):
    return torch.stack([tail.keys, tail.values], dim=1).to(torch.bfloat16)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_tails_are_read_as_they_were_written(codec, rollout_stores, rollout_samples, tiny_checkpoint):
    store, quantising = rollout_stores[codec], CODECS.get(codec)
    data = CachedDataset([store], Checkpoint(str(tiny_checkpoint)))
    assert data.rollouts == 3
    assert verify(store, deep=True).damaged == ()
    for index, (_, inputs, prefix, tails) in enumerate(rollout_samples):
        sample = data.load(index, tails=3)
        assert sample.stem_len == inputs.stem_len
        for tail, read in zip(tails, sample.tails, strict=True):
            expected = kv_of(tail)
            if quantising is not None:
                shape = tuple(expected.shape)
                expected = tensor_codec(quantising).decode(tensor_codec(quantising).encode(expected), shape)
            assert torch.equal(kv_of(read), expected)
            assert np.array_equal(read.token_ids, tail.token_ids)
            assert (read.start_position, read.text) == (tail.start_position, tail.text)
        stem = prefix.keys[:, :, : inputs.stem_len]
        for joined, tail in zip(sample.rollout_prefixes(), sample.tails, strict=True):
            assert torch.equal(joined.keys[:, :, inputs.stem_len :], tail.keys)
            assert joined.start_position == prefix.rope_delta + inputs.stem_len + len(tail.token_ids)
            assert joined.prefix_len == inputs.stem_len + tail.keys.shape[2]
            if codec == "bf16":
                assert torch.equal(joined.keys[:, :, : inputs.stem_len], stem)
                assert torch.equal(joined.values[:, :, inputs.stem_len :], tail.values)


def test_only_as_many_tails_are_read_as_are_asked_for(rollout_stores, tiny_checkpoint):
    data = CachedDataset([rollout_stores["bf16"]], Checkpoint(str(tiny_checkpoint)))
    assert data.load(0).tails == ()
    assert len(data.load(0, tails=2).tails) == 2
    for tails in (4, -1):
        with pytest.raises(UsageError, match=rf"^tails is {tails}; store .* has 3 reasoning rollouts of each sample"):
            data.load(0, tails=tails)


def test_the_direct_prefix_is_stored_as_without_rollouts(rollout_stores, rollout_samples):
    reader = CacheReader(rollout_stores["bf16"])
    for sample, _, prefix, _ in rollout_samples:
        stored = reader.read(sample.ref.sample_id, ["kv", "prefix_len", "start_position"])
        assert np.array_equal(stored["kv"][:, 0], prefix.keys.view(torch.uint16).numpy())
        assert (stored["prefix_len"], stored["start_position"]) == (prefix.prefix_len, prefix.start_position)


@pytest.mark.parametrize("codec", [None, CODECS["int8"]])
def test_rollouts_only_add_fields(codec):
    plain = store_fields(hidden_states=True, codec=codec)
    more = store_fields(hidden_states=True, codec=codec, rollouts=12)
    assert more[: len(plain)] == plain
    assert tail_count({field.name for field in plain}) == 0
    assert tail_count({field.name for field in more}) == 12
    parts = {"kv", "input_ids", "start_position", "text"} | ({"kv_shape"} if codec else set())
    assert {field.name for field in more[len(plain) :]} == {f"tail.{n}.{part}" for n in range(12) for part in parts}


def test_a_tail_that_cannot_be_quantised_is_the_samples_fault():
    kv = torch.full((2, 2, 5, 32), torch.nan)
    tail = Tail(keys=kv, values=kv, token_ids=np.zeros(5, np.int64), start_position=5, text="")
    with pytest.raises(BadClipError, match="clip@1#0: keys or values have NaN"):
        checked("clip@1#0", tail_arrays([tail], codec=CODECS["int8"]))

"""Which layers are decoded when, and where they are kept."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from alpacache.prefix import layers_ahead
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.layered import SegmentedRows
from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.packed import PackedPrefixes, PackedTails
from cache_store import CODECS


@pytest.mark.parametrize(
    ("places", "order", "expected"),
    [
        # A forward, then each layer's second forward and its backward.
        (2, (0, 1, 2, 3, 3, 3, 2, 2, 1, 1, 0, 0), [0, 1, 2, 3, 1, 0]),
        (3, (0, 1, 2, 3, 3, 2, 1, 0), [0, 1, 2, 3, 0]),
        (4, (0, 1, 2, 3, 3, 2, 1, 0), [0, 1, 2, 3]),
        # Several forwards.
        (2, (0, 1, 2, 3, 0, 1, 2, 3), [0, 1, 2, 3, 0, 1, 2, 3]),
        (4, (0, 1, 2, 3) * 3, [0, 1, 2, 3]),
    ],
)
def test_a_layer_that_is_still_there_is_not_decoded_again(monkeypatch, places, order, expected):
    def decode(prefixes, layer, scratch):
        decoded.append(layer)
        scratch.fill_(layer)

    decoded = []
    monkeypatch.setattr(layers_ahead, "decode", decode)
    layout = PrefixLayout(layers=4, kv_heads=1, head_dim=128, codec=CODECS["int8"])
    prefixes = SimpleNamespace(layout=layout, longest=8)
    memory = layers_ahead.make_places(layout, 1, 8, torch.device("cpu"), layers=places)
    ahead = layers_ahead.LayersAhead(memory, None)
    for layer in order:
        assert ahead.layer(prefixes, layer, then=layer + 1).unique().tolist() == [layer]
    assert decoded == expected


@pytest.mark.parametrize(("places", "expected"), [(4, [(0, 4)]), (3, [0, 1, 2, 3, 0])])
def test_a_heavy_codec_decodes_all_layers_before_the_first_if_there_is_room(monkeypatch, places, expected):
    decoded, layout = [], PrefixLayout(layers=4, kv_heads=1, head_dim=128, codec=CODECS["int8"])
    monkeypatch.setattr(type(layout), "is_heavy", True)
    monkeypatch.setattr(layers_ahead, "decode", lambda prefixes, layer, scratch: decoded.append(layer))
    monkeypatch.setattr(
        layers_ahead, "decode_groups", lambda prefixes, layer, scratch: decoded.append((layer, len(scratch)))
    )
    prefixes = SimpleNamespace(layout=layout, longest=8)
    memory = layers_ahead.make_places(layout, 1, 8, torch.device("cpu"), layers=places)
    ahead = layers_ahead.LayersAhead(memory, None)
    for layer in (0, 1, 2, 3, 3, 2, 1, 0):
        assert ahead.layer(prefixes, layer, then=layer + 1).data_ptr() == memory[layer % places].data_ptr()
    assert decoded == expected


def test_layers_that_are_encoded_together_are_decoded_together(monkeypatch):
    """A forward and its backward through five layers in groups of two."""
    layout = PrefixLayout(layers=5, kv_heads=1, head_dim=128, codec=CODECS["int8"])
    monkeypatch.setattr(type(tensor_codec(layout.codec)), "layers_together", 2)
    assert [layout.order_at(8), layout.order_at(8, 1)] == [2 * 4 * 8 * 128, 2 * 4 * 8 * 128 + 128]
    assert layout.scratch_shape(1, 8) == (1, 2 * 4 * 8 * 128 + 2 * 128)
    decoded = []
    monkeypatch.setattr(layers_ahead, "decode", lambda prefixes, layer, scratch: decoded.append(layer))
    memory = layers_ahead.make_places(layout, 1, 8, torch.device("cpu"), layers=2)
    assert len(memory) == 2
    ahead = layers_ahead.LayersAhead(memory, None)
    places = []
    for layer in (0, 1, 2, 3, 4, 4, 3, 2, 1, 0):
        got = ahead.layer(SimpleNamespace(layout=layout, longest=8), layer, then=-1)
        places.append(int(got.data_ptr() != memory.data_ptr()))
    assert decoded == [0, 2, 4, 1]
    assert places == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]


def decode_batch_as_kernels_do(codec, prefixes, layer, scratch):
    """Stands in for the kernels: keys in stored order, that order behind the values, nothing beyond the tokens."""
    layout = prefixes.layout
    order_at = layout.order_at(prefixes.longest)
    for place, (row, tokens) in enumerate(zip(prefixes.rows.tolist(), prefixes.lengths.tolist(), strict=True)):
        if tokens == 0:
            continue
        data, shape = prefixes.data[row], layout.shape(tokens)
        decoded = layout.decode(data, layer, tokens)
        if layout.is_ordered:
            _, where, segments = layout.codec.parts(layer, shape)[0]
            begin = layout.codec.layer_starts(shape)[layer]
            order = SegmentedRows(segments, data[None, begin:][:, where]).get("order")
            decoded[0] = decoded[0].gather(2, order.long()[:, None].expand_as(decoded[0]))
            scratch[place, order_at : order_at + order.numel()] = order.flatten()
        view = scratch[place, :order_at].view(torch.bfloat16).view(layout.shape(prefixes.longest)[1:])
        view[:, :, :tokens] = decoded


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_tails_lie_behind_their_stems_with_keys_in_the_order_of_the_stem(name, monkeypatch):
    """Beside prefixes of their own and beside one another, of several lengths, one of them up to the last place."""
    codec, dim, heads = CODECS[name], 64, 2
    layout = PrefixLayout(layers=3, kv_heads=heads, head_dim=dim, codec=codec)
    monkeypatch.setattr(type(layout.tensor_codec), "decode_batch", decode_batch_as_kernels_do)
    stored, stems, lengths, longest = [70, 33, 75], [64, 33, 70], [20, 0, 11], 85

    def encoded(tokens, room):
        kv = torch.randn(3, 2, heads, tokens, dim, generator=source) * torch.rand(1, 2, heads, 1, dim, generator=source)
        row = torch.zeros(layout.row_bytes(room), dtype=torch.uint8)
        data = layout.tensor_codec.encode(kv.bfloat16())
        row[: len(data)] = data
        return row

    source = torch.Generator().manual_seed(0)
    data = torch.stack([encoded(tokens, 75) for tokens in stored])
    tail_data = torch.stack([encoded(max(1, tokens), 20) for tokens in lengths])
    tails = PackedTails(
        data=tail_data,
        stored=torch.tensor(stored),
        stems=torch.tensor(stems),
        lengths=torch.tensor(lengths),
        longest=20,
    )
    whole = [stem + tail for stem, tail in zip(stems, lengths, strict=True)]
    assert max(whole) < longest
    prefixes = PackedPrefixes(
        layout=layout,
        data=data,
        rows=torch.arange(3),
        lengths=torch.tensor(whole),
        starts=torch.tensor(whole),
        longest=longest,
        dtype=torch.bfloat16,
        tails=tails,
    )
    order_at, rows = layout.order_at(longest), layout.scratch_shape(3, longest)
    several = [torch.full(rows, 255, dtype=torch.uint8) for _ in range(3)]
    layers_ahead.decode_groups(prefixes, 0, several)
    for layer in range(3):
        one = layers_ahead.decode(prefixes, layer, torch.full(rows, 255, dtype=torch.uint8))
        expected = torch.stack(prefixes.layer(layer), dim=1)
        for (place, tokens), scratch in itertools.product(enumerate(whole), (one, several[layer])):
            got = scratch[place, :order_at].view(torch.bfloat16).view(2, heads, longest, dim)[:, :, :tokens].clone()
            if layout.is_ordered:
                order = scratch[place, order_at : order_at + heads * dim].view(heads, 1, dim).long()
                assert not torch.equal(order[0], order[1])
                got[0] = torch.empty_like(got[0]).scatter_(2, order.expand_as(got[0]), got[0].clone())
            assert torch.equal(got, expected[place, :, :, :tokens])

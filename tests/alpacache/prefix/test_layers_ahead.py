"""Which layers are decoded when, and where they are kept."""

from types import SimpleNamespace

import pytest
import torch

from alpacache.prefix import layers_ahead
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.layout import PrefixLayout
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

"""Layers of keys and values that are decoded ahead of the attention that reads them, on a stream of their own."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alpacache.prefix.layout import LEAST_DECODED, PrefixLayout
from alpacache.prefix.packed import PackedPrefixes, PackedTails


def make_places(layout: PrefixLayout, samples: int, longest: int, device: torch.device, *, layers: int) -> Tensor:
    """Memory of `LayersAhead` for so many decoded layers of batches of at most so many samples."""
    places = max(LEAST_DECODED, -(-layers // layout.tensor_codec.layers_together))
    return torch.empty(places, *layout.scratch_shape(samples, longest), dtype=torch.uint8, device=device)


def decode(prefixes: PackedPrefixes, layer: int, scratch: Tensor | None = None) -> Tensor:
    """Rows of `PrefixLayout.scratch_shape` with a layer of every sample decoded; allocated if None."""
    if scratch is None:
        scratch = prefixes.data.new_empty(prefixes.layout.scratch_shape(len(prefixes.rows), prefixes.longest))
    decode_groups(prefixes, layer, [scratch])
    return scratch


def decode_groups(prefixes: PackedPrefixes, layer: int, scratch: Sequence[Tensor]) -> None:
    """Decode a layer, those encoded with it, and as many such groups behind them as there is scratch for, into it."""
    codec, tails = prefixes.layout.tensor_codec, prefixes.tails
    stored = prefixes if tails is None else replace(prefixes, lengths=tails.stored, tails=None)
    codec.decode_batches(stored, layer, scratch)
    if tails is not None:
        for place, one in enumerate(scratch):
            _put_tails(prefixes, tails, layer + place * codec.layers_together, one)


def _put_tails(prefixes: PackedPrefixes, tails: PackedTails, layer: int, scratch: Tensor) -> None:
    """Decode the tails of a layer, and put them behind their stems in rows of scratch that hold what is stored.

    Nothing waits for the device or depends on lengths but by tensors, so that a graph can hold it.
    """
    layout = prefixes.layout
    apart = replace(prefixes, data=tails.data, lengths=tails.lengths, longest=tails.longest, tails=None, ahead=None)
    decoded = decode(apart, layer)
    keys, values = _layers(decoded, layout, tails.longest).unbind(2)
    if layout.is_ordered:  # as the stem's: the queries of a sample have one order
        wanted, order = _orders(scratch, layout, prefixes.longest), _orders(decoded, layout, tails.longest)
        order = order.clamp(max=layout.head_dim - 1)  # where there is no tail it is anything
        channels = torch.arange(layout.head_dim, device=scratch.device).expand_as(order)
        place_of = torch.zeros_like(order).scatter_(-1, order, channels)
        keys = keys.gather(-1, place_of.gather(-1, wanted)[..., None, :].expand_as(keys))
    token = torch.arange(tails.longest, device=scratch.device)
    at = (tails.stems[:, None] + token).clamp(max=prefixes.longest - 1)  # what is behind a tail is never read
    at = at[:, None, None, :, None].expand_as(keys)
    for place, part in zip(_layers(scratch, layout, prefixes.longest).unbind(2), (keys, values), strict=True):
        place.scatter_(3, at, part)


def _layers(scratch: Tensor, layout: PrefixLayout, longest: int) -> Tensor:
    """bfloat16 `[B, layer, 2, kv_head, token, channel]` of rows of scratch."""
    elements = scratch[:, : layout.order_at(longest)].view(torch.bfloat16)
    return elements.view(len(scratch), layout.tensor_codec.layers_together, *layout.shape(longest)[1:])


def _orders(scratch: Tensor, layout: PrefixLayout, longest: int) -> Tensor:
    """int64 `[B, layer, kv_head, channel]`, the channel at each place of a key."""
    together = layout.tensor_codec.layers_together
    orders = scratch[:, layout.order_at(longest) : layout.order_at(longest, together)]
    return orders.view(len(scratch), together, layout.kv_heads, layout.head_dim).long()


class LayersAhead:
    """Decoded layers of one batch for forwards and backwards: while a layer is attended to, the next is decoded.

    Decoding uses little of a GPU and would otherwise hold up everything else, so a stream of its own fills two places
    or more in turn. They hold the last layers when a forward ends, which are the backward's first; with activation
    checkpointing each layer's second forward finds it still there. With a place for each layer, all are decoded once.

    A heavy codec fills the GPU by itself, and beside other kernels both only wait for each other. With a place for each
    layer, all are decoded at once before the first is attended to.
    """

    def __init__(self, places: Tensor, stream: torch.cuda.Stream | None) -> None:
        """`places`: from `make_places`, used by nothing else meanwhile; without a stream a layer is decoded when it is
        asked for."""
        self._places, self._stream = places, stream
        self._held: list[int | None] = [None] * len(places)
        self._ready: list[torch.cuda.Event | None] = [None] * len(places)

    def layer(self, prefixes: PackedPrefixes, layer: int, *, then: int) -> Tensor:
        """Return `decode`'s rows, for the current stream; `then`: the layer that will be asked for next, if any."""
        self._fill_all(prefixes)
        place = self._fill(prefixes, layer, None)
        self._await(place)
        if self._stream is not None and 0 <= then < prefixes.layout.layers:
            self._fill(prefixes, then, self._stream)
        return self._places[place]

    def _fill_all(self, prefixes: PackedPrefixes) -> None:
        """Where it is due, decode all layers, on the current stream."""
        layout, places = prefixes.layout, len(self._places)
        groups = -(-layout.layers // layout.tensor_codec.layers_together)
        if layout.is_heavy and groups <= places and self._held[0] is None:
            decode_groups(prefixes, 0, list(self._places[:groups]))
            self._held[:groups] = range(groups)

    def _fill(self, prefixes: PackedPrefixes, layer: int, stream: torch.cuda.Stream | None) -> int:
        """The place where a layer is, or is being, decoded."""
        group = layer // prefixes.layout.tensor_codec.layers_together
        place = group % len(self._places)
        if self._held[place] == group:
            return place
        self._held[place] = group
        self._await(place)
        if stream is None:
            decode(prefixes, layer, self._places[place])
            return place
        stream.wait_stream(torch.cuda.current_stream())  # readers of what the place holds now are enqueued there
        with torch.cuda.stream(stream):
            decode(prefixes, layer, self._places[place])
        self._ready[place] = stream.record_event()
        return place

    def _await(self, place: int) -> None:
        if (ready := self._ready[place]) is not None:
            torch.cuda.current_stream().wait_event(ready)
            self._ready[place] = None

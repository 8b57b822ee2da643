"""Layers of KV decoded ahead of the attention that reads them, on a stream of their own."""

import torch
from torch import Tensor

from alpacache.prefix.decode_kernels import decode, order_at, scratch_shape
from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.packed import PackedPrefixes


def make_places(layout: PrefixLayout, samples: int, longest: int, device: torch.device, *, layers: int) -> Tensor:
    """Memory of `LayersAhead` for so many decoded layers of batches of at most so many samples."""
    return torch.empty(layers, *scratch_shape(layout, samples, longest), dtype=torch.uint8, device=device)


class LayersAhead:
    """Decoded layers of one batch for forwards and backwards: while a layer is attended to, the next is decoded.

    Decoding takes little of what a GPU has and would otherwise stand in the way of everything else. A stream of its own
    fills two places or more in turn. They hold the last layers when a forward ends, which are the backward's first, and
    with activation checkpointing each layer's second forward finds it still there. With a place for each layer, all are
    decoded once.
    """

    def __init__(self, places: Tensor, stream: torch.cuda.Stream | None) -> None:
        """`places`: `[two or more, *scratch_shape]` uint8, which nothing else uses meanwhile; without a stream a layer
        is decoded when it is asked for."""
        self._places, self._stream = places, stream
        self._held: list[int | None] = [None] * len(places)
        self._ready: list[torch.cuda.Event | None] = [None] * len(places)

    def layer(self, prefixes: PackedPrefixes, layer: int, *, then: int) -> tuple[Tensor, int]:
        """What `decode` returns, on the current stream; `then`: what will be asked for next, if it exists."""
        self._fill(prefixes, layer, None)
        place = layer % len(self._places)
        self._await(place)
        if self._stream is not None and 0 <= then < prefixes.layout.layers:
            self._fill(prefixes, then, self._stream)
        return self._places[place], order_at(prefixes.layout, prefixes.longest)

    def _fill(self, prefixes: PackedPrefixes, layer: int, stream: torch.cuda.Stream | None) -> None:
        place = layer % len(self._places)
        if self._held[place] == layer:
            return
        self._held[place] = layer
        self._await(place)
        if stream is None:
            decode(prefixes, layer, self._places[place])
            return
        stream.wait_stream(torch.cuda.current_stream())  # whoever reads what the place holds now is enqueued there
        with torch.cuda.stream(stream):
            decode(prefixes, layer, self._places[place])
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(stream)
        self._ready[place] = ready

    def _await(self, place: int) -> None:
        if (ready := self._ready[place]) is not None:
            torch.cuda.current_stream().wait_event(ready)
            self._ready[place] = None

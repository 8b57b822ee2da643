"""A batch where the expert reads it: packed prefixes, and the flow's inputs in tensors at fixed addresses.

Training, validation and sampling all get their prefixes here. A captured CUDA graph reads the same addresses in every
replay, so all that differs from batch to batch is copied to where the first batch was.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache.cached_samples.ring import Batch, PrefixRows
from alpacache.prefix.layout import LEAST_DECODED
from alpacache.prefix.packed import PackedPrefixes, PackedTails

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

_SPARE_BYTES = 2 * 2**30
"""GPU memory that decoded layers leave to activations and libraries, where nobody has planned it."""
_ALIGNMENT = 16
"""Bytes; every tensor in the flat buffer begins at a multiple of it."""


class StagedBatch:
    """B samples with K noise draws each; their prefixes lie in the ring's rows, all else in one flat buffer.

    On a GPU `put` sends the values ahead, on a stream of its own into one of two further buffers, and the batch's work
    begins with a copy within the device: a copy from the host would wait in line behind the next batch's prefixes,
    which begin to be copied at the moment when the batch before has ended.
    """

    def __init__(
        self,
        rows: PrefixRows,
        expert: "ActionExpert",
        *,
        draws: int,
        at_once: int | None = None,
        decoded_layers: int | None = None,
    ) -> None:
        """Make room for a batch of the rows' size.

        Quantised layers are decoded ahead for an expert in bfloat16 on a GPU, where kernels read them.

        Args:
            at_once: most samples that `prefixes` is asked for at a time; None is the whole batch.
            decoded_layers: layers of so many samples that there is room for once they are decoded, 2 or more. None is
                all of them if the GPU has memory for that, else 2; 0 decodes a layer when it is attended to.
        """
        self.rows, self.size = rows, rows.batch_size
        self._dtype = expert.dtype
        self._cuda = rows.device.type == "cuda"
        real = torch.float32 if self._cuda else torch.float64  # the CPU's optimizer takes the Python number itself
        action = (expert.action_space.waypoints, 2)
        self._parts: list[tuple[torch.dtype, tuple[int, ...]]] = [
            (torch.int64, (3 if rows.tails is None else 6, self.size)),
            (torch.float32, (self.size, 1, *action)),
            (torch.float32, (self.size, draws, *action)),
            (torch.float32, (self.size, draws)),
            (real, ()),
            (torch.float32, ()),
        ]
        self._sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in self._parts]
        self._padded = [size + -size % _ALIGNMENT for size in self._sizes]
        self._flat = torch.zeros(sum(self._padded), dtype=torch.uint8, device=rows.device)
        self._places, self.action, self.noise, self.t, self.lr, self.stop = self._views(self._flat)
        """int64 `[3, B]`: row, tokens and first position of each prefix, and where tails may come `[6, B]`: tokens as
        stored, of the stem and of the tail; `[B, 1, 64, 2]`; `[B, K, 64, 2]`; `[B, K]`; learning rate; requests to
        stop."""
        self._places.fill_(1)
        if self._cuda:
            self._copying = torch.cuda.Stream(rows.device)  # type: ignore[no-untyped-call]
            self._ahead = [torch.empty_like(self._flat) for _ in range(2)]
            self._taken: list[torch.cuda.Event | None] = [None, None]
            self._next = 0
        self._decoded: Tensor | None = None
        if self._cuda and rows.layout.codec is not None and self._dtype == torch.bfloat16 and decoded_layers != 0:
            from alpacache.prefix import layers_ahead  # needs Triton

            layout, samples = rows.layout, min(at_once or self.size, self.size)
            if decoded_layers is None:
                all_bytes = layout.layers * math.prod(layout.scratch_shape(samples, rows.longest))
                decoded_layers = layout.layers if _is_free(all_bytes, rows.device) else LEAST_DECODED
            self._decoded = layers_ahead.make_places(layout, samples, rows.longest, rows.device, layers=decoded_layers)
            self._decoding = torch.cuda.Stream(rows.device)  # type: ignore[no-untyped-call]

    def put(self, batch: Batch, noise: Tensor, *, t: Tensor | None = None, lr: float = 0.0, stop: bool = False) -> None:
        """Stage a batch with values on the CPU; whatever is enqueued on the current stream from here on reads them.

        `noise [B, K, 64, 2]`, `t [B, K]`. A batch of fewer samples than there is room for is filled up with its first.
        """
        count = len(batch.rows)
        times = torch.zeros(count, self.t.shape[1]) if t is None else t
        expected = (count, *self.noise.shape[1:])
        if noise.shape != expected or times.shape != expected[:2]:
            raise ValueError(
                f"noise is {list(noise.shape)} and t {list(times.shape)}; expected {list(expected)} of noise."
            )
        filled = [*range(count), *[0] * (self.size - count)]
        tails = [length - stem for length, stem in zip(batch.lengths, batch.stems, strict=True)]
        places = torch.tensor([batch.rows, batch.lengths, batch.starts, batch.stored, batch.stems, tails])
        places = places[: len(self._places)]
        flow = (tensor[filled] for tensor in (batch.action[:, None], noise, times))
        host = torch.empty(len(self._flat), dtype=torch.uint8, pin_memory=self._cuda)
        values = (places[:, filled], *flow, torch.tensor(lr, dtype=torch.float64), torch.tensor(float(stop)))
        for view, value in zip(self._views(host), values, strict=True):
            view.copy_(value)
        self._send(host)
        if batch.ready is not None:
            torch.cuda.current_stream().wait_event(batch.ready)

    def prefixes(self, part: slice = slice(None), *, longest: int | None = None) -> PackedPrefixes:
        """The prefixes of some of the staged samples, with layers decoded ahead; none is above `longest` tokens.

        `longest`: at least `Batch.longest`; by default what the rows have room for.
        """
        rows, lengths, starts, *of_tails = self._places[:, part]
        tails, room = None, self.rows.tail_room
        if self.rows.tails is not None and room is not None:
            stored, stems, added = of_tails
            tails = PackedTails(data=self.rows.tails, stored=stored, stems=stems, lengths=added, longest=room.tail)
            longest = longest and min(longest + 1, self.rows.longest)  # tokens beyond a tail have a place
        ahead = None
        if self._decoded is not None:
            from alpacache.prefix.layers_ahead import LayersAhead

            ahead = LayersAhead(self._decoded[:, : len(rows)], self._decoding)
        return PackedPrefixes(
            layout=self.rows.layout,
            data=self.rows.data,
            rows=rows,
            lengths=lengths,
            starts=starts,
            longest=longest or self.rows.longest,
            dtype=self._dtype,
            ahead=ahead,
            tails=tails,
        )

    def _send(self, host: Tensor) -> None:
        if not self._cuda:
            self._flat.copy_(host)
            return
        ahead, taken = self._ahead[self._next], self._taken[self._next]
        with torch.cuda.stream(self._copying):
            if taken is not None:
                self._copying.wait_event(taken)
            ahead.copy_(host, non_blocking=True)
        current = torch.cuda.current_stream(self._flat.device)
        current.wait_stream(self._copying)
        self._flat.copy_(ahead)
        self._taken[self._next] = current.record_event()
        self._next = 1 - self._next

    def _views(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split(self._padded)  # type: ignore[no-untyped-call]
        layout = zip(pieces, self._sizes, self._parts, strict=True)
        return [piece[:size].view(dtype).view(shape) for piece, size, (dtype, shape) in layout]


def _is_free(size_bytes: int, device: torch.device) -> bool:
    """Tell whether so much GPU memory can be had with enough left."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size_bytes + _SPARE_BYTES <= torch.cuda.mem_get_info(device)[0] + idle

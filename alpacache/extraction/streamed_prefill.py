"""The device's part of stage one where the GPU does not hold the VLM: each layer's KV leaves as soon as it is made."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt_rows import PromptRows
from alpacache.alpamayo.streamed_vlm import StreamedVLM, load_streamed_vlm
from alpacache.alpamayo.text_layers import LayerKV
from alpacache.cached_samples.features import (
    bf16_rows,
    bf16_values,
    kv_bytes,
    kv_layer,
    kv_values,
    prefix_counters,
    tail_counters,
    tail_name,
)
from alpacache.errors import DeviceMemoryError
from alpacache.extraction.pipeline import groups
from alpacache.extraction.prefill import Group, StoredFeatures
from alpacache.extraction.preparation import Prepared
from alpacache.gpu.host_copies import HostCopies, HostPlaces
from alpacache.planning.prefill_plan import PrefillPlan

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sample:
    """A sample whose KV is on its way to the host, layer by layer."""

    prepared: Prepared
    parts: dict[str, slice]
    """Beginnings of the names of its fields of KV, and where each lies among a layer's tokens."""
    places: HostPlaces
    shapes: dict[str, tuple[int, ...]]
    """Shape of each of these fields, all layers together."""
    ends: dict[str, int]
    """Bytes of each of these fields that have left."""
    good: dict[str, list[Tensor]]
    """Field -> True if all that has left the device so far may be stored."""


class StreamedPrefiller:
    """A VLM whose weights come layer by layer, and what is stored of a run."""

    def __init__(
        self,
        vlm: StreamedVLM,
        checkpoint: Checkpoint,
        builder: InputBuilder,
        stored: StoredFeatures,
        copies: HostCopies,
        *,
        rows: int,
    ) -> None:
        """`rows`: samples that go through a layer at a time."""
        self._vlm, self._checkpoint, self._builder, self._stored = vlm, checkpoint, builder, stored
        self._copies, self._rows = copies, rows
        layers = range(vlm.layers) if stored.layers is None else stored.layers
        self._place_of = {layer: place for place, layer in enumerate(layers)}
        """Layer of the VLM -> its place among those that are stored."""

    def groups(self, samples: Iterator[Prepared], size: Callable[[], int]) -> Iterator[list[Prepared]]:
        """The samples in order, so many at a time."""
        while group := list(islice(samples, size())):
            yield group

    def begin(self, samples: Sequence[Prepared], meanwhile: Callable[[], object]) -> Group | str:
        """Have the device make what is stored of the samples; what it said if it has no room for them.

        Fewer go through a layer at a time where it has no room for more. `meanwhile` is called when the device has
        work, before the samples need room on the host.
        """
        while True:
            try:
                return self._group(samples, meanwhile)
            except torch.OutOfMemoryError as error:
                refusal = str(error)  # the error itself would keep what was allocated
            if self._rows == 1:
                return refusal
            self._rows //= 2
            if self._vlm.device.type == "cuda":
                torch.cuda.empty_cache()
            _log.warning("out of GPU memory; going on with %d samples in a layer at a time.", self._rows)

    @torch.inference_mode()
    def _group(self, samples: Sequence[Prepared], meanwhile: Callable[[], object]) -> Group:
        batches = list(groups(samples, length=lambda one: len(one.inputs.input_ids), size=lambda: self._rows))
        asked = [[one.inputs for one in batch] for batch in batches]
        endings = [[self._builder.twins(one.route) for one in batch] for batch in asked]
        begun: list[list[_Sample]] = []
        with ExitStack() as unless_done:

            def leave(which: int, rows: PromptRows, layer: int, kv: LayerKV) -> None:
                if len(begun) <= which:
                    if which == 0:
                        meanwhile()
                    begun.append([self._reserve(one, rows, row, kv) for row, one in enumerate(batches[which])])
                    for one in begun[which]:
                        unless_done.callback(_give_back, one.places)
                if layer in self._place_of:
                    self._leave(begun[which], self._place_of[layer], kv)

            rows = self._vlm.group(list(zip(asked, endings, strict=True)), leave)
            if self._stored.hidden_states:
                for some, own in zip(rows, begun, strict=True):
                    self._leave_hidden(own, some)
            self._vlm.check_weights(self._checkpoint)
            unless_done.pop_all()
        good = _flags([one for own in begun for one in own])
        made = None
        if self._vlm.device.type == "cuda":
            made = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            made.record()
        found = [(one, some, row) for some, own in zip(rows, begun, strict=True) for row, one in enumerate(own)]
        return Group(
            samples=[
                (one.prepared.sample_id, self._values(one, some, row, flags))
                for (one, some, row), flags in zip(found, good, strict=True)
            ],
            made=made,
            copies=[one.places.end() for one, *_ in found],
        )

    def _reserve(self, prepared: Prepared, rows: PromptRows, row: int, kv: LayerKV) -> _Sample:
        """Room on the host for all that is stored of a sample."""
        parts = {tail_name(name) if name else "": where for name, where in rows.parts(row).items()}
        heads, channels = kv.keys.shape[1], kv.keys.shape[3]
        shapes: dict[str, tuple[int, ...]] = {
            begin: (len(self._place_of), 2, heads, where.stop - where.start, channels) for begin, where in parts.items()
        }
        sizes = {f"{begin}kv": kv_bytes(shape, self._stored.codec) for begin, shape in shapes.items()}
        if self._stored.hidden_states:
            sizes["hidden"] = 2 * rows.lengths[row] * rows.prompts.hidden.shape[2]
        return _Sample(
            prepared=prepared,
            parts=parts,
            shapes=shapes,
            places=self._copies.reserve(sizes),
            ends=dict.fromkeys(parts, 0),
            good={name: [] for name in sizes},
        )

    def _leave(self, samples: list[_Sample], layer: int, kv: LayerKV) -> None:
        """Encode a layer's KV of these samples, those of one length together, and send it to the host.

        `layer`: its place among those that are stored.
        """
        alike: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for row, one in enumerate(samples):
            for begin, where in one.parts.items():
                alike[where.stop - where.start].append((row, begin))
        for members in alike.values():
            places = [(row, samples[row].parts[begin]) for row, begin in members]
            both = [torch.stack([kv.keys[row, :, where], kv.values[row, :, where]]) for row, where in places]
            data, good = kv_layer(torch.stack(both), layer, self._stored.codec)
            with self._copies.after_now():
                for number, (row, begin) in enumerate(members):
                    one = samples[row]
                    one.places.put(f"{begin}kv", one.ends[begin], data[number])
                    one.ends[begin] += data.shape[1]
                    one.good[f"{begin}kv"].append(good[number])

    def _leave_hidden(self, samples: list[_Sample], rows: PromptRows) -> None:
        """Send the hidden states after the final norm to the host."""
        hidden = self._vlm.norm(rows.prompts.hidden)
        for row, one in enumerate(samples):
            data, good = bf16_rows(hidden[row : row + 1, : rows.lengths[row]])
            with self._copies.after_now():
                one.places.put("hidden", 0, data[0])
            one.good["hidden"].append(good[0])

    def _values(self, one: _Sample, rows: PromptRows, row: int, good: Mapping[str, Tensor]) -> dict[str, Any]:
        """Values of a sample to be stored, which `features.checked` must see; large ones lie in its places."""
        values, codec, places = dict(one.prepared.arrays), self._stored.codec, one.places.places
        values |= prefix_counters(
            one.prepared.inputs,
            prefix_len=rows.lengths[row],
            rope_delta=rows.deltas[row],
            start_position=rows.start_position(row, ""),
        )
        for name, (begin, shape) in zip(rows.parts(row), one.shapes.items(), strict=True):
            values |= kv_values(begin, places[f"{begin}kv"], shape, codec, good[f"{begin}kv"])
            if name:
                ids, text = rows.endings[row][name]
                start = rows.start_position(row, name)
                values |= tail_counters(begin, token_ids=ids, start_position=start, text=text)
        if self._stored.hidden_states:
            shape = (rows.lengths[row], rows.prompts.hidden.shape[2])
            values |= bf16_values("hidden", places["hidden"], shape, good["hidden"])
        return values


def _give_back(places: HostPlaces) -> None:
    """Give up a sample's room on the host; what is on its way there goes first."""
    places.end().release()


def _flags(samples: list[_Sample]) -> list[dict[str, Tensor]]:
    """Flags of each sample, by field: True if all that has left may be stored. They go to the host together."""
    made = torch.stack([torch.stack(flags).all() for one in samples for flags in one.good.values()])
    flags = iter(made.to("cpu", non_blocking=True))
    return [{name: next(flags) for name in one.good} for one in samples]


@contextmanager
def open_streamed(
    plan: PrefillPlan,
    checkpoint: Checkpoint,
    builder: InputBuilder,
    stored: StoredFeatures,
    device: torch.device,
    *,
    dtype: torch.dtype,
    copies: HostCopies,
    compiled: bool = False,
) -> Iterator[StreamedPrefiller]:
    """Open the VLM with its weights where the plan has them. Raises `DeviceMemoryError` where no layer fits."""
    assert plan.home != "gpu"
    try:
        vlm = load_streamed_vlm(
            checkpoint,
            dtype=dtype,
            device=device,
            home=plan.home,
            tower_streams=plan.tower_streams,
            run_layers=stored.run_layers,
        )
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"two layers of the VLM of {checkpoint.model} do not fit on {device}: {error}\nEnd other programs on this "
            "GPU, or take one with more memory."
        ) from error
    if compiled:
        vlm.compile()
    with closing(vlm):
        yield StreamedPrefiller(vlm, checkpoint, builder, stored, copies, rows=plan.rows)

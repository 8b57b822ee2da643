"""The device's part of stage one: groups of samples go through the VLM, and their KV through the codec."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.features import prefix_arrays, tail_arrays, twin_arrays
from alpacache.errors import DeviceMemoryError
from alpacache.extraction.pipeline import groups
from alpacache.extraction.preparation import Prepared
from alpacache.gpu.host_copies import HostCopy
from alpacache.layer_choice import layers_to_run
from alpacache.prefix.prefix import PrefixFeatures, Tail
from cache_store import KVCodec

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFeatures:
    """Parts of the VLM's run over a sample that are stored."""

    codec: KVCodec | None
    """None stores KV losslessly."""
    hidden_states: bool
    rollouts: int
    """Reasoning rollouts of each sample."""
    layers: tuple[int, ...] | None = None
    """The VLM's layers whose KV is stored, rising; None: all."""

    @property
    def run_layers(self) -> int | None:
        """Number of the VLM's layers, from the first, that it has to be run through; None: all."""
        return layers_to_run(self.layers, whole=self.hidden_states or self.rollouts > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Samples that went through the VLM together, perhaps still on their way through it."""

    samples: list[tuple[str, dict[str, Any]]]
    """Sample ids and their values, large ones on the device; `features.checked` must see them before they are
    stored."""
    made: torch.cuda.Event | None
    """On a GPU, the event after which the values are good."""
    copies: list[HostCopy] | None = None
    """Copies of large values that are on their way to the host already, one for each sample."""


class Prefiller:
    """The VLM with its rollout sampler, and what is stored of a run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        builder: InputBuilder,
        stored: StoredFeatures,
        device: torch.device,
        *,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        """Load the checkpoint's VLM, whose layers the first group compiles if that is wanted.

        Raises `DeviceMemoryError` where it does not fit on the device.
        """
        from alpacache.alpamayo import load_vlm  # seconds of imports, which no refusal should wait for
        from alpacache.alpamayo.rollout import RolloutSampler

        self._stored, self._builder = stored, builder
        try:
            self._vlm = load_vlm(checkpoint, dtype=dtype, device=device)
            if stored.run_layers is not None:
                self._vlm.keep_layers(stored.run_layers)
            if compiled:
                self._vlm.compile()
            self._sampler = RolloutSampler.load(checkpoint, self._vlm, builder) if stored.rollouts else None
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"the VLM of {checkpoint.model} does not fit on {device}: {error}\nEnd other programs on this GPU, or "
                "take one with more memory; `alpacache plan` says how much stage one needs."
            ) from error

    def storing(self, stored: StoredFeatures, *, compiled: bool) -> Self:
        """The same VLM for what is stored with another codec, its layers compiled if that is wanted."""
        self._stored = stored
        if compiled:
            self._vlm.compile()
        return self

    def groups(self, samples: Iterator[Prepared], size: Callable[[], int]) -> Iterator[list[Prepared]]:
        """Samples of nearly equal length, so many at a time."""
        return groups(samples, length=lambda one: len(one.inputs.input_ids), size=size)

    def begin(self, samples: Sequence[Prepared], meanwhile: Callable[[], object]) -> Group | str:
        """Have the device make what is stored of the samples; what it said if it has no room for them.

        `meanwhile` is for prefills that need room on the host before they are done.
        """
        del meanwhile
        try:
            values = self.features(samples)
        except torch.OutOfMemoryError as error:
            return str(error)  # the error itself would keep what was allocated
        made = None
        if self._vlm.device.type == "cuda":
            made = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            made.record()
        together = zip(samples, values, strict=True)
        return Group(samples=[(one.sample_id, one.arrays | arrays) for one, arrays in together], made=made)

    def prefixes(self, samples: Sequence[Prepared]) -> list[PrefixFeatures]:
        """The samples' prefixes alone, on the device."""
        found = self._vlm.prefill_batch([one.inputs for one in samples])
        layers = self._stored.layers
        return found if layers is None else [prefix.of_layers(layers) for prefix in found]

    def features(self, samples: Sequence[Prepared]) -> list[dict[str, Any]]:
        """The stored values of each sample that come from the VLM."""
        stored, result = self._stored, []
        inputs = [one.inputs for one in samples]
        others = [self._builder.twins(one.route) for one in inputs]
        prefilled: Iterable[tuple[PrefixFeatures, dict[str, Tail]]]
        if any(others):
            prefilled = self._vlm.prefill_with_tails(inputs, others)
        else:
            prefilled = ((prefix, {}) for prefix in self._vlm.prefill_batch(inputs))
        for one, (prefix, twins) in zip(samples, prefilled, strict=True):
            tails, route = [], one.inputs.route
            if self._sampler is not None:
                question = None if route is None else self._builder.tail_ids("rollout", route=route)
                tails = self._sampler.sample(
                    prefix, one.inputs.stem_len, rollouts=stored.rollouts, key=one.sample_id, question=question
                )
            if stored.layers is not None:
                prefix = prefix.of_layers(stored.layers)
                tails = [tail.of_layers(stored.layers) for tail in tails]
                twins = {name: tail.of_layers(stored.layers) for name, tail in twins.items()}
            arrays = prefix_arrays(one.inputs, prefix, hidden_states=stored.hidden_states, codec=stored.codec)
            arrays |= tail_arrays(tails, codec=stored.codec) | twin_arrays(twins, codec=stored.codec)
            result.append(arrays)
        return result


class BatchSize:
    """Samples that go through the VLM at a time; halved where the GPU has no room for them."""

    def __init__(self, size: int, *, device: torch.device, name: str = "--batch-size") -> None:
        """`name`: of the size, for people."""
        self.size, self.device, self.name = size, device, name

    def shrink(self, samples: Sequence[Prepared], refusal: str) -> str:
        """Halve the size after a group did not fit; no later one is as large. Returns a note for the progress line.

        Raises `DeviceMemoryError` where the group was a single sample.
        """
        longest, before = max(len(one.inputs.input_ids) for one in samples), len(samples)
        if before == 1:
            peak = torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else 0.0
            raise DeviceMemoryError(
                f"out of GPU memory with {peak:.2f} GiB reserved at sample {samples[0].sample_id} ({longest} tokens) "
                f"alone: {refusal}\nWhat was committed is intact. Take fewer --cameras or --frames into another store, "
                "end other programs on this GPU, or take one with more memory."
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.size = before // 2
        message = "out of GPU memory at %d samples of up to %d tokens; going on with %s %d."
        _log.warning(message, before, longest, self.name, self.size)
        return f"{self.size} (out of memory at {before})"

"""Stage one: the frozen VLM once a sample, into a store.

Threads read and preprocess ahead, the main thread runs the VLM, other threads write; every queue is bounded. What is
committed is never done again, what fails is quarantined and the run goes on.
"""

import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint, FrozenVLM, load_vlm
from alpacache.alpamayo.inputs import InputBuilder, VLMInputs
from alpacache.config import ExtractConfig
from alpacache.device import device_name, resolve_device
from alpacache.errors import BadClipError, InterruptedRunError, UsageError
from alpacache.features import store_fields, to_arrays
from alpacache.identity import provenance, store_identity
from alpacache.interrupt import InterruptGuard
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.sample import Sample, SampleRef, Source, sort_cameras
from alpacache.selection import Rejected, select
from alpacache.sources import open_source
from cache_store import CODECS, CacheWriter

_READ_AHEAD = 4
_WRITES_IN_FLIGHT = 4
_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """What a run of stage one did."""

    store: str
    selected: int
    extracted: int
    already_there: int
    quarantined: dict[str, str]
    """Sample id (clip id where no sample could be chosen) -> reason, of all that the store holds in quarantine."""
    seconds: float
    samples_per_s: float
    bytes_written: int


def extract(config: ExtractConfig, *, on_progress: OnProgress = ignore) -> ExtractReport:
    """Run the VLM over the selected samples that the store does not hold yet.

    Raises `UsageError` (and `IdentityMismatchError`) before anything is changed, `StoreFullError` when the disk is
    full, `InterruptedRunError` after a signal; in each case the same call goes on where it stopped.
    """
    device = resolve_device(config.device)
    cameras = sort_cameras(config.cameras)
    source = open_source(config.source, cameras=cameras)
    checkpoint = Checkpoint(config.model)
    builder = InputBuilder(checkpoint)
    refs, unusable = select(source, split=config.split, t0=config.t0, samples=config.samples)
    worker, workers = config.shard
    if not refs and not unusable:
        raise UsageError(f"{config.source} has no sample in split {config.split!r}; choose another --split or --t0.")
    refs, unusable = refs[worker::workers], unusable[worker::workers]
    identity = store_identity(
        checkpoint,
        builder,
        cameras=cameras,
        frames=config.frames,
        codec=config.codec,
        dtype=str(_DTYPE).removeprefix("torch."),
    )
    with CacheWriter(
        config.store,
        fields=store_fields(hidden_states=config.hidden_states == "last", codec=CODECS.get(config.codec)),
        identity=identity,
        provenance=provenance(source=source.name, device=device_name(device)),
    ) as writer:
        return _Run(config, source, cameras, checkpoint, builder, writer, device, on_progress).run(refs, unusable)


class _Run:
    """One run's state: counters, pools, the progress it reports."""

    def __init__(
        self,
        config: ExtractConfig,
        source: Source,
        cameras: tuple[str, ...],
        checkpoint: Checkpoint,
        builder: InputBuilder,
        writer: CacheWriter,
        device: torch.device,
        on_progress: OnProgress,
    ) -> None:
        self.config, self.source, self.cameras = config, source, cameras
        self.checkpoint, self.builder, self.writer = checkpoint, builder, writer
        self.device, self.on_progress = device, on_progress
        self.extracted = 0
        self.failed = 0
        self.bytes_written = 0
        self.started = time.monotonic()

    def run(self, refs: Sequence[SampleRef], unusable: Sequence[Rejected]) -> ExtractReport:
        wanted = [ref.sample_id for ref in refs]
        if self.config.retry_quarantined:
            for name in wanted:
                self.writer.release(name)
        for clip_id in dict.fromkeys(ref.clip_id for ref in refs):
            self.writer.release(clip_id)  # it gives samples now
        for clip_id, error in unusable:
            known = self.writer.quarantine_of(clip_id)
            if known is None or known.reason != str(error):
                self._quarantine(clip_id, error)
        waiting = [ref for ref in refs if not self.writer.is_committed(ref.sample_id)]
        todo = [ref for ref in waiting if not self.writer.is_quarantined(ref.sample_id)]
        if todo:
            self._extract(todo)
        return self._report([*wanted, *(clip_id for clip_id, _ in unusable)], there=len(refs) - len(waiting))

    def _extract(self, todo: Sequence[SampleRef]) -> None:
        vlm = load_vlm(self.checkpoint, dtype=_DTYPE, device=self.device)
        self.started = time.monotonic()
        with (
            _deterministic(self.config.deterministic),
            InterruptGuard() as guard,
            ThreadPoolExecutor(2, "write") as pool,
        ):
            writes: deque[Future[bool]] = deque()
            for ref, prepared in self._prepared(todo):
                if guard.requested:
                    break
                try:
                    if isinstance(prepared, BadClipError):
                        raise prepared
                    arrays = self._encode(vlm, *prepared)
                except BadClipError as error:
                    self._quarantine(ref.sample_id, error)
                    self.failed += 1
                    continue
                writes.append(pool.submit(self.writer.write, ref.sample_id, arrays))
                self._collect(writes, leave=_WRITES_IN_FLIGHT, total=len(todo))
            self._collect(writes, leave=0, total=len(todo))
        left = len(todo) - self.extracted - self.failed
        if guard.requested and left:
            raise InterruptedRunError(
                f"stopped on request: {self.extracted} samples of this run are committed to {self.config.store}, "
                f"{left} are left; run the same command again to go on."
            )

    def _prepared(
        self, todo: Sequence[SampleRef]
    ) -> Iterator[tuple[SampleRef, tuple[Sample, VLMInputs] | BadClipError]]:
        """Samples and VLM inputs in order, a few made ahead by threads."""
        with ThreadPoolExecutor(self.config.workers, "read") as pool:
            waiting = iter(todo)
            ahead: deque[tuple[SampleRef, Future[tuple[Sample, VLMInputs]]]] = deque()
            try:
                while True:
                    for ref in islice(waiting, self.config.workers + _READ_AHEAD - len(ahead)):
                        ahead.append((ref, pool.submit(self._prepare, ref)))
                    if not ahead:
                        return
                    ref, future = ahead.popleft()
                    try:
                        yield ref, future.result()
                    except BadClipError as error:
                        yield ref, error
            finally:
                for _, future in ahead:
                    future.cancel()

    def _prepare(self, ref: SampleRef) -> tuple[Sample, VLMInputs]:
        sample = self.source.load(ref, cameras=self.cameras, frames=self.config.frames)
        return sample, self.builder.build(sample)

    def _encode(self, vlm: FrozenVLM, sample: Sample, inputs: VLMInputs) -> dict[str, Any]:
        prefix = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
        hidden_states, codec = self.config.hidden_states == "last", CODECS.get(self.config.codec)
        arrays = to_arrays(sample, inputs, prefix, hidden_states=hidden_states, codec=codec)
        self.bytes_written += sum(getattr(value, "nbytes", 0) for value in arrays.values())
        return arrays

    def _collect(self, writes: deque[Future[bool]], *, leave: int, total: int) -> None:
        """Wait for the oldest writes until few enough are in flight; a failed write fails the run here."""
        while len(writes) > leave or (writes and writes[0].done()):
            writes.popleft().result()
            self.extracted += 1
            done = self.extracted + self.failed
            rate = self.extracted / max(1e-9, time.monotonic() - self.started)
            notes = {"GB": f"{self.bytes_written / 1e9:.2f}", "quarantined": str(self.failed)}
            self.on_progress(Progress(done=done, total=total, unit="samples", rate=rate, notes=notes))

    def _quarantine(self, name: str, error: BadClipError) -> None:
        self.writer.quarantine(name, error.kind, str(error), "".join(traceback.format_exception(error)))

    def _report(self, names: Sequence[str], *, there: int) -> ExtractReport:
        seconds = time.monotonic() - self.started
        records = {name: self.writer.quarantine_of(name) for name in names}
        return ExtractReport(
            store=self.config.store,
            selected=len(names),
            extracted=self.extracted,
            already_there=there,
            quarantined={name: record.reason for name, record in records.items() if record is not None},
            seconds=seconds,
            samples_per_s=self.extracted / seconds if seconds else 0.0,
            bytes_written=self.bytes_written,
        )


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

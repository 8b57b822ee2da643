"""Stage one: the frozen VLM runs once over each sample, and what it leaves behind goes to a store.

    readers  -->  samples  -->  VLM and codec on the device  -->  writers  -->  store

The main thread feeds the device; threads read ahead of it and commit behind it (`pipeline`). What is committed is never
done again; what fails is quarantined and the run goes on.
"""

import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.features import checked
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, InterruptedRunError
from alpacache.extraction.codec_choice import longer_than_learnt, warn_of
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.failures import Failures
from alpacache.extraction.pipeline import SPARE_COPIES, Writers, read_ahead
from alpacache.extraction.prefill import BatchSize, Group, Prefiller, StoredFeatures
from alpacache.extraction.preparation import Prepared
from alpacache.extraction.progress import ExtractProgress, ExtractReport
from alpacache.extraction.reading_process import Readers, open_readers
from alpacache.extraction.streamed_prefill import StreamedPrefiller, open_streamed
from alpacache.extraction.target_store import TargetStore
from alpacache.extraction.task import Task
from alpacache.gpu.device import enter, own_device, restored_torch_threads
from alpacache.gpu.host_copies import HostCopies
from alpacache.interrupt import InterruptGuard
from alpacache.planning.prefill_plan import PrefillPlan
from alpacache.progress import OnNote, OnProgress, ignore, ignore_note
from alpacache.sources.source import FixedSource
from alpacache.sources.stretches import stretches
from cache_store import CacheWriter, KVCodec
from cache_store.format.names import sample_key
from cache_store.writer import committed_keys, stored_identity

_log = logging.getLogger(__name__)


def extract(config: ExtractConfig, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore_note) -> ExtractReport:
    """Run the VLM over the selected samples that the store does not hold yet.

    `on_note` hears, before anything is extracted, which prompt was chosen and why, where the VLM runs in another
    precision than its weights have, and whether its layers are compiled.

    Raises `UsageError` (and `IdentityMismatchError`) before anything is changed, `StoreFullError` when the disk is
    full, `DataError` when the source has gone, `DeviceMemoryError` when the GPU is too small, `InterruptedRunError`
    after a signal; in each case the same call goes on where it stopped.
    """
    device = own_device(config.device)
    enter(device)
    task = Task.of(config, device, on_note)
    store = TargetStore(
        task=task,
        path=config.store,
        codec=config.codec,
        codec_from=config.codec_from,
        force=config.force,
        split=None if config.split_by == "clip" else f"{config.split} by {config.split_by}",
    )
    before = stored_identity(config.store)
    chosen = store.known_codec(before)
    stored = StoredFeatures(
        codec=None if chosen is None else chosen.codec,
        hidden_states=config.hidden_states == "last",
        rollouts=config.tails,
        layers=task.layers,
    )
    task.tell_prompt()
    missing = _uncommitted(config.store, task.refs)
    first = task.first_of(missing)
    if chosen is not None:  # else nobody knows yet how large a sample is
        store.check_room(len(missing), first, stored)
    plan = task.plan_memory(len(missing), first, stored)
    chosen, before, ready = store.settle_codec(chosen, before, plan, stored, samples=len(missing), first=first)
    compiled = task.compiles(len(missing))
    opened, codec = store.open(stored, chosen, before, compiled=compiled)
    stored = replace(stored, codec=codec)
    with opened as writer:
        wanted = frozenset(sample_key(ref.sample_id) for ref in task.every)
        routed = config.route != "none"
        progress = ExtractProgress(
            config.store, wanted, selected=len(task.refs), routed=routed, on_progress=on_progress
        )
        failures = Failures(writer, progress, source=config.source)
        missing = _uncommitted(config.store, task.refs)
        todo = failures.settle(task.refs, task.unusable, missing, retry=config.retry_quarantined)
        if todo:
            _run(task, todo, plan, stored, writer, progress, failures, compiled=compiled, ready=ready)
        if progress.routeless:
            _log.warning(
                "none of %d samples of %s has a route: their prompts are those without routes.",
                progress.extracted,
                config.source,
            )
        names = [*(ref.sample_id for ref in task.refs), *(clip_id for clip_id, _ in task.unusable)]
        report = progress.report(
            selected=len(names), already_there=len(task.refs) - len(missing), quarantined=failures.records(names)
        )
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        return replace(report, memory=plan, peak_bytes=peak)


def _run(
    task: Task,
    todo: Sequence[SampleRef],
    plan: PrefillPlan | None,
    stored: StoredFeatures,
    writer: CacheWriter,
    progress: ExtractProgress,
    failures: Failures,
    *,
    compiled: bool,
    ready: Prefiller | None,
) -> None:
    """Extract these samples. Raises `InterruptedRunError` after a signal if some are left."""
    asked, device = task.prefill, task.device
    workers = min(asked.workers, len(todo))
    in_order = stretches(todo, task.source, workers=workers)
    if isinstance(task.source, FixedSource):
        task.source.expect([stretch[0] for stretch in in_order])
    batch, buffers = _batch_and_buffers(plan, asked.batch_size or 1, device, writers=asked.writers)
    with (
        _deterministic(asked.deterministic),
        restored_torch_threads(),
        open_readers(task.settings, task.source, task.builder, device, workers=workers) as readers,
        HostCopies(device, buffers) as copies,
        _open_prefiller(
            plan,
            task.checkpoint,
            task.builder,
            stored,
            device,
            task.settings.dtype,
            copies,
            compiled=compiled,
            ready=ready,
        ) as prefiller,
    ):
        progress.start(len(todo))
        with InterruptGuard() as guard, Writers(writer, copies, threads=asked.writers) as writers:
            extraction = _Extraction(readers, prefiller, batch, writers, progress, failures, guard, stored.codec)
            extraction.over(in_order)
        warn_of(extraction.longer, stored.codec, progress.extracted)
    if guard.requested and progress.left:
        raise InterruptedRunError(
            f"stopped on request: {progress.extracted} samples of this run are committed to {writer.path}, "
            f"{progress.left} are left; run the same command again to go on."
        )


def _batch_and_buffers(
    plan: PrefillPlan | None, asked: int, device: torch.device, *, writers: int
) -> tuple[BatchSize, int]:
    """Samples that go through the VLM together, and samples with room on the host on their way to the store."""
    if plan is not None and plan.home != "gpu":
        return BatchSize(plan.group, device=device, name="groups of"), max(plan.buffers, plan.group + SPARE_COPIES)
    batch = BatchSize(asked if plan is None else plan.rows, device=device)
    # A group leaves the device at once: it must not have to wait while the writers keep up.
    return batch, writers + max(SPARE_COPIES, batch.size)


@contextmanager
def _open_prefiller(
    plan: PrefillPlan | None,
    checkpoint: Checkpoint,
    builder: InputBuilder,
    stored: StoredFeatures,
    device: torch.device,
    dtype: torch.dtype,
    copies: HostCopies,
    *,
    compiled: bool,
    ready: Prefiller | None,
) -> Iterator[Prefiller | StreamedPrefiller]:
    """The VLM with its weights where the plan has them; `ready`: one that is there already."""
    if ready is not None:
        yield ready.storing(stored, compiled=compiled)
        return
    if plan is None or plan.home == "gpu":
        yield Prefiller(checkpoint, builder, stored, device, dtype=dtype, compiled=compiled)
        return
    given = plan, checkpoint, builder, stored, device
    with open_streamed(*given, dtype=dtype, copies=copies, compiled=compiled) as prefiller:
        yield prefiller


def _uncommitted(store: str, refs: Sequence[SampleRef]) -> list[SampleRef]:
    committed = committed_keys(store)
    return [ref for ref in refs if sample_key(ref.sample_id) not in committed]


@dataclass(slots=True)
class _Extraction:
    """One run over samples: the main thread feeds the device one group ahead of what is committed."""

    readers: Readers
    prefiller: Prefiller | StreamedPrefiller
    batch: BatchSize
    writers: Writers
    progress: ExtractProgress
    failures: Failures
    guard: InterruptGuard
    codec: KVCodec | None
    pending: Group | None = None
    """The last group, handed to the writers when the device has the next."""
    longer: dict[str, dict[str, float]] = field(default_factory=dict)
    """Samples that are unlike those the codec was learnt from, and how many times the bytes they take, by part."""

    def over(self, todo: Sequence[Sequence[SampleRef]]) -> None:
        """Extract and commit these samples, or those that are begun when a stop is requested."""
        with closing(self._prepared(todo)) as samples:
            try:
                self._prefill(self.progress.waits.timed("read", samples))
            finally:
                self._hand_over()
            with self.progress.waits.of("write"):
                committed = self.writers.collect(everything=True)
            self.progress.add_committed(committed)

    def _prepared(self, todo: Sequence[Sequence[SampleRef]]) -> Generator[Prepared]:
        """Samples ready for the VLM, made ahead by threads; what cannot be used is quarantined here."""
        readers, ahead = self.readers, self.readers.workers + 2 * self.batch.size
        for ref, future in read_ahead(
            todo, readers.one_pass, workers=readers.workers, ahead=ahead, begin=readers.begin
        ):
            try:
                prepared = future.result()
                self.progress.add_route(prepared.inputs.route)
                yield prepared
            except BadClipError as error:
                self.failures.check_source()
                self.failures.refuse(ref.sample_id, error)
            except OSError as error:
                raise self.failures.unreadable(ref.sample_id, error) from error
            if self.guard.requested:
                return

    def _prefill(self, samples: Iterator[Prepared]) -> None:
        """Feed the device; a group that does not fit is halved."""
        for group in self.prefiller.groups(samples, lambda: self.batch.size):
            if self.guard.requested:
                return
            parts = deque([group])
            while parts:
                part = parts.popleft()
                begun = self.prefiller.begin(part, self._hand_over)
                handed_over = self._hand_over()  # while the device is busy with the next
                if isinstance(begun, Group):
                    self.pending = begun
                elif handed_over:
                    parts.appendleft(part)  # there is room now
                else:
                    self.progress.batch_note = self.batch.shrink(part, begun)
                    parts.extendleft((part[self.batch.size :], part[: self.batch.size]))

    def _hand_over(self) -> bool:
        """Have the pending group committed once the device is through with it; whether there was one."""
        group, self.pending = self.pending, None
        if group is None:
            return False
        if group.made is not None:
            group.made.synchronize()
        for number, (sample_id, values) in enumerate(group.samples):
            copy = None if group.copies is None else group.copies[number]
            try:
                stored = checked(sample_id, values)
            except BadClipError as error:
                self.failures.refuse(sample_id, error)
                if copy is not None:
                    copy.release()
                continue
            for part, times in longer_than_learnt(self.codec, stored).items():
                self.longer.setdefault(part, {})[sample_id] = times
            with self.progress.waits.of("write"):
                self.writers.put(sample_id, stored, made=group.made, copy=copy)
            self.progress.add_committed(self.writers.collect())
        return True


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms, and cuBLAS's, which reads its setting when it is first used."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

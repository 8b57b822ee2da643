"""Stage one: the frozen VLM once a sample, into a store.

The main thread runs the VLM and the codec; threads read ahead of it and commit behind it, as `extraction_pipeline` has
them. What is committed is never done again, what fails is quarantined and the run goes on.
"""

import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint, FrozenVLM, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import RolloutSampler
from alpacache.cached_samples.features import (
    checked,
    prefix_arrays,
    store_fields,
    tail_arrays,
)
from alpacache.cached_samples.identity import provenance, store_identity
from alpacache.driving.sample import SampleRef, sort_cameras
from alpacache.errors import BadClipError, DataError, DeviceMemoryError, InterruptedRunError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.disk_room import check_room
from alpacache.extraction.pipeline import (
    SPARE_COPIES,
    Waits,
    Writers,
    groups,
    read_ahead,
)
from alpacache.extraction.preparation import (
    VLM_DTYPE,
    Preparation,
    Prepared,
    input_builder,
)
from alpacache.extraction.progress import StoreCount
from alpacache.extraction.reading_process import ReadingProcesses
from alpacache.gpu.device import (
    device_name,
    enter,
    limit_torch_to_one_thread,
    own_device,
    restored_torch_threads,
)
from alpacache.gpu.host_copies import HostCopies
from alpacache.interrupt import InterruptGuard
from alpacache.planning.time_model import prefill_batch
from alpacache.progress import OnProgress, Progress, clock, ignore
from alpacache.sources import check_still_there, is_streamed, open_source
from alpacache.sources.selection import Rejected, select
from alpacache.sources.source import FixedSource, Source
from alpacache.sources.views import views_identity
from alpacache.torchrun import this_process
from cache_store import CODECS, CacheWriter
from cache_store.format.names import sample_key
from cache_store.writer import committed_keys, failed_keys

_log = logging.getLogger(__name__)


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
    read_wait: float
    """Share of the time that the VLM waited for samples: more CPU cores would help, and up to them more `workers`."""
    write_wait: float
    """And for samples to be committed: a faster disk or more `writers` would."""
    committed: int
    """Of the samples of all workers together, those that the store holds by now."""
    wanted: int
    """How many these are."""


def extract(config: ExtractConfig, *, on_progress: OnProgress = ignore) -> ExtractReport:
    """Run the VLM over the selected samples that the store does not hold yet.

    Raises `UsageError` (and `IdentityMismatchError`) before anything is changed, `StoreFullError` when the disk is
    full, `DataError` when the source has gone, `DeviceMemoryError` when the GPU is too small, `InterruptedRunError`
    after a signal; in each case the same call goes on where it stopped.
    """
    device = own_device(config.device)
    enter(device)
    cameras = sort_cameras(config.cameras)
    source = open_source(config.source, cameras=cameras)
    checkpoint = Checkpoint(config.model, vlm=config.vlm)
    builder = input_builder(config, checkpoint)
    refs, unusable = select(source, split=config.split, t0=config.t0, samples=config.samples, views=config.views)
    worker, workers = share(config.shard)
    if not refs and not unusable:
        raise UsageError(f"{config.source} has no sample in split {config.split!r}; choose another --split or --t0.")
    wanted = frozenset(sample_key(ref.sample_id) for ref in refs)
    refs, unusable = refs[worker::workers], unusable[worker::workers]
    identity = store_identity(
        checkpoint,
        builder,
        cameras=cameras,
        frames=config.frames,
        codec=config.codec,
        dtype=str(VLM_DTYPE).removeprefix("torch."),
        rollouts=config.tails,
        views=views_identity(config.views, seed=config.seed),
    )
    if not config.force:
        held = committed_keys(config.store)
        check_room(
            config.store,
            source,
            [ref for ref in refs if sample_key(ref.sample_id) not in held],
            checkpoint,
            builder,
            cameras=cameras,
            frames=config.frames,
            codec=config.codec,
            hidden_states=config.hidden_states == "last",
            rollouts=config.tails,
        )
    fields = store_fields(
        hidden_states=config.hidden_states == "last",
        codec=CODECS.get(config.codec),
        rollouts=config.tails,
        views=config.views > 1,
    )
    with CacheWriter(
        config.store,
        fields=fields,
        identity=identity,
        provenance=provenance(source=source.name, device=device_name(device)),
    ) as writer:
        run = _Run(config, source, cameras, checkpoint, builder, writer, device, wanted, on_progress)
        return run.run(refs, unusable)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Samples that went through the VLM together, perhaps still on their way through it."""

    samples: list[tuple[str, dict[str, Any]]]
    """Sample ids and their values, large ones on the device, to be `checked`."""
    made: torch.cuda.Event | None
    """On a GPU: after which the values are good."""


class _Run:
    """One run's state: counters, batch size, the progress it reports."""

    def __init__(
        self,
        config: ExtractConfig,
        source: Source,
        cameras: tuple[str, ...],
        checkpoint: Checkpoint,
        builder: InputBuilder,
        writer: CacheWriter,
        device: torch.device,
        wanted: frozenset[str],
        on_progress: OnProgress,
    ) -> None:
        self.config, self.source, self.cameras = config, source, cameras
        self.checkpoint, self.builder, self.writer = checkpoint, builder, writer
        self.device, self.on_progress = device, on_progress
        at_once = prefill_batch(cameras=len(cameras), frames=config.frames)
        self.batch_size = config.batch_size or (at_once if device.type == "cuda" and not config.deterministic else 1)
        self.workers = reading_workers(config)
        self.waits = Waits()
        self.pending: _Group | None = None
        """The last group, handed over when the device has the next."""
        self.shrunk = ""
        self.extracted = 0
        self.failed = 0
        self.bytes_written = 0
        self.total = self.selected = 0
        self.started = time.monotonic()
        self.store_count = StoreCount(config.store, wanted)

    def run(self, refs: Sequence[SampleRef], unusable: Sequence[Rejected]) -> ExtractReport:
        wanted = [ref.sample_id for ref in refs]
        self.selected = len(wanted)
        if unusable:
            self._check_source()
        held, failed = committed_keys(self.config.store), failed_keys(self.config.store)
        if self.config.retry_quarantined:
            for name in wanted:
                if sample_key(name) in failed:
                    self.writer.release(name)
        for clip_id in dict.fromkeys(ref.clip_id for ref in refs):
            if sample_key(clip_id) in failed:
                self.writer.release(clip_id)  # it gives samples now
        for clip_id, error in unusable:
            known = self.writer.quarantine_of(clip_id)
            if known is None or known.reason != str(error):
                self._quarantine(clip_id, error)
        waiting = [ref for ref in refs if sample_key(ref.sample_id) not in held]
        recorded = [ref.sample_id for ref in waiting if sample_key(ref.sample_id) in failed]
        refused = {name for name in recorded if self.writer.is_quarantined(name)}
        todo = [ref for ref in waiting if ref.sample_id not in refused]
        if todo:
            with _deterministic(self.config.deterministic):
                self._extract(todo)
        return self._report([*wanted, *(clip_id for clip_id, _ in unusable)], there=len(refs) - len(waiting))

    def _extract(self, todo: Sequence[SampleRef]) -> None:
        if isinstance(self.source, FixedSource):
            self.source.expect(todo)
        self.total = len(todo)
        self.workers = min(self.workers, self.total)
        with (
            restored_torch_threads(),
            reading(self.config, self.source, self.builder, self.device, self.workers) as read,
        ):
            vlm, sampler = self._load()
            self.started = time.monotonic()
            with (
                InterruptGuard() as guard,
                # A group leaves the device at once: it must not have to wait while the writers keep up.
                HostCopies(self.device, self.config.writers + max(SPARE_COPIES, self.batch_size)) as copies,
                Writers(self.writer, copies, threads=self.config.writers) as writers,
                closing(self._prepared(todo, read, guard)) as prepared,
            ):
                self._run_through(vlm, sampler, prepared, writers, guard)
        left = self.total - self.extracted - self.failed
        if guard.requested and left:
            raise InterruptedRunError(
                f"stopped on request: {self.extracted} samples of this run are committed to {self.config.store}, "
                f"{left} are left; run the same command again to go on."
            )

    def _run_through(
        self,
        vlm: FrozenVLM,
        sampler: RolloutSampler | None,
        samples: Iterator[Prepared],
        writers: Writers,
        guard: InterruptGuard,
    ) -> None:
        try:
            for group in groups(
                self.waits.timed("read", samples),
                length=lambda one: len(one.inputs.input_ids),
                size=lambda: self.batch_size,
            ):
                if guard.requested:
                    break
                parts = deque([group])
                while parts:
                    part = parts.popleft()
                    made = self._compute(vlm, sampler, part)
                    handed_over = self._hand_over(writers)  # while the device is busy with the next
                    if isinstance(made, _Group):
                        self.pending = made
                    elif handed_over:
                        parts.appendleft(part)  # there is room now
                    else:
                        half = self._shrink(part, made)
                        parts.extendleft((part[half:], part[:half]))
        finally:
            self._hand_over(writers)
        with self.waits.of("write"):
            committed = writers.collect(everything=True)
        self._count(committed)

    def _load(self) -> tuple[FrozenVLM, RolloutSampler | None]:
        try:
            vlm = load_vlm(self.checkpoint, dtype=VLM_DTYPE, device=self.device)
            return vlm, RolloutSampler.load(self.checkpoint, vlm, self.builder) if self.config.tails else None
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"the VLM of {self.checkpoint.model} does not fit on {self.device}: {error}\nEnd other programs on "
                "this GPU, or take one with more memory; `alpacache plan` says how much stage one needs."
            ) from error

    def _prepared(
        self, todo: Sequence[SampleRef], read: Callable[[SampleRef], Prepared], guard: InterruptGuard
    ) -> Generator[Prepared]:
        """Samples ready for the VLM, in order, made ahead by threads; what cannot be used is quarantined here."""
        ahead = self.workers + 2 * self.batch_size
        begin = limit_torch_to_one_thread if self.device.type == "cuda" else None
        for ref, future in read_ahead(todo, read, workers=self.workers, ahead=ahead, begin=begin):
            try:
                yield future.result()
            except BadClipError as error:
                self._check_source()
                self._refuse(ref.sample_id, error)
            except OSError as error:
                raise DataError(
                    f"{self.config.source}: sample {ref.sample_id} cannot be read ({error}). What was committed to "
                    f"{self.config.store} is intact; see that the source is there and run the same command again."
                ) from error
            if guard.requested:
                return

    def _compute(self, vlm: FrozenVLM, sampler: RolloutSampler | None, part: Sequence[Prepared]) -> _Group | str:
        """Begin to make what is stored of a group; what the device said if it has no room for it."""
        try:
            found = self._features(vlm, sampler, part)
        except torch.OutOfMemoryError as error:
            return str(error)  # the error itself would keep what was allocated
        made = torch.cuda.Event(blocking=True) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if made is not None:
            made.record()
        return _Group(
            samples=[(one.sample_id, one.arrays | values) for one, values in zip(part, found, strict=True)], made=made
        )

    def _hand_over(self, writers: Writers) -> bool:
        """Have the group that waits for it committed, once the device is through with it; whether there is one."""
        group, self.pending = self.pending, None
        if group is None:
            return False
        if group.made is not None:
            group.made.synchronize()
        for sample_id, values in group.samples:
            try:
                stored = checked(sample_id, values)
            except BadClipError as error:
                self._refuse(sample_id, error)
                continue
            with self.waits.of("write"):
                writers.put(sample_id, stored, made=group.made)
            self._count(writers.collect())
        return True

    def _features(
        self, vlm: FrozenVLM, sampler: RolloutSampler | None, part: Sequence[Prepared]
    ) -> list[dict[str, Any]]:
        codec, hidden_states = CODECS.get(self.config.codec), self.config.hidden_states == "last"
        found = []
        for one, prefix in zip(part, vlm.prefill_batch([one.inputs for one in part]), strict=True):
            tails = []
            if sampler is not None:
                stem_len = one.inputs.stem_len
                tails = sampler.sample(prefix, stem_len, rollouts=self.config.tails, key=one.sample_id)
            values = prefix_arrays(one.sample_id, one.inputs, prefix, hidden_states=hidden_states, codec=codec)
            found.append(values | tail_arrays(tails, codec=codec))
        return found

    def _shrink(self, part: Sequence[Prepared], refusal: str) -> int:
        """Where to cut a group that did not fit on the GPU; no later one is as large."""
        longest = max(len(one.inputs.input_ids) for one in part)
        if len(part) == 1:
            peak = torch.cuda.max_memory_reserved(self.device) / 2**30 if self.device.type == "cuda" else 0.0
            raise DeviceMemoryError(
                f"out of GPU memory with {peak:.2f} GiB reserved at sample {part[0].sample_id} ({longest} tokens) "
                f"alone: {refusal}\nWhat was committed to {self.config.store} is intact. Take fewer --cameras or "
                "--frames into another store, end other programs on this GPU, or take one with more memory."
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_size, before = len(part) // 2, len(part)
        self.shrunk = f"{self.batch_size} (out of memory at {before})"
        _log.warning(
            "out of GPU memory at %d samples of up to %d tokens; going on with --batch-size %d.",
            before,
            longest,
            self.batch_size,
        )
        return self.batch_size

    def _check_source(self) -> None:
        kept = (
            f"What was committed to {self.config.store} is intact; bring the source back and run the same command "
            "again."
        )
        check_still_there(self.config.source, kept=kept)

    def _count(self, committed: Sequence[int]) -> None:
        if committed:
            self.extracted += len(committed)
            self.bytes_written += sum(committed)
            self._tell()

    def _tell(self) -> None:
        seconds = max(1e-9, time.monotonic() - self.started)
        done = self.extracted + self.failed
        committed, wanted, store_rate = self.store_count.now(at_once=done == self.total)
        notes = {
            "GB": f"{self.bytes_written / 1e9:.2f}",
            "MB/s": f"{self.bytes_written / 1e6 / seconds:.3g}",
            "store": f"{committed}/{wanted}",
            "quarantined": str(self.failed),
        }
        if wanted > self.selected and store_rate:
            notes["store ETA"] = clock((wanted - committed) / store_rate)
        if self.shrunk:
            notes["batch"] = self.shrunk
        notes |= {f"{what} wait": f"{share:.0%}" for what, share in self.waits.shares(seconds).items()}
        rate = self.extracted / seconds
        self.on_progress(Progress(done=done, total=self.total, unit="samples", rate=rate, notes=notes))

    def _refuse(self, sample_id: str, error: BadClipError) -> None:
        self._quarantine(sample_id, error)
        self.failed += 1
        self._tell()

    def _quarantine(self, name: str, error: BadClipError) -> None:
        self.writer.quarantine(name, error.kind, str(error), "".join(traceback.format_exception(error)))

    def _report(self, names: Sequence[str], *, there: int) -> ExtractReport:
        seconds = time.monotonic() - self.started
        failed = failed_keys(self.config.store)
        records = {name: self.writer.quarantine_of(name) for name in names if sample_key(name) in failed}
        committed, wanted, _ = self.store_count.now(at_once=True)
        return ExtractReport(
            store=self.config.store,
            selected=len(names),
            extracted=self.extracted,
            already_there=there,
            quarantined={name: record.reason for name, record in records.items() if record is not None},
            seconds=seconds,
            samples_per_s=self.extracted / seconds if seconds else 0.0,
            bytes_written=self.bytes_written,
            **{f"{what}_wait": share for what, share in self.waits.shares(seconds).items()},
            committed=committed,
            wanted=wanted,
        )


def share(shard: tuple[int, int]) -> tuple[int, int]:
    """This process's number and how many there are, of all processes that torchrun has started for each shard."""
    process = this_process()
    return shard[0] * process.world_size + process.rank, shard[1] * process.world_size


def reading_workers(config: ExtractConfig) -> int:
    """How many samples are read at a time: decoding and resizing keep a CPU core each, and torchrun's processes of one
    machine share its cores.
    """
    return config.workers or default_workers(len(os.sched_getaffinity(0)) // this_process().local_world_size)


def default_workers(cores: int) -> int:
    """Of a process that has so many CPU cores."""
    return min(max(cores - 2, 2), 24)


@contextmanager
def reading(
    config: ExtractConfig, source: Source, builder: InputBuilder, device: torch.device, workers: int
) -> Iterator[Callable[[SampleRef], Prepared]]:
    """What reads and preprocesses a sample, in the threads that call it, `workers` at most: beside a GPU each has a
    process for it.

    Not for what comes through the network: the processes would not know what the others have fetched.
    """
    if device.type == "cuda" and not is_streamed(config.source):
        with ReadingProcesses(config, workers, pinned_for=device) as processes:
            yield processes
    else:
        yield Preparation(config, source, builder)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms; of cuBLAS too, which reads its setting when it is first used."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

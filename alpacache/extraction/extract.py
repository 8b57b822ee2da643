"""Stage one: the frozen VLM runs once over each sample, and what it leaves behind goes to a store.

    readers  -->  samples  -->  VLM and codec on the device  -->  committer  -->  store

The main thread feeds the device; threads read ahead of it and commit behind it (`pipeline`). What is committed is never
done again; what fails is quarantined and the run goes on.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.features import store_fields
from alpacache.cached_samples.identity import provenance, store_identity
from alpacache.driving.cameras import sort_cameras
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, InterruptedRunError, UsageError
from alpacache.extraction.committer import Committer
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.disk_room import check_room
from alpacache.extraction.failures import Failures
from alpacache.extraction.pipeline import SPARE_COPIES, Writers, groups
from alpacache.extraction.prefill import BatchSize, Group, Prefiller, StoredFeatures
from alpacache.extraction.preparation import VLM_DTYPE, PreparationSettings, Prepared
from alpacache.extraction.progress import ExtractProgress, ExtractReport
from alpacache.extraction.readers import Readers, open_readers, reading_workers
from alpacache.gpu.device import enter, own_device, restored_torch_threads
from alpacache.gpu.host_copies import HostCopies
from alpacache.interrupt import InterruptGuard
from alpacache.planning.time_model import prefill_batch
from alpacache.progress import OnProgress, ignore
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.source import FixedSource
from alpacache.sources.views import views_identity
from alpacache.torchrun import this_process
from cache_store import CODECS, CacheWriter
from cache_store.format.names import sample_key
from cache_store.writer import committed_keys


def extract(config: ExtractConfig, *, on_progress: OnProgress = ignore) -> ExtractReport:
    """Run the VLM over the selected samples that the store does not hold yet.

    Raises `UsageError` (and `IdentityMismatchError`) before anything is changed, `StoreFullError` when the disk is
    full, `DataError` when the source has gone, `DeviceMemoryError` when the GPU is too small, `InterruptedRunError`
    after a signal; in each case the same call goes on where it stopped.
    """
    device = own_device(config.device)
    enter(device)
    settings = PreparationSettings(
        source=config.source,
        model=config.model,
        cameras=sort_cameras(config.cameras),
        frames=config.frames,
        seed=config.seed,
        camera_names=config.camera_names,
        frame_numbers=config.frame_numbers,
    )
    stored = StoredFeatures(
        codec=CODECS.get(config.codec), hidden_states=config.hidden_states == "last", rollouts=config.tails
    )
    source = open_source(settings.source, cameras=settings.cameras)
    checkpoint = Checkpoint(config.model, vlm=config.vlm)
    builder = settings.input_builder(checkpoint)
    refs, unusable = select(source, split=config.split, t0=config.t0, samples=config.samples, views=config.views)
    if not refs and not unusable:
        raise UsageError(f"{config.source} has no sample in split {config.split!r}; choose another --split or --t0.")
    wanted = frozenset(sample_key(ref.sample_id) for ref in refs)
    worker, workers = share(config.shard)
    refs, unusable = refs[worker::workers], unusable[worker::workers]
    identity = store_identity(
        checkpoint,
        builder,
        cameras=settings.cameras,
        frames=config.frames,
        codec=config.codec,
        dtype=str(VLM_DTYPE).removeprefix("torch."),
        rollouts=config.tails,
        views=views_identity(config.views, seed=config.seed),
    )
    if not config.force:
        missing = _uncommitted(config.store, refs)
        check_room(config.store, missing, source, checkpoint, builder, settings=settings, stored=stored)
    fields = store_fields(
        hidden_states=stored.hidden_states, codec=stored.codec, rollouts=stored.rollouts, views=config.views > 1
    )
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    origin = provenance(source=source.name, device=hardware)
    with CacheWriter(config.store, fields=fields, identity=identity, provenance=origin) as writer:
        progress = ExtractProgress(config.store, wanted, selected=len(refs), on_progress=on_progress)
        failures = Failures(writer, progress, source=config.source)
        missing = _uncommitted(config.store, refs)
        todo = failures.settle(refs, unusable, missing, retry=config.retry_quarantined)
        if todo:
            if isinstance(source, FixedSource):
                source.expect(todo)
            at_once = prefill_batch(cameras=len(settings.cameras), frames=config.frames)
            batched = device.type == "cuda" and not config.deterministic
            batch = BatchSize(config.batch_size or (at_once if batched else 1), device=device)
            workers = min(reading_workers(config.workers), len(todo))
            with (
                _deterministic(config.deterministic),
                restored_torch_threads(),
                open_readers(settings, source, builder, device, workers=workers) as readers,
            ):
                prefiller = Prefiller.load(checkpoint, builder, stored, device)
                progress.start(len(todo))
                _run(todo, readers, prefiller, batch, writer, config.writers, progress, failures)
        names = [*(ref.sample_id for ref in refs), *(clip_id for clip_id, _ in unusable)]
        return progress.report(
            selected=len(names), already_there=len(refs) - len(missing), quarantined=failures.reasons(names)
        )


def _uncommitted(store: str, refs: Sequence[SampleRef]) -> list[SampleRef]:
    committed = committed_keys(store)
    return [ref for ref in refs if sample_key(ref.sample_id) not in committed]


def _run(
    todo: Sequence[SampleRef],
    readers: Readers,
    prefiller: Prefiller,
    batch: BatchSize,
    writer: CacheWriter,
    threads: int,
    progress: ExtractProgress,
    failures: Failures,
) -> None:
    """Extract the samples; `threads` commit them. Raises `InterruptedRunError` where a signal left some undone."""
    with (
        InterruptGuard() as guard,
        # A group leaves the device at once: it must not have to wait while the writers keep up.
        HostCopies(batch.device, threads + max(SPARE_COPIES, batch.size)) as copies,
        Writers(writer, copies, threads=threads) as writers,
        closing(_prepared(todo, readers, batch, failures, guard)) as samples,
    ):
        committer = Committer(writers, progress, failures)
        try:
            _prefill(progress.waits.timed("read", samples), prefiller, batch, committer, guard)
        finally:
            committer.hand_over()
        committer.finish()
    if guard.requested and progress.left:
        raise InterruptedRunError(
            f"stopped on request: {progress.extracted} samples of this run are committed to {writer.path}, "
            f"{progress.left} are left; run the same command again to go on."
        )


def _prepared(
    todo: Sequence[SampleRef], readers: Readers, batch: BatchSize, failures: Failures, guard: InterruptGuard
) -> Generator[Prepared]:
    """Samples ready for the VLM, in order, made ahead by threads; what cannot be used is quarantined here."""
    for ref, future in readers.read_ahead(todo, spare=2 * batch.size):
        try:
            yield future.result()
        except BadClipError as error:
            failures.check_source()
            failures.refuse(ref.sample_id, error)
        except OSError as error:
            raise failures.unreadable(ref.sample_id, error) from error
        if guard.requested:
            return


def _prefill(
    samples: Iterator[Prepared], prefiller: Prefiller, batch: BatchSize, committer: Committer, guard: InterruptGuard
) -> None:
    """Feed the device, one group ahead of what is committed; a group that does not fit is halved."""
    for group in groups(samples, length=lambda one: len(one.inputs.input_ids), size=lambda: batch.size):
        if guard.requested:
            return
        parts = deque([group])
        while parts:
            part = parts.popleft()
            begun = prefiller.begin(part)
            handed_over = committer.hand_over()  # while the device is busy with the next
            if isinstance(begun, Group):
                committer.pending = begun
            elif handed_over:
                parts.appendleft(part)  # there is room now
            else:
                batch.shrink(part, begun)
                committer.progress.batch_note = batch.note
                parts.extendleft((part[batch.size :], part[: batch.size]))


def share(shard: tuple[int, int]) -> tuple[int, int]:
    """This process's number and how many there are, among all that torchrun has started for each shard."""
    process = this_process()
    return shard[0] * process.world_size + process.rank, shard[1] * process.world_size


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

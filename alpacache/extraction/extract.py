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
from functools import cache
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of, some_layers, stored_dtypes
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.recognition import prompt_words
from alpacache.cached_samples.features import checked, store_fields
from alpacache.cached_samples.identity import (
    as_stored,
    other_options,
    provenance,
    store_codec,
    store_identity,
    telling,
)
from alpacache.driving.cameras import check_places, sort_cameras
from alpacache.driving.sample import SampleRef
from alpacache.driving.splits import parse_split
from alpacache.durable import check_store_place
from alpacache.errors import BadClipError, InterruptedRunError, UsageError
from alpacache.extraction.codec_choice import known_codec, learnt_codec, longer_than_learnt, warn_of
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.disk_room import check_room
from alpacache.extraction.failures import Failures
from alpacache.extraction.memory import plan_memory, told_plan
from alpacache.extraction.pipeline import SPARE_COPIES, Writers, read_ahead
from alpacache.extraction.prefill import BatchSize, Group, Prefiller, StoredFeatures
from alpacache.extraction.preparation import PreparationSettings, Prepared, first_readable
from alpacache.extraction.progress import ExtractProgress, ExtractReport
from alpacache.extraction.reading_process import Readers, open_readers, reading_workers
from alpacache.extraction.streamed_prefill import StreamedPrefiller, open_streamed
from alpacache.gpu.device import enter, has_kernels, own_device, restored_torch_threads
from alpacache.gpu.host_copies import HostCopies
from alpacache.interrupt import InterruptGuard
from alpacache.planning.prefill_plan import PrefillPlan
from alpacache.planning.time_model import worth_compiling
from alpacache.progress import OnNote, OnProgress, ignore, ignore_note
from alpacache.sources.registry import open_source
from alpacache.sources.routes import open_route_file
from alpacache.sources.selection import note_on_split, select
from alpacache.sources.source import FixedSource
from alpacache.sources.stretches import share_of, stretches
from alpacache.sources.views import views_identity
from alpacache.torchrun import this_process
from cache_store import CacheWriter, IdentityMismatchError, KVCodec, TransformCodec
from cache_store.format.names import sample_key
from cache_store.format.store_root import mismatch
from cache_store.writer import committed_keys, stored_identity

_log = logging.getLogger(__name__)

_NOTED_BYTES = 10**9
"""Weights that take long enough to read to be spoken of."""


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
    settings = PreparationSettings(
        source=config.source,
        model=config.model,
        cameras=sort_cameras(config.cameras),
        frames=config.frames,
        seed=config.seed,
        camera_names=config.camera_names,
        frame_numbers=config.frame_numbers,
        route=config.route,
        route_file=config.route_file,
        route_tokens=config.route_tokens,
        vlm_dtype=config.vlm_dtype,
        blank=sort_cameras(config.blank) if config.blank else (),
    )
    source = open_source(config.source, cameras=settings.cameras)
    checkpoint = Checkpoint(config.model, vlm=config.vlm)
    layers = some_layers(checkpoint, config.layers)
    builder = settings.input_builder(checkpoint)
    prompt = builder.format
    if not prompt.camera_names:
        check_places(settings.cameras, settings.blank)
    settings = replace(settings, camera_names=prompt.camera_names, frame_numbers=prompt.frame_numbers)
    file = open_route_file(config.route_file, source)
    routes, routed_us = settings.routes(source, file=file, t0=config.t0), None if file is None else file.times_us
    refs, unusable = select(
        source,
        split=config.split,
        split_by=parse_split(config.split_by),
        clips=config.clips,
        t0=config.t0,
        samples=config.samples,
        views=config.views,
        routed_us=routed_us,
    )
    if not refs and not unusable:
        raise UsageError(f"{config.source} has no sample in split {config.split!r}; choose another --split or --t0.")
    wanted = frozenset(sample_key(ref.sample_id) for ref in refs)
    worker, workers = share(config.shard)
    every = refs
    refs, unusable = share_of(refs, source, worker, workers), unusable[worker::workers]
    check_store_place(config.store)
    stored_before = stored_identity(config.store)
    codec = known_codec(
        config.codec, config.codec_from, stored_before, store=str(config.store), checkpoint=checkpoint, layers=layers
    )
    stored = StoredFeatures(
        codec=codec, hidden_states=config.hidden_states == "last", rollouts=config.tails, layers=layers
    )

    def identified(codec: KVCodec | None) -> dict[str, Any]:
        identity = store_identity(
            checkpoint,
            builder,
            cameras=settings.shown,
            blank=settings.blank,
            frames=config.frames,
            codec=config.codec,
            calibrated=codec,
            dtype=str(settings.dtype).removeprefix("torch."),
            rollouts=config.tails,
            views=views_identity(config.views, seed=config.seed),
            layers=layers,
        )
        return identity if stored_before is None else as_stored(identity, stored_before)

    identity = identified(codec)
    by = parse_split(config.split_by)
    lone = note_on_split(source, split_by=by, clips=config.clips)
    if config.split != "all" and lone is not None:
        on_note(lone)
    for note in _notes(checkpoint, builder, settings.dtype):
        on_note(note)
    missing = _uncommitted(config.store, refs)
    first = cache(lambda: first_readable(missing, source, builder, settings=settings, routes=routes))
    if not config.force:
        check_room(config.store, len(missing), first, checkpoint, builder, stored=stored)
    plan = None
    if missing:
        plan = plan_memory(
            config,
            len(missing),
            first,
            checkpoint,
            builder,
            settings=settings,
            stored=stored,
            device=device,
            workers=reading_workers(config.workers),
        )
    first.cache_clear()  # its pictures are large
    if plan is not None:
        on_note(told_plan(plan))
        size = geometry_of(checkpoint).vlm_parameters * settings.dtype.itemsize
        if size >= _NOTED_BYTES:
            on_note(f"{size / 1e9:.1f} GB of the VLM's weights are read before the first sample.")
    if isinstance(codec, TransformCodec):
        if plan is not None and plan.home != "gpu":
            raise UsageError(
                f"--codec {config.codec} encodes whole samples, but a VLM that the GPU does not hold gives one "
                "layer at a time; take --codec bf16 or int8, or a GPU that holds the VLM."
            )
        if codec.tables is None and stored_before is None:
            codec = learnt_codec(
                codec,
                every,
                checkpoint,
                builder,
                source=source,
                settings=settings,
                layers=layers,
                device=device,
                workers=reading_workers(config.workers),
                on_note=on_note,
            )
            if (stored_before := stored_identity(config.store)) is not None and stored_before.get(
                "codec"
            ) == config.codec:
                on_note("another worker has begun the store meanwhile; its codec is used.")
                codec = store_codec(stored_before, store=str(config.store))
            stored = replace(stored, codec=codec)
            identity = identified(codec)
    fields = store_fields(
        hidden_states=stored.hidden_states,
        codec=stored.codec,
        rollouts=stored.rollouts,
        views=config.views > 1,
        routes=config.route != "none",
    )
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    compiled = _compiles(config, device, checkpoint, images=len(missing) * len(settings.shown) * config.frames)
    if compiled:
        on_note("the VLM's layers are compiled in the first group of samples; --no-compile leaves that out.")
    origin = provenance(source=source.name, device=hardware, compiled=compiled)
    if config.split_by != "clip":
        origin["split"] = f"{config.split} by {config.split_by}"
    tables = codec.calibrated.to_bytes() if isinstance(codec, TransformCodec) and codec.sha256 else None
    try:
        opened = CacheWriter(config.store, fields=fields, identity=identity, provenance=origin, codec_tables=tables)
    except IdentityMismatchError as error:
        told = mismatch(config.store, telling(error.differences))
        said = [*other_options(identity, stored_before or {}), str(told)]
        raise IdentityMismatchError("\n".join(said), error.differences) from None
    with opened as writer:
        routed = config.route != "none"
        progress = ExtractProgress(config.store, wanted, selected=len(refs), routed=routed, on_progress=on_progress)
        failures = Failures(writer, progress, source=config.source)
        missing = _uncommitted(config.store, refs)
        todo = failures.settle(refs, unusable, missing, retry=config.retry_quarantined)
        if todo:
            workers = min(reading_workers(config.workers), len(todo))
            in_order = stretches(todo, source, workers=workers)
            if isinstance(source, FixedSource):
                source.expect([stretch[0] for stretch in in_order])
            streamed = plan is not None and plan.home != "gpu"
            rows = plan.rows if plan is not None else config.batch_size or 1
            batch = BatchSize(rows, device=device)
            if plan is not None and streamed:
                batch = BatchSize(plan.group, device=device, name="groups of")
            # A group leaves the device at once: it must not have to wait while the writers keep up.
            buffers = config.writers + max(SPARE_COPIES, batch.size)
            if plan is not None and streamed:
                buffers = max(plan.buffers, plan.group + SPARE_COPIES)
            with (
                _deterministic(config.deterministic),
                restored_torch_threads(),
                open_readers(settings, source, builder, device, workers=workers) as readers,
                HostCopies(device, buffers) as copies,
                _open_prefiller(
                    plan, checkpoint, builder, stored, device, settings.dtype, copies, compiled=compiled
                ) as prefiller,
            ):
                progress.start(len(todo))
                with InterruptGuard() as guard, Writers(writer, copies, threads=config.writers) as writers:
                    extraction = _Extraction(readers, prefiller, batch, writers, progress, failures, guard, codec)
                    extraction.over(in_order)
                warn_of(extraction.longer, codec, progress.extracted)
            if guard.requested and progress.left:
                raise InterruptedRunError(
                    f"stopped on request: {progress.extracted} samples of this run are committed to {writer.path}, "
                    f"{progress.left} are left; run the same command again to go on."
                )
        if progress.routeless:
            _log.warning(
                "none of %d samples of %s has a route: their prompts are those without routes.",
                progress.extracted,
                config.source,
            )
        names = [*(ref.sample_id for ref in refs), *(clip_id for clip_id, _ in unusable)]
        report = progress.report(
            selected=len(names), already_there=len(refs) - len(missing), quarantined=failures.records(names)
        )
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        return replace(report, memory=plan, peak_bytes=peak)


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
) -> Iterator[Prefiller | StreamedPrefiller]:
    """The VLM with its weights where the plan has them."""
    if plan is None or plan.home == "gpu":
        yield Prefiller(checkpoint, builder, stored, device, dtype=dtype, compiled=compiled)
        return
    given = plan, checkpoint, builder, stored, device
    with open_streamed(*given, dtype=dtype, copies=copies, compiled=compiled) as prefiller:
        yield prefiller


def _notes(checkpoint: Checkpoint, builder: InputBuilder, dtype: torch.dtype) -> Iterator[str]:
    """Say which prompt the VLM will see and why, and what its precision is if it is not the weights' own."""
    found = builder.recognition
    family = "unclear" if found.family is None else found.family.name
    asked = "" if found.family and builder.format == found.family.prompt else ", as asked for"
    yield (
        f"prompt: {prompt_words(builder.format)}{asked}. Family {family}: {found.text}. --camera-names, "
        "--frame-numbers and their --no- forms overrule it."
    )
    stored = stored_dtypes(checkpoint)
    if stored != {"F32" if dtype == torch.float32 else "BF16"}:
        runs = "float32" if dtype == torch.float32 else "bfloat16; --vlm-dtype fp32 keeps their precision"
        yield f"the VLM's weights are stored as {', '.join(sorted(stored))}, and it runs in {runs}."


def _compiles(config: ExtractConfig, device: torch.device, checkpoint: Checkpoint, *, images: int) -> bool:
    """Tell whether the VLM's layers are compiled for so many images: only on a GPU, as asked for or where it pays."""
    if device.type != "cuda" or config.deterministic or not images:
        return False
    if config.compile is not None:
        return config.compile
    return has_kernels(device) and worth_compiling(geometry_of(checkpoint).vlm_parameters, images=images)


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
    longer: dict[str, float] = field(default_factory=dict)
    """Samples that are unlike those the codec was learnt from, and how many times the bytes they take."""

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
            if (times := longer_than_learnt(self.codec, stored)) is not None:
                self.longer[sample_id] = times
            with self.progress.waits.of("write"):
                self.writers.put(sample_id, stored, made=group.made, copy=copy)
            self.progress.add_committed(self.writers.collect())
        return True


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

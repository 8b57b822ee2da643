"""A call of `extract` before anything is changed: samples and model chosen, memory planned, codec and store settled."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of, some_layers, stored_dtypes
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.recognition import prompt_words
from alpacache.cached_samples.features import store_fields
from alpacache.cached_samples.identity import (
    CHOICE,
    as_stored,
    other_options,
    provenance,
    store_identity,
    telling,
)
from alpacache.driving.cameras import check_places, sort_cameras
from alpacache.driving.sample import SampleRef
from alpacache.driving.splits import parse_split
from alpacache.durable import check_store_place
from alpacache.errors import BadClipError, UsageError
from alpacache.extraction.codec_choice import (
    CALIBRATION_SAMPLES,
    ChosenCodec,
    fits_beside,
    known_codec,
    lacks_tables,
    new_codec,
    tables_of,
)
from alpacache.extraction.codec_learning import read_source
from alpacache.extraction.codec_trial import TRIAL_SAMPLES, spread_over
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.disk_room import check_room
from alpacache.extraction.memory import plan_memory, told_plan
from alpacache.extraction.prefill import Prefiller, StoredFeatures
from alpacache.extraction.preparation import PreparationSettings, ReadSample, first_readable
from alpacache.extraction.reading_process import reading_workers
from alpacache.gpu.device import has_kernels
from alpacache.planning.prefill_plan import PrefillPlan
from alpacache.planning.time_model import worth_compiling
from alpacache.progress import OnNote
from alpacache.sources.registry import open_source
from alpacache.sources.routes import Routes, open_route_file
from alpacache.sources.selection import note_on_split, select
from alpacache.sources.source import Source, picture_changes
from alpacache.sources.stretches import share_of
from alpacache.sources.views import views_identity
from alpacache.torchrun import this_process
from cache_store import CacheWriter, IdentityMismatchError, KVCodec, TransformCodec
from cache_store.format.store_root import mismatch
from cache_store.writer import stored_identity, stored_provenance

_NOTED_BYTES = 10**9
"""Weights that take long enough to read to be spoken of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The samples of this worker and what they are made with, settled before anything is changed."""

    config: ExtractConfig
    device: torch.device
    on_note: OnNote
    source: Source
    settings: PreparationSettings
    checkpoint: Checkpoint
    builder: InputBuilder
    layers: tuple[int, ...] | None
    routes: Routes
    every: Sequence[SampleRef]
    """The samples of all workers together."""
    refs: Sequence[SampleRef]
    unusable: Sequence[tuple[str, BadClipError]]
    """Clips of this worker that give no sample."""

    @classmethod
    def of(cls, config: ExtractConfig, device: torch.device, on_note: OnNote) -> "Task":
        """Open source and model, and choose the samples. Raises `UsageError`."""
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
        routes = settings.routes(source, file=file, t0=config.t0)
        every, unusable = select(
            source,
            split=config.split,
            split_by=parse_split(config.split_by),
            clips=config.clips,
            t0=config.t0,
            samples=config.samples,
            views=config.views,
            routed_us=None if file is None else file.times_us,
        )
        if not every and not unusable:
            reason = f"has no sample in split {config.split!r}; choose another --split or --t0."
            raise UsageError(f"{config.source} {reason}")
        check_store_place(config.store)
        worker, workers = share(config.shard)
        return cls(
            config=config,
            device=device,
            on_note=on_note,
            source=source,
            settings=settings,
            checkpoint=checkpoint,
            builder=builder,
            layers=layers,
            routes=routes,
            every=every,
            refs=share_of(every, source, worker, workers),
            unusable=unusable[worker::workers],
        )

    def known_codec(self, before: Mapping[str, Any] | None) -> ChosenCodec | None:
        """The codec, as far as it is known; see `codec_choice.known_codec`."""
        config = self.config
        given: dict[str, Any] = {"checkpoint": self.checkpoint, "layers": self.layers}
        return known_codec(config.codec, config.codec_from, before, store=str(config.store), **given)

    def identity(self, chosen: ChosenCodec, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Identity of the store with this codec, in the form of the one that is there `before`."""
        identity = store_identity(
            self.checkpoint,
            self.builder,
            cameras=self.settings.shown,
            blank=self.settings.blank,
            frames=self.config.frames,
            codec=chosen.name,
            calibrated=chosen.codec,
            dtype=str(self.settings.dtype).removeprefix("torch."),
            rollouts=self.config.tails,
            views=views_identity(self.config.views, seed=self.config.seed),
            layers=self.layers,
            changes=picture_changes(self.source),
        )
        return identity if before is None else as_stored(identity, before)

    def tell_prompt(self) -> None:
        """Say what the split leaves out, which prompt the VLM will see and why, and in what precision it runs."""
        lone = note_on_split(self.source, split_by=parse_split(self.config.split_by), clips=self.config.clips)
        if self.config.split != "all" and lone is not None:
            self.on_note(lone)
        for note in _notes(self.checkpoint, self.builder, self.settings.dtype):
            self.on_note(note)

    def plan_memory(self, missing: Sequence[SampleRef], stored: StoredFeatures, *, sized: bool) -> PrefillPlan | None:
        """Look whether the missing samples fit on disk and device, and plan the memory of those that there are.

        `sized`: their codec is known, so that the disk can be looked at.
        """
        config, first = self.config, self._first(missing)
        if sized:
            self._check_room(missing, first, stored)
        if not missing:
            return None
        plan = plan_memory(
            config,
            len(missing),
            first,
            self.checkpoint,
            self.builder,
            settings=self.settings,
            stored=stored,
            device=self.device,
            workers=reading_workers(config.workers),
        )
        if plan is not None:
            self.on_note(told_plan(plan))
            size = geometry_of(self.checkpoint).vlm_parameters * self.settings.dtype.itemsize
            if size >= _NOTED_BYTES:
                self.on_note(f"{size / 1e9:.1f} GB of the VLM's weights are read before the first sample.")
        return plan

    def settle_codec(
        self,
        chosen: ChosenCodec | None,
        before: Mapping[str, Any] | None,
        plan: PrefillPlan | None,
        stored: StoredFeatures,
        missing: Sequence[SampleRef],
    ) -> tuple[ChosenCodec, Mapping[str, Any] | None, Prefiller | None]:
        """Choose the codec and learn its tables, if this worker begins the store and they are not known.

        Returns the codec, the identity of a store that is there by now, and the VLM if it had to be loaded.
        """
        if chosen is not None and not isinstance(chosen.codec, TransformCodec):
            return chosen, before, None
        config = self.config
        if plan is not None and plan.home != "gpu":
            raise UsageError(
                f"--codec {config.codec} encodes whole samples, but a VLM that the GPU does not hold gives one layer "
                "at a time; take --codec bf16 or int8, or a GPU that holds the VLM."
            )
        if chosen is not None and (before is not None or not lacks_tables(chosen.codec)):
            return chosen, before, None
        device, workers = self.device, reading_workers(config.workers)
        ready: Prefiller | None = Prefiller(self.checkpoint, self.builder, stored, device, dtype=self.settings.dtype)
        assert ready is not None
        spread = spread_over(self.every, TRIAL_SAMPLES if chosen is None else CALIBRATION_SAMPLES)
        samples = list(read_source(spread, ready, self.builder, self.source, self.settings, device, workers=workers))
        if chosen is None and not fits_beside(self.checkpoint, device):
            ready = None  # its VLM is read again
        chosen = new_codec(
            config.codec,
            chosen,
            samples,
            self.checkpoint,
            selected=len(self.every),
            layers=self.layers,
            device=device,
            on_note=self.on_note,
        )
        if (before := stored_identity(config.store)) is not None:
            return self._winners_codec(before), before, ready
        if chosen.name != config.codec:
            self._check_room(missing, self._first(missing), replace(stored, codec=chosen.codec))
        return chosen, before, ready

    def _winners_codec(self, before: Mapping[str, Any]) -> ChosenCodec:
        """The codec of the store that another worker has begun."""
        self.on_note("another worker has begun the store meanwhile; its codec is used.")
        chosen = self.known_codec(before)
        assert chosen is not None
        return chosen

    def _first(self, missing: Sequence[SampleRef]) -> Callable[[], ReadSample | None]:
        """Reads the first of these samples that can be read, once."""
        return cache(
            lambda: first_readable(missing, self.source, self.builder, settings=self.settings, routes=self.routes)
        )

    def _check_room(
        self, missing: Sequence[SampleRef], first: Callable[[], ReadSample | None], stored: StoredFeatures
    ) -> None:
        if not self.config.force:
            check_room(self.config.store, len(missing), first, self.checkpoint, self.builder, stored=stored)

    def compiles(self, samples: int) -> bool:
        """Tell whether the VLM's layers are compiled for so many samples, and say so."""
        images = samples * len(self.settings.shown) * self.config.frames
        compiled = _compiles(self.config, self.device, self.checkpoint, images=images)
        if compiled:
            self.on_note("the VLM's layers are compiled in the first group of samples; --no-compile leaves that out.")
        return compiled

    def open_store(
        self, stored: StoredFeatures, chosen: ChosenCodec, before: Mapping[str, Any] | None, *, compiled: bool
    ) -> tuple[CacheWriter, KVCodec | None]:
        """Begin the store or go on with it; also returns the codec, which is the store's where another was quicker.

        Raises `IdentityMismatchError` for one of other settings, in options.
        """
        try:
            return self._writer(stored, chosen, before, compiled=compiled), chosen.codec
        except IdentityMismatchError:
            now = stored_identity(self.config.store)
            if before is not None or now is None or tables_of(chosen.codec) is None:
                raise
        chosen = self._winners_codec(now)
        return self._writer(stored, chosen, now, compiled=compiled), chosen.codec

    def _writer(
        self, stored: StoredFeatures, chosen: ChosenCodec, before: Mapping[str, Any] | None, *, compiled: bool
    ) -> CacheWriter:
        config, identity = self.config, self.identity(chosen, before)
        fields = store_fields(
            hidden_states=stored.hidden_states,
            codec=chosen.codec,
            rollouts=stored.rollouts,
            views=config.views > 1,
            routes=config.route != "none",
        )
        hardware = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        origin = provenance(source=self.source.name, device=hardware, compiled=compiled)
        if config.split_by != "clip":
            origin["split"] = f"{config.split} by {config.split_by}"
        evidence = (stored_provenance(config.store) or {}).get(CHOICE, chosen.evidence)
        if evidence is not None:
            origin[CHOICE] = evidence
        tables = tables_of(chosen.codec)
        try:
            return CacheWriter(config.store, fields=fields, identity=identity, provenance=origin, codec_tables=tables)
        except IdentityMismatchError as error:
            told = mismatch(config.store, telling(error.differences))
            said = [*other_options(identity, before or {}), str(told)]
            raise IdentityMismatchError("\n".join(said), error.differences) from None


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


def share(shard: tuple[int, int]) -> tuple[int, int]:
    """This process's number and how many there are, among all that torchrun has started for each shard."""
    process = this_process()
    return shard[0] * process.world_size + process.rank, shard[1] * process.world_size

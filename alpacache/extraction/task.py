"""A call of `extract` before anything is changed: source and model opened, samples chosen, memory planned."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of, some_layers, stored_dtypes
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.recognition import prompt_words
from alpacache.driving.cameras import check_places, sort_cameras
from alpacache.driving.sample import SampleRef
from alpacache.driving.splits import parse_split
from alpacache.durable import check_store_place
from alpacache.errors import BadClipError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.memory import PrefillSettings, plan_memory, prefill_work, told_plan
from alpacache.extraction.prefill import StoredFeatures
from alpacache.extraction.preparation import PreparationSettings, ReadSample, first_readable
from alpacache.extraction.reading_process import reading_workers
from alpacache.gpu.device import has_kernels
from alpacache.planning.config import budget_bytes
from alpacache.planning.prefill_plan import PrefillPlan
from alpacache.planning.time_model import worth_compiling
from alpacache.progress import OnNote
from alpacache.sources.registry import open_source
from alpacache.sources.routes import Routes, open_route_file
from alpacache.sources.selection import note_on_split, select
from alpacache.sources.source import Source
from alpacache.sources.stretches import share_of
from alpacache.torchrun import this_process

_NOTED_BYTES = 10**9
"""Weights that take long enough to read to be spoken of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The samples of this worker and what they are made with, settled before anything is changed."""

    device: torch.device
    on_note: OnNote
    source: Source
    settings: PreparationSettings
    prefill: PrefillSettings
    checkpoint: Checkpoint
    builder: InputBuilder
    layers: tuple[int, ...] | None
    """The VLM's layers whose KV is stored, rising; None: all."""
    routes: Routes
    views: int
    """Views of each moment, the picture as it is among them."""
    note: str | None
    """Sentence on what the split leaves out; None: both of its sides have clips."""
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
        split_by = parse_split(config.split_by)
        every, unusable = select(
            source,
            split=config.split,
            split_by=split_by,
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
        budget, weights = config.memory_budget, config.weights
        prefill = PrefillSettings(
            workers=reading_workers(config.workers),
            writers=config.writers,
            batch_size=config.batch_size,
            deterministic=config.deterministic,
            compile=config.compile,
            home=None if weights == "auto" else weights,
            budget_bytes=None if budget is None else budget_bytes(budget),
        )
        return cls(
            device=device,
            on_note=on_note,
            source=source,
            settings=settings,
            prefill=prefill,
            checkpoint=checkpoint,
            builder=builder,
            layers=layers,
            routes=routes,
            views=config.views,
            note=None if config.split == "all" else note_on_split(source, split_by=split_by, clips=config.clips),
            every=every,
            refs=share_of(every, source, worker, workers),
            unusable=unusable[worker::workers],
        )

    def tell_prompt(self) -> None:
        """Say what the split leaves out, which prompt the VLM will see and why, in what precision it runs, and which
        options are for a GPU that is not there.
        """
        split = () if self.note is None else (self.note,)
        prompt = _notes(self.checkpoint, self.builder, self.settings.dtype)
        for note in chain(split, prompt, _without_gpu(self.prefill, self.device)):
            self.on_note(note)

    def first_of(self, missing: Sequence[SampleRef]) -> Callable[[], ReadSample | None]:
        """Reads the first of these samples that can be read, once and when it is needed."""
        return cache(
            lambda: first_readable(missing, self.source, self.builder, settings=self.settings, routes=self.routes)
        )

    def plan_memory(
        self, samples: int, first: Callable[[], ReadSample | None], stored: StoredFeatures
    ) -> PrefillPlan | None:
        """Plan the memory of so many samples, which are taken to be as large as the `first` one, and say it.

        None where nothing is to be planned: there is no sample, or the VLM lies in a CPU's RAM anyway. Raises
        `UsageError` where nothing fits.
        """
        prefill, settings = self.prefill, self.settings
        if not samples or (self.device.type == "cpu" and prefill.home in (None, "gpu")):
            return None
        work = prefill_work(
            first(),
            self.checkpoint,
            self.builder,
            settings,
            stored,
            samples=samples,
            rows=prefill.rows(len(settings.shown), settings.frames, self.device),
            ahead=prefill.workers + prefill.writers,
        )
        plan = plan_memory(work, prefill, self.device)
        self.on_note(told_plan(plan))
        size = work.geometry.vlm_parameters * settings.dtype.itemsize
        if size >= _NOTED_BYTES:
            self.on_note(f"{size / 1e9:.1f} GB of the VLM's weights are read before the first sample.")
        return plan

    def compiles(self, samples: int) -> bool:
        """Tell whether the VLM's layers are compiled for so many samples, and say so."""
        images = samples * len(self.settings.shown) * self.settings.frames
        compiled = _compiles(self.prefill, self.device, self.checkpoint, images=images)
        if compiled:
            self.on_note("the VLM's layers are compiled in the first group of samples; --no-compile leaves that out.")
        return compiled


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


def _without_gpu(asked: PrefillSettings, device: torch.device) -> Iterator[str]:
    """Name the options that change nothing on a CPU."""
    resident = asked.home in (None, "gpu")
    given = {
        "--weights gpu": asked.home == "gpu",
        "--memory-budget": resident and asked.budget_bytes is not None,
        "--compile": bool(asked.compile),
    }
    names = [name for name, is_given in given.items() if is_given]
    if device.type == "cpu" and names:
        yield f"without a GPU there is no use for {', '.join(names)}."


def _compiles(asked: PrefillSettings, device: torch.device, checkpoint: Checkpoint, *, images: int) -> bool:
    """Tell whether the VLM's layers are compiled for so many images: only on a GPU, as asked for or where it pays."""
    if device.type != "cuda" or asked.deterministic or not images:
        return False
    if asked.compile is not None:
        return asked.compile
    return has_kernels(device) and worth_compiling(geometry_of(checkpoint).vlm_parameters, images=images)


def share(shard: tuple[int, int]) -> tuple[int, int]:
    """This process's number and how many there are, among all that torchrun has started for each shard."""
    process = this_process()
    return shard[0] * process.world_size + process.rank, shard[1] * process.world_size

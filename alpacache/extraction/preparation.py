"""Reading and preprocessing of a sample before the VLM runs: its inputs, and the stored values known by then."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder, VLMInputs
from alpacache.cached_samples.features import sample_arrays
from alpacache.driving.cameras import sort_cameras
from alpacache.driving.resizing import ResizedPictures
from alpacache.driving.sample import FRAME_STEP_US, Sample, SampleRef
from alpacache.errors import BadClipError
from alpacache.sources.blank import with_blank
from alpacache.sources.registry import open_source
from alpacache.sources.routes import RouteFile, Routes, open_route_file
from alpacache.sources.source import OnePassSource, Source
from alpacache.sources.views import one_pass

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Precisions that the VLM may run in, by the names users write."""
_TRIED = 8
"""Samples that are tried until one can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationSettings:
    """Settings of reading and preprocessing samples; a reading process gets them as JSON."""

    source: str
    model: str
    cameras: tuple[str, ...]
    """Cameras that are read, sorted by index."""
    frames: int
    seed: int
    """Seed of the views' changes."""
    camera_names: bool | None
    """None: as the model was trained."""
    frame_numbers: bool | None
    route: str = "none"
    route_file: str | None = None
    route_tokens: bool | None = None
    vlm_dtype: Literal["bf16", "fp32"] = "bf16"
    blank: tuple[str, ...] = ()
    """Further cameras, which black pictures stand in for."""

    @property
    def shown(self) -> tuple[str, ...]:
        """All cameras of a prompt, black ones too, sorted by index."""
        return sort_cameras([*self.cameras, *self.blank])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the VLM's weights and of the pixels it sees."""
        return DTYPES[self.vlm_dtype]

    def input_builder(self, checkpoint: Checkpoint) -> InputBuilder:
        """Makes the prompt that these settings ask for."""
        return InputBuilder(
            checkpoint,
            camera_names=self.camera_names,
            frame_numbers=self.frame_numbers,
            routes=self.route,
            route_tokens=self.route_tokens,
        )

    def routes(self, source: Source, *, file: RouteFile | None = None, t0: str = "routes") -> Routes:
        """Gives samples of this source their routes. Raises `UsageError` where it has none, `SourceError` for a bad
        file."""
        return Routes(self.route, source, file=file or open_route_file(self.route_file, source), t0=t0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A sample on its way to the VLM. Its frames, most of its bytes, are gone already."""

    sample_id: str
    inputs: VLMInputs
    """Pixels as the VLM takes them: in bfloat16 half the size of `InputBuilder`'s."""
    arrays: dict[str, Any]
    """Stored values that are known before the VLM runs: arrays, texts, lists of texts."""


class Preparation:
    """Reads and preprocesses samples; may be called in several threads."""

    def __init__(self, settings: PreparationSettings, source: Source, builder: InputBuilder) -> None:
        self._settings, self._source, self._builder = settings, source, builder
        self._routes = settings.routes(source)

    @classmethod
    def open(cls, settings: PreparationSettings) -> "Preparation":
        """Opens source and model by their names."""
        source = open_source(settings.source, cameras=settings.cameras)
        return cls(settings, source, settings.input_builder(Checkpoint(settings.model)))

    def __call__(self, ref: SampleRef) -> Prepared:
        """Raises `BadClipError` for a recording that cannot be used, `OSError` where it cannot be read."""
        with self.one_pass([ref]) as prepare:
            return prepare(ref)

    @contextmanager
    def one_pass(self, refs: Sequence[SampleRef]) -> Iterator[Callable[[SampleRef], Prepared]]:
        """A function that prepares these samples of one clip, given in the order of their times; see `views.one_pass`.

        To be called for each in that order from one thread. It gives and raises what each would alone.
        """
        settings = self._settings
        seen = ResizedPictures() if self._share_pictures(refs) else None
        cameras, frames = settings.cameras, settings.frames
        with one_pass(self._source, refs, cameras=cameras, frames=frames, seed=settings.seed) as load:

            def prepare(ref: SampleRef) -> Prepared:
                sample = with_blank(load(ref), settings.blank)
                inputs = self._builder.build(self._routes(sample), seen=None if ref.view else seen)
                inputs = replace(inputs, pixel_values=inputs.pixel_values.to(settings.dtype))
                return Prepared(sample_id=ref.sample_id, inputs=inputs, arrays=sample_arrays(sample, inputs))

            yield prepare

    def _share_pictures(self, refs: Sequence[SampleRef]) -> bool:
        """Tell whether two of these samples may have a picture in common that no view changes."""
        times = sorted(ref.t0_us for ref in refs if ref.view == 0)
        span_us = self._settings.frames * FRAME_STEP_US
        near = any(later - time <= span_us for time, later in pairwise(times))
        return near and isinstance(self._source, OnePassSource)


class ReadSample(NamedTuple):
    """A sample that could be read, for what its sizes tell of the others."""

    ref: SampleRef
    sample: Sample
    inputs: VLMInputs


def first_readable(
    refs: Sequence[SampleRef],
    source: Source,
    builder: InputBuilder,
    *,
    settings: PreparationSettings,
    routes: Routes,
) -> ReadSample | None:
    """The first of these samples that can be read; None where the first eight cannot."""
    for ref in refs[:_TRIED]:
        try:
            sample = source.load(replace(ref, view=0), cameras=settings.cameras, frames=settings.frames)
            sample = routes(with_blank(sample, settings.blank))
            return ReadSample(ref, sample, builder.build(sample))
        except (BadClipError, OSError):  # what is wrong with it is told when it is its turn
            continue
    return None

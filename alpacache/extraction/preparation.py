"""Reading and preprocessing of a sample before the VLM runs: its inputs, and the stored values known by then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder, VLMInputs
from alpacache.cached_samples.features import sample_arrays
from alpacache.driving.sample import Sample, SampleRef
from alpacache.errors import BadClipError
from alpacache.sources.registry import open_source
from alpacache.sources.routes import RouteFile, Routes, open_route_file
from alpacache.sources.source import Source
from alpacache.sources.views import load

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
    """Sorted by index."""
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
        settings = self._settings
        sample = load(self._source, ref, cameras=settings.cameras, frames=settings.frames, seed=settings.seed)
        inputs = self._builder.build(self._routes(sample))
        inputs = replace(inputs, pixel_values=inputs.pixel_values.to(settings.dtype))
        return Prepared(sample_id=ref.sample_id, inputs=inputs, arrays=sample_arrays(sample, inputs))


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
            sample = routes(source.load(replace(ref, view=0), cameras=settings.cameras, frames=settings.frames))
            return ReadSample(ref, sample, builder.build(sample))
        except (BadClipError, OSError):  # what is wrong with it is told when it is its turn
            continue
    return None

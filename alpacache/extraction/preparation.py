"""What stage one makes of a sample before the VLM runs: its inputs, and what is stored of it and known by then."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder, VLMInputs
from alpacache.cached_samples.features import sample_arrays
from alpacache.driving.sample import SampleRef, sort_cameras
from alpacache.extraction.config import ExtractConfig
from alpacache.sources import open_source
from alpacache.sources.source import Source
from alpacache.sources.views import load

VLM_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A sample on its way to the VLM. Its frames, most of its bytes, are gone already."""

    sample_id: str
    inputs: VLMInputs
    """Pixels as the VLM takes them, at half the size of `InputBuilder`'s."""
    arrays: dict[str, Any]
    """What is stored of it and known before the VLM runs: arrays, texts, lists of texts."""


class Preparation:
    """Reads and preprocesses the samples of one configuration; may be called in several threads."""

    def __init__(self, config: ExtractConfig, source: Source, builder: InputBuilder) -> None:
        self._source, self._builder = source, builder
        self._cameras, self._frames, self._seed = sort_cameras(config.cameras), config.frames, config.seed

    @classmethod
    def of(cls, config: ExtractConfig) -> "Preparation":
        """With source and model opened."""
        checkpoint = Checkpoint(config.model, vlm=config.vlm)
        return cls(
            config, open_source(config.source, cameras=sort_cameras(config.cameras)), input_builder(config, checkpoint)
        )

    def __call__(self, ref: SampleRef) -> Prepared:
        """Raises `BadClipError` for a recording that cannot be used, `OSError` where it cannot be read."""
        sample = load(self._source, ref, cameras=self._cameras, frames=self._frames, seed=self._seed)
        inputs = self._builder.build(sample)
        inputs = replace(inputs, pixel_values=inputs.pixel_values.to(VLM_DTYPE))
        return Prepared(sample_id=ref.sample_id, inputs=inputs, arrays=sample_arrays(sample, inputs))


def input_builder(config: ExtractConfig, checkpoint: Checkpoint) -> InputBuilder:
    """Of the prompt that the configuration asks for."""
    return InputBuilder(checkpoint, camera_names=config.camera_names, frame_numbers=config.frame_numbers)

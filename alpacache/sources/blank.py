"""Black pictures that keep the places of absent cameras: with a camera left out the others move up, and the model sees
each in the place of another.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from alpacache.driving.cameras import sort_cameras
from alpacache.driving.sample import Sample
from alpacache.sources.recording import wanted_frame_times_us


def with_blank(sample: Sample, blank: Sequence[str]) -> Sample:
    """The sample with black pictures of further cameras, of the recorded ones' size, as of the instants asked for."""
    if not blank:
        return sample
    names, count = sort_cameras([*sample.cameras, *blank]), sample.frames.shape[1]
    places = [names.index(name) for name in sample.cameras]
    frames = np.zeros_like(sample.frames, shape=(len(names), *sample.frames.shape[1:]))
    frames[places] = sample.frames
    stamps = np.tile(wanted_frame_times_us(sample.ref.t0_us, count), (len(names), 1))
    stamps[places] = sample.frame_timestamps_us
    black = tuple(name for name in names if name not in sample.cameras)
    return replace(sample, cameras=names, frames=frames, frame_timestamps_us=stamps, blank=black)

"""Views: seeded augmentations of a sample's pictures. An expert that sees one fixed prefix a clip learns it by heart.

View 0 is the pictures as they are. A higher one is a small crop, enlarged to the full size again, and a small change of
brightness, contrast, saturation and gamma: the same for every camera and frame of a sample, so that what moves between
frames still moves as it did. The numbers follow from seed, clip, t0 and view number alone, and are stored with the
sample.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from alpacache import randomness
from alpacache.driving.sample import Sample, SampleRef
from alpacache.errors import BadClipError
from alpacache.sources.source import OnePassSource, Source

METHOD = "crop-colour-v1"
"""Names what `apply` computes, in a store's identity."""
RANGES: Mapping[str, tuple[float, float]] = {
    "brightness": (0.85, 1.15),
    "contrast": (0.85, 1.15),
    "saturation": (0.8, 1.2),
    "gamma": (0.85, 1.15),
    "keep": (0.95, 1.0),
}
"""Ranges of uniform draws; the place of the crop is uniform over where it fits."""
_DIGITS = 4
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, slots=True, kw_only=True)
class Jitter:
    """Changes to all pictures of one sample; 1, 1, 1, 1, 1, 0, 0 changes nothing.

    Colour values run from 0 to 1. Brightness is a factor of each, contrast one of its distance from 0.5, saturation one
    of its distance from the pixel's grey, and gamma its exponent. The crop keeps the share `keep` of height and width;
    its top and left edges are shares of them too.
    """

    brightness: float
    contrast: float
    saturation: float
    gamma: float
    keep: float
    top: float
    left: float


def draw(ref: SampleRef, *, seed: int) -> Jitter:
    """Draw the jitter of a view above 0."""
    generator = randomness.generator("view", seed, ref.clip_id, ref.t0_us, ref.view)
    uniform = torch.rand(len(RANGES) + 2, generator=generator, dtype=torch.float64).tolist()
    ranges = zip(RANGES.items(), uniform, strict=False)
    drawn = {name: round(low + (high - low) * u, _DIGITS) for (name, (low, high)), u in ranges}
    top, left = (round((1 - drawn["keep"]) * u, _DIGITS) for u in uniform[len(RANGES) :])
    return Jitter(**drawn, top=top, left=left)


def apply(frames: NDArray[np.uint8], jitter: Jitter) -> NDArray[np.uint8]:
    """Jitter RGB pictures `[..., 3, H, W]`, one at a time, since a float copy of all is large."""
    height, width = frames.shape[-2:]
    rows, columns = _crop(height, jitter.keep, jitter.top), _crop(width, jitter.keep, jitter.left)
    values = np.arange(256) / 255 * jitter.brightness
    values = np.clip((values - 0.5) * jitter.contrast + 0.5, 0, 1) ** jitter.gamma
    table = values.astype(np.float32)  # what these make of each uint8 value
    pictures = frames.reshape(-1, *frames.shape[-3:])
    jittered = np.empty(pictures.shape, np.uint8)
    for number, picture in enumerate(pictures):
        pixels = torch.from_numpy(table[picture[:, rows, columns]])
        grey = sum(weight * channel for weight, channel in zip(_LUMA, pixels, strict=True))
        pixels = (grey + jitter.saturation * (pixels - grey)).clamp_(0, 1)[None]
        if pixels.shape[2:] != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
        jittered[number] = (pixels[0] * 255).round_().clamp_(0, 255).to(torch.uint8).numpy()
    return jittered.reshape(frames.shape)


@contextmanager
def one_pass(
    source: Source, refs: Sequence[SampleRef], *, cameras: Sequence[str], frames: int, seed: int
) -> Iterator[Callable[[SampleRef], Sample]]:
    """A function that loads these samples of one clip, given in the order of their times; sources know view 0 alone.

    To be called for each in that order, from one thread. The views of one moment share its pictures, and moments what
    the source lets them share (`OnePassSource`). The function raises `BadClipError` as sources do, for a sample alone.
    A jittered sample has no calibration: the camera's does not fit the crop.
    """
    left = Counter(ref.t0_us for ref in refs)
    plain = [SampleRef(clip_id=refs[0].clip_id, t0_us=t0_us) for t0_us in left]
    at_hand: dict[int, Sample | BadClipError] = {}

    with ExitStack() as opened:
        load: Callable[[SampleRef], Sample] = partial(source.load, cameras=cameras, frames=frames)
        if len(plain) > 1 and isinstance(source, OnePassSource):
            load = opened.enter_context(source.one_pass(plain, cameras=cameras, frames=frames))

        def load_view(ref: SampleRef) -> Sample:
            found = at_hand.pop(ref.t0_us, None)
            at_hand.clear()  # a moment's pictures do not wait for those of the next
            if found is None:
                try:
                    found = load(replace(ref, view=0))
                except BadClipError as error:
                    found = error
            left[ref.t0_us] -= 1
            if left[ref.t0_us] > 0:
                at_hand[ref.t0_us] = found
            if isinstance(found, BadClipError):
                raise found
            if ref.view == 0:
                return found
            jitter = draw(ref, seed=seed)
            seen = apply(found.frames, jitter)
            return replace(found, ref=ref, frames=seen, calibration=None, jitter=asdict(jitter))

        yield load_view


def views_identity(views: int, *, seed: int) -> dict[str, Any] | None:
    """The part of a store's identity that says how its views are made, but not how many: more may be added later.

    None without views, so that a store without them has the same identity as before views existed.
    """
    if views == 1:
        return None
    return {"method": METHOD, "seed": seed, "ranges": {name: list(bounds) for name, bounds in RANGES.items()}}


def _crop(length: int, keep: float, start: float) -> slice:
    """The whole pixels along one axis that a crop keeps."""
    kept = max(1, round(keep * length))
    first = min(round(start * length), length - kept)
    return slice(first, first + kept)

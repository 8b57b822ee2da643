"""The eyes of a driver: a moment's frames, through prompt and frozen VLM, become the prefix that experts plan from.

The VLM and its prompt are the same for every expert, so several drivers share one observer and look once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder, VLMInputs
from alpacache.driver.arguments import camera_names
from alpacache.driver.moment import moment_of
from alpacache.driving.cameras import check_blank
from alpacache.driving.poses import Track
from alpacache.driving.sample import Sample
from alpacache.errors import UsageError
from alpacache.prefix.prefix import PrefixFeatures, Tail
from alpacache.sources.blank import with_blank

if TYPE_CHECKING:
    from alpacache.alpamayo import FrozenVLM
    from alpacache.alpamayo.rollout import RolloutSampler

FRAMES = 4
"""Frames of each camera that the public models see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenMoment:
    """A moment that the VLM has seen: what every expert on it can drive from."""

    sample: Sample
    inputs: VLMInputs
    prefix: PrefixFeatures
    """The prefix as the VLM computed it, still on its device."""
    track: Track


class Observer:
    """The frozen VLM with its prompt, and the cameras and frames that it sees."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        vlm: "FrozenVLM",
        builder: InputBuilder,
        *,
        frames: int = FRAMES,
        blank: Sequence[str] = (),
    ) -> None:
        """
        Args:
            frames: of each camera, 0.1 s apart.
            blank: cameras that black pictures stand in for.
        """
        self.checkpoint, self.frames, self.blank = checkpoint, frames, tuple(blank)
        self._vlm, self._builder = vlm, builder
        self._rollouts: RolloutSampler | None = None
        self._checks: Callable[[Checkpoint], None] | None = getattr(vlm, "check_weights", None)

    @property
    def takes_routes(self) -> bool:
        """Tell whether the prompt has a place for a route."""
        return self._builder.format.route is not None

    def check_takes_routes(self) -> None:
        """Raise `UsageError` where the prompt has no place for a route."""
        if not self.takes_routes:
            raise UsageError(
                f"{self.checkpoint.model} is of family {self._builder.family.name}, whose prompt has no place for a "
                "route; leave it out."
            )

    def look(
        self,
        frames: NDArray[np.uint8],
        frame_times_us: ArrayLike,
        track: Track,
        *,
        cameras: Sequence[str],
        t0_us: int | None = None,
        route: str | None = None,
        name: str = "drive",
    ) -> SeenMoment:
        """Have the VLM see a moment; arguments and errors are those of `Driver.__call__`."""
        if route is not None:
            self.check_takes_routes()
        names = camera_names(cameras, "cameras")
        check_blank(names, self.blank)
        sample = moment_of(
            frames,
            frame_times_us,
            track,
            cameras=names,
            count=self.frames,
            t0_us=t0_us,
            route=route,
            name=name,
        )
        return self.see(with_blank(sample, self.blank), track)

    @torch.inference_mode(False)  # what is kept for later calls must not be of the caller's inference mode
    def see(self, sample: Sample, track: Track) -> SeenMoment:
        """Have the VLM see a sample; `track` places its ego frame in the world."""
        on_gpu = self._vlm.device if self._vlm.device.type == "cuda" else None
        inputs = self._builder.build(sample, device=on_gpu)
        inputs = replace(inputs, pixel_values=inputs.pixel_values.to(self._vlm.dtype))
        (prefix,) = self._prefixes([inputs])
        return SeenMoment(sample=sample, inputs=inputs, prefix=prefix, track=track)

    @torch.inference_mode(False)
    def see_together(self, samples: Sequence[Sample], tracks: Sequence[Track]) -> list[SeenMoment]:
        """`see` several samples at once; the same to rounding, and faster where each alone is small."""
        inputs = [self._builder.build(sample) for sample in samples]
        inputs = [replace(one, pixel_values=one.pixel_values.to(self._vlm.dtype)) for one in inputs]
        together = zip(samples, inputs, self._prefixes(inputs), tracks, strict=True)
        return [SeenMoment(sample=one, inputs=given, prefix=made, track=track) for one, given, made, track in together]

    def _prefixes(self, inputs: Sequence[VLMInputs]) -> list[PrefixFeatures]:
        prefixes = self._vlm.prefill_batch(inputs)
        if self._checks is not None:  # weights that came for the first time
            self._checks(self.checkpoint)
            self._checks = None
        return prefixes

    def reasoned(self, seen: SeenMoment, rollouts: int) -> list[Tail]:
        """Tails of reasoning rollouts, as a store holds them."""
        from alpacache.alpamayo.rollout import RolloutSampler
        from alpacache.alpamayo.streamed_vlm import StreamedVLM

        if self._rollouts is None:
            if isinstance(self._vlm, StreamedVLM):
                raise UsageError(
                    "reasoning needs the VLM's weights on the device, because each token goes through all of them; "
                    "drive without it, or with a larger memory budget."
                )
            self._rollouts = RolloutSampler.load(self.checkpoint, self._vlm, self._builder)
        route = seen.inputs.route
        question = None if route is None else self._builder.tail_ids("rollout", route=route)
        key = seen.sample.ref.sample_id
        tails = self._rollouts.sample(seen.prefix, seen.inputs.stem_len, rollouts=rollouts, key=key, question=question)
        return [replace(tail, keys=tail.keys.bfloat16(), values=tail.values.bfloat16()) for tail in tails]


def as_stored(prefix: PrefixFeatures) -> PrefixFeatures:
    """A prefix rounded as stores hold it."""
    return replace(prefix, keys=prefix.keys.bfloat16(), values=prefix.values.bfloat16(), hidden=None)

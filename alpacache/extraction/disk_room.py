"""A look, before the first sample is extracted, whether all that are missing fit on the disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import MAX_TOKENS
from alpacache.cached_samples.features import sample_arrays
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.extraction.prefill import StoredFeatures
from alpacache.extraction.preparation import PreparationSettings
from alpacache.planning.machine import existing_folder
from alpacache.planning.sample_size import planned_prompt, sample_bytes
from alpacache.sources.routes import Routes
from alpacache.sources.source import Source
from cache_store.storage.local_files import free_bytes
from cache_store.storage.storage import is_uri

_TRIED = 8
"""Samples that are tried until one can be read."""


def check_room(
    store: Path | str,
    refs: Sequence[SampleRef],
    source: Source,
    checkpoint: Checkpoint,
    builder: InputBuilder,
    *,
    settings: PreparationSettings,
    stored: StoredFeatures,
    routes: Routes,
) -> None:
    """Raise `UsageError` if the disk under the store has no room for these samples, each as large as the first.

    Reasoning rollouts, whose length nobody knows beforehand, count at their longest. Where none of the first eight
    samples can be read nothing is known, and nothing refused. Object storage has room for all.
    """
    if is_uri(store):
        return
    for ref in refs[:_TRIED]:
        try:
            sample = routes(source.load(replace(ref, view=0), cameras=settings.cameras, frames=settings.frames))
            inputs = builder.build(sample)
        except (BadClipError, OSError):  # what is wrong with it is told when it is its turn
            continue
        rollouts, route = stored.rollouts, sample.route
        frames, _, *picture = sample.frames.shape[1:]
        sizes = sample_bytes(
            geometry_of(checkpoint),
            planned_prompt(builder, sample.cameras, frames=frames, picture=picture, route=route),
            codec=stored.codec,
            hidden_states=stored.hidden_states,
            clip_id=ref.clip_id,
            jpeg_bytes=len(sample_arrays(sample, inputs).get("front_jpeg", b"")),
            rollouts=rollouts,
        )
        one, free = sum(sizes.values()), free_bytes(existing_folder(store))
        needed = one * len(refs)
        if needed > free:
            bound = f" (at most: {rollouts} reasoning rollouts of {MAX_TOKENS} tokens)" if rollouts else ""
            fewer = ", fewer --rollouts" if rollouts else ""
            raise UsageError(
                f"{store}: {len(refs):,} samples of {one:,} bytes{bound} need {needed:,} bytes, {free:,} are free. "
                f"Nothing was written. Make room, take a smaller --codec, fewer --samples{fewer} or --hidden-states "
                "none, or begin all the same with --force: what fits is kept."
            )
        return

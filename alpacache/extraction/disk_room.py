"""A look, before the first sample is extracted, whether all that are missing fit on the disk."""

from collections.abc import Callable
from pathlib import Path

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.rollout import MAX_TOKENS
from alpacache.cached_samples.features import sample_arrays
from alpacache.errors import UsageError
from alpacache.extraction.prefill import StoredFeatures
from alpacache.extraction.preparation import ReadSample
from alpacache.planning.machine import existing_folder
from alpacache.planning.sample_size import planned_prompt, sample_bytes
from cache_store.storage.local_files import free_bytes
from cache_store.storage.storage import is_uri


def check_room(
    store: Path | str,
    count: int,
    first: Callable[[], ReadSample | None],
    checkpoint: Checkpoint,
    builder: InputBuilder,
    *,
    stored: StoredFeatures,
) -> None:
    """Raise `UsageError` if the disk under the store has no room for so many samples, each as large as the first.

    Reasoning rollouts, whose length nobody knows beforehand, count at their longest. Where `first` finds none that can
    be read nothing is known, and nothing refused. Object storage has room for all.
    """
    if is_uri(store) or (found := first()) is None:
        return
    sample, rollouts = found.sample, stored.rollouts
    frames, _, *picture = sample.frames.shape[1:]
    sizes = sample_bytes(
        geometry_of(checkpoint),
        planned_prompt(builder, sample.cameras, frames=frames, picture=picture, route=sample.route),
        codec=stored.codec,
        hidden_states=stored.hidden_states,
        clip_id=found.ref.clip_id,
        jpeg_bytes=len(sample_arrays(sample, found.inputs).get("front_jpeg", b"")),
        rollouts=rollouts,
        layers=stored.layers,
    )
    one, free = sum(sizes.values()), free_bytes(existing_folder(store))
    needed = one * count
    if needed > free:
        bound = f" (at most: {rollouts} reasoning rollouts of {MAX_TOKENS} tokens)" if rollouts else ""
        fewer = ", fewer --rollouts" if rollouts else ""
        raise UsageError(
            f"{store}: {count:,} samples of {one:,} bytes{bound} need {needed:,} bytes, {free:,} are free. "
            f"Nothing was written. Make room, take a smaller --codec, fewer --samples{fewer} or --hidden-states "
            "none, or begin all the same with --force: what fits is kept."
        )

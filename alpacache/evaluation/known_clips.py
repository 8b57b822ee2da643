"""Clips that a run is judged on though it was trained on them: what it knows by heart would count as skill."""

from collections.abc import Mapping, Sequence
from typing import Any

from alpacache.cached_samples.identity import ids_digest
from alpacache.driving.sample import SampleRef
from cache_store import CacheReader, CacheStoreError


def count_known_clips(stores: Sequence[Mapping[str, Any]], judged: Sequence[str], clips: set[str]) -> int:
    """Count those of some clips that a run was trained on.

    `stores` are those in the run's settings; one counts only if its samples can be told: it is the store that is judged
    on, whose sample ids are `judged`, or lies where it lay, and has the samples that it had.
    """
    known: set[str] = set()
    digest = ids_digest(judged)
    for record in stores:
        sample_ids = judged
        if record["ids_sha256"] != digest:
            if "://" in record["path"]:  # what is far away may take long to answer
                continue
            try:
                sample_ids = CacheReader(record["path"]).sample_ids
            except (CacheStoreError, OSError):
                continue
            if ids_digest(sample_ids) != record["ids_sha256"]:
                continue
        known |= {SampleRef.parse(sample_id).clip_id for sample_id in sample_ids}
    return len(known & clips)

"""Samples that a run was trained on, as far as can be told: what it knows by heart would count as skill."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alpacache.cached_samples.identity import ids_digest
from alpacache.driving.sample import SampleRef
from alpacache.errors import UsageError
from alpacache.sources.name_lists import read_names
from alpacache.training.run_names import CHOICE, SAMPLES
from cache_store import CacheReader, CacheStoreError


def trained_samples(checkpoint: Path, settings: Mapping[str, Any], judged: Sequence[Sequence[str]]) -> list[SampleRef]:
    """Samples that a run was trained on.

    `settings` are the run's; it has noted those that it chose, if it did not take all of its stores. Else a store
    counts only if its samples can be told: it is one of those that are judged on, which hold `judged`, or lies where it
    lay, and has the samples that it had.
    """
    if CHOICE in settings:
        noted = checkpoint.parent.parent / SAMPLES
        try:
            chosen = read_names(str(noted), ["sample_id"], what=str(noted))
        except UsageError:
            return []
        return [SampleRef.parse(sample_id) for sample_id in chosen]
    known: set[str] = set()
    of_digest = {ids_digest(sample_ids): sample_ids for sample_ids in judged}
    for record in settings["stores"]:
        if (sample_ids := of_digest.get(record["ids_sha256"])) is not None:
            known |= set(sample_ids)
        elif "://" not in record["path"]:  # what is far away may take long to answer
            try:
                there = CacheReader(record["path"]).sample_ids
            except (CacheStoreError, OSError):
                continue
            if ids_digest(there) == record["ids_sha256"]:
                known |= set(there)
    return [SampleRef.parse(sample_id) for sample_id in known]

"""The store that a run of `extract` begins or goes on with: its codec, its identity, its writer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from alpacache.cached_samples.features import store_fields
from alpacache.cached_samples.identity import (
    CHOICE,
    as_stored,
    other_options,
    provenance,
    store_identity,
    telling,
)
from alpacache.errors import UsageError
from alpacache.extraction.codec_choice import (
    CALIBRATION_SAMPLES,
    ChosenCodec,
    fits_beside,
    known_codec,
    lacks_tables,
    new_codec,
    tables_of,
)
from alpacache.extraction.codec_learning import WholeSample, read_source
from alpacache.extraction.codec_trial import TRIAL_SAMPLES, spread_over
from alpacache.extraction.disk_room import check_room
from alpacache.extraction.prefill import Prefiller, StoredFeatures
from alpacache.extraction.preparation import ReadSample
from alpacache.extraction.task import Task
from alpacache.planning.prefill_plan import PrefillPlan
from alpacache.sources.source import picture_changes
from alpacache.sources.views import views_identity
from cache_store import CacheWriter, IdentityMismatchError, KVCodec, LearntCodec
from cache_store.format.store_root import mismatch
from cache_store.writer import stored_identity, stored_provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStore:
    """The store that a task's samples go to. Another worker may begin it at any time, and its codec is used then."""

    task: Task
    path: str
    codec: str
    """Name of the codec that is asked for, `auto:2%` among them."""
    codec_from: str | None
    """Store whose tables are taken rather than learnt."""
    force: bool
    """Begin even if the disk has no room for all of it."""
    split: str | None
    """The split as provenance has it; None: by clip, which goes without saying."""

    def known_codec(self, before: Mapping[str, Any] | None) -> ChosenCodec | None:
        """The codec, as far as it is known; see `codec_choice.known_codec`."""
        given: dict[str, Any] = {"checkpoint": self.task.checkpoint, "layers": self.task.layers}
        return known_codec(self.codec, self.codec_from, before, store=self.path, **given)

    def _identity(
        self, stored: StoredFeatures, chosen: ChosenCodec, before: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Identity of the store with this codec, in the form of the one that is there `before`."""
        task, settings = self.task, self.task.settings
        identity = store_identity(
            task.checkpoint,
            task.builder,
            cameras=settings.shown,
            blank=settings.blank,
            frames=settings.frames,
            codec=chosen.name,
            calibrated=chosen.codec,
            dtype=str(settings.dtype).removeprefix("torch."),
            rollouts=stored.rollouts,
            views=views_identity(task.views, seed=settings.seed),
            layers=task.layers,
            changes=picture_changes(task.source),
        )
        return identity if before is None else as_stored(identity, before)

    def check_room(self, samples: int, first: Callable[[], ReadSample | None], stored: StoredFeatures) -> None:
        """Raise `UsageError` if the disk has no room for so many samples, each as large as the `first`."""
        if not self.force:
            check_room(self.path, samples, first, self.task.checkpoint, self.task.builder, stored=stored)

    def settle_codec(
        self,
        chosen: ChosenCodec | None,
        before: Mapping[str, Any] | None,
        plan: PrefillPlan | None,
        stored: StoredFeatures,
        *,
        samples: int,
        first: Callable[[], ReadSample | None],
    ) -> tuple[ChosenCodec, Mapping[str, Any] | None, Prefiller | None]:
        """Choose the codec and learn its tables, if this worker begins the store and they are not known.

        `samples`: how many are to be extracted, the `first` of them being as large as the others.

        Returns the codec, the identity of a store that is there by now, and the VLM if it had to be loaded.
        """
        if chosen is not None and not isinstance(chosen.codec, LearntCodec):
            return chosen, before, None
        if plan is not None and plan.home != "gpu":
            raise UsageError(
                f"--codec {self.codec} encodes whole samples, but a VLM that the GPU does not hold gives one layer "
                "at a time; take --codec bf16 or int8, or a GPU that holds the VLM."
            )
        if chosen is not None and (before is not None or not lacks_tables(chosen.codec)):
            return chosen, before, None
        task = self.task
        learnt_from, ready = self._read_whole(stored, TRIAL_SAMPLES if chosen is None else CALIBRATION_SAMPLES)
        keeps = chosen is not None or fits_beside(task.checkpoint, task.device)
        if not keeps:
            del ready  # its VLM is read again
        chosen = new_codec(
            self.codec,
            chosen,
            learnt_from,
            task.checkpoint,
            selected=len(task.every),
            layers=task.layers,
            device=task.device,
            on_note=task.on_note,
        )
        if (before := stored_identity(self.path)) is not None:
            chosen = self._winners_codec(before)
        elif chosen.name != self.codec:
            self.check_room(samples, first, replace(stored, codec=chosen.codec))
        return chosen, before, ready if keeps else None

    def _read_whole(self, stored: StoredFeatures, count: int) -> tuple[list[WholeSample], Prefiller]:
        """Run the VLM over so many samples, spread over those of all workers; returns the VLM, too."""
        task, settings = self.task, self.task.settings
        ready = Prefiller(task.checkpoint, task.builder, stored, task.device, dtype=settings.dtype)
        given = task.builder, task.source, settings, task.device
        return list(read_source(spread_over(task.every, count), ready, *given, workers=task.prefill.workers)), ready

    def _winners_codec(self, before: Mapping[str, Any]) -> ChosenCodec:
        """The codec of the store that another worker has begun."""
        self.task.on_note("another worker has begun the store meanwhile; its codec is used.")
        chosen = self.known_codec(before)
        assert chosen is not None
        return chosen

    def open(
        self, stored: StoredFeatures, chosen: ChosenCodec, before: Mapping[str, Any] | None, *, compiled: bool
    ) -> tuple[CacheWriter, KVCodec | None]:
        """Begin the store or go on with it; also returns the codec, which is the store's where another was quicker.

        Raises `IdentityMismatchError` for one of other settings, in options.
        """
        try:
            return self._writer(stored, chosen, before, compiled=compiled), chosen.codec
        except IdentityMismatchError:
            now = stored_identity(self.path)
            if before is not None or now is None or tables_of(chosen.codec) is None:
                raise
        chosen = self._winners_codec(now)
        return self._writer(stored, chosen, now, compiled=compiled), chosen.codec

    def _writer(
        self, stored: StoredFeatures, chosen: ChosenCodec, before: Mapping[str, Any] | None, *, compiled: bool
    ) -> CacheWriter:
        task, identity = self.task, self._identity(stored, chosen, before)
        fields = store_fields(
            hidden_states=stored.hidden_states,
            codec=chosen.codec,
            rollouts=stored.rollouts,
            views=task.views > 1,
            routes=task.settings.route != "none",
        )
        hardware = torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else "cpu"
        origin = provenance(source=task.source.name, device=hardware, compiled=compiled)
        if self.split is not None:
            origin["split"] = self.split
        evidence = (stored_provenance(self.path) or {}).get(CHOICE, chosen.evidence)
        if evidence is not None:
            origin[CHOICE] = evidence
        tables = tables_of(chosen.codec)
        try:
            return CacheWriter(self.path, fields=fields, identity=identity, provenance=origin, codec_tables=tables)
        except IdentityMismatchError as error:
            told = mismatch(self.path, telling(error.differences))
            said = [*other_options(identity, before or {}), str(told)]
            raise IdentityMismatchError("\n".join(said), error.differences) from None

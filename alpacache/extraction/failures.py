"""Samples that cannot be extracted: they go into quarantine, unless it is the source that has gone."""

import traceback
from collections.abc import Sequence

from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, DataError
from alpacache.extraction.progress import ExtractProgress
from alpacache.masking import masked
from alpacache.sources.registry import check_still_there
from alpacache.sources.selection import Rejected
from cache_store import CacheWriter
from cache_store.format.names import sample_key
from cache_store.format.quarantine_record import QuarantineRecord


class Failures:
    """The store's quarantine, as one run of stage one fills and reads it."""

    def __init__(self, writer: CacheWriter, progress: ExtractProgress, *, source: str) -> None:
        self._writer, self._progress, self._source = writer, progress, source

    def settle(
        self, refs: Sequence[SampleRef], unusable: Sequence[Rejected], missing: Sequence[SampleRef], *, retry: bool
    ) -> list[SampleRef]:
        """Bring the quarantine up to date with a selection; which of its samples are to be extracted.

        Args:
            unusable: clips of the selection that give no sample.
            missing: samples that the store does not hold.
            retry: give samples in quarantine another try.
        """
        if unusable:
            self.check_source()
        failed = self._writer.failed_keys()
        again = [ref.sample_id for ref in refs] if retry else []
        again += dict.fromkeys(ref.clip_id for ref in refs)  # clips that may have given no sample before
        for name in again:
            if sample_key(name) in failed:
                self._writer.release(name)
        for clip_id, error in unusable:
            known = self._writer.quarantine_of(clip_id)
            if known is None or known.reason != str(error):
                self._quarantine(clip_id, error)
        return [
            ref
            for ref in missing
            if sample_key(ref.sample_id) not in failed or self._writer.quarantine_of(ref.sample_id) is None
        ]

    def check_source(self) -> None:
        """Raise `DataError` if the source has gone, which is not the fault of the sample that cannot be read."""
        store = self._writer.path
        kept = f"What was committed to {store} is intact; bring the source back and run the same command again."
        check_still_there(self._source, kept=kept)

    def refuse(self, sample_id: str, error: BadClipError) -> None:
        """Put a sample into quarantine and count it."""
        self._quarantine(sample_id, error)
        self._progress.add_failed()

    def unreadable(self, sample_id: str, error: OSError) -> DataError:
        """The error that ends a run whose source fails."""
        return DataError(
            f"{self._source}: sample {sample_id} cannot be read ({error}). What was committed to {self._writer.path} "
            "is intact; see that the source is there and run the same command again."
        )

    def records(self, names: Sequence[str]) -> dict[str, QuarantineRecord]:
        """Why those of the named samples and clips that are in quarantine are there."""
        failed = self._writer.failed_keys()
        records = {name: self._writer.quarantine_of(name) for name in names if sample_key(name) in failed}
        return {name: record for name, record in records.items() if record is not None}

    def _quarantine(self, name: str, error: BadClipError) -> None:
        told = masked("".join(traceback.format_exception(error)))
        self._writer.quarantine(name, error.kind, str(error), told)

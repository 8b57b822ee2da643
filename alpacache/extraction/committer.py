"""The way of a group from the device to the store: one group behind the device, then to the writing threads."""

from alpacache.cached_samples.features import checked
from alpacache.errors import BadClipError
from alpacache.extraction.failures import Failures
from alpacache.extraction.pipeline import Writers
from alpacache.extraction.prefill import Group
from alpacache.extraction.progress import ExtractProgress


class Committer:
    """Has groups committed, each once the device is through with it."""

    def __init__(self, writers: Writers, progress: ExtractProgress, failures: Failures) -> None:
        self._writers, self.progress, self._failures = writers, progress, failures
        self.pending: Group | None = None
        """The last group, handed over when the device has the next."""

    def hand_over(self) -> bool:
        """Have the pending group committed; whether there was one."""
        group, self.pending = self.pending, None
        if group is None:
            return False
        if group.made is not None:
            group.made.synchronize()
        for sample_id, values in group.samples:
            try:
                stored = checked(sample_id, values)
            except BadClipError as error:
                self._failures.refuse(sample_id, error)
                continue
            with self.progress.waits.of("write"):
                self._writers.put(sample_id, stored, made=group.made)
            self.progress.add_committed(self._writers.collect())
        return True

    def finish(self) -> None:
        """Wait until all is committed."""
        with self.progress.waits.of("write"):
            committed = self._writers.collect(everything=True)
        self.progress.add_committed(committed)

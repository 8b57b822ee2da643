"""Samples that cannot be read: the end of an evaluation, or left out of it and named."""

from collections.abc import Iterator
from contextlib import contextmanager

from alpacache.cached_samples.dataset import CachedDataset
from alpacache.evaluation.judging import LeftOut
from cache_store import SampleReadError


class Unread:
    """The samples of a dataset that cannot be read, and are left out if that is asked for."""

    def __init__(self, data: CachedDataset, *, skips: bool) -> None:
        """Take those whose commit record cannot be read; without `skips` raises the first one's error."""
        if not skips:
            data.refuse_unreadable()
        self._data, self._skips = data, skips
        self.errors = dict(data.unreadable)
        """Errors by index of the sample."""
        self._again: set[int] = set()
        """Samples that failed once and could be read at once."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Leave the sample of an error out. Raises the error where that is not wanted, or half of all are gone."""
        try:
            yield
        except SampleReadError as error:
            same_id = [
                index
                for index in range(len(self._data))
                if self._data.sample_id(index) == error.sample_id and index not in self.errors
            ]
            damaged = [index for index in same_id if self._data.error_of(index) is not None]
            if same_id and not damaged and same_id[0] not in self._again:
                self._again.add(same_id[0])  # it can be read now
                return
            if not self._skips or not same_id or (len(self.errors) + 1) * 2 > len(self._data):
                raise
            self.errors[(damaged or same_id)[0]] = error

    def left_out(self) -> list[LeftOut]:
        """The samples, in order, and those whose id nothing tells."""
        known = [LeftOut(self._data.sample_id(index), str(error)) for index, error in sorted(self.errors.items())]
        return [*known, *(LeftOut("", str(error)) for error in self._data.nameless)]

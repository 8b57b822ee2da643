"""Writing checkpoints while training goes on: a copy in host memory, a thread that brings it to the medium.

At full size a checkpoint is 11 GB: two hundred steps of an H100 pass while a disk takes it.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from alpacache.gpu.host_memory import available_bytes
from alpacache.training.run_directory import RunCheckpoint, RunDirectory

_log = logging.getLogger(__name__)
_SPARE_BYTES = 4 * 2**30
"""RAM that a copy leaves to the rest of a run."""


class CheckpointWriter:
    """One checkpoint at a time. An error of a write is met by the next `save`, or raised when the writer is left."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._step = 0
        """Of the last one that was begun."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let the last write end."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def save(self, step: int, content: RunCheckpoint, *, keep: int, best: int | None = None) -> None:
        """Begin to write a checkpoint, once the one before is written.

        If that one failed, or without room for a copy in RAM, it is written before this returns. Raises `DataError` as
        `RunDirectory.save`.
        """
        failed = self._has_failed(step)

        def write() -> None:
            self._directory.save(step, content, keep=keep, best=best)

        if failed or not _has_room(content.size_bytes):
            write()
            return
        content = content.on_host()
        self._written, self._step = self._pool.submit(write), step

    def _has_failed(self, step: int) -> bool:
        """Whether the write before did. It is no reason to lose what has been learnt since: there may be room now."""
        try:
            self.wait()
        except OSError as error:
            _log.warning(
                "checkpoint at step %d could not be written to %s (%s); step %d is written in its place. Free space "
                "there, or see to the disk, before the next.",
                self._step,
                self._directory.checkpoints,
                error.__cause__ or error,
                step,
            )
            return True
        return False

    def wait(self) -> None:
        """All that was begun is on the medium."""
        written, self._written = self._written, None
        if written is not None:
            written.result()


def _has_room(size_bytes: int) -> bool:
    try:
        return size_bytes + _SPARE_BYTES <= available_bytes()
    except OSError:  # no system that tells
        return False

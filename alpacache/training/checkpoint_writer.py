"""Writes checkpoints while training goes on: from a copy in host memory, by a thread.

At full size a checkpoint is 11 GB: two hundred steps of an H100 pass while a disk takes it.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

from alpacache.gpu.host_memory import available_bytes
from alpacache.training.run_directory import RunCheckpoint, RunDirectory

_log = logging.getLogger(__name__)
_SPARE_BYTES = 4 * 2**30
"""RAM that a copy must leave to the rest of the run."""


class CheckpointWriter:
    """Writes one checkpoint at a time. The error of a write is met by the next `save`, or raised on closing."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[Path] | None = None
        self._step = 0
        """Step of the last checkpoint that was begun."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the last write, unless somebody wants to leave at once: what is half written is never taken up."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._pool.shutdown(wait=False)
            return
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def save(self, step: int, content: RunCheckpoint, *, keep: int, best: int | None = None) -> None:
        """Begin to write a checkpoint, once the one before is written.

        If that one failed, or where RAM has no room for a copy, the checkpoint is written before this returns: what has
        been learnt since the failed one need not be lost, there may be room now. Raises `DataError` as
        `RunDirectory.save` does.
        """
        failed = False
        try:
            self.wait()
        except OSError as error:
            failed = True
            _log.warning(
                "checkpoint at step %d could not be written to %s (%s); step %d is written in its place. Free space "
                "there, or see to the disk, before the next.",
                self._step,
                self._directory.checkpoints,
                error.__cause__ or error,
                step,
            )
        has_room = False
        with suppress(OSError):  # the system may not tell
            has_room = content.size_bytes + _SPARE_BYTES <= available_bytes()
        if failed or not has_room:
            self._directory.save(step, content, keep=keep, best=best)
            return
        self._step = step
        self._written = self._pool.submit(self._directory.save, step, content.on_host(), keep=keep, best=best)

    def wait(self) -> None:
        """Wait until all that was begun is on the medium; raises the error of a failed write."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

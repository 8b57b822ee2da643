"""`metrics.jsonl`: a run's numbers, one JSON object a line, each line there as a whole or not at all.

A checkpoint records size and checksum of the rows up to its step, so a resumed run knows whether they are still those.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from alpacache import strict_json
from cache_store.checksum import crc32c
from cache_store.storage.local_files import write_flushed

_log = logging.getLogger(__name__)
_SPANS = 4


class MetricsFile:
    """Rows of a run, added one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes, self._crc = 0, 0

    @property
    def seal(self) -> dict[str, Any]:
        """Size and checksum of the rows so far, since `rewind`."""
        return {"bytes": self._bytes, "crc32c": f"{self._crc:08x}"}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; what is not finite becomes null. A disk without room for all of it takes nothing of it."""
        line = (strict_json.dumps(row) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                written = file.write(line)
                while written < len(line):  # the disk says with the rest why it took a part
                    written += file.write(line[written:])
            except OSError:
                file.truncate(before)
                raise
        self._bytes, self._crc = self._bytes + len(line), crc32c(line, self._crc)

    def rows(self, *, up_to: int, seal: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Rows up to a step; none if there is no file. A torn or damaged line is left out.

        `seal` is what the checkpoint of that step recorded. Warns where they are not those rows.
        """
        data = self.path.read_bytes() if self.path.is_file() else b""
        if data and seal and not _is_sealed(data, seal):
            _log.warning(
                "%s is not as it was at step %d (its checksum differs): losses shown of this run may be wrong.",
                self.path,
                up_to,
            )
        return [row for row in map(_row, data.splitlines()) if row is not None and row["step"] <= up_to]

    def rewind(self, step: int, seal: Mapping[str, Any] | None = None) -> None:
        """Drop rows after a step, so that a resumed run does not report steps twice.

        `seal` is what the checkpoint of that step recorded. Warns of rows that are lost or may be wrong.
        """
        data = self.path.read_bytes() if self.path.is_file() else b""
        kept = data[: seal["bytes"]] if seal else b""
        if step and (seal is None or not _is_sealed(data, seal)):
            lines = [(line, _row(line)) for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
            rows = [(line, row) for line, row in lines if row is not None and row["step"] <= step]
            kept = b"".join(line for line, _ in rows)
            there = {row["step"] for _, row in rows if "loss" in row}
            self._warn(step, [number for number in range(1, step + 1) if number not in there], known=seal is not None)
        if kept != data:
            write_flushed(self.path, kept)
        self._bytes, self._crc = len(kept), crc32c(kept)

    def _warn(self, step: int, lost: Sequence[int], *, known: bool) -> None:
        """Warn of lost rows, or where the rows are not those that are `known`."""
        if lost:
            _log.warning(
                "%s was cut or changed: it lacks the rows of steps %s. They cannot be made again; the run itself is "
                "whole and goes on.",
                self.path,
                _spans(lost),
            )
        elif known:
            _log.warning(
                "%s is not as it was at step %d (its checksum differs): a number in it may be wrong. The run itself is "
                "whole and goes on.",
                self.path,
                step,
            )


def _is_sealed(data: bytes, seal: Mapping[str, Any]) -> bool:
    """Tell whether the file begins with the rows that a checkpoint recorded."""
    kept = data[: seal["bytes"]]
    return seal == {"bytes": len(kept), "crc32c": f"{crc32c(kept):08x}"}


def _row(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        row = strict_json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _spans(numbers: Sequence[int]) -> str:
    """`2 to 4, 7`: of ascending numbers, a few spans at most."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [str(first) if first == last else f"{first} to {last}" for first, last in spans[:_SPANS]]
    return ", ".join(shown) + (", ..." if len(spans) > _SPANS else "")

"""Routes of samples: who gives a sample its navigation text, and files of such texts for sources that have none.

A file is a JSON list as the public recipe's `nav_demo_samples.json`: objects with `clip_id`, `t0_relative` (us on the
clip's clock) and `nav_text`; other keys are not looked at. Texts are checked when a sample takes them, so that a bad
one costs that sample alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.config import is_unicode
from alpacache.driving.route import check_route
from alpacache.driving.sample import Sample, SampleRef
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.regular_file import read_regular
from alpacache.sources.source import RoutedSource, Source, TimedRoutesSource

MOST_FILE_BYTES = 64 * 2**20
_KEYS = ("clip_id", "t0_relative", "nav_text")


class RouteFile:
    """Texts of a file by clip and moment."""

    def __init__(self, path: str) -> None:
        """Read the file. Raises `SourceError` for one that is no such list, or gives a moment two texts."""
        try:
            entries = strict_json.loads(read_regular(Path(path), limit_bytes=MOST_FILE_BYTES))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise SourceError(f"--route-file {path} cannot be read ({reason}).") from error
        if not isinstance(entries, list) or not entries:
            raise SourceError(f"--route-file {path}: expected a list of objects with {', '.join(_KEYS)}.")
        self.path = path
        self._texts: dict[str, dict[int, Any]] = {}
        for number, entry in enumerate(entries):
            clip_id, t0_us, text = _fields(entry, f"--route-file {path}: entry {number}")
            texts = self._texts.setdefault(clip_id, {})
            if texts.setdefault(t0_us, text) != text:
                raise SourceError(f"--route-file {path}: entry {number} gives {clip_id}@{t0_us} a second text.")

    @property
    def clip_ids(self) -> Sequence[str]:
        """Clips in the order of the file."""
        return list(self._texts)

    def times_us(self, clip_id: str) -> Sequence[int]:
        """Moments (us) of a clip that have a text."""
        return list(self._texts.get(clip_id, ()))

    def text(self, ref: SampleRef) -> Any:
        """The text of a sample, unchecked; None if it has none."""
        return self._texts.get(ref.clip_id, {}).get(ref.t0_us)


class Routes:
    """Gives samples the routes that are wanted. May be called from several threads."""

    def __init__(self, wanted: str, source: Source, *, file: RouteFile | None = None, t0: str = "") -> None:
        """`wanted` is `none`, `source` (or the file, if there is one) or the one text of all samples.

        Raises `UsageError` for a source that gives no routes, or a file that is of no use.
        """
        self._wanted, self._source, self._file = wanted, source, file
        if file is not None and wanted != "source" and t0 != "routes":
            raise UsageError(f"route is {wanted!r}; expected 'source', as --route-file {file.path} gives routes.")
        gives = isinstance(source, RoutedSource) and source.gives_routes
        if wanted == "source" and file is None and not gives:
            raise UsageError(
                f"{source.name} gives no routes. Pass --route-file FILE.json with texts by clip and t0, --route TEXT "
                "for one text, or leave --route out."
            )

    def __call__(self, sample: Sample) -> Sample:
        """The sample with its route, if it gets one. Raises `BadClipError` (`bad_route`) for a text that is refused."""
        if self._wanted != "source":
            return replace(sample, route=None if self._wanted == "none" else self._wanted)
        if self._file is not None:
            text = self._file.text(sample.ref)
        else:
            assert isinstance(self._source, RoutedSource)
            text = self._source.route_of(sample)
        try:
            return replace(sample, route=check_route(text))
        except ValueError as error:
            reason = f"its route cannot go into a prompt: {error}."
            raise BadClipError("bad_route", f"{sample.ref.sample_id}: {reason} Mend the text.") from error

    def rows_us(self, clip_id: str) -> tuple[NDArray[np.int64], bool] | None:
        """Times (us) of a clip's texts, and whether each holds until the next one; None where they have none.

        Raises `BadClipError` where they cannot be read.
        """
        if self._file is not None:
            return np.array(sorted(self._file.times_us(clip_id)), dtype=np.int64), False
        if self._wanted == "source" and isinstance(self._source, TimedRoutesSource):
            return self._source.route_times_us(clip_id), True
        return None


def open_route_file(path: str | None, source: Source) -> RouteFile | None:
    """The file of these texts, if there is one. Raises `UsageError` if it names none of the source's clips."""
    if path is None:
        return None
    file = RouteFile(path)
    if not any(map(file.times_us, source.clip_ids)):
        theirs, ours = ((f"{name[:60]!r}" for name in names[:2]) for names in (file.clip_ids, source.clip_ids))
        raise UsageError(
            f"--route-file {path} names none of the clips of {source.name} (first names {', '.join(theirs)}; the "
            f"source's are {', '.join(ours)}). Write the source's names as clip_id."
        )
    return file


def _fields(entry: Any, where: str) -> tuple[str, int, Any]:
    if not isinstance(entry, dict) or (absent := [key for key in _KEYS if key not in entry]):
        lacking = "" if not isinstance(entry, dict) else f" lacks {', '.join(absent)};"
        raise SourceError(f"{where}{lacking or ' is no object;'} expected {', '.join(_KEYS)}.")
    clip_id, t0_us, text = (entry[key] for key in _KEYS)
    if isinstance(t0_us, float) and t0_us.is_integer():
        t0_us = int(t0_us)
    if not isinstance(clip_id, str) or isinstance(t0_us, bool) or not isinstance(t0_us, int):
        raise SourceError(f"{where}: expected clip_id as text and t0_relative as whole microseconds.")
    for key, value in (("clip_id", clip_id), ("nav_text", text)):
        if isinstance(value, str) and not is_unicode(value):
            raise SourceError(f"{where}: {key} holds a half of a character (a lone surrogate); write it again.")
    return clip_id, t0_us, text

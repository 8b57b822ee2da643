"""Splits into training and held-out samples: by clip, or by blocks of time where drives are few and long.

By clip, three drives of ten minutes may all be for training. By time, every tenth block of each drive is held out, and
training keeps away from it by a gap of at least a sample's window, so that no moment of a held-out sample is seen in
training. A sample's side follows from its id and the split alone: extraction, preparation, training and evaluation
agree on it without knowing of each other.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

from alpacache.config import number, whole_number
from alpacache.driving.sample import FUTURE_STEPS, HISTORY_STEPS, STEP_US, SampleRef, split_of
from alpacache.errors import UsageError

Side: TypeAlias = Literal["train", "val"]

WINDOW_US = (HISTORY_STEPS + FUTURE_STEPS) * STEP_US
"""Time from the beginning of a sample's history to the end of its future: 8 s."""
HELD_OUT = 10
"""One block in so many is held out: as large a share as of clips."""
_LONGEST_S = 1e6
_LISTED = 3
_FORM = "clip, or time:BLOCK_S[:GAP_S[:SEED]] with BLOCK_S >= GAP_S >= 8, as in time:60 or time:60:8:1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Every tenth block of time of each clip is held out, beginning with one that the seed settles."""

    block_us: int
    gap_us: int = WINDOW_US
    """Least time from a held-out sample's t0 to one that is trained on."""
    seed: int = 0

    def side(self, clip_id: str, t0_us: int) -> Side | None:
        """Side that a sample falls on; None in a gap."""
        block = t0_us // self.block_us
        if self._is_held_out(clip_id, block):
            return "val"
        first = block * self.block_us
        near = t0_us - first < self.gap_us and self._is_held_out(clip_id, block - 1)
        near |= first + self.block_us - t0_us < self.gap_us and self._is_held_out(clip_id, block + 1)
        return None if near else "train"

    def check_lengths(self, lengths_us: Mapping[str, int], *, of: str = "clips") -> None:
        """Raise `UsageError` where a block is longer than a clip, which would fall on one side as a whole.

        `of` says what the lengths are of.
        """
        if short := [clip_id for clip_id, length in lengths_us.items() if length < self.block_us]:
            named = ", ".join(f"{name[:120]} ({lengths_us[name] / 1e6:.1f} s)" for name in short[:_LISTED])
            raise UsageError(
                f"blocks of {self.block_us / 1e6:g} s are longer than {len(short)} of {len(lengths_us)} {of}: "
                f"{named}. Take shorter blocks, or split by clip."
            )

    def _is_held_out(self, clip_id: str, block: int) -> bool:
        digest = hashlib.md5(f"{self.seed}:{clip_id}".encode(), usedforsecurity=False).hexdigest()
        return (block + int(digest, 16)) % HELD_OUT == 0


Split: TypeAlias = TimeSplit | None
"""Rule that divides samples; None is by clip."""


def parse_split(text: str) -> Split:
    """Parse `clip` or `time:BLOCK_S[:GAP_S[:SEED]]`. Raises `ValueError` with what was expected."""
    kind, *parts = text.split(":")
    if text == "clip":
        return None
    with suppress(ValueError):
        if kind == "time" and 1 <= len(parts) <= 3:
            block, gap = (round(number(part) * 1e6) for part in [*parts, str(WINDOW_US / 1e6)][:2])
            seed = whole_number(parts[2]) if len(parts) == 3 else 0
            if WINDOW_US <= gap <= block <= _LONGEST_S * 1e6 and 0 <= seed < 2**63:
                return TimeSplit(block_us=block, gap_us=gap, seed=seed)
    raise ValueError(_FORM)


def checked_split(text: str) -> str:
    """The text, if it is a split. Raises `ValueError` with what was expected."""
    parse_split(text)
    return text


def side_of(split: Split, clip_id: str, t0_us: int) -> Side | None:
    """Side of a split that a sample falls on; None in a gap between blocks of time."""
    return split_of(clip_id) if split is None else split.side(clip_id, t0_us)


def covered_us(refs: Iterable[SampleRef]) -> dict[str, int]:
    """Time by clip from the beginning of the first sample's window to the end of the last one's."""
    ends: dict[str, tuple[int, int]] = {}
    for ref in refs:
        first, last = ends.get(ref.clip_id, (ref.t0_us, ref.t0_us))
        ends[ref.clip_id] = min(first, ref.t0_us), max(last, ref.t0_us)
    return {clip_id: last - first + WINDOW_US for clip_id, (first, last) in ends.items()}


def count_overlapping(samples: Sequence[SampleRef], others: Iterable[SampleRef]) -> int:
    """Count the samples whose window shares time of its clip with that of one of some others."""
    times: dict[str, set[int]] = {}
    for ref in others:
        times.setdefault(ref.clip_id, set()).add(ref.t0_us)
    ordered = {clip_id: sorted(those) for clip_id, those in times.items()}

    def overlaps(ref: SampleRef) -> bool:
        those = ordered.get(ref.clip_id, [])
        at = bisect_left(those, ref.t0_us - WINDOW_US + 1)
        return at < len(those) and those[at] < ref.t0_us + WINDOW_US

    return sum(map(overlaps, samples))

"""How many samples of each turn a dataset is to have: in any log, straight roads outnumber curves by far.

A sample's turn follows from its poses, so no picture is read for one that is left out.
"""

from collections.abc import Mapping
from functools import lru_cache

from alpacache.driving.poses import history_and_future
from alpacache.driving.sample import SampleRef
from alpacache.driving.strata import TURNS, Turn, turns_ahead
from alpacache.errors import UsageError
from alpacache.sources.source import FixedSource, RecordedSource, Source


class Quota:
    """Counts down the samples that are still wanted of each turn; a turn that is not named is not wanted."""

    def __init__(self, source: Source, wanted: Mapping[Turn, int]) -> None:
        for turn, count in wanted.items():
            if turn not in TURNS or count < 1:
                raise UsageError(f"quota {turn}={count}: expected {', '.join(TURNS)} with at least 1 sample each.")
        if not wanted or not isinstance(source, FixedSource | RecordedSource):
            raise UsageError(f"{source.name}: a quota needs at least one turn, and a source whose poses can be read.")
        self._source, self._left = source, dict(wanted)
        if isinstance(source, RecordedSource):
            self._track = lru_cache(maxsize=1)(source.track)

    @property
    def is_full(self) -> bool:
        return not any(self._left.values())

    def take(self, ref: SampleRef) -> bool:
        """Whether the sample is wanted, and count it if so. Raises `BadClipError` where its poses cannot be used."""
        if isinstance(self._source, FixedSource):
            poses = self._source.poses(ref)
        else:
            poses = history_and_future(self._track(ref.clip_id), ref.t0_us, where=ref.clip_id)
        (turn,) = turns_ahead(poses.history_rot[None], poses.future_xyz[None], poses.future_rot[None])
        wanted = self._left.get(turn, 0) > 0
        if wanted:
            self._left[turn] -= 1
        return wanted


def parse_quota(text: str) -> dict[Turn, int]:
    """Parse `straight=200,sharp=100`; raises `UsageError`."""
    wanted: dict[Turn, int] = {}
    for part in text.split(","):
        turn, _, count = (piece.strip() for piece in part.partition("="))
        if turn not in TURNS or turn in wanted or not (count.isascii() and count.isdigit() and int(count)):
            raise UsageError(
                f"quota {text!r}: {part.strip()!r} is not TURN=SAMPLES with one of {', '.join(TURNS)}, each once; "
                "expected such as straight=200,gentle=100,sharp=100."
            )
        wanted[turn] = int(count)
    return wanted

"""Progress of an extraction: this worker's by its own counters, that of all workers by what the store holds."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from alpacache.driving.route import command_of
from alpacache.extraction.pipeline import Waits
from alpacache.planning.prefill_plan import PrefillPlan
from alpacache.progress import OnProgress, Progress, clock
from cache_store.format.quarantine_record import QuarantineRecord
from cache_store.writer import committed_keys

_INTERVAL_S, _SHARE = 10.0, 0.02
"""The store is counted this often, or less often where counting would take more of the time than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """Result of a run of stage one."""

    store: str
    selected: int
    extracted: int
    already_there: int
    quarantined: dict[str, str]
    """Sample id (clip id where no sample could be chosen) -> reason, of every selected one that the store holds in
    quarantine."""
    kinds: dict[str, str]
    """The same ids -> kind of the reason, a word for counting."""
    seconds: float
    samples_per_s: float
    bytes_written: int
    read_wait: float
    """Share of the time that the VLM waited for samples: more CPU cores would help, and up to them more `workers`."""
    write_wait: float
    """Share that it waited for samples to be committed: a faster disk or more `writers` would help."""
    committed: int
    """Samples of all workers together that the store holds by now."""
    wanted: int
    """Samples of all workers together."""
    memory: PrefillPlan | None = None
    """Planned memory of the GPU and of RAM; None where the VLM ran on a CPU, or nothing was left to do."""
    peak_bytes: int | None = None
    """GPU memory that the allocator had reserved at its peak."""
    routes: dict[str, int] = field(default_factory=dict)
    """Where samples were to get routes: how many of those read have one, by command, and how many have none (`""`)."""


class StoreCount:
    """Counts how many of the wanted samples all workers have committed; looks it up now and then."""

    def __init__(self, store: str, wanted: frozenset[str]) -> None:
        self._store, self._wanted = store, wanted
        self._committed, self._due, self._rate = 0, 0.0, 0.0
        self._first: tuple[float, int] | None = None
        """Time of the first count, and its result."""

    def now(self, *, at_once: bool) -> tuple[int, int, float]:
        """Committed, wanted, and all workers' samples a second; unless `at_once`, as of at most a while ago."""
        started = time.monotonic()
        if at_once or started >= self._due:
            with suppress(OSError):  # the next commit meets it too, and says what it means
                self._committed = len(self._wanted & committed_keys(self._store))
            ended = time.monotonic()
            self._due = ended + max(_INTERVAL_S, (ended - started) / _SHARE)
            self._first = self._first or (started, self._committed)
            seconds = started - self._first[0]
            self._rate = (self._committed - self._first[1]) / seconds if seconds else 0.0
        return self._committed, len(self._wanted), self._rate


class ExtractProgress:
    """Counters of one run and what it tells its caller."""

    def __init__(
        self, store: str, wanted: frozenset[str], *, selected: int, routed: bool = False, on_progress: OnProgress
    ) -> None:
        """`wanted`: keys of all workers' samples; `selected`: how many of them are this worker's; `routed`: samples are
        to get routes."""
        self._routes: Counter[str] | None = Counter() if routed else None
        self._store, self._selected, self._on_progress = store, selected, on_progress
        self._store_count = StoreCount(store, wanted)
        self.waits = Waits()
        self.extracted = self.failed = self._total = self._bytes_written = 0
        self.batch_note = ""
        """Shown where the batch size had to change."""
        self.start(0)

    def start(self, total: int) -> None:
        """The clock starts: the VLM is loaded and has so many samples before it."""
        self._total, self._started = total, time.monotonic()

    @property
    def left(self) -> int:
        return self._total - self.extracted - self.failed

    def add_committed(self, sizes_bytes: Sequence[int]) -> None:
        if sizes_bytes:
            self.extracted += len(sizes_bytes)
            self._bytes_written += sum(sizes_bytes)
            self._tell()

    def add_route(self, route: str | None) -> None:
        """Count the route of a sample that was read."""
        if self._routes is not None:
            self._routes["" if route is None else command_of(route)] += 1

    @property
    def routeless(self) -> bool:
        """True if samples were to get routes, some were extracted, and none had one."""
        return self._routes is not None and self.extracted > 0 and self._routes.keys() == {""}

    def add_failed(self) -> None:
        self.failed += 1
        self._tell()

    def _tell(self) -> None:
        seconds = max(1e-9, time.monotonic() - self._started)
        committed, wanted, store_rate = self._store_count.now(at_once=self.left == 0)
        notes = {
            "GB": f"{self._bytes_written / 1e9:.2f}",
            "MB/s": f"{self._bytes_written / 1e6 / seconds:.3g}",
            "store": f"{committed}/{wanted}",
            "quarantined": str(self.failed),
        }
        if wanted > self._selected and store_rate:
            notes["store ETA"] = clock((wanted - committed) / store_rate)
        if self.batch_note:
            notes["batch"] = self.batch_note
        if self._routes:
            notes["with route"] = f"{self._routes.total() - self._routes['']}/{self._routes.total()}"
        notes |= {f"{what} wait": f"{share:.0%}" for what, share in self.waits.shares(seconds).items()}
        done, rate = self.extracted + self.failed, self.extracted / seconds
        self._on_progress(Progress(done=done, total=self._total, unit="samples", rate=rate, notes=notes))

    def report(
        self, *, selected: int, already_there: int, quarantined: Mapping[str, QuarantineRecord]
    ) -> ExtractReport:
        seconds = time.monotonic() - self._started
        committed, wanted, _ = self._store_count.now(at_once=True)
        waits = self.waits.shares(seconds)
        return ExtractReport(
            store=self._store,
            selected=selected,
            extracted=self.extracted,
            already_there=already_there,
            quarantined={name: record.reason for name, record in quarantined.items()},
            kinds={name: record.kind for name, record in quarantined.items()},
            seconds=seconds,
            samples_per_s=self.extracted / seconds if seconds else 0.0,
            bytes_written=self._bytes_written,
            read_wait=waits["read"],
            write_wait=waits["write"],
            committed=committed,
            wanted=wanted,
            routes=dict(sorted((self._routes or {}).items())),
        )

"""`check`: looks for faults in a source's recordings before a GPU is rented for them.

Stage one reads wrong axes, wrong units or mirrored pictures without complaint: each sample is sound in itself, and only
the trained model is wrong. So samples are read as `extract` reads them, which shows what it would refuse, and whole
recordings are compared with what a road vehicle and its camera do. No model is loaded.
"""

import hashlib
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from alpacache.checks.check import Check, not_judged, verdict, worst
from alpacache.checks.clip import ClipFindings, Refusal, examine, judge_again
from alpacache.checks.clocks import (
    LagCurve,
    Sideways,
    choose,
    judge_clocks,
    judge_pairing,
    lag_curve,
    own_lag_curve,
    sideways_of,
    turns_seen,
)
from alpacache.checks.colours import judge_colours
from alpacache.checks.flow import Flow, flow_of, judge_scale
from alpacache.checks.glimpses import Glimpse
from alpacache.checks.motion import judge_axes, judge_speed
from alpacache.checks.order import MIN_JUMPS, clips_that_jump, judge_order, names_as_text
from alpacache.checks.pictures import Turn, alike, judge_mirrored, judge_pictures
from alpacache.checks.repeats import judge_repeats
from alpacache.checks.routes import RoutesReport, judge_routes, merge_routes
from alpacache.checks.seams import judge_bends, judge_seams
from alpacache.checks.targets import judge_targets
from alpacache.driving.cameras import FRONT_CAMERA, sort_cameras
from alpacache.driving.sample import Sample, SampleRef
from alpacache.driving.splits import Split
from alpacache.driving.strata import STRATA
from alpacache.progress import OnProgress, Progress
from alpacache.sources.routes import Routes
from alpacache.sources.selection import select
from alpacache.sources.source import RecordedSource, Source

_T = TypeVar("_T")
_R = TypeVar("_R")
SHOWN = 12
"""Most clips of which a sample from their middle is kept to be shown."""
MAX_THREADS = 16
"""Each holds the pictures of one sample."""
SWITCH_S = 0.0005
"""Longest wait of a decoder for the interpreter that another thread has; a frame takes a millisecond or two."""
MOST_GLIMPSES = 160
"""Most glimpses that are kept until the end, of up to 12 small pictures each."""
SUSPECTS = 3
"""Most clips whose film is compared in full because pictures moved against the poses in a turn."""
OUT_OF_ORDER = "pictures are not in the order of time"

MEANINGS: Mapping[str, str] = {
    "samples": "samples can be cut from the clips and read",
    "times": "timestamps are whole microseconds that increase",
    "poses": "poses come at 10 Hz or more, without gaps and without leaps that no car makes",
    "frames": "every camera is there, with 10 frames a second or more, evenly, while poses were recorded",
    "rotations": "quaternions have length 1, their scalar last, and keep the vehicle upright",
    "axes": "vehicles move along their own +x axis and turn the way their course does",
    "speed": "speeds and sideways accelerations are those of road vehicles, so positions are in metres",
    "standing": "the vehicle moves",
    "targets": "accelerations and curvatures, which the expert is trained on, are those of a car",
    "clip ids": "each clip is there once, under one id",
    "pictures": "pictures of all clips have one size and show something",
    "order": "pictures follow each other, and the road comes nearer while the vehicle drives forwards",
    "repeats": "while the vehicle drives, each picture differs from the one before",
    "scale": "the road moves in the picture by as much as the poses say, seen from a car's height",
    "colours": "green is yellower than the road and the sky bluer: red and blue are not swapped",
    "mirrored": "in turns, what the front camera sees moves the other way: in a left turn to the right",
    "clocks": "pictures turn when the poses do",
    "routes": "drives go the way that their navigation texts say",
}
"""Name of each check -> what it expects, in the order of tables."""


TOLD_BY_ONE = ("axes", "targets", "clocks")
"""Checks whose warning of a single clip is one of the source: they warn only of what that clip shows for certain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipReport:
    """The verdict on one clip."""

    clip_id: str
    samples: int
    """Number of selected samples that can be used."""
    refused: tuple[Refusal, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """The verdict on a source."""

    source: str
    samples: int
    """Number of samples that `extract` would take."""
    clips: tuple[ClipReport, ...]
    checks: tuple[Check, ...]
    """Checks of the source as a whole, one for each of `MEANINGS`."""
    strata: dict[str, int]
    """Number of usable samples in each stratum."""
    speeds_mps: dict[str, float]
    """`median`, `p95` and `max` of the samples' mean speeds; empty without samples."""
    lag_curve: LagCurve | None
    """Likeness of the front camera's pictures to the poses at each lag; None if that cannot be told."""
    routes: RoutesReport | None
    """What navigation texts say; None where they were not asked for."""
    shown: tuple[Sample, ...]
    """Usable samples of up to `SHOWN` clips, for `contact_sheet`."""
    seconds: float

    @property
    def ok(self) -> bool:
        """True if no check of the source as a whole failed; warnings do not count."""
        return worst(self.checks) != "fail"

    @property
    def clip_counts(self) -> dict[str, int]:
        """Number of clips that could be judged by the worst of their checks; one that is refused may be fine so far."""
        statuses = [worst(clip.checks) for clip in self.clips if any(check.is_judged for check in clip.checks)]
        return {status: statuses.count(status) for status in ("ok", "warn", "fail")}

    @property
    def refused(self) -> tuple[Refusal, ...]:
        return tuple(refusal for clip in self.clips for refusal in clip.refused)


def check_source(
    source: Source,
    *,
    split: Literal["train", "val", "all"] = "all",
    split_by: Split = None,
    clips: Sequence[str] = (),
    t0: str = "5.1",
    samples: int | None = None,
    cameras: Sequence[str] = (FRONT_CAMERA,),
    frames: int = 4,
    routes: Routes | None = None,
    routed_us: Callable[[str], Sequence[int]] | None = None,
    on_progress: OnProgress | None = None,
) -> SourceReport:
    """Read the samples that `extract` would select with the same arguments, and judge them and their recordings.

    `routes` gives samples their navigation texts, which are judged then; `routed_us` is as in `select`.

    Raises `UsageError` for arguments that make no sense, `SourceError` for a source that cannot be read.
    """
    started, names = time.monotonic(), sort_cameras(cameras)
    refs, rejected = select(
        source, split=split, split_by=split_by, clips=clips, t0=t0, samples=samples, routed_us=routed_us
    )
    by_clip: dict[str, list[SampleRef]] = {}
    for ref in refs:
        by_clip.setdefault(ref.clip_id, []).append(ref)
    refused: dict[str, list[Refusal]] = defaultdict(list)
    for clip_id, error in rejected:
        by_clip[clip_id], refused[clip_id] = [], [Refusal(where=clip_id, kind=error.kind, message=str(error))]
    survey, read = _Survey(source), _examine(source, by_clip, refused, cameras=names, frames=frames, routes=routes)
    with closing(_in_order(read, by_clip)) as findings:
        for done, clip in enumerate(findings, start=1):
            survey.add(clip)
            if on_progress is not None:
                rate = done / max(1e-9, time.monotonic() - started)
                on_progress(Progress(done=done, total=len(by_clip), unit="clips", rate=rate, notes={}))
    survey.settle()
    survey.compare_clocks()
    speeds = [speed for clip in survey.clips.values() for speed in clip.speeds_mps]
    speeds_mps = {}
    if speeds:
        speeds_mps = {"median": float(np.median(speeds)), "p95": float(np.percentile(speeds, 95)), "max": max(speeds)}
    return SourceReport(
        source=source.name,
        samples=sum(clip.usable for clip in survey.clips.values()),
        clips=survey.reports(),
        checks=survey.checks(),
        strata=survey.strata,
        speeds_mps=speeds_mps,
        lag_curve=survey.lag_curve,
        routes=survey.routes,
        shown=tuple(sample for clip in survey.clips.values() for sample in clip.shown),
        seconds=time.monotonic() - started,
    )


def _examine(
    source: Source,
    clips: Mapping[str, Sequence[SampleRef]],
    refused: Mapping[str, Sequence[Refusal]],
    *,
    cameras: Sequence[str],
    frames: int,
    routes: Routes | None,
) -> Callable[[str], ClipFindings]:
    """A function that examines one of these clips."""
    middles = [refs[len(refs) // 2] for refs in clips.values() if refs]
    places = np.linspace(0, len(middles) - 1, min(SHOWN, len(middles))).round().astype(int)
    to_show, numbers = {middles[place] for place in places}, {clip_id: number for number, clip_id in enumerate(clips)}

    def examined(clip_id: str) -> ClipFindings:
        return examine(
            source,
            clip_id,
            clips[clip_id],
            refused.get(clip_id, ()),
            cameras=cameras,
            frames=frames,
            to_show=to_show,
            number=numbers[clip_id],
            clips=len(clips),
            routes=routes,
        )

    return examined


def _in_order(work: Callable[[_T], _R], items: Iterable[_T]) -> Generator[_R, None, None]:
    """Results of `work` in the order of `items`, made on all cores; decoding pictures leaves the interpreter free.

    Closed early, it waits for the work in hand only.
    """
    pool = ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="check")
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield from pool.map(work, items)
    finally:
        sys.setswitchinterval(usual_s)
        pool.shutdown(cancel_futures=True)


class _Survey:
    """Findings on a source's clips, gathered one after the other."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.clips: dict[str, ClipFindings] = {}
        self.strata = dict.fromkeys(STRATA, 0)
        self._turns: list[Turn] = []
        self._glimpses: list[Glimpse] = []
        self._seen, self._every = 0, 1
        self._sizes: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._pictures, self._blank = 0, Counter[str]()
        self._clips_of_path: dict[bytes, list[str]] = defaultdict(list)
        self.lag_curve: LagCurve | None = None

    def add(self, clip: ClipFindings) -> None:
        """Take note of one more clip."""
        self.clips[clip.clip_id] = clip
        for label in clip.strata:
            self.strata[label] += 1
        for width, height, sample_id in clip.sizes:
            self._sizes[width, height].append(sample_id)
        self._turns += clip.turns
        self._keep(clip.glimpses)
        self._pictures += clip.pictures
        self._blank[clip.clip_id] += clip.blank
        if clip.track is not None and clip.motion is not None and clip.motion.moving.any():
            path = hashlib.sha256(clip.track.xyz.tobytes()).digest()
            self._clips_of_path[path].append(clip.clip_id)
        if clip.order != "either":  # a track is kept only until the order of its quaternions is known
            clip.track = None

    def _keep(self, glimpses: list[Glimpse]) -> None:
        """Keep some glimpses, evenly spread over all clips however many these are."""
        for glimpse in glimpses:
            if self._seen % self._every == 0:
                self._glimpses.append(glimpse)
            self._seen += 1
            if len(self._glimpses) > MOST_GLIMPSES:
                self._glimpses, self._every = self._glimpses[::2], 2 * self._every
        glimpses.clear()

    def settle(self) -> None:
        """Decide clips that drive forwards only with the scalar first by those whose order is certainly wrong."""
        undecided = [clip for clip in self.clips.values() if clip.order == "either"]
        if sum(clip.order == "wrong" for clip in self.clips.values()) >= len(undecided):
            for clip in undecided:
                judge_again(clip)

    def compare_clocks(self) -> None:
        """Look at the film of the clips that turn most, and judge their clocks one by one and together.

        What moves in it also tells mirrored pictures, at the lag that fits best.
        """
        source = self._source
        if not isinstance(source, RecordedSource):
            return
        motions = {clip_id: clip.motion for clip_id, clip in self.clips.items() if clip.motion is not None}
        against = Counter(turn.clip_id for turn in self._turns if not turn.agrees)
        chosen = choose(motions, suspects=[clip_id for clip_id, _ in against.most_common(SUSPECTS)])

        def seen(clip_id: str) -> Sideways | None:
            return sideways_of(source, clip_id, motions[clip_id], chosen[clip_id])

        parts = [part for part in _in_order(seen, chosen) if part is not None]
        self.lag_curve = lag_curve(parts) if parts else None
        own = {part.clip_id: judge_clocks(own_lag_curve(part, self.lag_curve)) for part in parts}
        for part in parts:
            if not own[part.clip_id].is_judged and (check := judge_pairing(part, motions, self.lag_curve)) is not None:
                own[part.clip_id] = check
        sound = [part for part in parts if own[part.clip_id].status == "ok"]
        if len(sound) < len(parts) and any(check.status == "fail" for check in own.values()):
            self.lag_curve = lag_curve(sound) if sound else None
        for clip_id, check in own.items():
            self.clips[clip_id].checks += (check,)
        lag_s = self.lag_curve.best_s if self.lag_curve is not None else None
        turns = [turn for part in parts for turn in turns_seen(part, lag_s or 0.0)]
        self._turns += alike(turns, clips=len({turn.clip_id for turn in (*self._turns, *turns)}))

    def _judge_flow(self, *, is_upright: bool) -> tuple[Check, Check]:
        """Judge the order of the pictures, and the scale of the poses by them; `is_upright`: headings are right."""
        jumps, pictures = clips_that_jump(self._glimpses)
        as_text = None
        if isinstance(self._source, RecordedSource) and len(jumps) >= MIN_JUMPS:
            suspect = max(set(jumps), key=jumps.count)
            as_text = suspect if names_as_text(self._source, suspect) else None
        flow: Flow | None = flow_of(self._glimpses) if is_upright else None
        order = judge_order(flow, jumps, pictures, as_text=as_text)
        if order.status == "fail":
            return order, not_judged("scale", OUT_OF_ORDER)
        return order, judge_scale(flow, self.lag_curve.focal_px if self.lag_curve is not None else None)

    @property
    def routes(self) -> RoutesReport | None:
        """What the clips tell of their routes, if that was asked for."""
        told = {clip_id: clip.routes for clip_id, clip in self.clips.items() if clip.routes is not None}
        return merge_routes(told) if told else None

    def reports(self) -> tuple[ClipReport, ...]:
        """The verdict on each clip, in order."""
        return tuple(
            ClipReport(clip_id=clip_id, samples=clip.usable, refused=tuple(clip.refused), checks=clip.checks)
            for clip_id, clip in self.clips.items()
        )

    def checks(self) -> tuple[Check, ...]:
        """One check of each name over the source as a whole."""
        whole = [
            self._judge_samples(),
            self._judge_ids(),
            judge_pictures(self._sizes, self._blank, self._pictures),
            judge_mirrored(self._turns),
            judge_repeats([moment for clip in self.clips.values() for moment in clip.moments]),
            judge_colours([looks for clip in self.clips.values() for looks in clip.swapped]),
            judge_routes(self.routes),
        ]
        if self.strata["all"] and self.strata["stopped"] == self.strata["all"]:
            remedy = "Standing vehicles teach nothing; if they did move, positions are not in metres (kilometres?)."
            whole.append(verdict("standing", f"the vehicle stands in all {self.strata['all']} samples", fail=remedy))
        motions = [clip.motion for clip in self.clips.values() if clip.motion is not None]
        if motions:
            whole += [judge_axes(motions), judge_speed(motions)]
        torn = judge_seams({clip.clip_id: clip.seams for clip in self.clips.values()})
        torn = torn or judge_bends({clip.clip_id: clip.bends for clip in self.clips.values()})
        whole += [] if torn is None else [torn]
        targets = [clip.targets for clip in self.clips.values() if clip.targets is not None]
        whole += [judge_targets(targets), judge_clocks(self.lag_curve)]
        judged = {check.name: check for check in whole}
        merged = {name: self._over_clips(name, judged.get(name)) for name in MEANINGS if name not in ("order", "scale")}
        order, scale = self._judge_flow(is_upright="fail" not in (merged["rotations"].status, merged["axes"].status))
        merged |= {"order": order, "scale": scale}
        if order.status == "fail":
            merged |= {name: not_judged(name, OUT_OF_ORDER) for name in ("mirrored", "clocks")}
        if merged["speed"].status == "fail":
            merged["scale"] = not_judged("scale", "speeds show it already")
        return tuple(merged[name] for name in MEANINGS)

    def _over_clips(self, name: str, judged: Check | None) -> Check:
        """Merge all clips' checks of one name: the source fails if most clips fail, or all of them together do."""
        listed = [(clip_id, check) for clip_id, clip in self.clips.items() for check in clip.checks]
        each = {clip_id: check for clip_id, check in listed if check.name == name and check.is_judged}
        bad = {clip_id: check for clip_id, check in each.items() if check.status != "ok"}
        failed = [clip_id for clip_id, check in bad.items() if check.status == "fail"]
        if judged is not None and (judged.status != "ok" or not (bad if name in TOLD_BY_ONE else failed)):
            return judged
        if not each:
            return next((check for _, check in listed if check.name == name), not_judged(name, "no clip to judge by"))
        if not bad:
            alike = {check.found for check in each.values()}
            return verdict(name, alike.pop() if len(alike) == 1 else f"{len(each)} clips")
        example = failed[0] if failed else next(iter(bad))
        finding = f"{len(bad)} of {len(each)} clips, such as {example}: {bad[example].found}"
        status = "fail" if judged is None and 2 * len(failed) > len(each) else "warn"
        return verdict(name, finding, **{status: bad[example].remedy})

    def _judge_samples(self) -> Check:
        """Check that there is anything to extract; count what is refused, by kind."""
        usable = sum(clip.usable for clip in self.clips.values())
        refused = [refusal for clip in self.clips.values() for refusal in clip.refused]
        kinds = Counter(refusal.kind for refusal in refused)
        finding = f"{usable} usable" + "".join(f", {count} refused ({kind})" for kind, count in kinds.most_common())
        if not usable and not refused:
            return verdict("samples", "none was selected", fail="Choose another --split or --t0.")
        if not usable:
            return verdict("samples", finding, fail=f"The first reason: {refused[0].message}")
        return verdict("samples", finding, warn=f"The first reason: {refused[0].message}" if refused else "")

    def _judge_ids(self) -> Check:
        """Ids that come twice, and clips with the same poses: one trained on and another judged by is a leak."""
        twice = [clip_id for clip_id, times in Counter(self._source.clip_ids).items() if times > 1]
        if twice:
            finding = f"{len(twice)} ids are listed more than once, such as {twice[0]}"
            return verdict("clip ids", finding, fail="Give every clip an id of its own.")
        copies = [ids for ids in self._clips_of_path.values() if len(ids) > 1]
        if copies:
            example = " and ".join(copies[0][:2])
            finding = f"{sum(map(len, copies))} clips share their poses with another, such as {example}"
            remedy = "Leave the copies out: one may be trained on and the other judged by."
            return verdict("clip ids", finding, warn=remedy)
        return verdict("clip ids", f"{len(self.clips)} different clips")

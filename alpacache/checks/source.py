"""`check`: looks for faults in a source's recordings before a GPU is rented for them.

Stage one reads wrong axes, wrong units or mirrored pictures without complaint: each sample is sound in itself, and only
the trained model is wrong. So samples are read as `extract` reads them, which shows what it would refuse, and whole
recordings are compared with what a road vehicle and its camera do. No model is loaded.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alpacache.checks.axes import (
    judge_axes,
    judge_rotations,
    judge_speed,
    judge_standing,
)
from alpacache.checks.check import Check, Status, fail, ok, warn, worst
from alpacache.checks.contact_sheet import CLIPS
from alpacache.checks.motion import Motion, motion_of
from alpacache.checks.pictures import (
    Turn,
    judge_mirrored,
    judge_pictures,
    turns_of_clip,
    turns_of_sample,
)
from alpacache.checks.recordings import (
    Recording,
    check_finite,
    check_frames,
    check_poses,
    check_times,
    in_microseconds,
    read_recording,
    recording_of,
)
from alpacache.driving.poses import Track
from alpacache.driving.sample import (
    FRONT_CAMERA,
    Sample,
    SampleRef,
    sort_cameras,
)
from alpacache.driving.strata import STRATA, classify
from alpacache.errors import BadClipError
from alpacache.progress import OnProgress, Progress
from alpacache.sources.selection import select
from alpacache.sources.source import RecordedSource, Source

MEANINGS: Mapping[str, str] = {
    "times": "timestamps are whole microseconds that increase",
    "poses": "poses come at 10 Hz or more, without gaps and without leaps that no car makes",
    "frames": "every camera is there, with 10 frames a second or more, evenly, while poses were recorded",
    "rotations": "quaternions have length 1, their scalar last, and keep the vehicle upright",
    "axes": "vehicles move along their own +x axis and turn the way their course does",
    "speed": "speeds and sideways accelerations are those of road vehicles, so positions are in metres",
    "standing": "the vehicle moves",
    "clip ids": "each clip is there once, under one id",
    "pictures": "pictures of all clips have one size and show something",
    "mirrored": "in turns, what the front camera sees moves the other way: in a left turn to the right",
}
"""Name of each check -> what it expects, in the order of tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A sample or clip that `extract` would quarantine."""

    where: str
    """Sample id, or clip id if no sample can be cut from the clip."""
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipReport:
    """The verdict on one clip."""

    clip_id: str
    samples: int
    """Number of selected samples that can be used."""
    refused: tuple[Refusal, ...]
    checks: tuple[Check, ...]

    @property
    def status(self) -> Status:
        """The worst of its checks."""
        return worst(self.checks)


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
    shown: tuple[Sample, ...]
    """Usable samples of up to `CLIPS` clips, for `contact_sheet`."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check of the source as a whole failed; warnings do not count."""
        return worst(self.checks) != "fail"

    @property
    def clip_counts(self) -> dict[str, int]:
        """Number of clips by the worst of their checks; a refused clip may be fine in itself."""
        return {status: sum(clip.status == status for clip in self.clips) for status in ("ok", "warn", "fail")}

    @property
    def refused(self) -> tuple[Refusal, ...]:
        return tuple(refusal for clip in self.clips for refusal in clip.refused)


@dataclass(slots=True)
class _Clip:
    """One clip while it is being judged."""

    refs: list[SampleRef]
    refused: list[Refusal]
    samples: int = 0
    checks: tuple[Check, ...] = ()
    motion: Motion | None = None
    order: str = "right"
    track: Track | None = None
    """The clip's track, kept if the order of its quaternions is undecided."""
    fingerprint: str = ""


class _SampleStatistics:
    """Statistics of all samples, and the samples that the contact sheet shows."""

    def __init__(self, chosen: frozenset[SampleRef]) -> None:
        self.chosen = chosen
        self.shown: list[Sample] = []
        self.speeds_mps: list[float] = []
        self.strata = dict.fromkeys(STRATA, 0)
        self.sizes: dict[tuple[int, int], list[str]] = {}
        self.blank: list[str] = []
        self.turns: list[Turn] = []

    def add(self, sample: Sample) -> None:
        strata = classify(sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot)
        self.speeds_mps.append(strata.mean_speed_mps)
        for label in strata.labels:
            self.strata[label] += 1
        height, width = sample.frames.shape[-2:]
        self.sizes.setdefault((width, height), []).append(sample.ref.sample_id)
        if min(float(camera[-1].std()) for camera in sample.frames) < 1.0:
            self.blank.append(sample.ref.sample_id)
        if sample.ref in self.chosen:
            self.shown.append(sample)


def check_source(
    source: Source,
    *,
    split: Literal["train", "val", "all"] = "all",
    t0: str = "5.1",
    samples: int | None = None,
    cameras: Sequence[str] = (FRONT_CAMERA,),
    frames: int = 4,
    on_progress: OnProgress | None = None,
) -> SourceReport:
    """Read the samples that `extract` would select with the same arguments, and judge them and their recordings.

    Raises `UsageError` for arguments that make no sense, `SourceError` for a source that cannot be read.
    """
    started, names = time.monotonic(), sort_cameras(cameras)
    refs, rejected = select(source, split=split, t0=t0, samples=samples)
    clips: dict[str, _Clip] = {}
    for ref in refs:
        clips.setdefault(ref.clip_id, _Clip([], [])).refs.append(ref)
    for clip_id, error in rejected:
        clips[clip_id] = _Clip([], [Refusal(where=clip_id, kind=error.kind, message=str(error))])
    statistics = _SampleStatistics(_spread([clip.refs[0] for clip in clips.values() if clip.refs]))
    for done, (clip_id, clip) in enumerate(clips.items(), start=1):
        first = _load_samples(source, clip, names, frames, statistics)
        _read_recording(source, clip_id, clip, names, first, statistics, clips=len(clips))
        if on_progress is not None:
            rate = done / max(1e-9, time.monotonic() - started)
            on_progress(Progress(done=done, total=len(clips), unit="clips", rate=rate, notes={}))
    _settle_order(list(clips.values()))
    usable = sum(clip.samples for clip in clips.values())
    return SourceReport(
        source=source.name,
        samples=usable,
        clips=tuple(
            ClipReport(clip_id=clip_id, samples=clip.samples, refused=tuple(clip.refused), checks=clip.checks)
            for clip_id, clip in clips.items()
        ),
        checks=_judge(source, clips, statistics),
        strata=statistics.strata,
        speeds_mps=_speeds(statistics.speeds_mps),
        shown=tuple(statistics.shown),
        seconds=time.monotonic() - started,
    )


def _spread(refs: Sequence[SampleRef]) -> frozenset[SampleRef]:
    """Up to `CLIPS` of the samples, evenly spread."""
    places = np.unique(np.linspace(0, len(refs) - 1, min(CLIPS, len(refs))).round().astype(int)) if refs else ()
    return frozenset(refs[place] for place in places)


def _load_samples(
    source: Source, clip: _Clip, cameras: Sequence[str], frames: int, statistics: _SampleStatistics
) -> Sample | None:
    """Load all samples of a clip, as `extract` would; return the first that can be used."""
    first: Sample | None = None
    for ref in clip.refs:
        try:
            sample = source.load(ref, cameras=cameras, frames=frames)
        except BadClipError as error:
            clip.refused.append(Refusal(where=ref.sample_id, kind=error.kind, message=str(error)))
            continue
        clip.samples += 1
        first = first or sample
        statistics.add(sample)
        if not isinstance(source, RecordedSource):
            statistics.turns += turns_of_sample(sample)
    return first


def _read_recording(
    source: Source,
    clip_id: str,
    clip: _Clip,
    cameras: Sequence[str],
    first: Sample | None,
    statistics: _SampleStatistics,
    *,
    clips: int,
) -> None:
    """Judge a clip's recording, or the part of it that its first sample holds."""
    if not isinstance(source, RecordedSource):
        if first is not None:
            _judge_clip(clip, recording_of(first))
        return
    try:
        recording = read_recording(source, clip_id, cameras)
    except BadClipError:
        return  # its samples were refused for the same reason
    if len(recording.track.timestamps_us) < 2:
        return
    recording = _judge_clip(clip, recording)
    if clip.motion is not None and FRONT_CAMERA in recording.frame_times_us:
        statistics.turns += turns_of_clip(source, clip_id, clip.motion, clips=clips)


def _judge_clip(clip: _Clip, recording: Recording) -> Recording:
    """Fill in checks, motion and fingerprint; return the recording with faults corrected for the checks that follow."""
    times = check_times(recording)
    recording = in_microseconds(recording)
    clip.checks = (times, check_poses(recording.track), check_frames(recording))
    rotations = judge_rotations(recording.track)
    broken = check_finite(recording.track)
    clip.order = rotations.order
    if rotations.order == "either":
        clip.track = recording.track
    _judge_motion(clip, broken or rotations.check, rotations.track)
    if clip.motion is not None and clip.motion.moving.any():
        clip.fingerprint = hashlib.sha256(np.ascontiguousarray(recording.track.xyz).tobytes()).hexdigest()
    return recording


def _judge_motion(clip: _Clip, rotations: Check, track: Track) -> None:
    """The checks from rotations on."""
    checks = [*clip.checks[:3], rotations]
    clip.motion = motion_of(track)
    if clip.motion is not None:
        checks += [judge_axes([clip.motion]), judge_speed([clip.motion]), judge_standing(clip.motion)]
    clip.checks = tuple(checks)


def _settle_order(clips: Sequence[_Clip]) -> None:
    """Decide clips that drive forwards only with the scalar first by those whose order is certainly wrong."""
    unsettled = [clip for clip in clips if clip.track is not None]
    if sum(clip.order == "wrong" for clip in clips) < max(1, len(unsettled)):
        return
    for clip in unsettled:
        if clip.track is not None:
            rotations = judge_rotations(clip.track, scalar_first=True)
            _judge_motion(clip, rotations.check, rotations.track)


def _judge(source: Source, clips: Mapping[str, _Clip], statistics: _SampleStatistics) -> tuple[Check, ...]:
    """One check of each name over the source as a whole."""
    motions = [clip.motion for clip in clips.values() if clip.motion is not None]
    judged = {check.name: check for check in (judge_axes(motions), judge_speed(motions))} if motions else {}
    judged["clip ids"] = _judge_ids(source, clips)
    judged["pictures"] = judge_pictures(statistics.sizes, statistics.blank)
    judged["mirrored"] = judge_mirrored(statistics.turns)
    return tuple(_over_clips(name, judged.get(name), clips) for name in MEANINGS)


def _over_clips(name: str, judged: Check | None, clips: Mapping[str, _Clip]) -> Check:
    """Merge all clips' checks of one name: the source fails if most clips fail, or all of them together do."""
    if judged is not None and judged.status == "fail":
        return judged
    each = {clip_id: check for clip_id, clip in clips.items() for check in clip.checks if check.name == name}
    bad = {clip_id: check for clip_id, check in each.items() if check.status != "ok"}
    failed = [clip_id for clip_id, check in bad.items() if check.status == "fail"]
    if judged is not None and (judged.status == "warn" or not failed):
        return judged
    if not bad:
        found = f"{len(each)} clips" if each else "not judged"
        alike = {check.found for check in each.values()}
        return ok(name, alike.pop() if len(alike) == 1 else found)
    example = failed[0] if failed else next(iter(bad))
    found = f"{len(bad)} of {len(each)} clips, such as {example}: {bad[example].found}"
    answer = fail if judged is None and 2 * len(failed) > len(each) else warn
    return answer(name, found, bad[example].remedy)


def _judge_ids(source: Source, clips: Mapping[str, _Clip]) -> Check:
    """Ids that come twice, and clips with the same poses: if one is trained on and one judged by, that is a leak."""
    twice = [clip_id for clip_id, times in Counter(source.clip_ids).items() if times > 1]
    if twice:
        found = f"{len(twice)} ids are listed more than once, such as {twice[0]}"
        return fail("clip ids", found, "Give every clip an id of its own.")
    same: dict[str, list[str]] = {}
    for clip_id, clip in clips.items():
        if clip.fingerprint:
            same.setdefault(clip.fingerprint, []).append(clip_id)
    copies = [ids for ids in same.values() if len(ids) > 1]
    if copies:
        found = f"{sum(map(len, copies))} clips share their poses with another, such as {' and '.join(copies[0][:2])}"
        remedy = "Leave the copies out: one may be trained on and the other judged by."
        return warn("clip ids", found, remedy)
    return ok("clip ids", f"{len(clips)} different clips")


def _speeds(speeds_mps: Sequence[float]) -> dict[str, float]:
    if not speeds_mps:
        return {}
    values = np.array(speeds_mps)
    return {
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": float(values.max()),
    }

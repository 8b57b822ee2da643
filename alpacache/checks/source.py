"""`check`: looks for faults in a source's recordings before a GPU is rented for them.

Stage one reads wrong axes, wrong units or mirrored pictures without complaint: each sample is sound in itself, and only
the trained model is wrong. So samples are read as `extract` reads them, which shows what it would refuse, and whole
recordings are compared with what a road vehicle and its camera do. No model is loaded.
"""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from alpacache.checks.check import Check, verdict, worst
from alpacache.checks.contact_sheet import CLIPS
from alpacache.checks.motion import Motion, judge_axes, judge_rotations, judge_speed, judge_standing, motion_of
from alpacache.checks.pictures import Turn, judge_mirrored, judge_pictures, turns_of_clip, turns_of_sample
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
from alpacache.driving.cameras import FRONT_CAMERA, sort_cameras
from alpacache.driving.poses import Track
from alpacache.driving.sample import Sample, SampleRef
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
        statuses = [worst(clip.checks) for clip in self.clips]
        return {status: statuses.count(status) for status in ("ok", "warn", "fail")}

    @property
    def refused(self) -> tuple[Refusal, ...]:
        return tuple(refusal for clip in self.clips for refusal in clip.refused)


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
    clips: dict[str, list[SampleRef]] = {}
    for ref in refs:
        clips.setdefault(ref.clip_id, []).append(ref)
    refused: dict[str, list[Refusal]] = defaultdict(list)
    for clip_id, error in rejected:
        clips[clip_id], refused[clip_id] = [], [Refusal(where=clip_id, kind=error.kind, message=str(error))]
    survey = _Survey(source, names, frames, clips)
    for done, (clip_id, wanted) in enumerate(clips.items(), start=1):
        survey.read(clip_id, wanted, refused[clip_id])
        if on_progress is not None:
            rate = done / max(1e-9, time.monotonic() - started)
            on_progress(Progress(done=done, total=len(clips), unit="clips", rate=rate, notes={}))
    survey.settle_order()
    speeds, speeds_mps = survey.speeds_mps, {}
    if speeds:
        speeds_mps = {"median": float(np.median(speeds)), "p95": float(np.percentile(speeds, 95)), "max": max(speeds)}
    return SourceReport(
        source=source.name,
        samples=sum(clip.samples for clip in survey.clips.values()),
        clips=tuple(survey.clips.values()),
        checks=survey.checks(),
        strata=survey.strata,
        speeds_mps=speeds_mps,
        shown=tuple(survey.shown),
        seconds=time.monotonic() - started,
    )


class _Survey:
    """What has been seen of a source's clips, one after the other."""

    def __init__(self, source: Source, cameras: Sequence[str], frames: int, clips: dict[str, list[SampleRef]]) -> None:
        self._source, self._cameras, self._frames, self._count = source, cameras, frames, len(clips)
        firsts = [refs[0] for refs in clips.values() if refs]
        places = np.linspace(0, len(firsts) - 1, min(CLIPS, len(firsts))).round().astype(int)
        self._to_show = {firsts[place] for place in places}
        self.clips: dict[str, ClipReport] = {}
        self.shown: list[Sample] = []
        self.speeds_mps: list[float] = []
        self.strata = dict.fromkeys(STRATA, 0)
        self._motions: dict[str, Motion] = {}
        self._turns: list[Turn] = []
        self._sizes: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._blank: list[str] = []
        self._clips_of_path: dict[bytes, list[str]] = defaultdict(list)
        self._misordered = 0
        self._undecided: dict[str, Track] = {}
        """Tracks of clips whose quaternions may have their scalar first."""

    def read(self, clip_id: str, refs: Sequence[SampleRef], refused: list[Refusal]) -> None:
        """Load all samples of a clip, as `extract` would, and judge its recording.

        A source without recordings is judged by the part of one that the clip's first sample holds.
        """
        source, first, usable = self._source, None, 0
        for ref in refs:
            try:
                sample = source.load(ref, cameras=self._cameras, frames=self._frames)
            except BadClipError as error:
                refused.append(Refusal(where=ref.sample_id, kind=error.kind, message=str(error)))
                continue
            usable += 1
            first = first or sample
            self._add_sample(sample)
        self.clips[clip_id] = ClipReport(clip_id=clip_id, samples=usable, refused=tuple(refused), checks=())
        if not isinstance(source, RecordedSource):
            if first is not None:
                self._judge_recording(clip_id, recording_of(first))
            return
        try:
            recording = read_recording(source, clip_id, self._cameras)
        except BadClipError:
            return  # its samples were refused for the same reason
        if len(recording.track.timestamps_us) >= 2:
            self._judge_recording(clip_id, recording)
            if clip_id in self._motions and FRONT_CAMERA in recording.frame_times_us:
                self._turns += turns_of_clip(source, clip_id, self._motions[clip_id], clips=self._count)

    def _add_sample(self, sample: Sample) -> None:
        strata = classify(sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot)
        self.speeds_mps.append(strata.mean_speed_mps)
        for label in strata.labels:
            self.strata[label] += 1
        height, width = sample.frames.shape[-2:]
        self._sizes[width, height].append(sample.ref.sample_id)
        if min(float(camera[-1].std()) for camera in sample.frames) < 1.0:
            self._blank.append(sample.ref.sample_id)
        if sample.ref in self._to_show:
            self.shown.append(sample)
        if not isinstance(self._source, RecordedSource):
            self._turns += turns_of_sample(sample)

    def _judge_recording(self, clip_id: str, recording: Recording) -> None:
        times = check_times(recording)
        recording = in_microseconds(recording)
        track, rotations = recording.track, judge_rotations(recording.track)
        checks = (times, check_poses(track), check_frames(recording), check_finite(track) or rotations.check)
        self._judge_motion(clip_id, checks, rotations.track)
        self._misordered += rotations.order == "wrong"
        if rotations.order == "either":
            self._undecided[clip_id] = track
        if clip_id in self._motions and self._motions[clip_id].moving.any():
            path = hashlib.sha256(np.ascontiguousarray(track.xyz).tobytes()).digest()
            self._clips_of_path[path].append(clip_id)

    def _judge_motion(self, clip_id: str, checks: Iterable[Check], track: Track) -> None:
        """Complete the checks of a clip by those of its motion."""
        motion = motion_of(track)
        if motion is not None:
            self._motions[clip_id] = motion
            checks = (*checks, judge_axes([motion]), judge_speed([motion]), judge_standing(motion))
        self.clips[clip_id] = replace(self.clips[clip_id], checks=tuple(checks))

    def settle_order(self) -> None:
        """Decide clips that drive forwards only with the scalar first by those whose order is certainly wrong."""
        if self._misordered >= len(self._undecided):
            for clip_id, track in self._undecided.items():
                rotations = judge_rotations(track, scalar_first=True)
                self._judge_motion(clip_id, (*self.clips[clip_id].checks[:3], rotations.check), rotations.track)

    def checks(self) -> tuple[Check, ...]:
        """One check of each name over the source as a whole."""
        whole = [self._judge_ids(), judge_pictures(self._sizes, self._blank), judge_mirrored(self._turns)]
        if self._motions:
            motions = tuple(self._motions.values())
            whole += [judge_axes(motions), judge_speed(motions)]
        judged = {check.name: check for check in whole}
        return tuple(self._over_clips(name, judged.get(name)) for name in MEANINGS)

    def _over_clips(self, name: str, judged: Check | None) -> Check:
        """Merge all clips' checks of one name: the source fails if most clips fail, or all of them together do."""
        each = {clip_id: check for clip_id, clip in self.clips.items() for check in clip.checks if check.name == name}
        bad = {clip_id: check for clip_id, check in each.items() if check.status != "ok"}
        failed = [clip_id for clip_id, check in bad.items() if check.status == "fail"]
        if judged is not None and (judged.status != "ok" or not failed):
            return judged
        if not bad:
            alike = {check.found for check in each.values()}
            return verdict(name, alike.pop() if len(alike) == 1 else f"{len(each)} clips" if each else "not judged")
        example = failed[0] if failed else next(iter(bad))
        found = f"{len(bad)} of {len(each)} clips, such as {example}: {bad[example].found}"
        status = "fail" if judged is None and 2 * len(failed) > len(each) else "warn"
        return verdict(name, found, **{status: bad[example].remedy})

    def _judge_ids(self) -> Check:
        """Ids that come twice, and clips with the same poses: one trained on and another judged by is a leak."""
        twice = [clip_id for clip_id, times in Counter(self._source.clip_ids).items() if times > 1]
        if twice:
            found = f"{len(twice)} ids are listed more than once, such as {twice[0]}"
            return verdict("clip ids", found, fail="Give every clip an id of its own.")
        copies = [ids for ids in self._clips_of_path.values() if len(ids) > 1]
        if copies:
            example = " and ".join(copies[0][:2])
            found = f"{sum(map(len, copies))} clips share their poses with another, such as {example}"
            remedy = "Leave the copies out: one may be trained on and the other judged by."
            return verdict("clip ids", found, warn=remedy)
        return verdict("clip ids", f"{len(self.clips)} different clips")

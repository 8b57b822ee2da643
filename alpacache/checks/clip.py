"""Findings of `check` on one clip: its samples as `extract` reads them, and the recording that they are cut from.

Nothing here depends on another clip, so that clips can be read side by side, on all cores.
"""

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from alpacache.checks.check import Check
from alpacache.checks.colours import looks_swapped
from alpacache.checks.film import look_at_film
from alpacache.checks.glimpses import Glimpse, glimpses_of_sample
from alpacache.checks.motion import Motion, judge_axes, judge_rotations, judge_speed, judge_standing, motion_of
from alpacache.checks.pictures import ONE_COLOUR, Turn, turns_of_sample
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
from alpacache.checks.repeats import Moment, moments_of
from alpacache.checks.routes import ClipRoutes
from alpacache.checks.seams import bends_at_t0
from alpacache.checks.targets import Targets, judge_targets, targets_of
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Seam, Track, seam_of
from alpacache.driving.sample import Sample, SampleRef
from alpacache.driving.strata import classify
from alpacache.errors import BadClipError
from alpacache.sources.routes import Routes
from alpacache.sources.source import FixedSource, RecordedSource, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A sample or clip that `extract` would quarantine."""

    where: str
    """Sample id, or clip id if no sample can be cut from the clip."""
    kind: str
    message: str


@dataclass(slots=True, kw_only=True)
class ClipFindings:
    """All that the checks of a source keep of one clip."""

    clip_id: str
    refused: list[Refusal]
    usable: int = 0
    """Number of samples that can be used."""
    checks: tuple[Check, ...] = ()
    motion: Motion | None = None
    targets: Targets | None = None
    turns: list[Turn] = field(default_factory=list)
    bends: list[bool] = field(default_factory=list)
    """Flags of samples that come without a recording: True where the yaw rate changes at t0 as nowhere after it."""
    seams: list[Seam] = field(default_factory=list)
    """Seams of samples that come without a recording."""
    moments: list[Moment] = field(default_factory=list)
    """Successive pictures while the vehicle drives."""
    glimpses: list[Glimpse] = field(default_factory=list)
    """Glimpses of the front camera."""
    swapped: list[bool] = field(default_factory=list)
    """Flags of pictures that tell: True if red and blue look swapped."""
    speeds_mps: list[float] = field(default_factory=list)
    """Mean speed of each usable sample."""
    strata: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int, str]] = field(default_factory=list)
    """Width, height and sample id."""
    pictures: int = 0
    """Number of pictures looked at, those of the samples and others."""
    blank: int = 0
    """Number of those that show one colour only."""
    shown: list[Sample] = field(default_factory=list)
    track: Track | None = None
    """The recorded poses, in microseconds."""
    routes: ClipRoutes | None = None
    """None where routes were not asked for."""
    order: str = "right"
    """Order of its quaternions, see `motion.Rotations`."""


def examine(
    source: Source,
    clip_id: str,
    refs: Sequence[SampleRef],
    refused: Iterable[Refusal],
    *,
    cameras: Sequence[str],
    frames: int,
    to_show: Collection[SampleRef],
    number: int,
    clips: int,
    routes: Routes | None = None,
) -> ClipFindings:
    """Load all samples of a clip, as `extract` would, and judge its recording.

    A source without recordings is judged by the part of one that the clip's first sample holds. `number` is that of the
    clip among `clips` of the source: the more there are, the less film of each is looked at, and of some none.
    """
    clip, first = ClipFindings(clip_id=clip_id, refused=list(refused)), None
    if routes is not None:
        clip.routes = ClipRoutes()
        _add_rows(clip.routes, source, clip_id, routes)
    for ref in refs:
        try:
            sample = source.load(ref, cameras=cameras, frames=frames)
            if routes is not None:
                sample = routes(sample)
        except BadClipError as error:
            clip.refused.append(Refusal(where=ref.sample_id, kind=error.kind, message=str(error)))
            continue
        first = first or sample
        _add_sample(clip, sample)
        if ref in to_show:
            clip.shown.append(sample)
        if not isinstance(source, RecordedSource):
            clip.turns += turns_of_sample(sample)
            clip.seams.append(seam_of(sample.history_xyz, sample.future_xyz))
            clip.bends.append(bends_at_t0(sample.history_rot, sample.future_rot))
    if not isinstance(source, RecordedSource):
        if first is not None:
            _judge_recording(clip, recording_of(first))
        return clip
    try:
        recording = read_recording(source, clip_id, cameras)
    except BadClipError:
        return clip  # its samples were refused for the same reason
    if len(recording.track.timestamps_us) >= 2:
        _judge_recording(clip, recording)
        if clip.motion is not None and FRONT_CAMERA in recording.frame_times_us:
            seen = look_at_film(source, clip_id, clip.motion, number=number, clips=clips)
            clip.turns += seen.turns
            for glimpse in seen.glimpses:
                _add_glimpse(clip, glimpse)
                _add_colours(clip, glimpse)
    return clip


def judge_again(clip: ClipFindings) -> None:
    """Take it that the clip's quaternions have their scalar first, as other clips have shown."""
    if clip.track is not None:
        rotations = judge_rotations(clip.track, scalar_first=True)
        _judge_motion(clip, (*clip.checks[:3], rotations.check), rotations.track)


def _add_sample(clip: ClipFindings, sample: Sample) -> None:
    strata = classify(sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot)
    clip.usable += 1
    if clip.routes is not None:
        clip.routes.add(sample.ref.sample_id, sample.route, strata)
    clip.speeds_mps.append(strata.mean_speed_mps)
    clip.strata += strata.labels
    height, width = sample.frames.shape[-2:]
    clip.sizes.append((width, height, sample.ref.sample_id))
    glimpses = glimpses_of_sample(sample)
    for glimpse in glimpses:
        _add_glimpse(clip, glimpse)
    front = sample.cameras.index(FRONT_CAMERA) if FRONT_CAMERA in sample.cameras else 0
    _add_colours(clip, glimpses[front])


def _add_rows(told: ClipRoutes, source: Source, clip_id: str, routes: Routes) -> None:
    if isinstance(source, FixedSource):  # its rows are its samples
        return
    with suppress(BadClipError):  # its samples are refused for the same reason
        if (rows := routes.rows_us(clip_id)) is not None:
            span = source.times_us(clip_id)
            if isinstance(source, RecordedSource) and len(stamps := source.track(clip_id).timestamps_us):
                span = int(stamps.min()), int(stamps.max())
            told.add_rows(rows[0], span, holds=rows[1])


def _add_glimpse(clip: ClipFindings, glimpse: Glimpse) -> None:
    clip.moments += moments_of(glimpse)
    clip.pictures += len(glimpse.pictures)
    clip.blank += int((glimpse.pictures.std(axis=(1, 2)) < ONE_COLOUR).sum())
    if glimpse.camera == FRONT_CAMERA and len(glimpse.pictures) > 1:
        clip.glimpses.append(glimpse)


def _add_colours(clip: ClipFindings, glimpse: Glimpse) -> None:
    looks = looks_swapped(glimpse.newest)
    clip.swapped += [] if looks is None else [looks]


def _judge_recording(clip: ClipFindings, recording: Recording) -> None:
    times = check_times(recording)
    recording = in_microseconds(recording)
    track, rotations = recording.track, judge_rotations(recording.track)
    checks = (times, check_poses(track), check_frames(recording), check_finite(track) or rotations.check)
    clip.track, clip.order = replace(track, xyz=np.ascontiguousarray(track.xyz)), rotations.order
    _judge_motion(clip, checks, rotations.track)


def _judge_motion(clip: ClipFindings, checks: tuple[Check, ...], track: Track) -> None:
    """Complete the checks of a clip by those of its motion; of its targets unless headings are wrong: speeds are solved
    along them."""
    clip.checks, clip.targets, motion = checks, None, motion_of(track)
    if motion is None:
        return
    clip.motion, axes = motion, judge_axes([motion])
    clip.checks = (*checks, axes, judge_speed([motion]), judge_standing(motion))
    clip.targets = targets_of(track) if axes.status != "fail" else None
    if clip.targets is not None:
        clip.checks = (*clip.checks, judge_targets([clip.targets]))

"""Checks of rotations, axes and units of poses against the way road vehicles move.

A vehicle moves along its own x axis and turns about its own z axis, its course turns the way its heading does, and its
tyres hold about 9 m/s² sideways. One clip may be too straight or too slow to tell; all clips together rarely are.

Any fixed world frame is allowed, so everything is measured against the vehicle's own axes, on a coarse time grid. The
world is first turned so that the vehicle's mean z axis points up; course and heading are angles in that plane, left
positive.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alpacache.checks.check import Check, not_judged, verdict
from alpacache.driving.poses import Track, finite_poses
from alpacache.driving.sample import Floats

RASTER_US = 200_000
"""Step of the grid: so long that centimetres of localisation noise do not turn the course."""
MOVING_MPS = 2.0
"""Speed below which the course is mostly noise."""
ALIGNED_RAD = float(np.deg2rad(25.0))
"""A vehicle's reference point in front of its rear axle goes a few degrees sideways in tight turns."""
OFFSET_DEG = (2.0, 10.0)
"""Headings this far off the course are a warning, a failure. Mounts and compasses of real cars are within 1 degree."""
TILT_DEG = 5.0
"""Cameras behind a windscreen look down by up to 4 degrees."""
OFFSET_MPS = 4.0
"""Speed above which the course is known to a degree or so."""
LEVER_M = (-1.0, 4.0)
"""Range of the reference point's place in front of the rear axle; away from it a point moves sideways in turns."""
STRAIGHT_PM = 0.004
"""Curvature below which such a point moves along the vehicle's axis, to a degree."""
METRES_A_DEGREE = 111_320.0
MIN_MOVING = 15
"""Least number of moving steps of 0.2 s for a verdict."""
MIN_TURNING = 10
TURNING_RADPS = 0.05
TURN_STEPS = 5
MIN_TURNED_RAD = 0.08
"""Least turn within `TURN_STEPS`: above the noise of a poor compass."""
TURN_RATIO = (0.8, 1.25)
"""Turn of the heading for each degree of the course's, beyond which headings are wrong."""
CHORD_STEPS = 4
"""Steps over which the course is known to half a degree in spite of centimetres of noise."""
MIN_BENT_RAD = 0.15
"""Least turn of such a course within `TURN_STEPS`."""
MIN_TURNED_ALL_RAD = 0.6
SCATTER_DEG = (1.5, 5.0)
"""Headings that scatter this much about the course are a warning, a failure. Those of real cars are below 0.5."""
HELD_RAD = 0.001
"""Change of heading within a step that is none while the course turns."""
HELD_SHARE = 0.3
UP_AND_DOWN_SHARE = 0.1
FOLLOWS = 0.8
"""Correlation of the jerks of heading and course from which on the vehicle itself turns so."""
JUMP_DEG = (0.4, 4.5)
"""Steps of rounded headings, or jumps of held ones: a warning, a failure."""
FAST_MPS = 60.0
BRISK_MPS = 25.0
GRIP_MPS2 = 9.0
STANDING_MPS = 0.5
_AXES = ("x", "y", "z")
_SCALES = ((3.6, "km/h taken for m/s, or feet"), (100.0, "centimetres"), (1000.0, "millimetres"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """`[N]` steps of about 0.2 s between two poses."""

    times_us: NDArray[np.int64]
    """Middle of each step."""
    speed_mps: Floats
    course_rad: Floats
    """Direction of the movement."""
    heading_rad: Floats
    """Direction of the vehicle's x axis in the middle of the step."""
    yaw_rad: Floats
    """Direction of the vehicle's x axis at the beginning of the step."""
    turn_rate_radps: Floats
    direction: Floats
    """`[N, 3]` unit vectors of the movement, in the vehicle's own axes."""
    ground: NDArray[np.complex128]
    """`[N]` change of x and y as recorded, in their units a second: complex, x + iy."""
    z_axis: Floats
    """`[N, 3]` the vehicle's z axis in the world as recorded."""

    @property
    def moving(self) -> NDArray[np.bool_]:
        return self.speed_mps > MOVING_MPS


def motion_of(track: Track) -> Motion | None:
    """Motion of a track; None if too few poses are finite."""
    from scipy.spatial.transform import Rotation

    track = sound_poses(track)
    if len(track.timestamps_us) < 3:
        return None
    since_us = track.timestamps_us - track.timestamps_us[0]
    chosen = np.flatnonzero(np.diff(since_us // RASTER_US, prepend=-1))  # the first pose of each 0.2 s
    if len(chosen) < 3:
        return None
    times, xyz = track.timestamps_us[chosen], track.xyz[chosen]
    rot = Rotation.from_quat(track.quaternion_xyzw[chosen]).as_matrix()
    dt_s, moved = np.diff(times) / 1e6, np.diff(xyz, axis=0)
    level = _levelling(rot[:, :, 2].mean(axis=0))
    forward, flat = (rot[:, :, 0] @ level.T), moved @ level.T
    yaw = np.unwrap(np.arctan2(forward[:, 1], forward[:, 0]))
    direction = np.einsum("nij,ni->nj", rot[:-1] + rot[1:], moved)
    return Motion(
        times_us=(times[:-1] + times[1:]) // 2,
        speed_mps=np.linalg.norm(moved, axis=1) / dt_s,
        course_rad=np.arctan2(flat[:, 1], flat[:, 0]),
        heading_rad=(yaw[:-1] + yaw[1:]) / 2,
        yaw_rad=yaw[:-1],
        turn_rate_radps=np.diff(yaw) / dt_s,
        direction=direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-9),
        ground=np.asarray((moved[:, 0] + 1j * moved[:, 1]) / dt_s, dtype=np.complex128),
        z_axis=rot[:-1, :, 2],
    )


def sound_poses(track: Track) -> Track:
    """The poses that are finite, in the order of time, each time once."""
    sound = finite_poses(track) & (np.abs(track.quaternion_xyzw).max(axis=1) > 1e-6)
    times, first = np.unique(track.timestamps_us[sound], return_index=True)
    xyz, quaternion = track.xyz[sound][first], track.quaternion_xyzw[sound][first]
    return Track(timestamps_us=times, xyz=xyz, quaternion_xyzw=quaternion)


def wrapped(angle_rad: Floats) -> Floats:
    """Angles brought to between -pi and pi."""
    turned: Floats = (angle_rad + np.pi) % (2 * np.pi) - np.pi
    return turned


def _levelling(up: Floats) -> Floats:
    """The rotation matrix that turns `up` to +z; the identity where `up` is hardly a direction."""
    from scipy.spatial.transform import Rotation

    length = float(np.linalg.norm(up))
    if length < 0.1:
        return np.eye(3)
    axis = np.cross(up / length, [0.0, 0.0, 1.0])
    sine, cosine = float(np.linalg.norm(axis)), float(up[2]) / length
    if sine < 1e-9:
        return np.diag([1.0, 1.0, 1.0] if cosine > 0 else [1.0, -1.0, -1.0])
    matrix: Floats = Rotation.from_rotvec(axis / sine * np.arctan2(sine, cosine)).as_matrix()
    return matrix


class Rotations(NamedTuple):
    """The verdict on a track's rotations."""

    check: Check
    track: Track
    """The track, its quaternions put in the right order if the check says that they are not."""
    order: Literal["right", "wrong", "either"]
    """`either`: both orders look upright; only scalar-first drives forward, so other clips decide."""


def judge_rotations(track: Track, *, scalar_first: bool = False) -> Rotations:
    """Order of the quaternions, and direction of the z axis; `scalar_first`: other clips have shown that order."""
    motion = motion_of(track)
    if motion is None:
        return Rotations(not_judged("rotations", "too few sound poses"), track, "right")
    reordered = replace(track, quaternion_xyzw=track.quaternion_xyzw[:, [1, 2, 3, 0]])
    other = motion_of(reordered)
    fits = other is not None and motion.moving.sum() >= MIN_MOVING and _forward(motion) < 0.5 and _forward(other) > 0.9
    if fits and (scalar_first or (motion.z_axis[:, 2] > 0.7).mean() < 0.5):
        finding = "the columns qx, qy, qz, qw hold w, x, y, z: read so, the vehicle stands upright and moves forwards"
        check = verdict("rotations", finding, fail="Write the quaternion with its scalar last.")
        return Rotations(check, reordered, "wrong")
    up = motion.z_axis.mean(axis=0)
    length = np.linalg.norm(up)
    if length < 0.7:
        finding = f"the vehicle's z axis points every way (its mean has length {length:.2f}); vehicles do not tip"
        remedy = "Check the order qx, qy, qz, qw, and that rotations lead from vehicle (z up) to world."
        check = verdict("rotations", finding, fail=remedy)
    elif up[2] < -0.7:
        remedy = (
            "Right only if the world's z points down too. Axes x forward, y right, z down must become x forward, "
            "y left, z up."
        )
        check = verdict("rotations", "the vehicle's z axis points down in the world", warn=remedy)
    else:
        kept = "z keeps its direction; the world's z is not up, which does no harm"
        check = verdict("rotations", "z up" if up[2] > 0.7 else kept)
    return Rotations(check, track, "either" if fits else "right")


def judge_axes(motions: Sequence[Motion]) -> Check:
    """Check that vehicles move along their own +x axis and turn the way their course does."""
    moving = [motion.moving for motion in motions]
    if sum(int(steps.sum()) for steps in moving) < MIN_MOVING:
        return not_judged("axes", "hardly any movement")
    course, heading, directions = (
        np.concatenate([getattr(motion, name)[steps] for motion, steps in zip(motions, moving, strict=True)])
        for name in ("course_rad", "heading_rad", "direction")
    )
    away = wrapped(course - heading)
    mirrored = _mirrored(motions, course, heading, away)
    if mirrored is not None:
        return mirrored
    apart = np.rad2deg(np.median(np.abs(away)))
    direction = directions.mean(axis=0)
    length, axis = float(np.linalg.norm(direction)), int(np.argmax(np.abs(direction)))
    chords = _joined([_chords(motion) for motion in motions])
    if (length < 0.85 or axis != 2) and (check := _turns_otherwise(chords)) is not None:
        return check
    if length > 0.85:
        if axis == 0 and direction[0] > length * np.cos(ALIGNED_RAD):
            check = _held(chords) or _scattered(chords)
            if check is not None and check.status == "fail":
                return check
            off = _off_course(motions, apart)
            return _tilted(check or off, direction_z=directions[:, 2]) if off.status == "ok" else off
        return _wrong_axis(direction / length, axis)
    forward, backward = np.abs(away) < ALIGNED_RAD, np.abs(away) > np.pi - ALIGNED_RAD
    if forward.mean() > 0.3 and (forward | backward).mean() > 0.8:
        return verdict("axes", f"moves along its own +x {100 * forward.mean():.0f} % of the time, else backwards")
    finding = f"course and heading have nothing to do with each other ({apart:.0f} degrees apart in the median)"
    remedy = "Check that rotations lead from vehicle to world, in the same world as the positions."
    return verdict("axes", finding, fail=remedy)


class _Chords(NamedTuple):
    """Poses in the middle of `CHORD_STEPS` steps with which the vehicle moves, those of each clip apart.

    The course over that time is exact enough to judge single headings. All are arrays `[N]`.
    """

    away_rad: Floats
    """Course less heading; NaN in turns, where the reference point may go sideways, and below `OFFSET_MPS`."""
    noise_rad: Floats
    """Error of `away_rad` by white noise of positions, as the path's roughness shows it: right in the mean square."""
    stepped_rad: Floats
    """Change of heading within one step."""
    turned_rad: Floats
    """Change of heading within `TURN_STEPS`, both averaged as the course is; NaN at the ends of stretches."""
    bent_rad: Floats
    """Change of course within `TURN_STEPS`."""
    curved_pm: Floats
    """Change of the heading's curvature within `TURN_STEPS`."""
    twitched_rad: Floats
    """Change of the heading's change from step to step."""
    swerved_rad: Floats
    """The same of the course."""


def _joined(parts: Sequence[_Chords]) -> _Chords:
    return _Chords(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _chords(motion: Motion) -> _Chords:
    """Course, heading and their changes about each pose of a motion, without what is near a gap or a standstill."""
    if len(motion.times_us) <= CHORD_STEPS + 2 * TURN_STEPS:
        return _Chords(*(np.zeros(0) for _ in _Chords._fields))
    windows = np.lib.stride_tricks.sliding_window_view
    step_s = np.median(np.diff(motion.times_us)) / 1e6
    moved = motion.speed_mps * np.exp(1j * motion.course_rad) * step_s
    chord = windows(moved, CHORD_STEPS).sum(axis=1)
    seconds = np.diff(motion.times_us, prepend=motion.times_us[0]) / 1e6
    slowest = windows(np.where(seconds < 2 * step_s, motion.speed_mps, 0.0), CHORD_STEPS).min(axis=1)
    course, middle = np.angle(chord), slice(CHORD_STEPS // 2, CHORD_STEPS // 2 + len(chord))
    heading = windows(motion.heading_rad, CHORD_STEPS).mean(axis=1)
    curvature = windows(motion.turn_rate_radps, CHORD_STEPS).mean(axis=1) / np.maximum(np.abs(chord), 1e-9)
    curvature *= CHORD_STEPS * step_s
    # Third differences of positions have 20 times the variance of one, a chord's two ends have twice that.
    rough = np.pad(moved[2:] - 2 * moved[1:-1] + moved[:-2], 1)[middle]
    noise = np.sqrt(2 / 20) * (rough * np.exp(-1j * course)).imag / np.maximum(np.abs(chord), 1e-9)
    away = wrapped(course - motion.yaw_rad[middle])

    def change(values: Floats, *, before: int, after: int) -> Floats:
        changes = np.full(len(values), np.nan)
        inner = slice(before, len(values) - after)
        changes[inner] = values[before + after :] - values[: len(values) - before - after]
        moves = windows(slowest, before + after + 1).min(axis=1) > MOVING_MPS
        changes[inner][~moves] = np.nan
        return changes

    bent_wide = wrapped(change(course, before=CHORD_STEPS, after=CHORD_STEPS))
    with np.errstate(invalid="ignore"):
        straight = np.abs(bent_wide) < STRAIGHT_PM * 2 * np.abs(chord)
        known = straight & (slowest > OFFSET_MPS) & (np.abs(away) < 2 * ALIGNED_RAD)
    before, after = TURN_STEPS // 2, TURN_STEPS - TURN_STEPS // 2
    return _Chords(
        away_rad=np.where(known, away, np.nan),
        noise_rad=noise,
        stepped_rad=np.diff(motion.yaw_rad)[middle],
        turned_rad=change(heading, before=before, after=after),
        bent_rad=wrapped(change(course, before=before, after=after)),
        curved_pm=change(curvature, before=before, after=after),
        twitched_rad=np.pad(np.diff(motion.heading_rad, n=2), 1)[middle],
        swerved_rad=np.pad(np.diff(wrapped(np.diff(motion.course_rad))), 1)[middle],
    )


def _turns_otherwise(chords: _Chords) -> Check | None:
    """A failed check if headings turn clearly less or more than the course does, whichever point the poses are of."""
    with np.errstate(invalid="ignore"):
        turns = np.maximum(np.abs(chords.turned_rad), np.abs(chords.bent_rad)) > MIN_BENT_RAD
    turned, bent, curved = chords.turned_rad[turns], chords.bent_rad[turns], chords.curved_pm[turns]
    if len(bent) < MIN_TURNING or np.maximum(np.abs(turned), np.abs(bent)).sum() < TURN_STEPS * MIN_TURNED_ALL_RAD:
        return None
    lever_m = np.linalg.lstsq(np.stack([turned, curved], axis=1), bent)[0][1]
    bent = bent - np.clip(lever_m, *LEVER_M) * curved
    both, headings, courses = float(turned @ bent), float(turned @ turned), float(bent @ bent)
    # Noise of headings lowers the slope on them, noise of the course that on it: beyond either, no noise explains it.
    ratio = np.sqrt(headings / max(courses, 1e-9))
    least, most = both / max(courses, 1e-9), headings / max(both, 1e-9)
    if ratio < TURN_RATIO[0] / 2 or 0 < most < TURN_RATIO[0]:
        shown = min(ratio, most)
    elif least > TURN_RATIO[1]:
        shown = least
    else:
        return None
    finding = f"headings do not turn as the course does: by {shown:.2f} degrees for each degree of its turns"
    remedy = "Check that the rotations are those of the recording, not constant, and that angles became radians once."
    if shown < 0.1:
        remedy = "Rotations must be those of the vehicle at each pose; without them, take headings from the course."
    return verdict("axes", finding, fail=remedy)


def _held(chords: _Chords) -> Check | None:
    """A warned or failed check if headings are rounded, or stay exactly the same in turns and then jump.

    Unless the course does, too: in simulators, keys steer a vehicle by jerks.
    """
    with np.errstate(invalid="ignore"):
        turns = np.abs(chords.bent_rad) > MIN_TURNED_RAD
    stepped = np.abs(chords.stepped_rad[turns])
    held = stepped < HELD_RAD
    jumps, change = stepped[~held], np.diff(stepped)
    # Turns of one rate are steps of one size, too, but their rate never goes up and at once down again.
    up_and_down = (change[1:] * change[:-1] < 0) & (np.minimum(np.abs(change[1:]), np.abs(change[:-1])) > HELD_RAD)
    if len(jumps) < MIN_TURNING or up_and_down.mean() < UP_AND_DOWN_SHARE:
        return None
    twitched, swerved = chords.twitched_rad[turns], chords.swerved_rad[turns]
    if twitched @ swerved > FOLLOWS * np.linalg.norm(twitched) * np.linalg.norm(swerved):
        return None
    finest = jumps.min()
    if np.mean(np.abs(jumps - finest * np.round(jumps / finest)) < HELD_RAD) > 0.95:
        degrees = float(np.rad2deg(finest))
        finding = f"headings come in steps of {degrees:.1f} degrees"
        remedy = "They were rounded: write all digits, or take headings from the course."
    elif held.mean() > HELD_SHARE:
        degrees = float(np.rad2deg(np.median(jumps)))
        finding = f"headings stay the same in {100 * held.mean():.0f} % of a turn's steps of 0.2 s, then jump"
        finding += f" by {degrees:.1f} degrees"
        remedy = "Were they held from a slower sensor? Interpolate headings to the times of positions."
    else:
        return None
    if degrees < JUMP_DEG[0]:
        return None
    return verdict("axes", finding, **{"fail" if degrees > JUMP_DEG[1] else "warn": remedy})


def _scattered(chords: _Chords) -> Check | None:
    """A warned or failed check if headings scatter about the course on straights by more than noise of positions."""
    known = np.isfinite(chords.away_rad)
    away, noise = chords.away_rad[known], chords.noise_rad[known]
    if len(away) < 2 * MIN_MOVING:
        return None
    low, high = np.percentile(away, [16, 84])
    degrees = float(np.rad2deg(np.sqrt(max(0.0, ((high - low) / 2) ** 2 - (noise**2).mean()))))
    if degrees < SCATTER_DEG[0]:
        return None
    finding = f"headings scatter by {degrees:.1f} degrees about the course on straight road (rms)"
    remedy = "Each sample's path is turned by its heading at t0: filter the headings, or take them from the course."
    return verdict("axes", finding, **{"fail" if degrees >= SCATTER_DEG[1] else "warn": remedy})


def _off_course(motions: Sequence[Motion], apart_deg: float) -> Check:
    """Check that headings do not lie to one side of the course beyond what a point off the rear axle explains."""
    straight: list[Floats] = []
    everywhere: list[Floats] = []
    for motion in motions:
        away = wrapped(motion.course_rad - motion.heading_rad)
        known = (motion.speed_mps > OFFSET_MPS) & (np.abs(away) < 2 * ALIGNED_RAD)  # forwards
        away, curvature = away[known], (motion.turn_rate_radps / np.maximum(motion.speed_mps, OFFSET_MPS))[known]
        slips = np.sort(np.outer(curvature, LEVER_M), axis=1)
        straight.append(away[np.abs(curvature) < STRAIGHT_PM])
        everywhere.append(away - np.clip(away, slips[:, 0], slips[:, 1]))
    offset = np.concatenate(straight)
    offset = np.concatenate(everywhere) if len(offset) < MIN_MOVING else offset
    finding = f"moves along its own +x, to {apart_deg:.1f} degrees (median)"
    if len(offset) < MIN_MOVING:
        return verdict("axes", finding)
    low, degrees, high = np.rad2deg(np.percentile(offset, [25, 50, 75]))
    error = 0.93 * (high - low) / np.sqrt(len(offset))  # of a median, if offsets are normal
    if abs(degrees) - error < OFFSET_DEG[0]:
        return verdict("axes", finding)
    side = "right" if degrees > 0 else "left"
    finding = f"headings point {abs(degrees):.1f} degrees to the {side} of where the vehicle goes (median)"
    remedy = (
        "Turn every rotation by that angle about z: a camera's or an IMU's own axes, a compass without declination, or "
        "a grid's north?"
    )
    return verdict("axes", finding, **{"fail" if abs(degrees) >= OFFSET_DEG[1] else "warn": remedy})


def _tilted(check: Check, *, direction_z: Floats) -> Check:
    """`check`, or a warning if the vehicle's x axis points up or down from its path."""
    degrees = float(np.rad2deg(np.median(np.arcsin(np.clip(direction_z, -1.0, 1.0)))))
    if abs(degrees) < TILT_DEG:
        return check
    side = "below" if degrees > 0 else "above"
    finding = f"the vehicle's x axis points {abs(degrees):.1f} degrees {side} its path (median)"
    remedy = "Turn every rotation by that angle about y: those of a camera that looks at the road, or of a tilted IMU?"
    return verdict("axes", finding, warn=remedy)


def judge_speed(motions: Sequence[Motion]) -> Check:
    """Check that speeds and sideways accelerations are those of road vehicles."""
    speeds = np.concatenate([np.zeros(0), *(motion.speed_mps for motion in motions)])
    rolling = speeds[speeds > STANDING_MPS]
    if (fastest := _degrees_a_second(motions)) is not None:
        finding = f"x and y change by at most {fastest:.2g} a second, yet on a steady course that turns"
        finding += f"; as degrees that would be {METRES_A_DEGREE * fastest:.1f} m/s"
        remedy = "Latitude and longitude must become metres, such as east and north of a point on the drive."
        return verdict("speed", finding, fail=remedy)
    if len(rolling) < max(1, 0.02 * len(speeds)):
        remedy = "Standing vehicles teach nothing; if they did move, positions are not in metres (kilometres?)."
        return verdict("speed", f"never more than {speeds.max(initial=0):.2f} m/s", warn=remedy)
    rates = np.abs(np.concatenate([motion.turn_rate_radps for motion in motions]))
    turning = (speeds > MOVING_MPS) & (rates > TURNING_RADPS)
    median, sideways = float(np.median(rolling)), 0.0
    finding = f"median {median:.1f} m/s, fastest {speeds.max():.1f} m/s"
    if turning.sum() >= MIN_TURNING:
        sideways = float(np.percentile((speeds * rates)[turning], 90))
        finding += f", up to {sideways:.1f} m/s² sideways in turns"
    slides = sideways > GRIP_MPS2
    if median > FAST_MPS or (median > BRISK_MPS and slides):
        factor, unit = next((scale for scale in _SCALES if median / scale[0] < 35), _SCALES[-1])
        finding += f"; divided by {factor:.3g} that would be {median / factor:.1f} m/s"
        remedy = f"Positions must be in metres, and they look {factor:.3g} times too large: {unit}?"
        return verdict("speed", finding, fail=remedy)
    remedy = "More than tyres hold, or faster than most roads allow; check units of positions, speed and time."
    return verdict("speed", finding, warn=remedy if slides or median > 45 else "")


def _degrees_a_second(motions: Sequence[Motion]) -> float | None:
    """Greatest speed over ground in the positions' own unit, if that looks like degrees: hardly any change, but that of
    a drive, never back and forth while the vehicle turns."""
    speeds = [np.abs(motion.ground) for motion in motions]
    fastest = float(np.percentile(np.concatenate(speeds), 98)) if speeds else 0.0
    if not 1.0 < fastest * METRES_A_DEGREE < FAST_MPS:
        return None
    moved, steady, turned_rad = 0, 0, 0.0
    for motion, speed in zip(motions, speeds, strict=True):
        both = np.minimum(speed[1:], speed[:-1]) > 0.2 * fastest
        bent = np.abs(np.angle(motion.ground[1:] * motion.ground[:-1].conj()))[both]
        moved, steady = moved + len(bent), steady + int((bent < 2 * ALIGNED_RAD).sum())
        turned_rad = max(turned_rad, float(np.ptp(motion.heading_rad)))
    is_drive = moved >= 2 * MIN_MOVING and steady >= 0.95 * moved and turned_rad > MIN_TURNED_RAD
    return fastest if is_drive else None


def judge_standing(motion: Motion) -> Check:
    """Check that the vehicle moves at all, and measure how much its heading wanders where it does not."""
    stands = motion.speed_mps < STANDING_MPS
    standing, still = float(stands.mean()), stands[1:] & stands[:-1]
    wanders = ""
    if still.sum() >= MIN_MOVING:
        # Each heading is the mean of two poses', so that differences have 0.7 of the deviation of one.
        degrees = np.sqrt(2) * float(np.rad2deg(np.diff(motion.heading_rad)[still].std()))
        wanders = f"; standing, its heading wanders by {degrees:.2f} degrees, of which training makes no turn"
    if standing > 0.9:
        remedy = "A standing vehicle teaches nothing; leave the clip out unless you want it."
        return verdict("standing", f"stands {100 * standing:.0f} % of the time{wanders}", warn=remedy)
    return verdict("standing", f"moves {100 * (1 - standing):.0f} % of the time{wanders}")


def _forward(motion: Motion) -> float:
    """Share of the moving steps that go forwards with the vehicle's z axis up."""
    forward = motion.direction[:, 0] > np.cos(ALIGNED_RAD)
    return float((forward & (motion.z_axis[:, 2] > 0.7))[motion.moving].mean())


def _mirrored(motions: Sequence[Motion], course: Floats, heading: Floats, away: Floats) -> Check | None:
    """A failed check if course and heading turn opposite ways; their sum shows which axis is flipped."""
    turned, bent = np.concatenate([_turning_pairs(motion) for motion in motions], axis=1)
    slope = float((turned * bent).sum() / max(1e-9, (turned**2).sum()))
    mean_sum, mean_away = (complex(np.exp(1j * angles).mean()) for angles in (course + heading, away))
    alike, at = abs(mean_sum), float(np.angle(mean_sum))
    opposite = len(turned) >= MIN_TURNING and slope < -0.5 and np.mean(turned * bent < 0) > 0.8
    if not opposite and not (alike > 0.95 and abs(mean_away) < 0.7):
        return None
    if alike > 0.9 and abs(at) < 0.3:
        fault = "the y axis of positions is flipped, or rotations lead from world to vehicle"
    elif alike > 0.9 and abs(at) > np.pi - 0.3:
        fault = "the x axis of positions is flipped"
    elif alike > 0.9 and abs(at - np.pi / 2) < 0.3:
        fault = "x and y of positions are swapped (north and east?)"
    else:
        fault = "one of both is mirrored"
    finding = f"mirrored: the course turns one way and the heading the other; {fault}"
    remedy = "Axes are right-handed: y is left of x, and a left turn has a positive yaw rate. Flip one of both."
    return verdict("axes", finding, fail=remedy)


def _turning_pairs(motion: Motion) -> Floats:
    """`[2, N]` changes of heading and of course over about 1 s, where the vehicle moves and clearly turns."""
    turned = motion.heading_rad[TURN_STEPS:] - motion.heading_rad[:-TURN_STEPS]
    bent = wrapped(motion.course_rad[TURN_STEPS:] - motion.course_rad[:-TURN_STEPS])
    kept = motion.moving[TURN_STEPS:] & motion.moving[:-TURN_STEPS] & (np.abs(turned) > MIN_TURNED_RAD)
    return np.stack([turned, bent])[:, kept]


def _wrong_axis(direction: Floats, axis: int) -> Check:
    finding = f"moves along its own {'+' if direction[axis] > 0 else '-'}{_AXES[axis]}, not +x"
    remedy = "These look like a camera's axes (z forward); rotations must lead from the vehicle (x forward, y left)."
    if axis != 2:
        degrees = float(np.rad2deg(np.arctan2(direction[1], direction[0])))
        finding += f": {abs(degrees) if abs(degrees) > 179 else degrees:.0f} degrees from its heading"
        remedy = (
            "Unless it drives in reverse, turn every rotation by that angle about z, "
            "so that the vehicle's x points forward."
        )
    return verdict("axes", finding, fail=remedy)

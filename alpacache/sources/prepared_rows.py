"""A sample as one row of a Hugging Face dataset, and back: bit for bit, unless pictures were resized on purpose.

Rows may come from a stranger: pictures are embedded PNG bytes, never paths, and sizes are checked before pixels are
allocated. What a row says is held against what the protocol of a source promises: a stranger's row is read by the same
code as one of `prepare`, and its mistakes show nowhere else.
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.driving.poses import MAX_GAP_US, EgoPoses, Track, check_usable, sample_times_us, seam_of
from alpacache.driving.sample import FRAME_STEP_US, FUTURE_STEPS, HISTORY_STEPS, Sample, SampleRef
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.sources.image import read_image, stack
from alpacache.sources.recording import read_lenses, wanted_frame_times_us
from alpacache.sources.source import as_changes

POSES = {
    "history_xyz": (HISTORY_STEPS, 3),
    "history_rot": (HISTORY_STEPS, 3, 3),
    "future_xyz": (FUTURE_STEPS, 3),
    "future_rot": (FUTURE_STEPS, 3, 3),
}
NEEDED = ("sample_id", "cameras", "frames", "frame_timestamps_us", *POSES, "calibration")
"""Columns that are read. The others say where a row is from, and may be absent."""
ROUTE = "route"
"""Column of navigation texts, read where it is there."""
CHANGES = "changes"
"""Column of what was done to the pictures since they were recorded, the same in all rows; absent where nothing was."""
MIXED = "it holds pictures that were changed and others; keep them in datasets of their own"
T0 = "t0_us"
"""Column that says what the id says, read where it is there."""
ORIGIN_SLACK_M = ROTATION_SLACK = 0.01
"""Slack (m, and of a rotation's elements) with which rows of 16-bit numbers are still right."""
TORN_MPS, TORN_TIMES = 2.5, 8.0
"""Change of velocity within one step at t0 from which on, if it is so many times the usual one, a future is not that of
its history. Localisation that is noisy changes elsewhere, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFit:
    """Limits of a model's image processor, at whose size pictures are stored (`fit_size`)."""

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int


def features(*, routes: bool = False, changes: bool = False) -> Any:
    """Columns of a prepared dataset, with or without those of routes and of changes to its pictures."""
    from datasets import Features, Image, List, Value

    vectors = List(List(Value("float32")))
    return Features(
        {
            "sample_id": Value("string"),
            "clip_id": Value("string"),
            "t0_us": Value("int64"),
            "view": Value("int32"),
            "cameras": List(Value("string")),
            "frames": List(List(Image(decode=False))),
            "frame_timestamps_us": List(List(Value("int64"))),
            **{name: vectors if len(shape) == 2 else List(vectors) for name, shape in POSES.items()},
            "calibration": Value("string"),
            "source": Value("string"),
            "recorded_size": List(Value("int32")),
            "pixel_deviation": List(Value("float32")),
            **({ROUTE: Value("string")} if routes else {}),
            **({CHANGES: List(Value("string"))} if changes else {}),
        }
    )


def check_columns(names: Sequence[str], place: str) -> None:
    """Raise `SourceError` if columns that are read are missing."""
    if absent := [column for column in NEEDED if column not in names]:
        raise SourceError(f"{place} lacks the columns {', '.join(absent)}; was it written by `alpacache prepare`?")


def to_row(sample: Sample, *, source: str, fit: PictureFit | None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A sample as a row, some of it in columns that `features` may lack; with `fit`, pictures at that processor's size.

    `pixel_deviation` is the largest and the mean difference between the pixels that the VLM will see and those of the
    recorded pictures, on their scale of -1 to 1; both are 0 without `fit`.
    """
    frames, deviation, where = sample.frames, (0.0, 0.0), sample.ref.sample_id
    if fit is not None:
        from alpacache.driving.resizing import to_processor_size

        try:
            frames, deviation = to_processor_size(frames, **asdict(fit))
        except ValueError as error:
            raise BadClipError("wrong_shape", f"{where}: {error} Prepare it at its original size.") from error
    return {
        "sample_id": where,
        "clip_id": sample.ref.clip_id,
        "t0_us": sample.ref.t0_us,
        "view": sample.ref.view,
        "cameras": list(sample.cameras),
        "frames": [[{"bytes": _png(image), "path": None} for image in camera] for camera in frames],
        "frame_timestamps_us": sample.frame_timestamps_us.tolist(),
        **{name: getattr(sample, name).tolist() for name in POSES},
        "calibration": None if sample.calibration is None else json.dumps(sample.calibration),
        "source": source,
        "recorded_size": list(sample.frames.shape[-2:]),
        "pixel_deviation": list(deviation),
        ROUTE: sample.route,
        CHANGES: list(changes),
    }


def changes_in(told: Iterable[Any], place: str) -> tuple[str, ...]:
    """Changes of the pictures that a dataset's rows name. Raises `SourceError` where they do not agree."""
    try:
        found = {as_changes(row or []) for row in told}
    except ValueError as error:
        raise SourceError(f"{place}: column {CHANGES} is none of `alpacache prepare`; expected {error}.") from error
    if len(found) > 1:
        raise SourceError(f"{place}: {MIXED}.")
    return found.pop() if found else ()


def from_row(ref: SampleRef, row: dict[str, Any], cameras: Sequence[str], frames: int) -> Sample:
    """The sample in a row; raises `BadClipError`, `UsageError`, or what Python raises on damaged values."""
    where = ref.sample_id
    absent = [camera for camera in cameras if camera not in row["cameras"]]
    if absent:
        raise BadClipError("missing_camera", f"{where}: prepared without {', '.join(absent)}; leave it out.")
    if frames > len(row["frames"][0]):
        raise UsageError(f"{where}: prepared with {len(row['frames'][0])} frames a camera, {frames} are asked for.")
    chosen = [row["cameras"].index(camera) for camera in cameras]
    encoded = [image["bytes"] for place in chosen for image in row["frames"][place][-frames:]]
    if not all(encoded):  # a row that points to files is refused
        raise BadClipError("undecodable_video", f"{where}: a picture is not embedded in the row.")
    if (t0_us := row.get(T0)) is not None and t0_us != ref.t0_us:
        reason = f"the row's t0_us is {t0_us}, its id says {ref.t0_us}; write the right one in both places."
        raise BadClipError("time_order", f"{where}: {reason}")
    _check_lengths(row, where=where)
    images = stack([read_image(io.BytesIO(data), "PNG", where=where) for data in encoded], where=where)
    stamps = np.array([row["frame_timestamps_us"][place][-frames:] for place in chosen], dtype=np.int64)
    _check_times(stamps, ref.t0_us, where=where)
    lenses = None if row["calibration"] is None else read_lenses(row["calibration"], where=f"{where}: calibration")
    return Sample(
        ref=ref,
        cameras=tuple(cameras),
        frames=images.reshape(len(cameras), frames, *images.shape[1:]),
        frame_timestamps_us=stamps.reshape(len(cameras), frames),
        calibration=lenses and ({camera: lenses[camera] for camera in cameras if camera in lenses} or None),
        route=row.get(ROUTE),
        **sound_poses(ref, row)._asdict(),
    )


def sound_poses(ref: SampleRef, row: dict[str, Any]) -> EgoPoses:
    """History and future in a row, held against what a recording's must be.

    Raises `BadClipError`: `wrong_shape`, `not_finite`, `pose_jump`, or `wrong_frame` for poses that are not seen from
    the vehicle at t0.
    """
    from scipy.spatial.transform import Rotation

    where = ref.sample_id
    for name, shape in POSES.items():
        if (given := np.shape(row[name])) != shape:
            raise BadClipError("wrong_shape", f"{where}: {name} has shape {given}; expected {shape}.")
    poses = poses_of(row)
    xyz = np.concatenate([poses.history_xyz, poses.future_xyz]).astype(np.float64)
    rot = np.concatenate([poses.history_rot, poses.future_rot]).astype(np.float64)
    if not (np.isfinite(xyz).all() and np.isfinite(rot).all()):
        bad = [name for name, values in poses._asdict().items() if not np.isfinite(values).all()]
        raise BadClipError("not_finite", f"{where}: {', '.join(bad)} hold NaN or infinity.")
    off = np.abs(rot @ rot.transpose(0, 2, 1) - np.eye(3)).max()
    if off > ROTATION_SLACK or np.linalg.det(rot).min() < 0:
        raise BadClipError("pose_jump", f"{where}: history_rot or future_rot holds matrices that are no rotations.")
    away_m, turned = float(np.linalg.norm(poses.history_xyz[-1])), np.abs(poses.history_rot[-1] - np.eye(3)).max()
    if away_m > ORIGIN_SLACK_M or turned > ROTATION_SLACK:
        end = ", ".join(f"{value:.3g}" for value in poses.history_xyz[-1])
        reason = f"history ends at ({end}) m" + (", turned" if turned > ROTATION_SLACK else "")
        remedy = "Poses must be those seen from the vehicle at t0: history ends at its origin, unturned."
        raise BadClipError("wrong_frame", f"{where}: {reason}. {remedy}")
    times = sample_times_us(ref.t0_us)
    track = Track(timestamps_us=times, xyz=xyz, quaternion_xyzw=Rotation.from_matrix(rot).as_quat())
    check_usable(track, times, where=where)
    seam = seam_of(poses.history_xyz, poses.future_xyz)
    if seam.change_mps > TORN_MPS and seam.times > TORN_TIMES:
        reason = f"velocity changes by {seam.change_mps:.1f} m/s within 0.1 s at t0, {seam.times:.0f} times as much as"
        remedy = "The future is not that of this history: is it another sample's, or in reverse order?"
        raise BadClipError("pose_jump", f"{where}: {reason} around it. {remedy}")
    return poses


def _check_lengths(row: dict[str, Any], *, where: str) -> None:
    """Raise `BadClipError` unless a row has one list of pictures and one of times for each camera, all equally long."""
    names, counts = row["cameras"], [len(images) for images in row["frames"]]
    times = [len(stamps) for stamps in row["frame_timestamps_us"]]
    if len(set(names)) != len(names) or counts != times or len(counts) != len(names) or len(set(counts)) != 1:
        counted = f"{len(names)} cameras ({len(set(names))} different), {counts} pictures and {times} frame times"
        raise BadClipError("wrong_shape", f"{where}: {counted}; expected as many pictures as times for each camera.")


def _check_times(stamps: NDArray[np.int64], t0_us: int, *, where: str) -> None:
    """Raise `BadClipError` unless `[cameras, frames]` frame times are the wanted ones or shortly before them."""
    age_us = wanted_frame_times_us(t0_us, stamps.shape[1]) - stamps
    if (np.diff(stamps, axis=1) < 0).any() or age_us[:, -1].min() < 0 or np.abs(age_us).max() > MAX_GAP_US:
        last = ", ".join(f"{value / 1e6:.3f}" for value in (stamps[:, -1] - t0_us).tolist())
        reason = f"pictures end {last} s from t0, first to last over {np.ptp(stamps) / 1e6:.3f} s"
        remedy = f"They are to lie {FRAME_STEP_US / 1e6:g} s apart in order, the last at t0 or shortly before it."
        raise BadClipError("time_order", f"{where}: {reason}. {remedy}")


def poses_of(row: dict[str, Any]) -> EgoPoses:
    """History and future in a row; raises what Python and numpy raise on damaged values."""
    return EgoPoses(**{name: np.array(row[name], dtype=np.float32).reshape(shape) for name, shape in POSES.items()})


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()

"""Prepared samples: a Hugging Face `datasets` directory with one self-contained row a sample.

`prepare` reads a source once, so that later runs, or other machines, need neither the recordings nor the devkit.
Pictures are PNG, so a sample read back equals the one written bit for bit. Work goes to `OUT.partial/` in small
shards, each complete or absent, and becomes `OUT` in one rename: an interrupted run goes on where it stopped.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.sample import FUTURE_STEPS, HISTORY_STEPS, STEP_US, Sample, SampleRef, Source, sort_cameras
from alpacache.sources.video import check_size, stack

SHARD_SAMPLES = 32
_POSES = {
    "history_xyz": (HISTORY_STEPS, 3),
    "history_rot": (HISTORY_STEPS, 3, 3),
    "future_xyz": (FUTURE_STEPS, 3),
    "future_rot": (FUTURE_STEPS, 3, 3),
}
_COLUMNS = ("sample_id", "cameras", "frames", "frame_timestamps_us", *_POSES, "calibration")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What `prepare` did."""

    samples: int
    rejected: tuple[tuple[str, str, str], ...]
    """Sample id, kind and message of each sample that could not be used."""


def prepare(
    source: Source,
    refs: Sequence[SampleRef],
    out: str | Path,
    *,
    cameras: Sequence[str],
    frames: int = 4,
    on_sample: Callable[[SampleRef], None] | None = None,
) -> Prepared:
    """Write the samples `refs` of `source` to the directory `out`, which `datasets.load_from_disk` reads.

    `on_sample` is called after each sample; what it raises stops the run, and the same call goes on later. Samples
    with a `BadClipError` are left out and reported. Raises `UsageError` where `out` exists or a partial run had other
    settings, `SourceError` where no sample could be used.
    """
    final, names = Path(out), sort_cameras(cameras)
    if final.exists():
        raise UsageError(f"{final} already exists; choose another --out or remove it.")
    partial = _open_partial(final, source, refs, names, frames)
    parts = [refs[start : start + SHARD_SAMPLES] for start in range(0, len(refs), SHARD_SAMPLES)]
    reports = [
        _write_shard(partial / f"shard-{number:06d}", source, part, names, frames, on_sample)
        for number, part in enumerate(parts)
    ]
    rejected = tuple(tuple(entry) for report in reports for entry in report)
    count = len(refs) - len(rejected)
    if not count:
        reason = f" The first reason: {rejected[0][2]}" if rejected else ""
        raise SourceError(f"{source.name}: none of {len(refs)} samples can be used.{reason}")
    _finish(partial, final, source.name, count)
    return Prepared(samples=count, rejected=rejected)  # type: ignore[arg-type]


class PreparedSource:
    """Samples that `prepare` wrote. Their moments are fixed; cameras and frames may be fewer than were prepared."""

    def __init__(self, dataset: Any, *, name: str) -> None:
        """Wrap a `datasets.Dataset`; use `open_prepared`."""
        absent = [column for column in _COLUMNS if column not in dataset.column_names]
        if absent:
            raise SourceError(f"{name} lacks the columns {', '.join(absent)}; was it written by `alpacache prepare`?")
        self.name = name
        pictures = _features()["frames"]
        same = dataset.features["frames"] == pictures
        self._rows = dataset.with_format(None) if same else dataset.with_format(None).cast_column("frames", pictures)
        ids = list(self._rows["sample_id"])
        self._row_of = {sample_id: row for row, sample_id in enumerate(ids)}
        self.sample_refs: Sequence[SampleRef] = [SampleRef.parse(sample_id) for sample_id in ids]
        self.clip_ids: Sequence[str] = list(dict.fromkeys(ref.clip_id for ref in self.sample_refs))

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant of the clip's prepared samples."""
        times = [ref.t0_us for ref in self.sample_refs if ref.clip_id == clip_id]
        if not times:
            raise BadClipError("missing_clip", f"{clip_id}: not in {self.name}.")
        return min(times) - (HISTORY_STEPS - 1) * STEP_US, max(times) + FUTURE_STEPS * STEP_US

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Decode one row; raises `BadClipError` for one that is absent, damaged or lacks a camera."""
        where, names = ref.sample_id, sort_cameras(cameras)
        if where not in self._row_of:
            raise BadClipError("missing_clip", f"{where}: not in {self.name}; a prepared dataset has fixed moments.")
        row = self._rows[self._row_of[where]]
        try:
            return _from_row(ref, row, names, frames)
        except (BadClipError, UsageError):
            raise
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise BadClipError("wrong_shape", f"{where}: the row in {self.name} is damaged ({error}).") from error


def open_prepared(place: str) -> PreparedSource:
    """A directory that `prepare` wrote, or a hub repository with the same columns. No code of it is ever run."""
    import datasets

    directory = Path(place)
    try:
        if directory.is_dir():
            _refuse_outside_files(directory)
            dataset = datasets.load_from_disk(place)
        else:
            dataset = datasets.load_dataset(place)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        remedy = "" if directory.is_dir() else f"; to fetch it: hf download {place} --repo-type dataset"
        raise SourceError(f"hf:{place} cannot be read ({error}){remedy}.") from error
    if isinstance(dataset, dict):
        dataset = datasets.concatenate_datasets(list(dataset.values()))
    return PreparedSource(dataset, name=f"hf:{directory.resolve().name if directory.is_dir() else place}")


def _features() -> Any:
    """Columns of a prepared dataset."""
    from datasets import Features, Image, List, Value

    poses = {name: Value("float32") for name in _POSES}
    return Features(
        {
            "sample_id": Value("string"),
            "clip_id": Value("string"),
            "t0_us": Value("int64"),
            "view": Value("int32"),
            "cameras": List(Value("string")),
            "frames": List(List(Image(decode=False))),
            "frame_timestamps_us": List(List(Value("int64"))),
            **{name: _nested(List, poses[name], len(shape)) for name, shape in _POSES.items()},
            "calibration": Value("string"),
        }
    )


def _nested(list_type: Any, leaf: Any, depth: int) -> Any:
    return leaf if depth == 0 else list_type(_nested(list_type, leaf, depth - 1))


def _to_row(sample: Sample) -> dict[str, Any]:
    return {
        "sample_id": sample.ref.sample_id,
        "clip_id": sample.ref.clip_id,
        "t0_us": sample.ref.t0_us,
        "view": sample.ref.view,
        "cameras": list(sample.cameras),
        "frames": [[{"bytes": _png(image), "path": None} for image in camera] for camera in sample.frames],
        "frame_timestamps_us": sample.frame_timestamps_us.tolist(),
        **{name: getattr(sample, name).tolist() for name in _POSES},
        "calibration": None if sample.calibration is None else json.dumps(sample.calibration),
    }


def _from_row(ref: SampleRef, row: dict[str, Any], cameras: Sequence[str], frames: int) -> Sample:
    where = ref.sample_id
    absent = [camera for camera in cameras if camera not in row["cameras"]]
    if absent:
        raise BadClipError("missing_camera", f"{where}: prepared without {', '.join(absent)}; leave it out.")
    if frames > len(row["frames"][0]):
        raise UsageError(f"{where}: prepared with {len(row['frames'][0])} frames a camera, {frames} are asked for.")
    chosen = [row["cameras"].index(camera) for camera in cameras]
    shots = [[_read_png(image["bytes"], where) for image in row["frames"][place][-frames:]] for place in chosen]
    stamps = np.array([row["frame_timestamps_us"][place][-frames:] for place in chosen], dtype=np.int64)
    height, width = shots[0][0].shape[:2]
    images = stack([image for shot in shots for image in shot], where=where)
    lenses = None if row["calibration"] is None else json.loads(row["calibration"])
    poses: dict[str, Any] = {
        name: np.array(row[name], dtype=np.float32).reshape(shape) for name, shape in _POSES.items()
    }
    return Sample(
        ref=ref,
        cameras=tuple(cameras),
        frames=images.reshape(len(cameras), frames, 3, height, width),
        frame_timestamps_us=stamps.reshape(len(cameras), frames),
        calibration=lenses and ({camera: lenses[camera] for camera in cameras if camera in lenses} or None),
        **poses,
    )


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _read_png(data: bytes | None, where: str) -> NDArray[np.uint8]:
    """Embedded bytes only: a row that points to a file is refused."""
    from PIL import Image

    if not data:
        raise BadClipError("undecodable_video", f"{where}: a picture is not embedded in the row.")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check_size(*image.size, where=where)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadClipError("undecodable_video", f"{where}: a picture is no readable PNG ({error}).") from error


def _open_partial(final: Path, source: Source, refs: Sequence[SampleRef], cameras: Sequence[str], frames: int) -> Path:
    """The working directory, new or of an earlier run with the same settings."""
    partial = final.with_name(f"{final.name}.partial")
    ids = hashlib.sha256("\n".join(ref.sample_id for ref in refs).encode()).hexdigest()
    plan = json.dumps({"source": source.name, "samples": ids, "cameras": list(cameras), "frames": frames})
    partial.mkdir(parents=True, exist_ok=True)
    file = partial / "plan.json"
    if file.exists() and file.read_text() != plan:
        raise UsageError(f"{partial} belongs to a run with other settings; remove it or choose another --out.")
    file.write_text(plan)
    return partial


def _write_shard(
    base: Path,
    source: Source,
    refs: Sequence[SampleRef],
    cameras: Sequence[str],
    frames: int,
    on_sample: Callable[[SampleRef], None] | None,
) -> list[list[str]]:
    """Write `base.arrow`, then `base.json` with the rejected samples; the latter's presence means done."""
    import pyarrow as pa

    report = base.with_suffix(".json")
    if report.exists():
        done: list[list[str]] = json.loads(report.read_text())
        return done
    schema, rejected = _features().arrow_schema, []
    with pa.OSFile(str(base.with_suffix(".arrow")), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for ref in refs:
            try:
                row = _to_row(source.load(ref, cameras=cameras, frames=frames))
                writer.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
            except BadClipError as error:
                rejected.append([ref.sample_id, error.kind, str(error)])
            if on_sample is not None:
                on_sample(ref)
    temporary = base.with_suffix(".tmp")
    temporary.write_text(json.dumps(rejected))
    temporary.replace(report)
    return rejected


def _finish(partial: Path, final: Path, source_name: str, count: int) -> None:
    from datasets import Dataset, DatasetInfo, concatenate_datasets

    about = DatasetInfo(
        features=_features(), description=f"{count} driving samples from {source_name}, written by alpacache prepare."
    )
    shards = [Dataset.from_file(str(file), info=about) for file in sorted(partial.glob("shard-*.arrow"))]
    done = partial / "done"
    shutil.rmtree(done, ignore_errors=True)
    concatenate_datasets([shard for shard in shards if len(shard)]).save_to_disk(done)
    done.replace(final)
    shutil.rmtree(partial)


def _refuse_outside_files(directory: Path) -> None:
    """Data files are named in `state.json`; those of a prepared dataset lie next to it."""
    state = directory / "state.json"
    if not state.is_file():
        return
    for entry in json.loads(state.read_text())["_data_files"]:
        if not (directory / entry["filename"]).resolve().is_relative_to(directory.resolve()):
            raise SourceError(f"{state} names a file outside its directory: {entry['filename']!r}.")

"""Prepared samples: a Hugging Face `datasets` directory with one self-contained row a sample.

`prepare` reads a source once, so that later runs, or other machines, need neither the recordings nor the devkit.
Pictures are PNG, so a sample read back equals the one written bit for bit, unless they were asked for at the size of a
model's processor. Work goes to `OUT.partial/` in small shards, each complete or absent, and becomes `OUT` in one
rename: an interrupted run goes on where it stopped.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.poses import EgoPoses
from alpacache.sample import FUTURE_STEPS, HISTORY_STEPS, STEP_US, Sample, SampleRef, Source, sort_cameras
from alpacache.selection import Rejected
from alpacache.sources.pai_cache import connection_errors
from alpacache.sources.prepared_card import PROVENANCE, provenance, render_card
from alpacache.sources.prepared_rows import POSES, PictureFit, check_columns, features, from_row, poses_of, to_row
from alpacache.sources.prepared_stream import StreamedRows

SHARD_SAMPLES = 32
Decoded = TypeVar("Decoded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What `prepare` did."""

    samples: int
    rejected: tuple[tuple[str, str, str], ...]
    """Id, kind and message of each clip or sample that could not be used."""
    provenance: dict[str, Any]
    """What is in `provenance.json`: settings, versions, counts, strata, curvature."""


def prepare(
    source: Source,
    refs: Sequence[SampleRef],
    out: str | Path,
    *,
    cameras: Sequence[str],
    frames: int = 4,
    fit: PictureFit | None = None,
    unusable: Sequence[Rejected] = (),
    settings: Mapping[str, Any] | None = None,
    on_sample: Callable[[SampleRef], None] | None = None,
) -> Prepared:
    """Write the samples `refs` of `source` to the directory `out`, which `datasets.load_from_disk` reads.

    Pictures are stored as they were recorded or, with `fit`, at the size of that image processor. `unusable` and
    `settings` say what `select` refused and what it was asked for; they go into the dataset's record and card.
    `on_sample` is called after each sample; what it raises stops the run, and the same call goes on later. Samples
    with a `BadClipError` are left out and reported. Raises `UsageError` where `out` exists or a partial run had other
    settings, `SourceError` where no sample could be used.
    """
    final, names = Path(out), sort_cameras(cameras)
    if final.exists():
        raise UsageError(f"{final} already exists; choose another --out or remove it.")
    asked = {**(settings or {}), "cameras": list(names), "frames": frames, "fit": None if fit is None else asdict(fit)}
    partial = _open_partial(final, source, refs, asked)
    parts = [refs[start : start + SHARD_SAMPLES] for start in range(0, len(refs), SHARD_SAMPLES)]

    def to_rows(ref: SampleRef) -> dict[str, Any]:
        return to_row(source.load(ref, cameras=names, frames=frames), source=source.name, fit=fit)

    reports = [
        _write_shard(partial / f"shard-{number:06d}", to_rows, part, on_sample) for number, part in enumerate(parts)
    ]
    rejected = [(name, error.kind, str(error)) for name, error in unusable]
    rejected += [(name, kind, message) for report in reports for name, kind, message in report]
    if all(len(report) == len(part) for report, part in zip(reports, parts, strict=True)):
        reason = f" The first reason: {rejected[0][2]}" if rejected else ""
        raise SourceError(f"{source.name}: none of {len(refs)} samples can be used.{reason}")
    record = _finish(partial, final, source.name, asked, rejected)
    return Prepared(samples=record["samples"], rejected=tuple(rejected), provenance=record)


class Rows(Protocol):
    """Rows of a prepared dataset, in memory, on disk or streamed."""

    ids: Sequence[str]

    def row(self, number: int) -> dict[str, Any]:
        """All of a row."""

    def poses(self, number: int) -> dict[str, Any]:
        """Its poses, without its pictures."""


class PreparedSource:
    """Samples that `prepare` wrote. Their moments are fixed; cameras and frames may be fewer than were prepared."""

    def __init__(self, rows: Rows, *, name: str) -> None:
        """Use `open_prepared`."""
        self.name, self._rows = name, rows
        self._row_of = {sample_id: number for number, sample_id in enumerate(rows.ids)}
        self.sample_refs: Sequence[SampleRef] = [SampleRef.parse(sample_id) for sample_id in rows.ids]
        self.clip_ids: Sequence[str] = list(dict.fromkeys(ref.clip_id for ref in self.sample_refs))

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant of the clip's prepared samples."""
        times = [ref.t0_us for ref in self.sample_refs if ref.clip_id == clip_id]
        if not times:
            raise BadClipError("missing_clip", f"{clip_id}: not in {self.name}.")
        return min(times) - (HISTORY_STEPS - 1) * STEP_US, max(times) + FUTURE_STEPS * STEP_US

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Decode one row; raises `BadClipError` for one that is absent, damaged or lacks a camera."""
        names = sort_cameras(cameras)
        return self._read(ref, self._rows.row, lambda row: from_row(ref, row, names, frames))

    def poses(self, ref: SampleRef) -> EgoPoses:
        """History and future without the pictures; raises `BadClipError`."""
        return self._read(ref, self._rows.poses, poses_of)

    def _read(
        self, ref: SampleRef, get: Callable[[int], dict[str, Any]], decode: Callable[[dict[str, Any]], Decoded]
    ) -> Decoded:
        where = ref.sample_id
        if where not in self._row_of:
            raise BadClipError("missing_clip", f"{where}: not in {self.name}; a prepared dataset has fixed moments.")
        row = get(self._row_of[where])
        try:
            return decode(row)
        except (BadClipError, UsageError):
            raise
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise BadClipError("wrong_shape", f"{where}: the row in {self.name} is damaged ({error}).") from error


def open_prepared(place: str) -> PreparedSource:
    """A directory that `prepare` wrote, or parquet files with its columns: a hub repository, or a directory laid out
    like one. The latter two are streamed. No code of a dataset is ever run.

    Raises `SourceError` with what to do.
    """
    import datasets

    directory = Path(place)
    name = f"hf:{directory.resolve().name if directory.is_dir() else place}"
    failures = (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError, *connection_errors())
    try:
        if directory.is_dir() and _is_saved(directory):
            return PreparedSource(_SavedRows(directory, name), name=name)
        return PreparedSource(StreamedRows(place), name=name)
    except SourceError:
        raise
    except failures as error:
        raise SourceError(f"hf:{place} cannot be read ({_first_line(error)}){_remedy(place, error)}") from error


def _is_saved(directory: Path) -> bool:
    """Whether `save_to_disk` made it, of one split or of several."""
    return (directory / "state.json").is_file() or (directory / "dataset_dict.json").is_file()


class _SavedRows:
    """Rows of a directory that `prepare` or `save_to_disk` wrote; they stay on disk."""

    def __init__(self, directory: Path, name: str) -> None:
        import datasets

        _refuse_outside_files(directory)
        dataset = datasets.load_from_disk(str(directory))
        if isinstance(dataset, dict):
            dataset = datasets.concatenate_datasets(list(dataset.values()))
        check_columns(dataset.column_names, name)
        pictures, rows = features()["frames"], dataset.with_format(None)
        self._rows = rows if rows.features["frames"] == pictures else rows.cast_column("frames", pictures)
        self._poses = self._rows.select_columns(list(POSES))
        self.ids: Sequence[str] = list(self._rows["sample_id"])

    def row(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self._rows[number]
        return found

    def poses(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self._poses[number]
        return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _remedy(place: str, error: Exception) -> str:
    """What to do, as the rest of a sentence."""
    import huggingface_hub

    if Path(place).is_dir():
        return "; expected a directory that `alpacache prepare` wrote, or parquet files with the same columns."
    fetch = f"hf download {place} --repo-type dataset --local-dir DIR"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"; HF_HUB_OFFLINE is set: unset it, or fetch it where there is a network: {fetch}, then read hf:DIR."
    if place.startswith((".", "/")) or place.count("/") != 1:
        return "; there is no such directory, and a hub repository is named OWNER/NAME."
    return (
        f"; see that the name is right and the hub can be reached. If it is private or gated, accept its terms on its "
        f"page and run: hf auth login. To fetch all of it: {fetch}, then read hf:DIR."
    )


def _open_partial(final: Path, source: Source, refs: Sequence[SampleRef], asked: Mapping[str, Any]) -> Path:
    """The working directory, new or of an earlier run with the same settings."""
    partial = final.with_name(f"{final.name}.partial")
    ids = hashlib.sha256("\n".join(ref.sample_id for ref in refs).encode()).hexdigest()
    plan = json.dumps({"source": source.name, "samples": ids, **asked})
    partial.mkdir(parents=True, exist_ok=True)
    file = partial / "plan.json"
    if file.exists() and file.read_text() != plan:
        raise UsageError(f"{partial} belongs to a run with other settings; remove it or choose another --out.")
    file.write_text(plan)
    return partial


def _write_shard(
    base: Path,
    to_rows: Callable[[SampleRef], dict[str, Any]],
    refs: Sequence[SampleRef],
    on_sample: Callable[[SampleRef], None] | None,
) -> list[list[str]]:
    """Write `base.arrow`, then `base.json` with the rejected samples; the latter's presence means done."""
    import pyarrow as pa

    report = base.with_suffix(".json")
    if report.exists():
        done: list[list[str]] = json.loads(report.read_text())
        return done
    schema, rejected = features().arrow_schema, []
    with pa.OSFile(str(base.with_suffix(".arrow")), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for ref in refs:
            try:
                writer.write_batch(pa.RecordBatch.from_pylist([to_rows(ref)], schema=schema))
            except BadClipError as error:
                rejected.append([ref.sample_id, error.kind, str(error)])
            if on_sample is not None:
                on_sample(ref)
    temporary = base.with_suffix(".tmp")
    temporary.write_text(json.dumps(rejected))
    temporary.replace(report)
    return rejected


def _finish(
    partial: Path, final: Path, source_name: str, asked: Mapping[str, Any], rejected: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    """Join the shards, add record and card, and give the directory its name. The record."""
    from datasets import Dataset, concatenate_datasets

    shards = [Dataset.from_file(str(file)) for file in sorted(partial.glob("shard-*.arrow"))]
    rows = concatenate_datasets([shard for shard in shards if len(shard)])
    record = provenance(rows, source=source_name, settings=asked, rejected=rejected)
    rows.info.description = f"{len(rows)} driving samples from {source_name}, written by alpacache prepare."
    done = partial / "done"
    shutil.rmtree(done, ignore_errors=True)
    rows.save_to_disk(done)
    (done / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n")
    (done / "README.md").write_text(render_card(record), encoding="utf-8")
    done.replace(final)
    shutil.rmtree(partial)
    return record


def _refuse_outside_files(directory: Path) -> None:
    """Data files are named in `state.json`; those of a prepared dataset lie next to it."""
    state = directory / "state.json"
    if not state.is_file():
        return
    for entry in json.loads(state.read_text())["_data_files"]:
        if not (directory / entry["filename"]).resolve().is_relative_to(directory.resolve()):
            raise SourceError(f"{state} names a file outside its directory: {entry['filename']!r}.")

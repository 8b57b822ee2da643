"""`prepare`: writes samples as a Hugging Face dataset, one row each.

Pictures are PNG, so a sample read back equals the one written bit for bit, unless they were asked for at the size of a
model's processor. Work goes to `OUT.partial/` in small shards and becomes `OUT` in one rename, so that an interrupted
run goes on where it stopped. A shard counts once it is complete and on the medium; one process at a time works there.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alpacache.driving.cameras import sort_cameras
from alpacache.driving.sample import SampleRef
from alpacache.durable import check_out, naming
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.sources.prepared_card import PROVENANCE, provenance, render_card
from alpacache.sources.prepared_rows import PictureFit, features, to_row
from alpacache.sources.registry import check_still_there
from alpacache.sources.routes import Routes
from alpacache.sources.selection import Rejected
from alpacache.sources.source import Source, picture_changes
from cache_store.storage.local_files import flush, write_flushed

SHARD_SAMPLES = 32
_PLAN = "plan_sha256"
"""Key of the record by which the same command, run again, knows its own finished output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """The outcome of `prepare`."""

    samples: int
    rejected: tuple[tuple[str, str, str], ...]
    """Id, kind of error and message for each clip or sample that could not be used."""
    provenance: dict[str, Any]
    """Content of `provenance.json`: settings, versions, counts, strata, curvature."""
    existed: bool = False
    """True if all of this lay there already, from an earlier call: nothing was written."""


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
    spec: str | None = None,
    routes: Routes | None = None,
    on_sample: Callable[[SampleRef], None] | None = None,
) -> PrepareReport:
    """Write the samples `refs` of `source` to the directory `out`, which `datasets.load_from_disk` reads.

    Samples with a `BadClipError` are left out and reported.

    Args:
        fit: store pictures at the size of this image processor instead of as they were recorded.
        unusable: what `select` refused; part of the dataset's record and card, like `settings`.
        settings: what `select` was asked for.
        spec: what `open_source` opened, to tell a bad clip from a source that has gone.
        routes: gives the samples theirs; None leaves the column out.
        on_sample: called after each sample; what it raises stops the run, and the same call goes on later.

    Where `out` is what an earlier call with the same arguments wrote, nothing is written. Raises `UsageError` if it is
    anything else, or a partial run has other settings or is at work; `SourceError` if no sample
    can be used; `DataError` if the source has gone.
    """
    final, names = Path(out), sort_cameras(cameras)
    partial = final.with_name(f"{final.name}.partial")
    check_out(final)
    asked = {**(settings or {}), "cameras": list(names), "frames": frames, "fit": None if fit is None else asdict(fit)}
    if routes is not None:
        asked["route"] = "source"
    if changes := picture_changes(source):
        asked["changes"] = list(changes)
    ids = hashlib.sha256("\n".join(ref.sample_id for ref in refs).encode()).hexdigest()
    plan = json.dumps({"source": source.name, "samples": ids, **asked})
    if (earlier := _earlier(final, plan, refs, unusable)) is not None:
        if partial.is_dir():  # it was killed before it had removed that
            with _alone(partial):
                pass
            shutil.rmtree(partial)
        return earlier
    if unusable:
        _check_source(spec, partial)
    parts = [refs[start : start + SHARD_SAMPLES] for start in range(0, len(refs), SHARD_SAMPLES)]
    shards = [partial / f"shard-{number:06d}" for number in range(len(parts))]

    def to_row_of(ref: SampleRef) -> dict[str, Any]:
        try:
            sample = source.load(ref, cameras=names, frames=frames)
            sample = sample if routes is None else routes(sample)
        except BadClipError:
            _check_source(spec, partial)
            raise
        return to_row(sample, source=source.name, fit=fit, changes=changes)

    partial.mkdir(parents=True, exist_ok=True)
    with naming(final), _alone(partial):
        _refuse_existing(final)  # another run may have just finished
        _settle_plan(partial, plan)
        rejected = [(name, error.kind, str(error)) for name, error in unusable]
        for base, part in zip(shards, parts, strict=True):
            columns = features(routes=routes is not None, changes=bool(changes))
            written = _write_shard(base, to_row_of, part, on_sample, columns=columns)
            rejected += [(name, kind, text) for name, kind, text in written]
        if len(rejected) - len(unusable) == len(refs):
            reason = f" The first reason: {rejected[0][2]}" if rejected else ""
            raise SourceError(f"{source.name}: none of {len(rejected)} samples can be used.{reason}")
        record = _finish(shards, final, source.name, asked, rejected, plan)
    shutil.rmtree(partial)  # only now that its lock is closed: NFS keeps the names of open files
    return PrepareReport(samples=record["samples"], rejected=tuple(rejected), provenance=record)


def _earlier(final: Path, plan: str, refs: Sequence[SampleRef], unusable: Sequence[Rejected]) -> PrepareReport | None:
    """The outcome of an earlier call of the same plan that has finished; None if nothing is there.

    Raises `UsageError` for whatever else is there.
    """
    from datasets import load_from_disk

    if not final.exists():
        return None
    try:
        record = json.loads((final / PROVENANCE).read_bytes())
        if record[_PLAN] != _digest(plan):
            _refuse_existing(final)
        written = set(load_from_disk(final)["sample_id"])
        if len(written) != record["samples"]:
            _refuse_existing(final)
    except UsageError:
        raise
    except (OSError, ValueError, LookupError, TypeError):
        _refuse_existing(final)
    rejected = [(name, error.kind, str(error)) for name, error in unusable]
    left_out = [ref.sample_id for ref in refs if ref.sample_id not in written]
    rejected += [(name, "left_out", "left out when this was prepared.") for name in left_out]
    return PrepareReport(samples=record["samples"], rejected=tuple(rejected), provenance=record, existed=True)


def _digest(plan: str) -> str:
    return hashlib.sha256(plan.encode()).hexdigest()


def _refuse_existing(final: Path) -> None:
    if final.exists():
        raise UsageError(f"{final} already exists; choose another --out or remove it.")


def _check_source(spec: str | None, partial: Path) -> None:
    if spec is not None:
        again = f"bring the source back and run the same command again: it goes on with what is in {partial}."
        check_still_there(spec, kept=f"No sample was left out for it; {again}")


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Keep other processes out of the working directory; the kernel drops the lock of a killed process."""
    with (partial / "lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = f"another prepare is at work in {partial}; wait until it is done or choose another --out."
            raise UsageError(busy) from None
        except OSError as error:
            raise UsageError(f"{partial} cannot be locked ({error}); choose --out on another file system.") from error
        yield


def _settle_plan(partial: Path, plan: str) -> None:
    """Write down what the working directory is for, or check that an earlier run there had the same settings."""
    file = partial / "plan.json"
    if not file.exists():
        write_flushed(file, plan.encode())
    elif file.read_text() != plan:
        raise UsageError(f"{partial} belongs to a run with other settings; remove it or choose another --out.")


def _write_shard(
    base: Path,
    to_rows: Callable[[SampleRef], dict[str, Any]],
    refs: Sequence[SampleRef],
    on_sample: Callable[[SampleRef], None] | None,
    *,
    columns: Any,
) -> list[list[str]]:
    """Write `base.arrow`, then `base.json` with its count of rows and the rejected samples; returns the latter.

    A shard that is already there and complete is left as it is.
    """
    import pyarrow as pa

    report, arrow = base.with_suffix(".json"), base.with_suffix(".arrow")
    if (done := _read_report(report, arrow, len(refs))) is not None:
        return done
    report.unlink(missing_ok=True)
    schema, rejected = columns.arrow_schema, []
    with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for ref in refs:
            try:
                writer.write_batch(pa.RecordBatch.from_pylist([to_rows(ref)], schema=schema))
            except BadClipError as error:
                rejected.append([ref.sample_id, error.kind, str(error)])
            if on_sample is not None:
                on_sample(ref)
    flush(arrow)
    write_flushed(report, json.dumps({"rows": len(refs) - len(rejected), "rejected": rejected}).encode())
    return rejected


def _read_report(report: Path, arrow: Path, samples: int) -> list[list[str]] | None:
    """The rejected samples of a complete shard, else None."""
    import pyarrow as pa

    try:
        written = json.loads(report.read_text())
        rejected: list[list[str]] = written["rejected"]
        with pa.memory_map(str(arrow)) as file, pa.ipc.open_stream(file) as stream:
            rows = sum(batch.num_rows for batch in stream)
        return rejected if written["rows"] == rows and rows + len(rejected) == samples else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def _finish(
    shards: Sequence[Path],
    final: Path,
    source_name: str,
    asked: Mapping[str, Any],
    rejected: Sequence[tuple[str, str, str]],
    plan: str,
) -> dict[str, Any]:
    """Join the shards, add record and card, rename the directory once all is on the medium; returns the record."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(shard.with_suffix(".arrow"))) for shard in shards]
    rows = concatenate_datasets([part for part in parts if len(part)])
    record = provenance(rows, source=source_name, settings=asked, rejected=rejected) | {_PLAN: _digest(plan)}
    rows.info.description = f"{len(rows)} driving samples from {source_name}, written by alpacache prepare."
    done = shards[0].with_name("done")
    shutil.rmtree(done, ignore_errors=True)
    rows.save_to_disk(done)
    (done / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n")
    (done / "README.md").write_text(render_card(record), encoding="utf-8")
    for path in (*done.iterdir(), done):
        flush(path)
    done.replace(final)
    flush(final.parent)
    return record

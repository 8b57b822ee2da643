"""Writes drives as a `folder:`, clip after clip, so that a killed command goes on where it was.

    OUT/convert.json                    the settings, and when all is done, the report
    OUT/dataset.json                    there when all is done
    OUT/clips/CLIP/...                  the layout of `alpacache.sources.folder`
    OUT/clips/CLIP/provenance.json      where the clip's values come from, and what was changed

A clip is written under a hidden name and renamed when all of it is on the disk.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import __version__, strict_json
from alpacache.converters.clips import (
    Piece,
    Settled,
    check_drive,
    frames_between,
    pieces,
    routes_between,
    settle,
)
from alpacache.converters.config import Mount, Triple
from alpacache.converters.drive import Arrays, Camera, Dropped, Film, LoggedDrive, Packets, Pictures
from alpacache.converters.remux import copy_frames, decoded, film_frames, suffix_of, whole_range, write_raw
from alpacache.directory_lock import LOCK, DirectoryLock
from alpacache.driving.cameras import FRONT_CAMERA, sort_cameras
from alpacache.driving.route import check_route
from alpacache.durable import check_out, names_in, naming
from alpacache.errors import BadClipError, DataError, InterruptedRunError, SourceError, UsageError
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.regular_file import read_regular
from alpacache.sources.folder import is_plain_name
from alpacache.sources.recording import POSE_COLUMNS
from cache_store.storage.local_files import flush, write_flushed

REPORT, INDEX, CLIPS, PROVENANCE = "convert.json", "dataset.json", "clips", "provenance.json"
JPEG_QUALITY = 95
"""JPEG quality of pictures that had no file format; with all colours (4:4:4)."""
_WORK = ".writing"
"""Folder beside the clips for what is not whole yet."""
_FLUSHING = 16
"""Threads that flush a clip's files."""
_MAX_REPORT_BYTES = 2**28
_LONGEST_NAME = 120
_SUMMARY = {"name": str, "drive": str, "seconds": float, "poses": int, "routes": int, "cameras": dict}
"""Keys and types of what a clip's record says of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """Result of a conversion."""

    out: str
    clips: tuple[dict[str, Any], ...]
    """Each clip's name, drive, seconds, poses, routes and cameras, with how pictures were written; `pose`, where the
    pose stood, with offset and mount; and facts that are `told`. Clips of an earlier version lack the last two."""
    kept: int
    """Clips of them that an earlier command had written."""
    dropped: tuple[Dropped, ...]
    """Parts of the log that are not in the folder."""
    cameras: tuple[str, ...]


def convert(
    drives: Iterable[LoggedDrive | Dropped],
    out: Path,
    *,
    name: str,
    settings: Mapping[str, Any],
    changes: Sequence[str] = (),
    clip_seconds: float | None = None,
    offset_m: Triple | None = None,
    mount_deg: Mount | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = ignore,
) -> ConvertReport:
    """Write the clips of `drives` that are not in `out` yet.

    Args:
        name: of the data set.
        settings: what the result depends on; a folder of other settings is refused.
        changes: what was done to the pictures since they were recorded; it goes to the index, and so to the identity of
            stores.
        clip_seconds, offset_m, mount_deg: see `clips`.
        is_stopped: asked between frames; then `InterruptedRunError` is raised, and finished clips stay.

    Raises `UsageError` for a folder of something else, and where no drive could be used.
    """
    check_out(out)
    with naming(out), DirectoryLock(out, remedy="Wait for it, or choose another --out."):
        _begin(out, settings)
        work = out / CLIPS / _WORK
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            writer = _Writer(out, work, settings=settings, is_stopped=is_stopped, on_progress=on_progress)
            for drive in drives:
                if isinstance(drive, Dropped):
                    writer.dropped.append(drive)
                    continue
                writer.write(drive, clip_seconds=clip_seconds, offset_m=offset_m, mount_deg=mount_deg)
            if not writer.clips:
                reasons = "; ".join(drop.reason for drop in writer.dropped[:3]) or "the input holds no drive"
                raise SourceError(f"nothing could be converted: {reasons}.")
            return writer.finish(name, changes)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # unless there is something to go on with
                (out / CLIPS).rmdir()
                (out / REPORT).unlink()


def plain_name(text: str) -> str:
    """A drive's name as one path component that every file system takes: letters, digits and `._-+`, none hidden."""
    plain = re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("._")[:_LONGEST_NAME] or "drive"
    assert is_plain_name(plain)
    return plain


def _begin(out: Path, settings: Mapping[str, Any]) -> None:
    """Begin or go on with `out`. Raises `UsageError` for one with other settings or of something else."""
    report = out / REPORT
    if report.is_file():
        try:
            begun = strict_json.loads(read_regular(report, limit_bytes=_MAX_REPORT_BYTES))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{report} cannot be read ({error}); choose another --out.") from error
        wanted = strict_json.loads(strict_json.dumps(strict_json.plain(settings)))
        if changed := [key for key in {**begun, **wanted} if begun.get(key) != wanted.get(key)]:
            key = sorted(changed)[0]
            was, now = json.dumps(begun.get(key)), json.dumps(wanted.get(key))
            raise UsageError(
                f"--out {out} was begun with {key} {was}, and this command has {now}; choose another --out, or "
                "remove that folder."
            )
        return
    begun = f".{REPORT}.new"  # of one that was killed at its very beginning
    if present := [name for name in names_in(out) if name not in (LOCK, begun)]:
        raise UsageError(f"--out {out} holds {present[0]} and is not of this command; choose a new folder.")
    write_flushed(report, _json({"settings": settings}))


class _Writer:
    """The clips of one `convert`."""

    def __init__(
        self,
        out: Path,
        work: Path,
        *,
        settings: Mapping[str, Any],
        is_stopped: Callable[[], bool],
        on_progress: OnProgress,
    ) -> None:
        self.clips: dict[str, dict[str, Any]] = {}
        self.dropped: list[Dropped] = []
        self._out, self._work, self._settings = out, work, settings
        self._is_stopped, self._on_progress = is_stopped, on_progress
        self._kept, self._frames, self._total, self._began = 0, 0, 0, time.monotonic()

    def write(
        self,
        drive: LoggedDrive,
        *,
        clip_seconds: float | None,
        offset_m: Triple | None,
        mount_deg: Mount | None,
    ) -> None:
        """Write the clips of a drive that are not there yet; one that cannot be used is dropped."""
        self.dropped.extend(drive.dropped)
        named = replace(drive, name=plain_name(drive.name))
        try:
            if named.cameras:
                sort_cameras(list(named.cameras))
            check_drive(named)
            settled = settle(named, offset_m=offset_m, mount_deg=mount_deg)
            parts, short = pieces(named, settled.track, clip_seconds)
            self.dropped.extend(short)
            if not named.cameras and not any(drop.what == "cameras" for drop in named.dropped):
                reason = f"{named.name} has none: its poses are written alone, and `extract` takes no sample of them"
                self.dropped.append(Dropped(what="cameras", count=1, reason=reason))
            self._total += sum(len(camera.times_us) for camera in named.cameras.values())
            todo = [piece for piece in parts if not self._is_kept(piece, drive.name)]
            with self._as_films(named if todo else replace(named, cameras={})) as whole:
                for piece in todo:
                    try:
                        self._write_piece(whole, settled, piece)
                    except BadClipError as error:
                        self.dropped.append(Dropped(what="clips", count=1, reason=str(error).rstrip(".")))
                        del self.clips[piece.name]
        except (BadClipError, UsageError) as error:  # such as a mount that cannot be estimated on this drive
            self.dropped.append(Dropped(what="drives", count=1, reason=str(error).rstrip(".")))

    def finish(self, name: str, changes: Sequence[str]) -> ConvertReport:
        """Write the index and the report."""
        written = [camera for clip in self.clips.values() for camera in clip["cameras"]]
        cameras = sort_cameras(written or [FRONT_CAMERA])  # an index names one, also where only poses are there so far
        index = {"name": name, "cameras": list(cameras), "clips": list(self.clips)}
        index |= {"changes": list(changes)} if changes else {}
        report = ConvertReport(
            out=str(self._out),
            clips=tuple(self.clips.values()),
            kept=self._kept,
            dropped=tuple(self.dropped),
            cameras=cameras,
        )
        dropped = [asdict(drop) for drop in self.dropped]
        record = {"settings": self._settings, "clips": list(self.clips.values()), "dropped": dropped}
        write_flushed(self._out / INDEX, _json(index))
        write_flushed(self._out / REPORT, _json(record))
        return report

    @contextmanager
    def _as_films(self, drive: LoggedDrive) -> Iterator[LoggedDrive]:
        """The drive with packets put into raw files, when a clip is not there yet; the files go afterwards."""
        packets = {name: camera for name, camera in drive.cameras.items() if isinstance(camera, Packets)}
        films: dict[str, Camera] = {}
        try:
            for name, camera in packets.items():
                raw = self._work / f"{name}{suffix_of(camera.codec)}"
                write_raw(self._each(camera.read()), camera.codec, raw)
                films[name] = Film(path=raw, times_us=camera.times_us)
            yield replace(drive, cameras={**drive.cameras, **films})
        finally:
            for film in films.values():
                assert isinstance(film, Film)
                film.path.unlink(missing_ok=True)

    def _is_kept(self, piece: Piece, drive: str) -> bool:
        """Tell whether an earlier command has written this clip; raises `BadClipError` for a name that is taken."""
        if piece.name in self.clips:
            raise BadClipError("wrong_shape", f"{drive}: {piece.name} is the name of two drives; rename one of them.")
        done = self._out / CLIPS / piece.name / PROVENANCE
        if not done.is_file():
            self.clips[piece.name] = {}  # its place in the order of the index
            return False
        self.clips[piece.name] = _clip_in(done)
        self._kept += 1
        return True

    def _write_piece(self, drive: LoggedDrive, settled: Settled, piece: Piece) -> None:
        final, draft = self._out / CLIPS / piece.name, self._work / piece.name
        draft.mkdir()
        try:
            cameras = {
                name: self._write_camera(draft, drive.name, name, camera, piece)
                for name, camera in drive.cameras.items()
            }
            self._write_tables(draft, drive, piece)
            clip = self._summary(drive, piece, cameras, settled)
            record = {"clip": clip, "alpacache": __version__, "settings": self._settings}
            record |= {"pose": settled.record, "facts": drive.facts}
            (draft / PROVENANCE).write_bytes(_json(record))
            with ThreadPoolExecutor(_FLUSHING) as pool:  # disks flush many files at once
                list(pool.map(flush, draft.rglob("*")))
            flush(draft)
            draft.rename(final)
            flush(final.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self.clips[piece.name] = clip

    def _summary(self, drive: LoggedDrive, piece: Piece, cameras: dict[str, Any], settled: Settled) -> dict[str, Any]:
        stamps = piece.track.timestamps_us
        seconds = (min(int(stamps[-1]), piece.end_us) - max(int(stamps[0]), piece.begin_us)) / 1e6
        routes = len(routes_between(drive.routes, piece))
        return {
            "name": piece.name,
            "drive": drive.name,
            "seconds": round(seconds, 3),
            "poses": len(stamps),
            "routes": routes,
            "cameras": cameras,
            "pose": settled.record,
            "told": {key: str(drive.facts[key]) for key in drive.told if key in drive.facts},
        }

    def _write_tables(self, draft: Path, drive: LoggedDrive, piece: Piece) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        track = piece.track
        columns = [track.timestamps_us, *track.xyz.T, *track.quaternion_xyzw.T]
        table = pa.table(
            {name: np.ascontiguousarray(column) for name, column in zip(POSE_COLUMNS, columns, strict=True)}
        )
        pq.write_table(table, draft / "egomotion.parquet")
        if routes := routes_between(drive.routes, piece):
            for at, text in routes:
                try:
                    check_route(text)
                except ValueError as error:
                    raise BadClipError("bad_route", f"{piece.name}: the route at {at} us: {error}.") from error
            times = pa.array([at for at, _ in routes], pa.int64())
            pq.write_table(
                pa.table({"timestamp": times, "route": [text for _, text in routes]}), draft / "route.parquet"
            )
        if lenses := {name: lens for name, lens in drive.calibration.items() if name in drive.cameras}:
            (draft / "calibration.json").write_bytes(_json(lenses))

    def _write_camera(self, draft: Path, drive: str, name: str, camera: Camera, piece: Piece) -> dict[str, Any]:
        """Write one camera's part of a clip; returns what was done."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        where = f"{drive}: {name}"
        begin, end = frames_between(camera.times_us, piece)
        if begin == end:
            raise BadClipError("missing_camera", f"{piece.name}: {name} has no frame in it.")
        how: dict[str, Any]
        match camera:
            case Film():
                begin, end, how = self._write_film(draft, name, camera, begin, end, where=where)
            case Pictures():
                files = ((data, _picture_ending(data, where=where)) for data in camera.read(begin, end))
                how = {"written": "copied", "formats": self._write_pictures(draft / name, files, end - begin, where)}
            case Arrays():
                self._write_pictures(draft / name, _as_jpeg(camera.read(begin, end)), end - begin, where)
                how = {"written": "encoded", "formats": [".jpg"], "quality": JPEG_QUALITY}
            case _:
                raise AssertionError("packets have become a film")
        stamps = camera.times_us[begin:end]
        pq.write_table(pa.table({"timestamp": stamps}), draft / f"{name}.timestamps.parquet")
        return {"frames": len(stamps), **how}

    def _write_film(
        self, draft: Path, name: str, camera: Film, begin: int, end: int, *, where: str
    ) -> tuple[int, int, dict[str, Any]]:
        frames = film_frames(camera.path)
        first, count = camera.first, len(camera.times_us)
        if first + count > frames.total:
            held = f"{camera.path.name} holds {frames.total} frames, and its times name {first + count}"
            raise BadClipError("wrong_shape", f"{where}: {held}; copy it again in case it is cut off.")
        copied = whole_range(frames, first + begin, first + end)
        if copied is not None and first <= copied[0] and copied[1] <= first + count:
            begin, end = copied[0] - first, copied[1] - first
            copy_frames(camera.path, *copied, camera.times_us[begin:end], draft / f"{name}.mp4")
            self._progress(end - begin)
            return begin, end, {"written": "packets copied", "codec": frames.codec}
        pictures = _as_jpeg(decoded(camera.path, first + begin, first + end))
        self._write_pictures(draft / name, pictures, end - begin, where)
        how = {"written": "decoded and encoded", "codec": frames.codec, "formats": [".jpg"], "quality": JPEG_QUALITY}
        return begin, end, how

    def _write_pictures(
        self, folder: Path, files: Iterator[tuple[bytes, str]], expected: int, where: str
    ) -> Sequence[str]:
        """Number the pictures; returns their endings."""
        folder.mkdir()
        endings, count = set(), 0
        for data, ending in self._each(files):
            (folder / f"{count:06d}{ending}").write_bytes(data)
            endings.add(ending)
            count += 1
        if count != expected:
            raise BadClipError("wrong_shape", f"{where}: {count} pictures could be read of {expected}.")
        return sorted(endings)

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items, with progress, until the command is asked to stop."""
        for item in items:
            if self._is_stopped():
                raise InterruptedRunError("stopped on request; run the same command again to go on.")
            yield item
            self._progress(1)

    def _progress(self, frames: int) -> None:
        self._frames += frames
        rate = self._frames / max(1e-9, time.monotonic() - self._began)
        progress = Progress(done=self._frames, total=max(self._total, self._frames), unit="frames", rate=rate, notes={})
        self._on_progress(progress)


def _clip_in(provenance: Path) -> dict[str, Any]:
    """The summary of a clip that an earlier command wrote. Raises `DataError` where it is damaged."""
    try:
        clip: dict[str, Any] = strict_json.loads(read_regular(provenance, limit_bytes=_MAX_REPORT_BYTES))["clip"]
        if any(type(clip[key]) is not kind for key, kind in _SUMMARY.items()):
            raise ValueError("it does not say what the clip holds")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{provenance} is damaged ({error}). Remove that clip's folder and run the same command again; it is "
            "written anew."
        ) from error
    return clip


def _picture_ending(data: bytes, *, where: str) -> str:
    """Ending of a picture by its first bytes, whatever the log calls it."""
    if data.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    raise BadClipError("undecodable_video", f"{where}: a picture begins with {data[:4].hex()}; JPEG and PNG are read.")


def _as_jpeg(frames: Iterator[NDArray[np.uint8]]) -> Iterator[tuple[bytes, str]]:
    import io

    from PIL import Image

    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        yield file.getvalue(), ".jpg"


def _json(value: Any) -> bytes:
    return (strict_json.dumps(strict_json.plain(value), indent=1) + "\n").encode()

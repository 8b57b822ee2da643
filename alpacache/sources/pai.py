"""`pai:DIR` and `pai`: PhysicalAI-AV, read by its own devkit (`physical_ai_av`), from disk or from the hub.

The devkit's classes are used as they are, so poses and cameras mean what they mean to the public loader. It knows only
the hub and the hub's cache: a local tree gets a cache directory made of links (see `pai_cache`), and of the hub only
the chunks that samples are loaded from are downloaded (see `pai_chunks`). Films alone are read as every source's are
(see `video`): the devkit's reader takes their rate for constant and counts no frames, so a lost one would move all
later ones. Of films that it reads rightly the frames are the same.
This module adds what a run over many clips needs: which clips are there, and a reason for each that cannot be used.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.driving.cameras import CAMERAS, sort_cameras
from alpacache.driving.poses import Track, check_track, check_usable, ego_poses, frame_indices, sample_times_us
from alpacache.driving.sample import Sample, SampleRef
from alpacache.errors import BadClipError, DataError, SourceError, UsageError
from alpacache.hub import why_unreachable
from alpacache.sources.pai_cache import FEATURES_FILE, REPO, LinkedCache, explain_hub_error, unreachable_hub
from alpacache.sources.pai_chunks import ChunkCache, cache_directory, limit_bytes
from alpacache.sources.pai_metadata import Faults, read_by_clip
from alpacache.sources.recording import POSE_COLUMNS, Reel, Shot, covered_us, read_frames, reels, sample_of, track_of
from alpacache.sources.retry import connection_errors, first_line, with_retry
from alpacache.sources.source import SourceKind
from alpacache.sources.table import check_table, read_columns
from alpacache.sources.video import FilmReading

EGOMOTION = "egomotion"
EVENTS_FILE = "reasoning/ood_reasoning.parquet"
MAX_MEMBER_BYTES = 2**29
MAX_TIME_US = 2**53


def open_tree(directory: str | Path, *, cameras: Sequence[str] | None = None) -> "PhysicalAiSource":
    """Open a tree with the repository's own layout, as `hf download ... --local-dir DIR` leaves it, without network."""
    interface_class = _devkit()
    cache = LinkedCache(Path(directory))
    options = {"revision": cache.revision, "cache_dir": cache.directory, "token": False}
    try:
        interface = interface_class(**options, confirm_download_threshold_gb=float("inf"))
        return PhysicalAiSource(interface, name=f"pai:{cache.tree.name}", cameras=cameras, files=cache)
    except UsageError:
        raise
    except Exception as error:  # the devkit checks nothing: whatever it and pandas make of odd tables
        raise SourceError(f"pai:{directory}: the devkit cannot read its metadata ({first_line(error)}).") from error


def open_hub(*, cameras: Sequence[str] | None = None) -> "PhysicalAiSource":
    """Open the dataset on the hub. `pai_chunks` says what is downloaded of it and where that is kept.

    Raises `SourceError` with the command that helps.
    """
    limit, directory = limit_bytes(), cache_directory()
    options = {"cache_dir": str(directory) if limit else None, "confirm_download_threshold_gb": float("inf")}
    _check_reach()
    interface_class = _devkit()
    try:
        interface = with_retry(lambda: interface_class(**options), what=f"opening {REPO}")
    except connection_errors() as error:
        raise explain_hub_error(error) from error
    except Exception as error:  # the devkit checks nothing: whatever it and pandas make of odd tables
        raise SourceError(f"pai ({REPO}): the devkit cannot read its metadata ({first_line(error)}).") from error
    chunks = ChunkCache(interface, directory, limit) if limit else None
    return PhysicalAiSource(interface, name=f"pai@{interface.revision}", cameras=cameras, files=chunks)


def _check_reach(tree: str = "") -> None:
    if not tree and (why := why_unreachable()):
        raise unreachable_hub(why)


class PhysicalAiSource:
    """Clips behind one devkit interface, in the order of their chunks; every read opens its own files."""

    def __init__(
        self, interface: Any, *, name: str, cameras: Sequence[str] | None, files: LinkedCache | ChunkCache | None
    ) -> None:
        """Called by `open_tree` and `open_hub`; without `files` all is streamed."""
        self._interface = interface
        self._cache = files if isinstance(files, LinkedCache) else None
        self._chunks = files if isinstance(files, ChunkCache) else None
        self.name, self.cameras = name, sort_cameras(cameras or CAMERAS)
        self._unusable = self._unusable_clips()
        usable = [clip_id for clip_id in self._usable_clips() if clip_id not in self._unusable]
        self._known = frozenset(usable)
        self.clip_ids: Sequence[str] = [*usable, *sorted(self._unusable)]
        if not self.clip_ids:
            raise SourceError(f"{name}: no clip with poses and a camera is here; fetch a chunk of each, see the docs.")
        self._poses = lru_cache(maxsize=64)(self._read_poses)
        self._lenses = lru_cache(maxsize=64)(self._read_calibration)
        self._events = lru_cache(maxsize=1)(self._read_events)

    def times_us(self, clip_id: str) -> tuple[int, int]:
        """First and last instant that the poses and those of `cameras` that the clip has both cover."""
        _, track = self._poses(clip_id)
        there = [camera for camera in self.cameras if self._has(clip_id, camera)]
        return covered_us(track, {name: self.frame_times_us(clip_id, name) for name in there}, where=clip_id)

    def track(self, clip_id: str) -> Track:
        self._check_known(clip_id)
        return track_of(self._read_columns(clip_id, EGOMOTION, EGOMOTION, POSE_COLUMNS))

    def frame_times_us(self, clip_id: str, camera: str) -> NDArray[np.int64]:
        self._check_known(clip_id)
        return self._read_stamps(clip_id, camera, fetch=False)

    def film(self, clip_id: str, camera: str, times_us: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._glimpses(clip_id, camera, times_us)

    def glance(self, clip_id: str, camera: str, times_us: NDArray[np.int64], *, about_px: int) -> NDArray[np.uint8]:
        return self._glimpses(clip_id, camera, times_us, about_px=about_px)

    def event_times_us(self, clip_id: str) -> Sequence[int]:
        return event_times_us(self._events().get(clip_id, ()), where=f"{clip_id}: {EVENTS_FILE}")

    def group_of(self, clip_id: str) -> str:
        """The clip's chunk, which is downloaded as a whole."""
        return str(self._interface.get_clip_chunk(clip_id)) if clip_id in self._known else ""

    def _check_known(self, clip_id: str) -> None:
        if clip_id in self._unusable:
            raise BadClipError("missing_clip", f"{clip_id}: {self._unusable[clip_id]}")
        if clip_id not in self._known:
            raise BadClipError("missing_clip", f"{clip_id}: not a clip of {self.name}.")

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """Read one sample; raises `BadClipError` for a recording that cannot be used at this t0."""
        with self.one_pass([ref], cameras=cameras, frames=frames) as load:
            return load(ref)

    @contextmanager
    def one_pass(
        self, refs: Sequence[SampleRef], *, cameras: Sequence[str], frames: int
    ) -> Iterator[Callable[[SampleRef], Sample]]:
        """Read samples of one clip, each camera's film in one pass; films stay in memory meanwhile."""
        clip_id, t0s_us = refs[0].clip_id, [ref.t0_us for ref in refs]

        def reel(camera: str) -> Reel:
            read_stamps, open_film = partial(self._read_stamps, clip_id, camera), partial(self._film, clip_id, camera)
            return Reel(t0s_us, frames, read_stamps, open_film)

        def shot(camera: str, reel: Reel, t0_us: int) -> Shot:
            with self._reading_film(clip_id, camera):
                return reel.shot(t0_us, where=f"{clip_id}: {camera}")

        with reels(sort_cameras(cameras), reel) as by_camera:

            def load(ref: SampleRef) -> Sample:
                interpolator, track = self._poses(clip_id)
                times = sample_times_us(ref.t0_us)
                check_usable(track, times, where=clip_id)
                pose = interpolator(times).pose
                shots = {name: shot(name, each, ref.t0_us) for name, each in by_camera.items()}
                poses = ego_poses(pose.translation, pose.rotation.as_matrix())
                return sample_of(ref, poses, shots, self._lenses(clip_id))

            yield load

    def _usable_clips(self) -> list[str]:
        """Clips marked valid that have poses; in a local tree, those whose chunk has poses and a camera on disk."""
        index = self._interface.clip_index
        if "clip_is_valid" in index.columns:
            index = index[index["clip_is_valid"]]
        presence = self._interface.feature_presence
        if EGOMOTION in presence.columns:
            index = index[presence[EGOMOTION].reindex(index.index, fill_value=False).astype(bool)]
        if self._cache is not None:
            here = {chunk for chunk in set(index["chunk"]) if self._chunk_is_here(chunk)}
            index = index[index["chunk"].isin(here)]
        return [str(clip) for _, clip in sorted(zip(index["chunk"], index.index, strict=True))]

    def _unusable_clips(self) -> Faults:
        """Clips of a local tree that its metadata is wrong about, unless their chunk is known not to be here."""
        if self._cache is None:
            return {}
        chunks, faults = self._interface.clip_index["chunk"], self._cache.unusable
        here = {chunk: self._chunk_is_here(chunk) for chunk in {chunks[clip] for clip in faults if clip in chunks}}
        return {clip: why for clip, why in faults.items() if clip not in chunks or here[chunks[clip]]}

    def _chunk_is_here(self, chunk: int) -> bool:
        features = self._interface.features
        names = [name for name in (EGOMOTION, *CAMERAS) if name in features.ALL]
        has = [self._interface.is_file_cached(features.get_chunk_feature_filename(chunk, name)) for name in names]
        return has[0] and any(has[1:])

    def _has(self, clip_id: str, camera: str) -> bool:
        presence = self._interface.feature_presence
        named = camera in self._interface.features.ALL
        listed = camera not in presence.columns or bool(presence[camera].get(clip_id, False))
        return named and listed and (self._cache is None or self._interface.is_file_cached(self._file(clip_id, camera)))

    def _file(self, clip_id: str, feature: str) -> str:
        interface = self._interface
        return str(interface.features.get_chunk_feature_filename(interface.get_clip_chunk(clip_id), feature))

    def _read_poses(self, clip_id: str) -> tuple[Any, Track]:
        """The devkit's interpolator and the track behind it, checked first because the devkit's errors name no row."""
        track = self.track(clip_id)
        check_track(track, where=clip_id)
        with self._reading(clip_id, EGOMOTION):
            return self._feature(clip_id, EGOMOTION), track

    def _reading_film(self, clip_id: str, camera: str) -> AbstractContextManager[None]:
        return self._reading(clip_id, camera, missing="missing_camera", damaged="undecodable_video")

    def _glimpses(
        self, clip_id: str, camera: str, times_us: NDArray[np.int64], *, about_px: int | None = None
    ) -> NDArray[np.uint8]:
        with self._reading_film(clip_id, camera):
            stamps = self._read_stamps(clip_id, camera)
            where, opener = f"{clip_id}: {camera}", partial(self._film, clip_id, camera, about_px=about_px)
            return read_frames(opener, stamps, frame_indices(stamps, times_us, where=where), where=where)

    def _film(
        self,
        clip_id: str,
        camera: str,
        stamps: NDArray[np.int64],
        wanted: Sequence[Sequence[int]],
        *,
        about_px: int | None = None,
    ) -> FilmReading:
        film = self._read_member(clip_id, camera, "video", lambda opened: opened.read())
        where = f"{clip_id}: {camera}"
        return FilmReading(film, wanted, stamps, name="the film", where=where, about_px=about_px)

    def _read_stamps(self, clip_id: str, camera: str, *, fetch: bool = True) -> NDArray[np.int64]:
        if not self._has(clip_id, camera):
            raise BadClipError("missing_camera", f"{clip_id}: {camera}: {self._where_to_get(clip_id, camera)}")
        return self._read_columns(clip_id, camera, "frame_timestamps", ("timestamp",), fetch=fetch)["timestamp"]

    def _feature(self, clip_id: str, feature: str) -> Any:
        read = partial(self._interface.get_clip_feature, clip_id, feature)
        return self._at_hand(self._file(clip_id, feature), lambda stream: read(maybe_stream=stream))

    def _read_columns(
        self, clip_id: str, feature: str, member: str, names: Sequence[str], *, fetch: bool = True
    ) -> dict[str, NDArray[Any]]:
        """Read columns of one parquet member of a chunk's archive, once the devkit can read all of it too."""
        where = f"{clip_id}: {feature}"

        def columns(opened: Any) -> dict[str, NDArray[Any]]:
            table = BytesIO(opened.read())
            check_table(table, where=where)
            return read_columns(table, names, where=where)

        missing = "missing_poses" if feature == EGOMOTION else "missing_camera"
        with self._reading(clip_id, feature, missing=missing):
            arrays: dict[str, NDArray[Any]] = self._read_member(clip_id, feature, member, columns, fetch=fetch)
            return arrays

    def _read_member(
        self, clip_id: str, feature: str, member: str, parse: Callable[[Any], Any], *, fetch: bool = True
    ) -> Any:
        """Parse one opened member of a chunk's archive; refuses what no film unpacks to.

        Without `fetch` the chunk is not downloaded for it: the needed part of the archive is streamed.
        """
        file, names = self._file(clip_id, feature), self._interface.features.get_clip_files_in_zip(clip_id, feature)

        def read(stream: bool) -> Any:
            with self._interface.open_file(file, maybe_stream=stream) as opened, zipfile.ZipFile(opened) as archive:
                for name in names.values():
                    if name in archive.namelist() and archive.getinfo(name).file_size > MAX_MEMBER_BYTES:
                        reason = f"{name} unpacks to more than {MAX_MEMBER_BYTES:,} B."
                        raise BadClipError("unsafe_size", f"{clip_id}: {reason}")
                with archive.open(names[member]) as entry:
                    return parse(entry)

        return self._at_hand(file, read, fetch=fetch)

    def _at_hand(self, file: str, read: Callable[[bool], Any], *, fetch: bool = True) -> Any:
        """Call `read(stream)` while the archive is held on disk, or streaming it, and again while the hub fails."""
        if self._cache is not None:
            return read(False)
        if self._chunks is None:
            return with_retry(lambda: read(True), what=file)
        with self._chunks.hold(file, fetch=fetch):
            return with_retry(lambda: read(not fetch), what=file)

    @contextmanager
    def _reading(
        self, clip_id: str, feature: str, *, missing: str = "wrong_shape", damaged: str = "wrong_shape"
    ) -> Iterator[None]:
        """Turn what the devkit, zip, parquet and FFmpeg raise for bad data into a `BadClipError`."""
        import av
        import pyarrow as pa

        where = f"{clip_id}: {feature}"
        try:
            yield
        except (BadClipError, DataError, UsageError):
            raise
        except (KeyError, FileNotFoundError) as error:
            reason = self._where_to_get(clip_id, feature)
            raise BadClipError(missing, f"{where}: {reason} ({error})") from error
        except (zipfile.BadZipFile, av.error.FFmpegError, pa.ArrowException, EOFError) as error:
            raise BadClipError(damaged, f"{where} cannot be decoded ({error}); fetch its file again.") from error
        except connection_errors() as error:
            if self._cache is None:
                text = f"{where}: cannot be fetched ({first_line(error)}); the same command goes on."
                raise DataError(text) from error
            raise BadClipError(damaged, f"{where} cannot be read ({error}).") from error
        except Exception as error:  # the devkit checks nothing: whatever it and pandas make of damaged data
            raise BadClipError(damaged, f"{where} cannot be decoded by the devkit ({error}).") from error

    def _where_to_get(self, clip_id: str, feature: str) -> str:
        if feature not in self._interface.features.ALL:
            return "the dataset has no such feature; leave it out with --cameras."
        file = self._file(clip_id, feature)
        if self._cache is None or self._interface.is_file_cached(file):
            return "the dataset has none for this clip; leave it out with --cameras."
        return f"not in the tree; run: hf download {REPO} {file} --repo-type dataset --local-dir {self._cache.tree}"

    def _read_calibration(self, clip_id: str) -> dict[str, dict[str, Any]]:
        """The f-theta model and place of each camera for which the dataset has both; damaged ones are a bad clip."""
        read = []
        for feature in ("camera_intrinsics", "sensor_extrinsics"):
            with self._reading(clip_id, feature):
                self._check_calibration(clip_id, feature)
                try:
                    read.append(self._feature(clip_id, feature))
                except (KeyError, FileNotFoundError):  # no such file here, or none of this clip in it
                    return {}
        models, poses = read[0].camera_models, read[1].sensor_poses
        with self._reading(clip_id, "camera_intrinsics"):
            lenses = {
                name: {
                    "model": "ftheta",
                    "width": int(models[name].width),
                    "height": int(models[name].height),
                    "cx": float(models[name].principal_point[0]),
                    "cy": float(models[name].principal_point[1]),
                    "fw_poly": [float(value) for value in models[name].th2r.coef],
                    "bw_poly": [float(value) for value in models[name].r2th.coef],
                    "position_m": [float(value) for value in poses[name].translation],
                    "rotation": poses[name].rotation.as_matrix().tolist(),
                }
                for name in CAMERAS
                if name in models and name in poses
            }
            json.dumps(lenses, allow_nan=False)  # raises ValueError
            return lenses

    def _check_calibration(self, clip_id: str, feature: str) -> None:
        """Hold a chunk's table of calibrations against the limits before the devkit reads it."""
        if self._cache is not None and feature in self._interface.features.ALL:
            file = self._cache.tree / self._file(clip_id, feature)
            if file.exists():
                check_table(file, where=f"{clip_id}: {file.name}")

    def _read_events(self) -> dict[str, list[str]]:
        """The texts in which events are listed, by clip."""
        if self._cache is not None and not self._interface.is_file_cached(EVENTS_FILE):
            fetch = f"hf download {REPO} {EVENTS_FILE} --repo-type dataset --local-dir {self._cache.tree}"
            raise UsageError(f"{self.name}: t0 events needs {EVENTS_FILE}; run: {fetch}")
        try:
            file = Path(with_retry(lambda: self._interface.download_file(EVENTS_FILE), what=EVENTS_FILE))
        except connection_errors() as error:
            raise explain_hub_error(error) from error
        listed: dict[str, list[str]] = {}
        table, _ = read_by_clip(file, ("events",), name=f"{self.name}: {EVENTS_FILE}")
        for clip, text in table["events"].items():
            if isinstance(text, str):
                listed.setdefault(str(clip), []).append(text)
        return listed


def event_times_us(texts: Sequence[str], *, where: str) -> list[int]:
    """Times (us) of the events in JSON texts; one without a time is left out.

    Raises `BadClipError` (`wrong_shape`) for other texts, and for events none of which has a time.
    """
    events: list[Any] = []
    for text in texts:
        try:
            events += strict_json.loads(text) or ()
        except (ValueError, TypeError) as error:
            raise BadClipError("wrong_shape", f"{where} is no list of events for this clip ({error}).") from error
    times = [event.get("event_start_timestamp") for event in events if isinstance(event, dict)]
    whole = [int(time) for time in times if isinstance(time, int | float) and abs(time) < MAX_TIME_US]
    if events and not whole:
        raise BadClipError("wrong_shape", f"{where}: none of its {len(events)} events has an event_start_timestamp.")
    return sorted(whole)


def _devkit() -> Any:
    try:
        from physical_ai_av import PhysicalAIAVDatasetInterface
    except ImportError as error:
        raise UsageError(
            f"PhysicalAI-AV is read by its devkit, which is not installed ({error}); run: pip install 'alpacache[pai]'"
        ) from error
    return PhysicalAIAVDatasetInterface


KIND = SourceKind(
    prefix="pai",
    usage=("pai", "pai:DIR"),
    open=lambda place, cameras: open_tree(place, cameras=cameras) if place else open_hub(cameras=cameras),
    check_reach=_check_reach,
    is_streamed=lambda place: not place,
    marker=lambda place: Path(place) / FEATURES_FILE if place else None,
)

"""`drive`: a recording played with the paths that a model predicts at every moment, base beside trained, as a film.

The VLM looks at each moment once, whatever the number of experts. What they predict is kept beside the film while it is
made, so that a run that was stopped goes on; the film itself appears at once when it is done.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alpacache import strict_json
from alpacache.cached_samples.identity import model_identity, vlm_identity
from alpacache.driver.config import DriveConfig
from alpacache.driver.driver import Driver, load_driver
from alpacache.driver.kept_paths import kept_beside
from alpacache.driver.moment import moment_of, pose_at
from alpacache.driving.cameras import FRONT_CAMERA, sort_cameras
from alpacache.driving.poses import Track, check_track, frame_indices, interpolate
from alpacache.driving.sample import FRAME_STEP_US, FUTURE_STEPS, HISTORY_STEPS, STEP_US, Sample, SampleRef
from alpacache.durable import check_file_out, naming
from alpacache.errors import BadClipError, InterruptedRunError, UsageError
from alpacache.inference import BASE, TRAINED
from alpacache.interrupt import InterruptGuard
from alpacache.pictures.canvas import MODEL_COLOURS
from alpacache.pictures.drive_frame import SIZE, Shown, drive_frame
from alpacache.pictures.front_view import project
from alpacache.planning.config import budget_bytes
from alpacache.progress import OnProgress, Progress, ignore
from alpacache.regular_file import regular_size
from alpacache.sources.blank import with_blank
from alpacache.sources.recording import wanted_frame_times_us
from alpacache.sources.registry import open_source
from alpacache.sources.routes import Routes
from alpacache.sources.source import RecordedSource, Source, picture_changes
from cache_store.storage.local_files import flush

_log = logging.getLogger(__name__)

_AT_ONCE = 10
"""Moments whose pictures are read together."""
_ENCODERS = ("libx264", "libopenh264", "mpeg4")
_MARK = "alpacache drive"
"""A film's comment, by which it is known as one of these: no other file is written over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriveReport:
    """A film that was made."""

    out: str
    clip: str
    pictures: int
    """Pictures of the film, each with paths of its own."""
    seconds: float
    resumed: int
    """Pictures whose paths had been predicted before."""
    left_out: int
    """Moments that cannot be driven from, as within a hole of a camera: the film goes on behind them."""
    models: tuple[str, ...]
    shown_paths: bool
    """False where the camera has no calibration: then paths are drawn from above alone."""


def drive(config: DriveConfig, *, on_progress: OnProgress = ignore) -> DriveReport:
    """Play a recording with predicted paths into a film.

    Raises `UsageError` for settings that cannot work, `BadClipError` for a recording that cannot be played,
    `InterruptedRunError` after a signal: the same call goes on where it stopped.
    """
    out, started = Path(config.out), time.monotonic()
    _check_film(out)
    cameras = sort_cameras(config.cameras)
    source = open_source(config.source, cameras=cameras)
    if not isinstance(source, RecordedSource):
        raise UsageError(
            f"{config.source} holds single samples; a film needs whole recordings, of folder:DIR, pai or synthetic:N."
        )
    clip = config.clip or source.clip_ids[0]
    if clip not in source.clip_ids:
        raise UsageError(f"{config.source} has no clip {clip!r}; its first is {source.clip_ids[0]!r}.")
    track = source.track(clip)
    check_track(track, where=clip)
    routes = Routes(config.route, source)
    budget = None if config.memory_budget is None else budget_bytes(config.memory_budget)
    given: dict[str, Any] = {"device": config.device, "vlm": config.vlm, "frames": config.frames}
    base, others = _drivers(config.model, config.checkpoint, average=config.ema, memory_budget=budget, **given)
    _warn_of_other_pictures(base, source)
    observer = base.observer
    if config.route != "none":
        observer.check_takes_routes()
    span: dict[str, Any] = {"begin_s": config.begin, "seconds": config.seconds, "every_s": config.every}
    moments = _moments(source, clip, **span, frames=observer.frames)
    shown = FRONT_CAMERA if FRONT_CAMERA in cameras else cameras[0]
    lens = _lens(source, clip, shown, moments[0])
    asked = {name: getattr(config, name) for name in ("cameras", "route", "paths", "flow_steps", "seed")}
    settings = _settings(asked, source=source.name, clip=clip, first_us=moments[0], drivers=others)
    draft, resumed, done = out.with_name(f".{out.name}.new"), 0, 0
    sampled: dict[str, Any] = {"paths": config.paths, "flow_steps": config.flow_steps, "seed": config.seed}
    left_out: list[BadClipError] = []
    looks: dict[str, Any] = {"cameras": cameras, "frames": observer.frames, "shown": shown, "left_out": left_out}
    with (
        naming(out.parent),
        kept_beside(out, settings, shape=(config.paths, FUTURE_STEPS, 3)) as kept,
        InterruptGuard() as guard,
        _Film(draft, every_s=config.every) as film,
    ):
        for sample, pictures in _seen(source, clip, track, moments, **looks):
            if guard.requested:
                raise InterruptedRunError(
                    f"stopped on request: {done} of {len(moments)} moments are predicted; the same command goes on."
                )
            t0_us, sample = sample.ref.t0_us, routes(sample)
            paths = kept.read(t0_us)
            resumed += paths is not None
            if paths is None:
                seen = observer.see(with_blank(sample, observer.blank), track)
                paths = {label: driver.paths(seen, **sampled).xyz for label, driver in others.items()}
                kept.write(t0_us, paths)
            film.add(drive_frame(_shown(track, t0_us, pictures, lens, paths, sample.route, clip)))
            done += 1
            rate, passed = done / (time.monotonic() - started), done + len(left_out)
            on_progress(Progress(done=passed, total=len(moments), unit="pictures", rate=rate, notes={"clip": clip}))
        if not done:
            raise left_out[0]
        film.finish(out)
        kept.remove()
    if left_out:
        _log.warning("%d of %d moments are left out; the first: %s", len(left_out), len(moments), left_out[0])
    return DriveReport(
        out=config.out,
        clip=clip,
        pictures=done,
        seconds=time.monotonic() - started,
        resumed=resumed,
        left_out=len(left_out),
        models=tuple(others),
        shown_paths=lens is not None,
    )


def _warn_of_other_pictures(driver: Driver, source: Source) -> None:
    """Warn where an expert was trained on pictures that were changed otherwise than those of the source."""
    if driver.changes is not None and (changes := picture_changes(source)) != tuple(driver.changes):
        saw, shows = (", ".join(each) or "nothing" for each in (driver.changes, changes))
        _log.warning("trained on pictures changed by %s, and those of %s are changed by %s.", saw, source.name, shows)


def _drivers(
    model: str, run: str | None, *, average: bool, memory_budget: int | None, **given: Any
) -> tuple[Driver, dict[str, Driver]]:
    """The driver whose recorded settings count, and all drivers of its observer by label."""
    first = load_driver(model, run, average=average, memory_budget=memory_budget, **given)
    return first, {BASE: first} if run is None else {BASE: first.alongside(None), TRAINED: first}


def _moments(
    source: Source, clip: str, *, begin_s: float, seconds: float | None, every_s: float, frames: int
) -> list[int]:
    """Choose the moments (us) of the film's pictures. Raises `UsageError` where there are none."""
    first, last = source.times_us(clip)
    earliest = first + max((HISTORY_STEPS - 1) * STEP_US, (frames - 1) * FRAME_STEP_US)
    begin, step = max(earliest, first + round(begin_s * 1e6)), round(every_s * 1e6)
    end = last if seconds is None else min(last, begin + round(seconds * 1e6))
    moments = list(range(begin, end + 1, step))
    if not moments:
        reason = f"from {first / 1e6:.1f} to {last / 1e6:.1f} s; a film can begin at {earliest / 1e6:.1f} s"
        raise UsageError(f"{clip}: poses and cameras cover it {reason}, --begin is {begin_s:g}.")
    return moments


def _lens(source: Source, clip: str, camera: str, t0_us: int) -> Mapping[str, Any] | None:
    """Read the calibration of the shown camera; None where the source has none that can be drawn with."""
    try:
        sample = source.load(SampleRef(clip_id=clip, t0_us=t0_us), cameras=[camera], frames=1)
        lens = (sample.calibration or {}).get(camera)
        if lens is None or not {"width", "height"} <= lens.keys():
            return None
        project(np.array([[10.0, 0, 0]]), lens)
    except (BadClipError, ValueError):  # too short for a future, or another form: the film goes without
        return None
    found: Mapping[str, Any] = lens
    return found


def _seen(
    source: RecordedSource,
    clip: str,
    track: Track,
    moments: Sequence[int],
    *,
    cameras: Sequence[str],
    frames: int,
    shown: str,
    left_out: list[BadClipError],
) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
    """Yield each moment's sample and the shown camera's newest picture `[3, H, W]`; several are read in one pass.

    Why a moment cannot be driven from is added to `left_out`.
    """
    waiting, stamps = iter(moments), {camera: source.frame_times_us(clip, camera) for camera in cameras}
    while some := list(islice(waiting, _AT_ONCE)):
        wanted = np.unique(np.concatenate([wanted_frame_times_us(t0_us, frames) for t0_us in some]))
        read: dict[str, tuple[NDArray[np.int64], NDArray[np.uint8]]] = {}
        for camera in cameras:
            chosen = np.unique(frame_indices(stamps[camera], wanted, where=f"{clip}: {camera}"))
            times = stamps[camera][chosen]
            read[camera] = times, source.film(clip, camera, times).transpose(0, 2, 3, 1)
        for t0_us in some:
            parts = {}
            for camera, (times, pictures) in read.items():
                last = int(np.searchsorted(times, t0_us, side="right"))
                first = int(np.searchsorted(times, t0_us - (frames - 1) * FRAME_STEP_US, side="right")) - 1
                # A frame is seldom taken exactly at t0: the newest one stands until the next.
                parts[camera] = pictures[[*range(first, last), last - 1]], np.append(times[first:last], t0_us + 1)
            try:
                sample = _moment(parts, track, t0_us, frames=frames, clip=clip)
            except BadClipError as error:
                left_out.append(error)
                continue
            yield sample, parts[shown][0][-1].transpose(2, 0, 1)


def _moment(
    parts: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.int64]]],
    track: Track,
    t0_us: int,
    *,
    frames: int,
    clip: str,
) -> Sample:
    """Make the sample of a moment from cameras that may have taken different numbers of pictures."""
    count = max(len(times) for _, times in parts.values())
    padded, stamps = [], []
    for pictures, times in parts.values():
        lacking = count - len(times)
        padded.append(np.concatenate([pictures[:1].repeat(lacking, axis=0), pictures]) if lacking else pictures)
        stamps.append(np.concatenate([times[0] - np.arange(lacking, 0, -1), times]))
    return moment_of(
        np.stack(padded) if len(padded) > 1 else padded[0][None],
        np.stack(stamps),
        track,
        cameras=list(parts),
        count=frames,
        t0_us=t0_us,
        route=None,
        name=clip,
    )


def _shown(
    track: Track,
    t0_us: int,
    picture: NDArray[np.uint8],
    lens: Mapping[str, Any] | None,
    paths: Mapping[str, NDArray[np.float32]],
    route: str | None,
    clip: str,
) -> Shown:
    """Collect what the picture of a moment shows."""
    position, rotation = pose_at(track, t0_us)
    around = t0_us + STEP_US * np.arange(1 - HISTORY_STEPS, FUTURE_STEPS + 1, dtype=np.int64)
    around = around[around <= track.timestamps_us[-1]]
    xyz = (interpolate(track, around)[0] - position) @ rotation
    coloured = dict(zip(paths, MODEL_COLOURS, strict=False))
    caption = f"{clip}, {t0_us / 1e6:.1f} s" + (f": {route}" if route else "")
    return Shown(
        picture=picture,
        lens=lens,
        history_xyz=xyz[:HISTORY_STEPS],
        driven_xyz=xyz[HISTORY_STEPS:],
        paths={label: (coloured[label], np.asarray(found, np.float64)) for label, found in paths.items()},
        caption=caption,
    )


class _Film:
    """A film on its way to a file, which is removed unless it is finished."""

    def __init__(self, path: Path, *, every_s: float) -> None:
        self._path, self._rate = path, 1 / Fraction(every_s).limit_denominator(100)

    def __enter__(self) -> "_Film":
        import av

        self._container = av.open(str(self._path), "w", format="mp4", options={"movflags": "faststart"})
        self._container.metadata["comment"] = _MARK
        for name in _ENCODERS:
            try:
                self._stream: Any = self._container.add_stream(name, rate=self._rate)
                break
            except (av.error.FFmpegError, ValueError):
                continue
        else:
            raise UsageError(f"PyAV has none of the encoders {', '.join(_ENCODERS)}; install PyAV from its wheels.")
        self._stream.width, self._stream.height, self._stream.pix_fmt = *SIZE, "yuv420p"
        self._stream.options = {"crf": "20", "preset": "veryfast"} if name == "libx264" else {}
        self._stream.bit_rate = 4_000_000
        return self

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Add a picture `[H, W, 3]`."""
        import av

        for packet in self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
            self._container.mux(packet)

    def finish(self, out: Path) -> None:
        """Write the last pictures, and give the film its name when all of it is on the disk."""
        for packet in self._stream.encode():
            self._container.mux(packet)
        self._container.close()
        flush(self._path)
        self._path.replace(out)
        flush(out.parent)

    def __exit__(self, *error: object) -> None:
        try:
            self._container.close()
        finally:
            self._path.unlink(missing_ok=True)


def _settings(
    asked: Mapping[str, Any], *, source: str, clip: str, first_us: int, drivers: Mapping[str, Driver]
) -> dict[str, Any]:
    """Collect all that the predicted paths depend on; the drivers share one observer."""
    base = drivers[BASE]
    return strict_json.plain(  # type: ignore[no-any-return]
        {
            **asked,
            "source": source,
            "clip": clip,
            "first_us": first_us,
            "frames": base.observer.frames,
            "models": list(drivers),
            "trained": [driver.trained for driver in drivers.values()],
            "expert": model_identity(base.checkpoint),
            "vlm": vlm_identity(base.checkpoint),
            "device": base.device.type,
        }
    )


def _check_film(out: Path) -> None:
    """Refuse a place where no film can be written, or where something else lies that it would take the place of."""
    check_file_out(out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory; expected the name of a film, such as {out}/drive.mp4.")
    if os.path.lexists(out) and not _is_film(out):
        raise UsageError(
            f"--out {out} is there already and is no film of `alpacache drive`; nothing is written over. Name another "
            "file, or move it away."
        )


def _is_film(out: Path) -> bool:
    import av

    try:
        regular_size(out)
        with av.open(str(out), format="mp4") as film:
            return bool(film.metadata.get("comment") == _MARK)
    except (OSError, ValueError, av.error.FFmpegError):
        return False

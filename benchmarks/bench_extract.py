"""Stage one end to end: `alpacache.extract` beside the slowest of the three things that it consists of.

Full size, random weights, 1080p drives: H.264 in the layout of PhysicalAI-AV where its reader is installed, else a
folder of JPEGs. All rates are samples a second: `prefill_s` the VLM alone on the same inputs in the same batch,
`write_s` plain files of a sample's size, each forced to the medium, `decode_s` reading and preprocessing alone, the
last two with as many workers as `extract` has. `samples_s` counts from the first committed sample on, and readers have
begun before it, as they do while a real VLM is loaded. `of_limit` is `samples_s` over the least. `read_wait` and
`write_wait` are the shares of the time that the VLM waited for samples and for writers. `cores_to_keep_up`: with so
many cores reading would be as fast as the VLM, if it goes with their number. Rows without a codec are the VLM alone at
several batches; `neighbour_error` is the relative L2 difference of keys and values from the same sample alone;
`reuse_at_best` is the part that the VLM takes longer with as many more tokens as the system prompt has: computing that
once for all samples cannot save more. The row noted `--deterministic` has run twice; `same_bytes` tells whether both
stored the same. Text is shorter than the real prompt's, by 60 to 70 tokens: the tokenizer here cannot spell.
"""

import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import full_size
import numpy as np
import torch
from bench_store_write import raw
from benchmark_report import arguments, finish, hardware_name

from alpacache.alpamayo import Checkpoint, FrozenVLM, PrefixFeatures
from alpacache.alpamayo.inputs import VLMInputs
from alpacache.driving.sample import SampleRef
from alpacache.extraction import extract as extraction
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.preparation import PreparationSettings
from alpacache.extraction.reading_process import Readers, open_readers, reading_workers
from alpacache.planning.time_model import prefill_batch
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.stretches import stretches
from alpacache.sources.synthetic import SyntheticSource
from cache_store import CacheReader, info

PICTURES = 6
"""Distinct ones a camera and clip: drawing takes time, decoding does not care."""
ENLARGED = 4
"""Times in width and height."""
VIDEO_FPS, VIDEO_CRF = 30, 24
"""As cameras record; 21 Mbit/s. What a frame costs to decode goes with its bytes."""
T0, MOMENTS = "every:0.15", 27
"""Moments of a clip and how many there are; a clip is read in one pass, as `bench_decode` measures."""
SYSTEM_TOKENS = 20
"""Of R1's prompt before the first image."""
REPEATED = 8
"""Samples that are extracted twice."""
KEYS = ("cameras", "codec", "batch", "samples_s", "prefill_s", "write_s", "decode_s", "of_limit", "cpu_cores")
KEYS += (
    "read_wait",
    "write_wait",
    "cores_to_keep_up",
    "workers",
    "writers",
    "samples",
    "tokens",
    "sample_mb",
    "neighbour_error",
    "reuse_at_best",
    "same_bytes",
    "peak_gib",
    "source",
    "note",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large the benchmark is."""

    small: bool
    """The small model of `full_size`."""
    picture: tuple[int, int]
    """Width and height."""
    clips: int
    samples: dict[int, int]
    """Cameras -> samples of a run."""
    batches: tuple[int, ...]
    """Of the VLM alone."""
    batch: int | None
    """Of `extract`; None: its default."""


FULL = Scale(
    small=False, picture=(1920, 1080), clips=12, samples={1: 300, 4: 80, 6: 60}, batches=(1, 2, 4, 8), batch=None
)
QUICK = Scale(small=True, picture=(192, 108), clips=1, samples={1: 4, 4: 2}, batches=(), batch=2)


class RepeatedPictures(SyntheticSource):
    """Generated drives whose films repeat a few pictures, drawn at a quarter of the size, with noise on every pixel."""

    def __init__(self, count: int, *, size: tuple[int, int], cameras: Sequence[str]) -> None:
        super().__init__(count, cameras=cameras, size=(size[0] // ENLARGED, size[1] // ENLARGED))
        self._drawn: dict[tuple[str, str], np.ndarray] = {}

    def film(self, clip_id: str, camera: str, times_us: np.ndarray) -> np.ndarray:
        if (clip_id, camera) not in self._drawn:
            moments = 3_000_000 + 100_000 * np.arange(PICTURES)
            drawn = super().film(clip_id, camera, moments).repeat(ENLARGED, axis=-1).repeat(ENLARGED, axis=-2)
            noise = np.random.default_rng(0).integers(-8, 9, drawn.shape[-2:])
            self._drawn[clip_id, camera] = (drawn + noise).clip(0, 255).astype(np.uint8)
        return self._drawn[clip_id, camera][np.arange(len(times_us)) % PICTURES]


def write_drives(root: Path, scale: Scale, cameras: tuple[str, ...]) -> str:
    """Recordings with these cameras, kept if they are there already; the name of the source."""
    source = RepeatedPictures(scale.clips, size=scale.picture, cameras=cameras)
    is_tree = all(importlib.util.find_spec(module) for module in ("av", "physical_ai_av"))
    if not root.exists():
        draft = root.with_name(f"{root.name}.writing")
        if is_tree:
            from pai_tree import write_tree

            films = {"fps": VIDEO_FPS, "crf": VIDEO_CRF, "clips_per_chunk": scale.clips, "same_films": True}
            write_tree(draft, source=source, cameras=cameras, **films)
        else:
            _write_folder(draft, source, cameras)
        draft.rename(root)
    return f"{'pai' if is_tree else 'folder'}:{root}"


def _write_folder(root: Path, source: RepeatedPictures, cameras: tuple[str, ...]) -> None:
    import pandas as pd
    from PIL import Image

    stamps = np.arange(0, 20_000_001, 100_000)
    for clip in source.clip_ids:
        folder = root / "clips" / clip
        folder.mkdir(parents=True)
        track = source.track(clip)
        poses = {"timestamp": track.timestamps_us}
        poses |= {name: track.xyz[:, axis] for axis, name in enumerate("xyz")}
        poses |= {name: track.quaternion_xyzw[:, axis] for axis, name in enumerate(("qx", "qy", "qz", "qw"))}
        pd.DataFrame(poses).to_parquet(folder / "egomotion.parquet")
        for camera in cameras:
            (folder / camera).mkdir()
            pd.DataFrame({"timestamp": stamps}).to_parquet(folder / f"{camera}.timestamps.parquet")
            for number, image in enumerate(source.film(clip, camera, stamps[:PICTURES])):
                picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
                picture.save(folder / camera / f"{number:06d}.jpg", quality=90)
            for number in range(PICTURES, len(stamps)):
                name = f"{number % PICTURES:06d}.jpg"
                os.link(folder / camera / name, folder / camera / f"{number:06d}.jpg")
    index = {"name": "bench", "cameras": list(cameras), "clips": list(source.clip_ids)}
    (root / "dataset.json").write_text(json.dumps(index))


def make_vlm(checkpoint_dir: Path) -> FrozenVLM:
    """Random weights in bfloat16, as `extract` would load them."""
    model = full_size.random_vlm(checkpoint_dir, full_size.device()).model.to(torch.bfloat16)
    return FrozenVLM(model, future_start_id=Checkpoint(str(checkpoint_dir)).config.traj_token_ids["future_start"])


@contextmanager
def begun_reading(config: ExtractConfig, device: torch.device) -> Iterator[tuple[Readers, list[VLMInputs], float]]:
    """What `extract` reads with, its workers begun; inputs of a few samples, and how many a second it reads."""
    source = open_source(config.source, cameras=config.cameras)
    refs, _ = select(source, t0=config.t0, samples=config.samples)
    settings = PreparationSettings(
        source=config.source,
        model=config.model,
        cameras=config.cameras,
        frames=config.frames,
        seed=config.seed,
        camera_names=None,
        frame_numbers=None,
    )
    builder, workers = settings.input_builder(Checkpoint(config.model)), reading_workers(config.workers)
    with open_readers(settings, source, builder, device, workers=workers) as readers:
        with ThreadPoolExecutor(workers, initializer=readers.begin) as pool:
            # So many that each worker is warm, and enough for any batch.
            some = itertools.islice(itertools.cycle(refs), max(2 * workers, 8))
            inputs = list(pool.map(lambda ref: read_pass(readers, [ref]), some))[:8]
            started = time.perf_counter()
            for _ in pool.map(lambda part: read_pass(readers, part) and None, stretches(refs, source, workers=workers)):
                pass
            rate = len(refs) / (time.perf_counter() - started)
        yield readers, inputs, rate


def read_pass(readers: Readers, refs: Sequence[SampleRef]) -> VLMInputs:
    """Read a stretch; inputs of its last sample."""
    with readers.one_pass(refs) as prepare:
        for ref in refs:
            inputs = prepare(ref).inputs
    return inputs


def reading_in_threads() -> AbstractContextManager[Any]:
    """Within it samples are read as they would be through the network: in threads of the process that has the VLM."""
    return mock.patch("alpacache.extraction.reading_process.is_streamed", return_value=True)


def prefill_rate(vlm: FrozenVLM, inputs: Sequence[VLMInputs], batch: int, *, rounds: int) -> float:
    """Samples a second of the VLM alone, inputs ready in RAM; the median round."""
    chosen = [inputs[number % len(inputs)] for number in range(batch)]
    seconds = []
    for _ in range(rounds + 1):
        _synchronise()
        started = time.perf_counter()
        found = vlm.prefill_batch(chosen)
        _synchronise()
        seconds.append(time.perf_counter() - started)
        del found
    return batch / statistics.median(seconds[1:])


def with_system_prompt(inputs: VLMInputs) -> VLMInputs:
    """So many text tokens longer at its beginning."""
    text = np.full(SYSTEM_TOKENS, inputs.input_ids[0])
    return dataclasses.replace(inputs, input_ids=np.concatenate([text, inputs.input_ids]))


def neighbour_error(vlm: FrozenVLM, inputs: Sequence[VLMInputs], batch: int) -> float:
    """Relative L2 difference of keys and values in a batch from those alone."""
    together = vlm.prefill_batch([inputs[number % len(inputs)] for number in range(batch)])[0]
    alone = vlm.prefill_batch(inputs[:1])[0]
    difference = total = 0.0
    for layer in range(len(alone.keys)):
        one, other = (_layer(prefix, layer) for prefix in (together, alone))
        difference += float((one - other).square().sum())
        total += float(other.square().sum())
    return (difference / total) ** 0.5


def _layer(prefix: PrefixFeatures, layer: int) -> torch.Tensor:
    return torch.stack([prefix.keys[layer], prefix.values[layer]]).double()


def write_rate(folder: Path, size_bytes: int, *, writers: int) -> float:
    """Files of that size a second, each written and forced to the medium."""
    data = np.random.default_rng(0).integers(0, 256, size_bytes, np.uint8)
    count = max(3 * writers, 8)
    folder.mkdir()
    try:
        with ThreadPoolExecutor(writers) as pool:
            started = time.perf_counter()
            list(pool.map(lambda number: raw(folder / str(number), data), range(count)))
            return count / (time.perf_counter() - started)
    finally:
        shutil.rmtree(folder)


def measure(
    root: Path,
    checkpoint_dir: Path,
    vlm: FrozenVLM,
    spec: str,
    cameras: int,
    scale: Scale,
    *,
    codecs: Sequence[str],
    threads: bool,
) -> Iterator[dict[str, Any]]:
    """Rows of one camera set: the VLM alone, then `extract` in each codec."""
    config = ExtractConfig(
        source=spec,
        model=str(checkpoint_dir),
        store=str(root / "store"),
        cameras=full_size.camera_names(cameras),
        t0=T0,
        samples=scale.samples[cameras],
        batch_size=scale.batch,
        device=str(vlm.device),
    )
    rounds = 1 if scale.small else 5
    batch = scale.batch or prefill_batch(cameras=cameras, frames=config.frames)
    common = {"cameras": cameras, "cpu_cores": len(os.sched_getaffinity(0)), "source": spec.partition(":")[0]}
    common |= {"workers": reading_workers(config.workers)}
    with begun_reading(config, vlm.device) as (readers, inputs, decode):
        common |= {"tokens": len(inputs[0].input_ids), "decode_s": decode}
        ready = [_ready(one, vlm) for one in inputs]
        alone: dict[int, float] = {}
        for size in sorted({*scale.batches, batch}):
            row: dict[str, Any] = {**common, "batch": size}
            with _peak(row):
                alone[size] = prefill_rate(vlm, ready, size, rounds=rounds)
                row |= {"prefill_s": alone[size], "neighbour_error": neighbour_error(vlm, ready, size)}
                row["cores_to_keep_up"] = row["cpu_cores"] * alone[size] / decode
                if size == batch:
                    longer = [with_system_prompt(one) for one in ready]
                    slower = prefill_rate(vlm, longer, size, rounds=rounds)
                    row["reuse_at_best"] = alone[size] / slower - 1
            yield row
        for codec in codecs:
            row = {**common, "codec": codec, "batch": batch, "writers": config.writers}
            with _peak(row):
                row |= extract_row(root, vlm, config, codec, readers, alone.get(batch), decode)
            yield row
        row = {**common, "codec": codecs[0], "batch": 1, "note": "--deterministic"}
        with _peak(row):
            row["same_bytes"] = repeats_its_bytes(vlm, config, codecs[0], readers)
        yield row
    if threads:
        row = {**common, "codec": "int8", "batch": batch, "writers": config.writers, "note": "read in threads"}
        with reading_in_threads(), begun_reading(config, vlm.device) as (readers, _, decode), _peak(row):
            row |= {"decode_s": decode} | extract_row(root, vlm, config, "int8", readers, alone.get(batch), decode)
        yield row


@contextmanager
def in_hand(vlm: FrozenVLM, readers: Readers) -> Iterator[None]:
    """Within it `extract` takes this model and these readers."""
    with (
        mock.patch("alpacache.alpamayo.load_vlm", return_value=vlm),
        mock.patch.object(extraction, "open_readers", return_value=nullcontext(readers)),
    ):
        yield


def extract_row(
    root: Path,
    vlm: FrozenVLM,
    config: ExtractConfig,
    codec: str,
    readers: Readers,
    prefill: float | None,
    decode: float,
) -> dict[str, Any]:
    """One run of `extract`, the model in hand and its readers begun."""
    done: list[tuple[int, float]] = []
    with in_hand(vlm, readers):
        report = extraction.extract(
            dataclasses.replace(config, codec=codec),  # type: ignore[arg-type]
            on_progress=lambda progress: done.append((progress.done, time.perf_counter())),
        )
    (before, started), (after, ended) = done[0], done[-1]
    rate = (after - before) / (ended - started) if after > before else report.samples_per_s
    size = info(config.store).size_bytes // report.extracted
    shutil.rmtree(config.store)
    write = write_rate(root / "raw", size, writers=config.writers)
    limit = min(part for part in (prefill, write, decode) if part is not None)
    return {
        "samples_s": rate,
        "prefill_s": prefill,
        "write_s": write,
        "of_limit": rate / limit,
        "read_wait": report.read_wait,
        "write_wait": report.write_wait,
        "samples": report.extracted,
        "sample_mb": size / 1e6,
    }


def repeats_its_bytes(vlm: FrozenVLM, config: ExtractConfig, codec: str, readers: Readers) -> bool:
    """Whether two runs of `extract --deterministic` store the same, field by field."""
    samples = min(REPEATED, config.samples or REPEATED)
    settings = {"codec": codec, "samples": samples, "deterministic": True, "batch_size": None, "writers": 2}
    found = []
    for _ in range(2):
        with in_hand(vlm, readers):
            extraction.extract(dataclasses.replace(config, **settings))  # type: ignore[arg-type]
        reader = CacheReader(config.store)
        arrays = [reader.read(name) for name in reader.sample_ids]
        found.append([[np.asarray(one[name]).tobytes() for name in sorted(one)] for one in arrays])
        shutil.rmtree(config.store)
    return len(found[0]) == samples and found[0] == found[1]


def _ready(inputs: VLMInputs, vlm: FrozenVLM) -> VLMInputs:
    """As `extract` hands them to the VLM."""
    pixels = inputs.pixel_values.to(vlm.dtype)
    return dataclasses.replace(inputs, pixel_values=pixels.pin_memory() if vlm.device.type == "cuda" else pixels)


@contextmanager
def _peak(row: dict[str, Any]) -> Iterator[None]:
    """Note the GPU memory that was taken, or that it did not suffice."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dir", type=Path, help="where recordings and stores are written")
    parser.add_argument("--drives", type=Path, help="recordings, kept; what is there already is used again")
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 4], choices=sorted(full_size.CAMERA_SETS))
    parser.add_argument("--family", default="r1", choices=full_size.FAMILIES)
    parser.add_argument("--codecs", nargs="+", default=["int8", "bf16"], choices=["int8", "bf16"])
    parser.add_argument("--batches", type=int, nargs="*", help="of the VLM alone, beside extract's own")
    parser.add_argument("--read-in-threads", action="store_true", help="add rows of reading in threads, for comparison")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick runs a small model on the CPU.")
    scale = QUICK if options.quick else FULL
    if options.batches is not None:
        scale = dataclasses.replace(scale, batches=tuple(options.batches))
    root = Path(tempfile.mkdtemp(dir=options.dir))
    rows: list[dict[str, Any]] = []
    try:
        with mock.patch.object(full_size, "_expert_state", return_value={"vlm.placeholder": torch.zeros(1)}):
            checkpoint_dir = full_size.write_checkpoint(root / "model", small=scale.small, family=options.family)
        with ThreadPoolExecutor() as pool:
            drives = {
                cameras: pool.submit(
                    write_drives,
                    (options.drives or root) / f"drives{cameras}",
                    scale,
                    full_size.camera_names(cameras),
                )
                for cameras in options.cameras
            }
            vlm = make_vlm(checkpoint_dir)
        for cameras, spec in drives.items():
            for row in measure(
                root,
                checkpoint_dir,
                vlm,
                spec.result(),
                cameras,
                scale,
                codecs=options.codecs,
                threads=options.read_in_threads,
            ):
                print({key: row[key] for key in KEYS if key in row}, flush=True)
                rows.append({key: row.get(key) for key in KEYS})
    finally:
        shutil.rmtree(root)
    finish("extract", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


if __name__ == "__main__":
    main()

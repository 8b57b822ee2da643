"""Stage one under memory budgets: weights on the GPU, in page-locked RAM and in the checkpoint's files.

Full size, random weights in files; what comes before and behind is ready and cheap, so that the VLM decides: samples
lie in RAM, already read, and the store is in memory. All else is `alpacache.extract` with `--memory-budget`: codec,
copies to the host, writers, commits. `samples_s` counts from the second group that is committed on, or the first of
few; `of_resident` is its ratio to the resident rate of the same cameras. `peak_gib` is what the allocator had reserved,
`planned_gib` what the plan said, `budget` what the allocator was capped to, less half a GiB. `read_gb_s` is how fast
the files' home reads units, nothing else going on; `bus_gb_s` how fast page-locked RAM reaches the GPU. `bound_s` is
the rate that the slower of resident computing and the medium allows for that group.
"""

import gc
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import full_size
import torch
from benchmark_report import arguments, finish, hardware_name

from alpacache.alpamayo import Checkpoint, FrozenVLM, load_vlm, streamed_vlm
from alpacache.alpamayo.weight_homes import FilesHome, RamHome
from alpacache.driving.sample import SampleRef
from alpacache.extraction import extract as extraction
from alpacache.extraction import memory
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.preparation import Preparation, PreparationSettings, Prepared
from alpacache.gpu.host_memory import available_bytes
from alpacache.planning import prefill_plan
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select

KEYS = ("cameras", "weights", "budget", "codec", "samples_s", "of_resident", "bound_s", "group", "rows", "peak_gib")
KEYS += ("planned_gib", "planned_host_gib", "samples", "tokens", "bus_gb_s", "read_gb_s", "seconds", "note")
READY = 8
"""Distinct samples; others are these under other names."""


@dataclass(frozen=True, slots=True)
class ReadyReaders:
    """Gives samples that were read before."""

    samples: list[Prepared]
    workers: int = 2

    def prepare(self, ref: SampleRef) -> Prepared:
        return replace(self.samples[hash(ref.sample_id) % len(self.samples)], sample_id=ref.sample_id)

    def one_pass(self, refs: list[SampleRef]) -> Any:
        """A context with `prepare`."""
        return nullcontext(self.prepare)

    def begin(self) -> None:
        """There is nothing to begin."""


class KeptRam:
    """Makes each home in RAM once, for all runs, which do not close it."""

    class Home(RamHome):
        def close(self) -> None:
            self._next = 0

    def __init__(self) -> None:
        self._made: dict[int, RamHome] = {}

    def __call__(self, units: list[Any], **how: Any) -> RamHome:
        if len(units) not in self._made:
            self._made[len(units)] = self.Home(units, **how)
        return self._made[len(units)]

    def room(self) -> AbstractContextManager[Any]:
        """Within it plans count what is kept as free: they plan for a home that is not there yet."""
        kept = sum(flat.nbytes for home in self._made.values() for flat in home._flats)
        return mock.patch.object(memory, "available_bytes", return_value=available_bytes() + kept)

    def close(self) -> None:
        for home in self._made.values():
            RamHome.close(home)


def ready_samples(config: ExtractConfig, device: torch.device) -> list[Prepared]:
    """A few samples of the source, read, their pixels page-locked."""
    source = open_source(config.source, cameras=config.cameras)
    refs, _ = select(source, t0=config.t0, samples=READY)
    settings = PreparationSettings(
        source=config.source,
        model=config.model,
        cameras=config.cameras,
        frames=config.frames,
        seed=0,
        camera_names=None,
        frame_numbers=None,
    )
    prepare = Preparation(settings, source, settings.input_builder(Checkpoint(config.model)))
    found = [prepare(ref) for ref in refs]
    if device.type == "cuda":
        found = [
            replace(one, inputs=replace(one.inputs, pixel_values=one.inputs.pixel_values.pin_memory())) for one in found
        ]
    return found


def bus_rate(device: torch.device) -> float | None:
    """GB/s of copies from page-locked RAM."""
    if device.type != "cuda":
        return None
    host = torch.empty(2**29, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 4 * host.nbytes / (time.perf_counter() - started) / 1e9


def file_rate(checkpoint_dir: Path, *, cuda: bool) -> float:
    """GB/s of the text layers read as the files' home reads them."""
    where, prefix = Checkpoint(str(checkpoint_dir)).vlm_home
    layers = {name.split(".")[4] for name in where.with_prefix(f"{prefix}model.language_model.layers.")}
    names = [f"language_model.layers.{number}." for number in range(min(8, len(layers)))]
    units = streamed_vlm.unit_files(where, f"{prefix}model.", names)
    home = FilesHome(units, cuda=cuda)
    try:
        home.next_unit()
        started = time.perf_counter()
        for _ in units:
            home.given_back(None)
            home.next_unit()
        return sum(unit.nbytes for unit in units) / (time.perf_counter() - started) / 1e9
    finally:
        home.close()


@contextmanager
def uncapped() -> Iterator[None]:
    """Before and behind it the allocator holds nothing and may take all."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def run(config: ExtractConfig, ready: list[Prepared], model: AbstractContextManager[Any]) -> dict[str, Any]:
    """One run of `extract` on ready samples; within `model` it finds what was loaded before."""
    done: list[tuple[int, float]] = []
    started = time.perf_counter()
    with (
        mock.patch.object(extraction, "open_readers", return_value=nullcontext(ReadyReaders(ready))),
        model,
        uncapped(),
    ):
        try:
            report = extraction.extract(
                config, on_progress=lambda progress: done.append((progress.done, time.perf_counter()))
            )
        finally:
            shutil.rmtree(config.store, ignore_errors=True)
    plan = report.memory
    row: dict[str, Any] = {"samples": report.extracted, "seconds": time.perf_counter() - started}
    row["tokens"] = len(ready[0].inputs.input_ids)
    group = 1
    if plan is not None:
        group = plan.group
        row |= {"weights": plan.home, "group": plan.group, "rows": plan.rows}
        row |= {"planned_gib": plan.device_bytes / 2**30, "planned_host_gib": plan.host_bytes / 2**30}
        row["_streamed"] = plan.streamed_bytes
    if report.peak_bytes is not None:
        row["peak_gib"] = report.peak_bytes / 2**30
    # The buffers of two groups on the host are made, and kernels compiled, in the first two.
    behind = 2 * group if report.extracted > 3 * group else group
    first, begun = next(((count, when) for count, when in done if count >= behind), done[-1])
    last, ended = done[-1]
    row["samples_s"] = (last - first) / (ended - begun) if last > first else report.samples_per_s
    return row


def random_vlm(checkpoint_dir: Path, device: torch.device) -> FrozenVLM:
    """A whole VLM, where the files hold but a part of one."""
    model = full_size.random_vlm(checkpoint_dir, device).model.to(torch.bfloat16)
    return FrozenVLM(model, future_start_id=Checkpoint(str(checkpoint_dir)).config.traj_token_ids["future_start"])


def units_of(layers: int) -> AbstractContextManager[Any]:
    """Within it what streams a text layer that is a hole in the files takes another in its place."""
    find = streamed_vlm.unit_files

    def held(home: Checkpoint, prefix: str, units: list[str]) -> list[Any]:
        return find(home, prefix, full_size.held_layers(units, layers))

    return mock.patch.object(streamed_vlm, "unit_files", held)


def measure(root: Path, checkpoint_dir: Path, options: Any, *, small: bool) -> Iterator[dict[str, Any]]:
    """All rows: the resident VLM first, then, once it is gone, the budgets."""
    device = full_size.device()
    configs, ready = {}, {}
    for cameras in options.cameras:
        configs[cameras] = ExtractConfig(
            source="synthetic:2000",
            model=str(checkpoint_dir),
            store=str(Path(options.store or root) / "store"),
            cameras=full_size.camera_names(cameras),
            samples=2 if small else options.samples[0 if cameras == 1 else 1],
            codec=options.codec,
            batch_size=1 if small else None,
            force=True,
            device=str(device),
        )
        ready[cameras] = ready_samples(configs[cameras], device)
    resident: dict[int, float] = {}
    if options.layers is None:
        loaded = [load_vlm(str(checkpoint_dir), dtype=torch.bfloat16, device=device)]
    else:
        loaded = [random_vlm(checkpoint_dir, device)]
    for cameras, config in configs.items():
        in_hand = mock.patch("alpacache.alpamayo.load_vlm", return_value=loaded[0])
        row = run(config, ready[cameras], in_hand)
        del in_hand
        resident[cameras] = row["samples_s"]
        yield {"cameras": cameras, "weights": "gpu", "codec": config.codec, "of_resident": 1.0, **row}
    loaded.clear()
    gc.collect()
    medium = {"ram": bus_rate(device), "files": file_rate(checkpoint_dir, cuda=device.type == "cuda")}
    kept = KeptRam()
    try:
        for weights, budget in options.runs:
            for cameras, config in configs.items():
                asked = replace(config, memory_budget=budget, weights=weights)
                most = mock.patch.object(prefill_plan, "_MOST_GROUP", options.group if weights == "files" else 256)
                row = {"cameras": cameras, "budget": budget, "codec": config.codec, "weights": weights}
                row |= {"bus_gb_s": medium["ram"], "read_gb_s": medium["files"] if weights == "files" else None}
                try:
                    with most, kept.room():
                        row |= run(asked, ready[cameras], mock.patch.object(streamed_vlm, "RamHome", kept))
                except Exception as error:  # the other rows are worth having
                    yield row | {"note": " ".join(str(error).split())[:200]}
                    continue
                row["of_resident"] = row["samples_s"] / resident[cameras]
                rate = medium.get(row["weights"])
                if rate and row["_streamed"]:
                    row["bound_s"] = min(resident[cameras], row["group"] * rate * 1e9 / row["_streamed"])
                yield row
    finally:
        kept.close()


def weights_and_budget(text: str) -> tuple[str, str]:
    weights, _, budget = text.partition(":")
    return weights, budget


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dir", type=Path, help="where the checkpoint is written, or is already")
    parser.add_argument("--store", type=Path, help="where stores are written; a file system in memory")
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 4], choices=sorted(full_size.CAMERA_SETS))
    parser.add_argument("--family", default="r1", choices=full_size.FAMILIES)
    parser.add_argument("--layers", type=int, help="text layers in the files, where they cannot hold all")
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--group", type=int, default=256, help="largest group of weights in files")
    parser.add_argument("--samples", type=int, nargs=2, default=[192, 64], help="of a run with 1 camera and with more")
    default = ["auto:24GB", "ram:16GB", "ram:12GB", "ram:8GB", "files:8GB"]
    parser.add_argument("--runs", type=weights_and_budget, nargs="+", default=[weights_and_budget(o) for o in default])
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick runs a small model on the CPU.")
    root = Path(tempfile.mkdtemp(dir=options.dir))
    if options.quick:
        options.cameras, options.runs = options.cameras[:1], options.runs[-2:]
    rows: list[dict[str, Any]] = []
    try:
        started = time.perf_counter()
        kind = {"small": options.quick, "family": options.family}
        if options.layers is None:
            checkpoint_dir, held = full_size.write_checkpoint(root / "model", with_vlm=True, **kind), nullcontext()
        else:
            checkpoint_dir = full_size.write_vlm(root / "model", layers=options.layers, **kind)
            held = units_of(options.layers)
        print(f"checkpoint written in {time.perf_counter() - started:.0f} s", flush=True)
        with held:
            for row in measure(root, checkpoint_dir, options, small=options.quick):
                print({key: row[key] for key in KEYS if row.get(key) is not None}, flush=True)
                rows.append({key: row.get(key) for key in KEYS})
    finally:
        shutil.rmtree(root)
    finish("stream", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


if __name__ == "__main__":
    main()

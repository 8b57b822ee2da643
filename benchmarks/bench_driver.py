"""Latency of a driver, from pictures and poses to paths, beside the public path in the same run.

Full size, random weights, batch 1. `driver` is `load_driver` called as a car calls it: frames of 1080 x 1920 in host
memory, compiled prefill, flow steps as a CUDA graph, paths back on the host. Its parts are timed apart, each until the
device is done: pictures (chosen, resized, patched), prefill, flow steps; so they add up to more than the whole, where
they overlap. `public` is transformers as it is: pictures resized as the recipe does it on the CPU, prefill kernel by
kernel, the cache repeated for each path, and in each step the expert over it by stock attention. `of_public` is the
driver's median over the public one's, `of_public_without_pictures` over that of prefill and flow steps alone. With
`streamed` the memory budget is below the VLM's weights. `allocations` counts what was asked of the GPU's memory in the
calls that were measured. `--quick` runs a small model on the CPU.
"""

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import full_size
import numpy as np
import torch
from bench_eval import public_prefill, stock_velocity
from bench_train_e2e import hardware, isolated, one_line
from benchmark_report import arguments, finish
from numpy.typing import NDArray
from transformers import Qwen3VLForConditionalGeneration

from alpacache import flow_matching, load_driver
from alpacache.alpamayo import ActionExpert, Checkpoint, load_expert
from alpacache.alpamayo.inputs import to_patches
from alpacache.driver.driver import Driver
from alpacache.driver.moment import moment_of, track_of_poses
from alpacache.driving.poses import Track

FLOW_STEPS = (10, 4, 2)
MODEL, VLM = "model", "vlm_weights"
T0_US = 5_100_000
KEYS = (
    *("case", "cameras", "paths", "flow_steps", "tokens", "p50_ms", "p95_ms", "pictures_ms", "prefill_ms", "flow_ms"),
    *("of_public", "of_public_without_pictures", "peak_gib", "allocations", "calls", "note"),
)
"""Of a row, in the table's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What differs between a full and a quick run."""

    small: bool
    cameras: tuple[int, ...]
    picture: tuple[int, int]
    """Height and width of a frame."""
    warm_ups: int
    calls: int
    """Calls that count."""
    public_calls: int
    streamed_calls: int


FULL = Plan(small=False, cameras=(1, 4), picture=(1080, 1920), warm_ups=4, calls=40, public_calls=10, streamed_calls=8)
QUICK = Plan(small=True, cameras=(1,), picture=(320, 576), warm_ups=1, calls=3, public_calls=2, streamed_calls=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a car has recorded up to a moment."""

    cameras: tuple[str, ...]
    frames: NDArray[np.uint8]
    times_us: NDArray[np.int64]
    poses: NDArray[np.float64]
    pose_times_us: NDArray[np.int64]

    @property
    def given(self) -> tuple[Any, ...]:
        """Arguments of a driver's call."""
        return self.frames, self.times_us, self.poses, self.pose_times_us


def recording(plan: Plan, cameras: int) -> Recording:
    """Noise in front of the cameras, and 2 s straight ahead at 10 m/s."""
    rng, times = np.random.default_rng(0), T0_US + np.arange(-40, 1) * 50_000
    poses = np.zeros((len(times), 7))
    poses[:, 0], poses[:, 6] = (times - T0_US) / 1e5, 1.0
    return Recording(
        cameras=full_size.camera_names(cameras),
        frames=rng.integers(0, 256, (cameras, full_size.FRAMES, *plan.picture, 3), np.uint8),
        times_us=T0_US + np.arange(-full_size.FRAMES + 1, 1) * 100_000,
        poses=poses,
        pose_times_us=times,
    )


def timed(work: Callable[[], object], calls: int, warm_ups: int) -> list[float]:
    """Milliseconds of each call until the device is done."""
    found = []
    for number in range(warm_ups + calls):
        _settle()
        started = time.perf_counter()
        work()
        _settle()
        if number >= warm_ups:
            found.append((time.perf_counter() - started) * 1e3)
    return found


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _allocations() -> int:
    """How often memory was asked of the device so far."""
    return int(torch.cuda.memory_stats()["num_device_alloc"]) if torch.cuda.is_available() else 0


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None


def quantiles(milliseconds: list[float]) -> dict[str, Any]:
    middle, high = np.quantile(milliseconds, (0.5, 0.95)).tolist()
    return {"p50_ms": middle, "p95_ms": high, "calls": len(milliseconds)}


def driver_rows(plan: Plan, work: Path, paths: int, budget_gib: float | None) -> list[dict[str, Any]]:
    """Rows of a driver with all weights on the device, or within a budget."""
    rows, case = [], "driver" if budget_gib is None else "streamed"
    budget = None if budget_gib is None else round(budget_gib * 2**30)
    driver = load_driver(str(work / MODEL), vlm=str(work / VLM), memory_budget=budget)
    calls = plan.calls if budget is None else plan.streamed_calls
    for cameras in plan.cameras:
        for flow_steps in FLOW_STEPS if budget is None else FLOW_STEPS[:1]:
            about = {"case": case, "cameras": cameras, "paths": paths, "flow_steps": flow_steps}
            try:
                row = about | measured(driver, plan, cameras, paths, flow_steps, calls)
            except Exception as error:
                row = about | {"note": one_line(error)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def measured(driver: Driver, plan: Plan, cameras: int, paths: int, flow_steps: int, calls: int) -> dict[str, Any]:
    """Times of whole calls and of their parts."""
    made, warm_ups = recording(plan, cameras), plan.warm_ups
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    on_gpu = driver.device if driver.device.type == "cuda" else None

    def call() -> None:
        driver(*made.given, cameras=made.cameras, paths=paths, flow_steps=flow_steps)

    timed(call, 0, warm_ups)
    before = _allocations()
    whole = timed(call, calls, 0)
    asked = _allocations() - before
    seen = driver.look(made.frames, made.times_us, track_of(made), cameras=made.cameras)
    builder, vlm = driver.observer._builder, driver.observer._vlm

    def pictures() -> None:
        sample = moment_of(
            made.frames,
            made.times_us,
            track_of(made),
            cameras=made.cameras,
            count=driver.observer.frames,
            t0_us=None,
            route=None,
            name="drive",
        )
        builder.build(sample, device=on_gpu)

    parts = {
        "pictures_ms": timed(pictures, calls, 1),
        "prefill_ms": timed(lambda: vlm.prefill_batch([seen.inputs]), calls, 1),
        "flow_ms": timed(lambda: driver.paths(seen, paths=paths, flow_steps=flow_steps), calls, 1),
    }
    return {
        **quantiles(whole),
        **{name: float(np.median(times)) for name, times in parts.items()},
        "tokens": seen.prefix.prefix_len,
        "peak_gib": _peak_gib(),
        "allocations": asked,
    }


def track_of(made: Recording) -> Track:
    return track_of_poses(made.poses, made.pose_times_us, name="drive")


def public_rows(plan: Plan, work: Path, paths: int) -> list[dict[str, Any]]:
    """Rows of the public path."""
    where = full_size.device()
    vlm = full_size.random_vlm(work / MODEL, where)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    expert = load_expert(str(work / MODEL), dtype=dtype, device=where, attention="sdpa").eval()
    rows = []
    for cameras in plan.cameras:
        for flow_steps in FLOW_STEPS:
            about = {"case": "public", "cameras": cameras, "paths": paths, "flow_steps": flow_steps}
            rows.append(about | public_measured(plan, work, vlm, expert, cameras, paths, flow_steps))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def public_measured(
    plan: Plan,
    work: Path,
    vlm: Qwen3VLForConditionalGeneration,
    expert: ActionExpert,
    cameras: int,
    paths: int,
    flow_steps: int,
) -> dict[str, Any]:
    """Times of the public path's parts; the whole is their sum, call by call."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    made, config = recording(plan, cameras), Checkpoint(str(work / MODEL)).config
    frames = made.frames.reshape(-1, *plan.picture, 3).transpose(0, 3, 1, 2)
    sizes = {"patch": 16, "merge": 2, "temporal": 2, "min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    generator = torch.Generator(expert.device).manual_seed(3)
    inputs, start = full_size.prompt(vlm, cameras=cameras, batch=1, generator=generator)
    noise = torch.randn(paths, full_size.FUTURE_STEPS, 2, generator=generator, device=expert.device)
    length = inputs["input_ids"].shape[1]

    @torch.no_grad()
    def flow(cache: Any) -> None:
        velocity = stock_velocity(expert, cache, length=length, start=start, paths=paths)
        flow_matching.sample(velocity, noise, steps=flow_steps).cpu()

    parts: dict[str, list[float]] = {"pictures_ms": [], "prefill_ms": [], "flow_ms": []}
    for _ in range(1 + plan.public_calls):
        parts["pictures_ms"] += timed(lambda: to_patches(frames, **sizes), 1, 0)
        cache: list[Any] = []
        parts["prefill_ms"] += timed(lambda: cache.append(public_prefill(vlm, inputs, paths=paths)[0]), 1, 0)  # noqa: B023
        parts["flow_ms"] += timed(lambda: flow(cache[0]), 1, 0)  # noqa: B023
    counted = {name: times[1:] for name, times in parts.items()}
    whole = np.sum(list(counted.values()), axis=0).tolist()
    medians = {name: float(np.median(times)) for name, times in counted.items()}
    return {**quantiles(whole), **medians, "tokens": length, "peak_gib": _peak_gib()}


def over_public(row: dict[str, Any], public: list[dict[str, Any]]) -> dict[str, Any]:
    """A driver's row with the ratios of its median to the public path's on the same cameras and flow steps."""
    same = [other for other in public if all(other[key] == row[key] for key in ("cameras", "flow_steps", "paths"))]
    if row["case"] == "public" or "p50_ms" not in row or not same:
        return row
    (other,) = same
    return row | {
        "of_public": row["p50_ms"] / other["p50_ms"],
        "of_public_without_pictures": row["p50_ms"] / (other["prefill_ms"] + other["flow_ms"]),
    }


def prepare(plan: Plan, work: Path) -> None:
    """Checkpoints of the expert and of the VLM, if they are not there."""
    full_size.write_checkpoint(work / MODEL, small=plan.small)
    full_size.write_checkpoint(work / VLM, small=plan.small, with_vlm=True)
    gc.collect()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="checkpoints; by default a temporary directory")
    parser.add_argument("--paths", type=int, default=1, help="paths of a call")
    parser.add_argument("--budget-gib", type=float, help="GPU memory of the streamed case; default 12, 0 leaves it out")
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("a full run needs a CUDA device; --quick runs a small model on the CPU.")
    plan = QUICK if options.quick else FULL
    root = options.work or Path(tempfile.mkdtemp())
    work = root / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    call: Callable[..., Any] = (lambda function, *given: function(*given)) if options.quick else isolated
    budget = options.budget_gib if options.budget_gib is not None else (0.04 if options.quick else 12.0)
    try:
        call(prepare, plan, work)
        streamed = call(driver_rows, plan, work, options.paths, budget) if budget else []
        public = call(public_rows, plan, work, options.paths)
        rows = [*public, *call(driver_rows, plan, work, options.paths, None), *streamed]
    finally:
        if options.work is None:
            shutil.rmtree(root)
    rows = [over_public(row, public) for row in rows]
    for row in rows:
        if "of_public" in row:
            about = f"{row['case']}, {row['cameras']} cameras, {row['flow_steps']} flow steps"
            print(f"{about}: {row['p50_ms']:.1f} ms, {row['of_public']:.2f} of the public path")
    finish("driver", [{key: row.get(key) for key in KEYS} for row in rows], options, hardware=hardware())


if __name__ == "__main__":
    main()

"""Training end to end: `alpacache.train` from a store, beside the public recipe with the VLM in every step.

Full size, random weights. Each case is one call of `train` in a process and a run directory of its own; its steps come
from the run's `metrics.jsonl`. Media: `page_cache` reads the store's files from RAM, `cold` from the disk (evicted
before, every sample once), `pinned` keeps samples in RAM (measured after each was read once). `step_ms` is the median
step; `samples_s` is samples over the sum of the measured steps, so that hiccups count; `of_raw_read` is its bytes over
raw reading of the same files from the same medium in threads.
"""

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from unittest import mock

import full_size
import numpy as np
import torch
from bench_store_read import evict, raw_readers, timed
from benchmark_report import arguments, finish, hardware_name

from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory
from alpacache.training.train import train
from cache_store import CacheReader

Medium: TypeAlias = Literal["pinned", "page_cache", "cold"]
MEDIA: tuple[Medium, ...] = ("page_cache", "pinned", "cold")
"""The cold one last, as it evicts."""
MODEL = "model"
"""Name of the checkpoint's directory."""
LAYERS = {"r1": 36, "2": 64}
READ_AHEAD = 3
"""Steps of a cold run whose samples were read while the model was made ready."""
ROOM_BYTES = 4 * 10**9
"""Left free on the disk when a store is made."""
KEYS = (
    *("case", "family", "cameras", "codec", "medium", "batch", "draws", "optimizer", "trainable", "compile", "budget"),
    *("micro_batch", "checkpointing", "step_ms", "samples_s", "draws_s", "data_wait", "peak_gib", "planned_gib"),
    *("over_recipe_b1", "over_recipe_best", "of_raw_read", "raw_gb_s", "steps", "note"),
)
"""Of a row, in the table's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row: what `train` is asked for, on which store, from which medium."""

    name: str
    cameras: int
    codec: str
    batch: int
    medium: Medium = "pinned"
    draws: int | Literal["auto"] = 1
    optimizer: str = "auto"
    trainable: str = "all"
    compile: bool = True
    budget: str = "24GB"
    micro_batch: int | None = None
    family: str = "r1"

    @property
    def store(self) -> str:
        return _store(self.family, self.cameras, self.codec)


def _model(family: str) -> str:
    return MODEL if family == "r1" else f"{MODEL}-{family}"


def _store(family: str, cameras: int, codec: str) -> str:
    return f"{'' if family == 'r1' else f'f{family}-'}c{cameras}-{codec}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What differs between a full and a quick run."""

    small: bool
    store_bytes: int
    settle: int
    """Steps before the first that counts."""
    measured: int
    recipe_batches: tuple[int, ...]
    recipe_rounds: int

    def lengths(self, cameras: int) -> tuple[int, int]:
        """Shortest and longest prefix."""
        return (72, 80) if self.small else full_size.PREFIX_TOKENS[cameras]

    def samples(self, case: Case) -> int:
        """As many as make up the store's bytes, rounded up to whole batches of its cases."""
        multiple = 4 if self.small else {4: 8, 1: 16, 6: 8}[case.cameras]
        tokens = sum(self.lengths(case.cameras)) / 2
        values = (4 if self.small else LAYERS[case.family]) * 2 * full_size.KV_HEADS * full_size.HEAD_DIM * tokens
        bits = {"bf16": 16.0, "int8": 8.5, "int4": 4.5}
        sample_bytes = values * (bits.get(case.codec) or float(case.codec.removeprefix("transform:"))) / 8
        return math.ceil(self.store_bytes / sample_bytes / multiple) * multiple


FULL = Plan(small=False, store_bytes=20 * 10**9, settle=10, measured=30, recipe_batches=(1, 2, 4, 8), recipe_rounds=4)
QUICK = Plan(small=True, store_bytes=10 * 10**6, settle=2, measured=4, recipe_batches=(1, 2), recipe_rounds=2)


def full_cases() -> list[Case]:
    """By store, because the disk may not hold all of them; the cold case last, because it evicts."""
    cases = []
    for cameras, batch in ((4, 8), (1, 16)):
        for codec in ("int8", "bf16"):
            common: dict[str, Any] = {"cameras": cameras, "codec": codec, "batch": batch}
            store = f"c{cameras}-{codec}"
            cases += [Case(name=f"{store}-page", medium="page_cache", **common), Case(name=f"{store}-pinned", **common)]
            if codec == "int8":
                cases += [Case(name=f"{store}-draws{draws}", draws=draws, **common) for draws in (4, 8)]
                cases.append(Case(name=f"{store}-adamw", optimizer="adamw", **common))
            if store == "c4-int8":
                cases += [
                    Case(name=f"{store}-two-micro", micro_batch=batch // 2, **common),
                    Case(name=f"{store}-not-compiled", compile=False, **common),
                    Case(name=f"{store}-lora", trainable="lora", **common | {"batch": 4}),
                ]
            if store == "c1-int8":
                cases += [
                    Case(name=f"{store}-16gb", budget="16GB", **common | {"batch": 1}),
                    Case(name=f"{store}-batch4", **common | {"batch": 4}),  # the example of `plan`
                ]
            cases.append(Case(name=f"{store}-cold", medium="cold", **common))
            if codec == "int8":
                cases.append(Case(name=f"{store}-cold-auto", medium="cold", draws="auto", **common))
    return cases + transform_cases() + super_cases()


def transform_cases() -> list[Case]:
    """The smallest bytes, beside `int4`'s of the same run."""
    cases = []
    for cameras, batch in ((1, 16), (4, 8)):
        for codec in ("int4", "transform:2.2"):
            cases += [
                Case(
                    name=f"{_store('r1', cameras, codec)}-{medium.removesuffix('_cache')}",
                    cameras=cameras,
                    codec=codec,
                    batch=batch,
                    medium=medium,
                )
                for medium in MEDIA
            ]
    return cases


def super_cases() -> list[Case]:
    """2 Super: one camera and the six of its inference profile."""
    cases = []
    for cameras, codec, batch in ((1, "int8", 16), (1, "int4", 16), (6, "int8", 4), (6, "int4", 8)):
        common: dict[str, Any] = {"family": "2", "cameras": cameras, "codec": codec, "batch": batch}
        store = _store("2", cameras, codec)
        cases += [Case(name=f"{store}-page", medium="page_cache", **common), Case(name=f"{store}-pinned", **common)]
    return cases


def quick_cases() -> list[Case]:
    return [
        Case(name="c1-int8-page", cameras=1, codec="int8", batch=4, medium="page_cache"),
        Case(name="c1-int8-two-micro", cameras=1, codec="int8", batch=4, micro_batch=2),
        Case(name="c1-int8-cold", cameras=1, codec="int8", batch=4, medium="cold"),
        Case(name="c1-int8-cold-auto", cameras=1, codec="int8", batch=4, medium="cold", draws="auto"),
        Case(name="c1-bf16-draws2", cameras=1, codec="bf16", batch=4, medium="page_cache", draws=2),
        Case(name="f2-c1-int8-page", family="2", cameras=1, codec="int8", batch=4, medium="page_cache"),
    ]


def train_config(
    case: Case, *, store: Path, checkpoint: Path, out: Path, steps: int
) -> tuple[TrainConfig, dict[str, Any]]:
    """The case's config, and what it asks for that `train` has no field for (an older one, to compare with)."""
    cuda = torch.cuda.is_available()
    wanted: dict[str, Any] = {
        "stores": (str(store),),
        "model": str(checkpoint),
        "out": str(out),
        "steps": steps,
        "batch_size": case.batch,
        "draws": case.draws,
        "in_memory": case.medium == "pinned",
        "optimizer": case.optimizer,
        "trainable": case.trainable,
        "compile": case.compile,
        "micro_batch": case.micro_batch,
        "memory_budget": case.budget if cuda else None,
        "save_every": 10**9,
        "device": "cuda" if cuda else "cpu",
    }
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    left_out = {name: value for name, value in wanted.items() if name not in known and value not in (None, "auto")}
    return TrainConfig(**{name: value for name, value in wanted.items() if name in known}), left_out


def step_times(metrics: Sequence[dict[str, Any]], batch: int) -> list[tuple[int, float, float]]:
    """(step, its milliseconds, its share of waiting) of all steps but the last, which no other follows.

    Rows without `step_ms` hold means since the run began; their differences are the steps.
    """
    if any("step_ms" in row for row in metrics):
        rows = [row for row in metrics if row.get("step_ms") is not None and row.get("data_wait") is not None]
        found = [(row["step"], row["step_ms"], row["data_wait"]) for row in rows]
        return found[:-1] if rows and rows[-1] is metrics[-1] else found
    times = []
    before_s = before_wait_s = 0.0
    for row in metrics[:-1]:
        now_s = row["step"] * batch / row["samples_per_s"]
        now_wait_s = row["data_wait"] * now_s
        seconds = max(now_s - before_s, 1e-9)
        times.append((row["step"], seconds * 1e3, (now_wait_s - before_wait_s) / seconds))
        before_s, before_wait_s = now_s, now_wait_s
    return times


def run_case(case: Case, plan: Plan, work: Path) -> dict[str, Any]:
    """The case's row; a failure is a note in it."""
    try:
        return about(case) | _measure(case, plan, work)
    except Exception as error:
        traceback.print_exc()
        return about(case) | {"note": one_line(error)}
    finally:
        shutil.rmtree(work / "runs" / case.name, ignore_errors=True)


def about(case: Case) -> dict[str, Any]:
    return {"case": case.name, **{key: getattr(case, key) for key in KEYS if hasattr(case, key)}}


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _measure(case: Case, plan: Plan, work: Path) -> dict[str, Any]:
    checkpoint, out = work / _model(case.family), work / "runs" / case.name
    shutil.rmtree(out, ignore_errors=True)
    reader = make_store(case, plan, work)
    epoch = len(reader) // case.batch
    steps, skip = {
        "page_cache": (plan.settle + plan.measured + 1, plan.settle),
        "pinned": (epoch + plan.settle + plan.measured + 1, epoch + plan.settle),
        "cold": (epoch, min(READ_AHEAD, epoch - 2)),
    }[case.medium]
    raw = [prepare_medium(reader, cold=case.medium == "cold")] if case.medium != "pinned" else []
    config, left_out = train_config(case, store=reader.path, checkpoint=checkpoint, out=out, steps=steps)
    with mock.patch.object(RunDirectory, "save"):  # 14 GB of weights and moments that nobody reads, outside the steps
        report = train(config)
    print(json.dumps({"case": case.name, "report": dataclasses.asdict(report)}, default=str), flush=True)
    if case.medium == "cold":
        raw.append(prepare_medium(reader, cold=True))  # a disk is not as fast at all times
    raw_gb_s = statistics.mean(raw) if raw else None
    settled = tomllib.loads((out / "config.toml").read_text())
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [(ms, wait) for step, ms, wait in step_times(metrics, case.batch) if step > skip]
    each = {"step_ms": [round(ms, 1) for ms, _ in times], "data_wait": [round(wait, 3) for _, wait in times]}
    print(json.dumps({"case": case.name, "raw_gb_s": raw, **each}), flush=True)
    total_s = sum(ms for ms, _ in times) / 1e3
    samples_s = case.batch * len(times) / total_s
    sample_bytes = sum(reader.size_bytes(name) for name in reader.sample_ids) / len(reader)
    return {
        "step_ms": statistics.median(ms for ms, _ in times),
        "samples_s": samples_s,
        "draws_s": samples_s * settled["draws"],
        "data_wait": sum(ms * wait for ms, wait in times) / 1e3 / total_s,
        "peak_gib": report.peak_gib,
        "planned_gib": report.planned_gib,
        **{key: settled[key] for key in ("micro_batch", "checkpointing", "draws") if key in settled},
        "of_raw_read": samples_s * sample_bytes / 1e9 / raw_gb_s if raw_gb_s else None,
        "raw_gb_s": raw_gb_s,
        "steps": len(times),
        "note": "train has no " + ", ".join(f"{name}={value}" for name, value in left_out.items()) if left_out else "",
    }


def make_store(case: Case, plan: Plan, work: Path) -> CacheReader:
    """The case's store, made if it is not there; other stores give way where the disk is too small for both."""
    directory, wanted = work / case.store, plan.samples(case)
    if not directory.exists():
        others = sorted(path for path in work.glob("*c[0-9]-*") if path != directory)
        while others and shutil.disk_usage(work).free < 1.1 * plan.store_bytes + ROOM_BYTES:
            shutil.rmtree(others.pop(0))
    started = time.monotonic()
    shortest, longest = plan.lengths(case.cameras)
    reader = full_size.write_store(
        directory,
        work / _model(case.family),
        cameras=case.cameras,
        codec=case.codec,
        samples=wanted,
        shortest=shortest,
        longest=longest,
    )
    print(json.dumps({"store": case.store, "samples": wanted, "seconds": time.monotonic() - started}), flush=True)
    return reader


def prepare_medium(reader: CacheReader, *, cold: bool) -> float:
    """Bring the files into the page cache, or out of it; GB/s of raw reading from there."""
    ids, threads = list(reader.sample_ids), min(14, os.cpu_count() or 1)
    buffers = [np.zeros(max(map(reader.buffer_bytes, ids)) + 64, np.uint8) for _ in range(threads)]
    readinto = raw_readers(reader)["readinto"]
    if not cold:
        timed(readinto, ids, buffers)
        return sum(map(reader.size_bytes, ids)) / timed(readinto, ids, buffers) / 1e9
    evict(reader.path)
    seconds = timed(readinto, ids, buffers)  # all: the first gigabytes after a pause may come faster
    evict(reader.path)
    return sum(map(reader.size_bytes, ids)) / seconds / 1e9


def recipe_rows(plan: Plan, family: str, cameras: list[int], work: Path) -> dict[str, Any]:
    """Measured by an earlier call in the same place, or now, each camera count once."""
    full_size.write_checkpoint(work / _model(family), small=plan.small, family=family)
    path = work / f"recipe-{family}.json"
    known = json.loads(path.read_text()) if path.is_file() else {"hardware": hardware(), "rows": []}
    new = [count for count in cameras if not any(row["cameras"] == count for row in known["rows"])]
    if new:
        measured = full_size.measure_recipe(
            work / _model(family), new, batches=plan.recipe_batches, rounds=plan.recipe_rounds
        )
        known["rows"] += [{"family": family, **row} for row in measured]
        path.write_text(json.dumps(known))
    return {**known, "rows": [row for row in known["rows"] if row["cameras"] in cameras]}


def over_recipe(row: dict[str, Any], recipe: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples a second over the recipe's at batch 1 and at its best batch, of the same cameras."""
    same = [other for other in recipe if all(other.get(key) == row.get(key) for key in ("family", "cameras"))]
    single = max((other["samples_s"] for other in same if other["batch"] == 1), default=None)
    best = max((other["samples_s"] for other in same), default=None)
    if "samples_s" not in row or single is None or best is None:
        return row
    return row | {"over_recipe_b1": row["samples_s"] / single, "over_recipe_best": row["samples_s"] / best}


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else hardware_name()


def isolated(function: Callable[..., Any], *given: Any) -> Any:
    """Call in a process that ends with it: no memory, no graph and no crash of one case reaches the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="checkpoint, stores and runs; what is there already is used again")
    parser.add_argument(
        "--cases", metavar="NAME,...", help="some of these, in that order: " + ", ".join(c.name for c in full_cases())
    )
    parser.add_argument("--store-gb", type=float, default=FULL.store_bytes / 1e9, help="size of each store")
    parser.add_argument("--no-recipe", dest="recipe", action="store_false", help="leave the public recipe out")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no case after that many seconds")
    options = parser.parse_args()
    started = time.monotonic()
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("a full run needs a CUDA device; --quick runs a small expert on the CPU.")
    plan = QUICK if options.quick else dataclasses.replace(FULL, store_bytes=int(options.store_gb * 1e9))
    cases = quick_cases() if options.quick else full_cases()
    wanted = options.cases.split(",") if options.cases else [case.name for case in cases]
    if unknown := sorted(set(wanted) - {case.name for case in cases}):
        raise SystemExit(f"unknown cases {', '.join(unknown)}; known: {', '.join(case.name for case in cases)}.")
    cases = sorted((case for case in cases if case.name in wanted), key=lambda case: wanted.index(case.name))
    root = options.work or Path(tempfile.mkdtemp())
    work = root / ("quick" if options.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    call: Callable[..., Any] = (lambda function, *given: function(*given)) if options.quick else isolated
    try:
        recipes: list[dict[str, Any]] = []
        for family in sorted({case.family for case in cases}):
            mine = sorted({case.cameras for case in cases if case.family == family})
            recipes.append(call(recipe_rows, plan, family, mine if options.recipe else [], work))
        known = [row for recipe in recipes for row in recipe["rows"]]
        rows = list(known)
        for case in cases:
            if time.monotonic() - started > options.limit_s:
                print(f"no time left for {case.name} and what follows", flush=True)
                break
            try:
                row = call(run_case, case, plan, work)
            except Exception as error:  # the process itself died
                row = about(case) | {"note": one_line(error)}
            rows.append(over_recipe(row, known))
            print(json.dumps({"at_s": round(time.monotonic() - started), **rows[-1]}), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(root)
    rows = [{key: row.get(key) for key in KEYS} for row in rows]
    finish("train_e2e", rows, options, hardware=recipes[0]["hardware"])


if __name__ == "__main__":
    main()

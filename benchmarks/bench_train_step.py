"""One training step at full size, random weights, samples on the device: `train`'s own step beside stock attention.

A case is a `TrainStep` as `train` makes it (captured, compiled, micro-batches, checkpointing, adapters) in a process of
its own under the memory cap; `planned_gib` is what `memory_plan` says of it. `stock` is the usual way in the same run:
bf16 concatenated cache, repeated draws, expanded heads (sdpa), every kernel launched, fused AdamW. No disk, no copies
of samples: `bench_train_e2e.py` has those. `--quick` runs a small expert on the CPU.

Cases `…-7.5`, `…-11.5` and `…-15.5` are settled by `fastest_plan` as `train` settles them for a card of 8, 12 or 16 GB,
with room for a validation: `bus_ms` is how long the streamed state takes to come and go at the measured rate of the
bus, and `of_slower` the longer of that and the resident step of the same batch, over the step. Cases `…-once` are the
same with one backward a step, and `over_once` the rate over theirs.
"""

import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import full_size
import torch
from benchmark_report import arguments, finish, hardware_name
from full_size import HEAD_DIM, KV_HEADS, PREFIX_TOKENS, RandomKV

from alpacache import flow_matching
from alpacache.alpamayo.expert import ActionExpert
from alpacache.cached_samples.ring import Batch, PrefixRows
from alpacache.cached_samples.staged_batch import StagedBatch
from alpacache.distributed.world import World
from alpacache.driving.sample import FUTURE_STEPS
from alpacache.gpu.device import cap_memory
from alpacache.planning.config import budget_bytes
from alpacache.planning.machine import bus_speed, gpu_speed
from alpacache.planning.memory_model import fastest_plan, memory_plan, with_room_used
from alpacache.planning.workload import MemoryPlan, Workload
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.packed import PackedPrefixes
from alpacache.prefix.transform import TransformTensorCodec
from alpacache.training.learner import Learner, planned_optimizer
from alpacache.training.optimizers import StepOptimizer, make_optimizer, resolve
from alpacache.training.step import TrainStep
from alpacache.training.trainable import choose_trainable, enable_checkpointing
from cache_store import CODECS, TransformCodec

BUDGET = "24GB"
_LARGEST = 1.3
"""Bytes of the largest sample of the codec transform, as a multiple of what its rate says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a row is asked for."""

    name: str
    cameras: int
    batch: int
    codec: str = "int8"
    draws: int = 1
    micro_batch: int | None = None
    checkpointing: bool = False
    trainable: str = "all"
    optimizer: str = "auto"
    capture: bool = True
    compile: bool = True
    decode_twice: bool = False
    """Even where the memory has room for decoded layers."""
    stock: bool = False
    budget: str = BUDGET
    settled: bool = False
    """All of that, and where the optimizer's state is, is what `fastest_plan` chooses."""
    backwards: int | None = None
    """How many a step makes, where that is not chosen."""


CASES = [
    Case(name="stock", cameras=4, batch=8, codec="bf16", optimizer="adamw", capture=False, compile=False, stock=True),
    Case(name="c4", cameras=4, batch=8),
    Case(name="c4-decode-twice", cameras=4, batch=8, decode_twice=True),
    Case(name="c4-bf16", cameras=4, batch=8, codec="bf16"),
    Case(name="c4-not-compiled", cameras=4, batch=8, compile=False),
    Case(name="c4-not-captured", cameras=4, batch=8, compile=False, capture=False),
    Case(name="c4-adamw", cameras=4, batch=8, optimizer="adamw"),
    Case(name="c4-two-micro", cameras=4, batch=8, micro_batch=4),
    Case(name="c4-draws4", cameras=4, batch=8, draws=4),
    Case(name="c4-draws4-checkpointing", cameras=4, batch=8, draws=4, checkpointing=True),
    Case(name="c4-draws8-checkpointing", cameras=4, batch=8, draws=8, checkpointing=True),
    Case(name="c4-lora", cameras=4, batch=4, trainable="lora"),
    Case(name="c1", cameras=1, batch=16),
    Case(name="c4-transform", cameras=4, batch=8, codec="transform:2.2"),
    Case(name="c1-transform", cameras=1, batch=16, codec="transform:2.2"),
    Case(name="c1-decode-twice", cameras=1, batch=16, decode_twice=True),
    Case(name="c1-one", cameras=1, batch=1),
    Case(name="c1-8", cameras=1, batch=8),
    Case(name="c1-8-7.5", cameras=1, batch=8, budget="8GB", settled=True),
    Case(name="c1-8-11.5-once", cameras=1, batch=8, budget="12GB", settled=True, backwards=1),
    Case(name="c1-8-11.5", cameras=1, batch=8, budget="12GB", settled=True),
    Case(name="c1-8-15.5", cameras=1, batch=8, budget="16GB", settled=True),
    Case(name="c1-16-11.5", cameras=1, batch=16, budget="12GB", settled=True),
    Case(name="c1-16-15.5-once", cameras=1, batch=16, budget="16GB", settled=True, backwards=1),
    Case(name="c1-16-15.5", cameras=1, batch=16, budget="16GB", settled=True),
    Case(name="c4-4", cameras=4, batch=4),
    Case(name="c4-4-15.5", cameras=4, batch=4, budget="16GB", settled=True),
    Case(name="c4-8-11.5", cameras=4, batch=8, budget="12GB", settled=True),
    Case(name="c4-8-15.5", cameras=4, batch=8, budget="16GB", settled=True),
]
QUICK = [
    Case(name="stock", cameras=1, batch=4, codec="bf16", stock=True, capture=False, compile=False),
    Case(name="c1", cameras=1, batch=4),
    Case(name="c1-two-micro", cameras=1, batch=4, micro_batch=2, draws=2),
    Case(name="c1-streamed", cameras=1, batch=4, settled=True),
    Case(name="c1-twice", cameras=1, batch=4, settled=True, backwards=2),
]


def random_rows(case: Case, layout: PrefixLayout, lengths: list[int], device: torch.device) -> PrefixRows:
    """Two batches of stored samples; layers of a sample are alike, but for those of the codec transform."""
    rows = PrefixRows(layout, max(lengths), batch_size=case.batch, device=device)
    for place, length in enumerate(lengths):
        one = torch.randn(1, 2, KV_HEADS, length, HEAD_DIM, device=device, dtype=torch.bfloat16)
        kv = one.expand(layout.layers, -1, -1, -1, -1)
        if isinstance(layout.codec, TransformCodec):
            row = TransformTensorCodec(layout.codec).encode(*_random_kv(layout.layers, device).kv(length))
        elif layout.codec is None:
            row = kv.to(layout.dtype).contiguous().flatten().view(torch.uint8)
        else:
            row = tensor_codec(layout.codec).encode(kv).flatten()
        rows.data[place, : len(row)] = rows.data[case.batch + place, : len(row)] = row
    return rows


@cache
def _random_kv(layers: int, device: torch.device) -> RandomKV:
    """What a codec learns from, and then the samples."""
    return RandomKV(layers, KV_HEADS, HEAD_DIM, device)


def run_case(case: Case, small: bool, steps: int) -> dict[str, Any]:
    """The case's row; a failure is a note in it."""
    try:
        return asdict(case) | (_stock(case, small, steps) if case.stock else _measure(case, small, steps))
    except (torch.OutOfMemoryError, ValueError) as error:
        return asdict(case) | {"note": " ".join(f"{type(error).__name__}: {error}".split())[:160]}


def _setting(case: Case, small: bool) -> tuple[ActionExpert, PrefixLayout, list[int], torch.device]:
    device = full_size.device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    expert = full_size.random_expert(device, dtype, small=small).train()
    shortest, longest = (80, 88) if small else PREFIX_TOKENS[case.cameras]
    lengths = [round(value) for value in torch.linspace(shortest, longest, case.batch).tolist()]
    layers, codec, most_bytes = len(expert.expert.layers), CODECS.get(case.codec), None
    if (wanted := TransformCodec.named(case.codec)) is not None:
        codec = full_size.learnt(wanted.rate, _random_kv(layers, device), shortest)
        most_bytes = round(_LARGEST * codec.expected_bytes((layers, 2, KV_HEADS, longest, HEAD_DIM)))
    layout = PrefixLayout(
        layers=layers, kv_heads=KV_HEADS, head_dim=HEAD_DIM, codec=codec, dtype=dtype, most_bytes=most_bytes
    )
    return expert, layout, [*lengths[:-1], longest], device


def _measure(case: Case, small: bool, steps: int) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    cap = cap_memory(budget_bytes(case.budget), torch.device("cuda")) if cuda else None
    expert, layout, lengths, device = _setting(case, small)
    parameters = choose_trainable(expert, case.trainable, seed=0)
    name = resolve(case.optimizer, device)
    work = Workload(
        parameters=sum(p.numel() for n, p in expert.named_parameters() if "lora" not in n),
        trained=sum(parameter.numel() for parameter in parameters.values()),
        layers=layout.layers,
        hidden=expert.expert.config.hidden_size,
        intermediate=expert.expert.config.intermediate_size,
        layout=layout,
        longest=max(lengths),
        batch_size=case.batch,
        trainable=case.trainable,
        optimizer=name,
        compiled=case.compile,
        captured=case.capture,
        validates=case.settled,
    )
    bus_bytes_s = bus_speed() if cuda and case.settled else None
    plan = _plan(case, work, cap, bus_bytes_s)
    case = replace(case, micro_batch=plan.micro_batch, checkpointing=plan.checkpointing, capture=plan.captured)
    if plan.checkpointing:
        enable_checkpointing(expert)

    def optimizer(shards: Mapping[str, slice]) -> StepOptimizer:
        make = partial(make_optimizer, name, betas=(0.9, 0.999), weight_decay=0.0)
        return planned_optimizer(make, parameters, plan, layers=layout.layers)

    learner = Learner(expert, parameters, World(rank=0, size=1, device=device), optimizer, budget_bytes=None)
    for_validation = torch.empty(plan.validation, dtype=torch.uint8, device=device)
    rows = random_rows(case, layout, lengths, device)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    staged = StagedBatch(rows, expert, draws=case.draws, at_once=plan.micro_batch, decoded_layers=plan.decoded_layers)
    step = TrainStep(
        learner,
        staged,
        micro_batch=plan.micro_batch,
        clip=1.0,
        causal=False,
        capture=plan.captured,
        compile_layers=case.compile,
    )
    batch = Batch(
        positions=tuple(range(case.batch)),
        sample_ids=tuple(map(str, range(case.batch))),
        action=torch.randn(case.batch, FUTURE_STEPS, 2),
        rows=tuple(range(case.batch)),
        lengths=tuple(lengths),
        stored=tuple(lengths),
        stems=tuple(lengths),
        starts=tuple(length - 50 for length in lengths),
        turns=("straight",) * case.batch,
        ready=None,
    )
    noise, t = torch.randn(case.batch, case.draws, FUTURE_STEPS, 2), torch.rand(case.batch, case.draws)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        result = step.run(batch, noise, t, 1e-4)
        values = result.values()
        times.append(time.perf_counter() - started)
    learner.settle()
    del for_validation
    planned = plan.device_bytes / 2**30 if cuda else None
    numbers = {"decoded_layers": plan.decoded_layers, "planned_gib": planned, "streamed_layers": plan.streamed_layers}
    if plan.streamed_layers and bus_bytes_s is not None:
        numbers |= {"bus_gb_s": bus_bytes_s / 1e9, "bus_ms": plan.streamed / bus_bytes_s * 1e3}
    chosen = {name: getattr(case, name) for name in ("micro_batch", "checkpointing", "capture")}
    return _row(case, times, values.loss) | chosen | numbers | {"backwards": plan.backwards}


def _plan(case: Case, work: Workload, cap: int | None, bus_bytes_s: float | None) -> MemoryPlan:
    """What is asked for, or chosen as `train` chooses it; without a GPU half of the layers are streamed then."""
    if case.settled and cap is not None:
        gpu = gpu_speed()
        torch.cuda.empty_cache()
        return fastest_plan(
            work,
            draws=case.draws,
            micro_batch=None,
            checkpointing=None,
            cap_bytes=cap,
            gpu=gpu,
            bus_bytes_s=bus_bytes_s,
            backwards=case.backwards,
        )
    plan = memory_plan(
        work,
        draws=case.draws,
        micro_batch=case.micro_batch or case.batch,
        checkpointing=case.checkpointing,
        streamed_layers=work.layers // 2 if case.settled else 0,
        backwards=case.backwards or 1,
    )
    return plan if cap is None or case.decode_twice else with_room_used(work, plan, cap_bytes=cap)


def _stock(case: Case, small: bool, steps: int) -> dict[str, Any]:
    """Stock attention and torch's AdamW, kernel by kernel."""
    expert, layout, lengths, device = _setting(case, small)
    expert.expert.config._attn_implementation = "sdpa"
    prefixes = PackedPrefixes(
        layout=layout,
        data=random_rows(case, layout, lengths, device).data,
        rows=torch.arange(case.batch, device=device),
        lengths=torch.tensor(lengths, device=device),
        starts=torch.tensor(lengths, device=device) - 50,
        longest=max(lengths),
        dtype=expert.dtype,
    )
    optimizer = torch.optim.AdamW(expert.parameters(), lr=1e-4, fused=device.type == "cuda")
    action, noise = (torch.randn(case.batch, case.draws, FUTURE_STEPS, 2, device=device) for _ in range(2))
    t = torch.rand(case.batch, case.draws, device=device)
    times, loss = [], 0.0
    for _ in range(steps):
        started = time.perf_counter()
        velocity = expert.velocity(flow_matching.interpolate(action, noise, t), t, prefixes)
        error = flow_matching.loss(velocity, action, noise).mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(error.detach())  # waits for the device
        times.append(time.perf_counter() - started)
    return _row(case, times, loss)


def _is_resident(case: Case, row: Mapping[str, Any]) -> bool:
    """Tell whether a row is of the same work with nothing in the way."""
    plain = asdict(replace(case, settled=False, budget=BUDGET, micro_batch=row["micro_batch"], backwards=1))
    alike = all(row[name] == value for name, value in plain.items() if name not in ("name", "micro_batch"))
    return alike and "step_ms" in row


def _row(case: Case, times: list[float], loss: float) -> dict[str, Any]:
    step_s = statistics.median(times[len(times) // 3 :])
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    return {
        "step_ms": step_s * 1e3,
        "samples_s": case.batch / step_s,
        "draws_s": case.batch * case.draws / step_s,
        "peak_gib": peak,
        "loss": loss,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", metavar="NAME,...", help="some of: " + ", ".join(case.name for case in CASES))
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("a full run needs a CUDA device; --quick runs a small expert on the CPU.")
    cases, steps = (QUICK, 4) if options.quick else (CASES, 20)
    wanted = options.cases.split(",") if options.cases else [case.name for case in cases]
    if unknown := sorted(set(wanted) - {case.name for case in cases}):
        raise SystemExit(f"unknown cases {', '.join(unknown)}; known: {', '.join(case.name for case in cases)}.")
    rows: list[dict[str, Any]] = []
    for case in cases:
        if case.name not in wanted:
            continue
        if options.quick:
            row = run_case(case, True, steps)
        else:  # no memory and no graph of one case reaches the next
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(run_case, case, False, steps).result()
        base = next((other["samples_s"] for other in rows if other["stock"] and "samples_s" in other), None)
        row["over_stock"] = row["samples_s"] / base if base and case.cameras == 4 and "samples_s" in row else None
        if case.settled and "step_ms" in row:
            resident = [other["step_ms"] for other in rows if _is_resident(case, other)]
            if resident:
                slower = max(resident[0], row.get("bus_ms", 0.0))
                row |= {"resident_ms": resident[0], "of_slower": slower / row["step_ms"]}
            once = [other["samples_s"] for other in rows if other["name"] == f"{case.name}-once"]
            if once:
                row["over_once"] = row["samples_s"] / once[0]
        rows.append(row)
        print(json.dumps(row), flush=True)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware_name()
    finish("train_step", rows, options, hardware=hardware)


if __name__ == "__main__":
    main()

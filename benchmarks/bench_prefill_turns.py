"""Ways to make the VLM's prefill faster, side by side in a minute and a half: they take turns on one GPU.

Differences of 1 % are looked for, and a GPU's clock drifts more than that in a minute; so each round has a turn of each
way, and `over_eager` and `over_compiled` are medians over rounds of ratios within a round. A turn is one batch alone
(`alone_ms`), then several without a pause, as `extract` has them (`batch_ms`, `samples_s`). `sm_mhz`, `watt` and
`limits` are what the driver said in these. Errors are relative L2 differences from float32 as in `bench_prefill`.
Afterwards other batch sizes take turns, and kernels of some ways are listed with the time in which none runs.
"""

import copy
import ctypes
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import full_size
import torch
from bench_prefill import _synchronise, _tidy, errors, make_vlm, parts, prompts, seconds
from benchmark_report import arguments, finish, hardware_name
from prefill_ways import WAYS, Turns
from torch import Tensor

from alpacache.alpamayo import FrozenVLM
from alpacache.planning.time_model import prefill_batch

SIZES = {1: (16, 24, 32), 4: (4,)}
"""Other batch sizes, by cameras."""
SIZED = ("eager", "compiled", "best")
PROFILED = ("compiled", "best")
_SMI = [
    "nvidia-smi",
    "--query-gpu=clocks.sm,clocks.max.sm,power.draw,power.limit,clocks_throttle_reasons.active,temperature.gpu",
    "--format=csv",
]
_LIMITS = {0x1: "idle", 0x4: "power cap", 0x8: "hardware", 0x20: "temperature", 0x40: "hot", 0x80: "power brake"}


class Meter:
    """What the driver says of the first GPU, 50 times a second."""

    def __init__(self) -> None:
        self._found: list[tuple[float, int, int, int]] = []
        """When, MHz, bits of `_LIMITS`, millijoules."""
        self._over = threading.Event()
        try:
            told = subprocess.run(_SMI, capture_output=True, text=True, timeout=20, check=False)
            print("at rest:", " ".join((told.stdout + told.stderr).split())[:300], flush=True)
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self._device = ctypes.c_void_p()
            self._ask("nvmlInit_v2")
            self._ask("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self._device))
            self._read()
        except (OSError, AttributeError, RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"clock and power are not known: {error}", flush=True)
            return
        threading.Thread(target=self._watch, daemon=True).start()

    def _ask(self, name: str, *values: Any) -> None:
        code = getattr(self._nvml, name)(*values)
        if code:
            raise RuntimeError(f"{name} gives {code}")

    def _read(self) -> None:
        clock, bits, energy = ctypes.c_uint(), ctypes.c_ulonglong(), ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetClockInfo", self._device, 1, ctypes.byref(clock))
        self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._device, ctypes.byref(bits))
        self._ask("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(energy))
        self._found.append((time.perf_counter(), clock.value, bits.value, energy.value))

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            try:
                self._read()
            except RuntimeError as error:
                print(f"clock and power are no longer known: {error}", flush=True)
                return

    def between(self, windows: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """Median clock, mean power, and how often what kept the clock low, in these times."""
        clocks: list[int] = []
        limits: dict[str, int] = defaultdict(int)
        joules = spent = 0.0
        for begin, end in windows:
            inside = [row for row in list(self._found) if begin < row[0] < end]
            clocks += [row[1] for row in inside]
            for _, _, bits, _ in inside:
                names = [name for bit, name in _LIMITS.items() if bits & bit]
                limits[" and ".join(names) or (hex(bits) if bits else "nothing")] += 1
            changes = [row for before, row in pairwise(inside) if row[3] != before[3]]
            if len(changes) > 1:  # the counter stands still in between
                joules += 1e-3 * (changes[-1][3] - changes[0][3])
                spent += changes[-1][0] - changes[0][0]
        if not clocks:
            return {}
        told = ", ".join(f"{name} {100 * count // len(clocks)} %" for name, count in limits.items())
        return {"sm_mhz": statistics.median(clocks), "watt": joules / spent if spent else None, "limits": told}

    def close(self) -> None:
        self._over.set()


class Measured:
    """Turns of one way on one group of samples."""

    def __init__(self, way: str, cameras: int, inputs: Sequence[Any]) -> None:
        self.way, self.cameras, self.inputs = way, cameras, inputs
        self.alone: list[float] = []
        self.together: list[float] = []
        """Seconds a batch, round by round."""
        self.windows: list[tuple[float, float]] = []
        self.told: dict[str, Any] = {}

    def turn(self, turns: Turns, *, batches: int) -> None:
        with turns.going(WAYS[self.way]):
            self.alone.append(seconds(lambda: turns.vlm.prefill_batch(self.inputs), rounds=1))
            begin = time.perf_counter()
            for _ in range(batches):
                turns.vlm.prefill_batch(self.inputs)
            _synchronise()
            end = time.perf_counter()
        self.together.append((end - begin) / batches)
        self.windows.append((begin, end))

    def row(self, others: Sequence["Measured"], meter: Meter) -> dict[str, Any]:
        row = {"way": self.way, "cameras": self.cameras, "batch": len(self.inputs)}
        row |= {"tokens": len(self.inputs[0].input_ids), "rounds": len(self.together)}
        if self.together:
            each = statistics.median(self.together)
            row |= {"alone_ms": 1e3 * statistics.median(self.alone), "batch_ms": 1e3 * each}
            row |= {"spread": max(self.together) / min(self.together) - 1, "samples_s": len(self.inputs) / each}
        for other in others:
            same = (other.cameras, len(other.inputs)) == (self.cameras, len(self.inputs))
            if same and other.way in ("eager", "compiled"):
                for name in ("alone", "together"):
                    ratios = [a / b for a, b in zip(getattr(other, name), getattr(self, name), strict=False)]
                    if ratios:
                        suffix = "_alone" if name == "alone" else ""
                        row[f"over_{other.way}{suffix}"] = statistics.median(ratios)
        return row | meter.between(self.windows) | self.told


@torch.inference_mode()
def around_blocks(vlm: FrozenVLM, inputs: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of the tower without its blocks, and of the pixels' way to the device."""
    visual: Any = vlm.model.visual
    grids = torch.cat([one.image_grid_thw for one in inputs])
    pixels = torch.cat([one.pixel_values.to(vlm.device) for one in inputs])
    with mock.patch.object(type(visual.blocks[0]), "forward", lambda block, hidden, **_: hidden):
        kept = [(block, block.__dict__.pop("forward")) for block in visual.blocks if "forward" in block.__dict__]
        try:
            visual(pixels, grid_thw=grids)
            found = {"around_ms": 1e3 * seconds(lambda: visual(pixels, grid_thw=grids), rounds=5)}
        finally:
            for block, forward in kept:
                block.forward = forward

    def send() -> Tensor:
        return torch.cat([one.pixel_values.to(vlm.device, non_blocking=True) for one in inputs])

    return found | {"pixels_ms": 1e3 * seconds(send, rounds=5)}


def profile(call: Callable[[], Any]) -> None:
    """Print the kernels of a prefill, and when none of them runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        _synchronise()
    events = [one for one in found.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda one: one.time_range.start)
    if not events:
        return
    total: dict[str, list[float]] = defaultdict(list)
    gaps, end = [], events[0].time_range.start
    for event in events:
        total[event.name].append(event.device_time)
        gaps.append((event.time_range.start - end, event.name))
        end = max(end, event.time_range.end)
    busy, span = sum(map(sum, total.values())), end - events[0].time_range.start
    idle = sum(gap for gap, _ in gaps if gap > 0)
    print(f"  kernels {busy / 1e3:.1f} ms in {span / 1e3:.1f}, {len(events)} of them, none runs {idle / 1e3:.2f} ms")
    for gap, name in sorted(gaps, reverse=True)[:5]:
        print(f"  {gap / 1e3:8.2f} ms of nothing before {name[:90]}")
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1]))[:30]:
        each = f"{len(times):5d} x {statistics.mean(times):8.1f} us"
        print(f"  {sum(times) / 1e3:8.2f} ms {each}  {name[:120]}")
    print("", end="", flush=True)


def prepare(turns: Turns, one: Measured, reference: Sequence[Any] | None) -> None:
    """First runs of a way, which compile it, with errors where the reference is given."""
    with turns.going(WAYS[one.way]):
        start = seconds(lambda: turns.vlm.prefill_batch(one.inputs), rounds=1)
        if turns.failed:
            raise RuntimeError("could not be compiled; see the warning")
        found = turns.vlm.prefill_batch(one.inputs)
        one.told["first_s"] = start
        if reference is not None:
            one.told |= errors(found, reference)


def measure(vlm: FrozenVLM, options: Any, meter: Meter) -> list[dict[str, Any]]:
    """Rows; ways for which no time is left are missing."""

    def share(part: float) -> float:
        return options.begun + part * options.seconds

    exact = FrozenVLM(copy.deepcopy(vlm.model).float(), future_start_id=vlm.future_start_id)
    inputs, references = {}, {}
    for cameras in options.cameras:
        batch = 2 if options.quick else prefill_batch(cameras=cameras, frames=full_size.FRAMES)
        inputs[cameras] = prompts(vlm, cameras=cameras, batch=batch)
        references[cameras] = exact.prefill_batch(inputs[cameras])
    del exact
    _tidy()
    print(f"ready after {time.perf_counter() - options.begun:.1f} s", flush=True)
    turns, going = Turns(vlm, backend=options.backend), []
    for way in options.ways:
        if time.perf_counter() > share(0.55):
            print(f"no time is left for {way}", flush=True)
            continue
        try:
            both = [Measured(way, cameras, inputs[cameras]) for cameras in options.cameras]
            for one in both:
                prepare(turns, one, references[one.cameras])
                print(json.dumps({"way": way, "cameras": one.cameras, **one.told}), flush=True)
            going += both
        except Exception as error:  # one way less; the others are measured
            print(f"{way} fails: {_told(error)}", flush=True)
    references.clear()
    _tidy()
    print(f"compiled after {time.perf_counter() - options.begun:.1f} s", flush=True)
    _rounds(turns, going, share(0.84), batches=options.batches, rounds=options.rounds)
    rows = _show(going, meter)
    for way in ("eager", *PROFILED):
        if way in options.ways and any(one.way == way for one in going) and time.perf_counter() < share(0.9):
            _look_inside(turns, way, inputs[options.cameras[0]], kernels=way in PROFILED)
    sized: list[Measured] = []
    for cameras in options.cameras:
        for batch in (3,) if options.quick else SIZES[cameras]:
            some = prompts(vlm, cameras=cameras, batch=1) * batch
            at_size = [Measured(way, cameras, some) for way in SIZED if any(one.way == way for one in going)]
            if time.perf_counter() < share(0.96):
                _rounds(turns, at_size, share(0.97), batches=2, rounds=1)
                sized += at_size
    return rows + _show(sized, meter)


def _rounds(turns: Turns, going: list[Measured], until: float, *, batches: int, rounds: int) -> None:
    """Let all take turns until then, for at least a round; who fails is left out of what is to come."""
    for number in range(rounds):
        if number and time.perf_counter() > until:
            break
        for one in list(going):
            try:
                one.turn(turns, batches=batches)
            except Exception as error:
                going.remove(one)
                print(f"{one.way} fails: {_told(error)}", flush=True)
                _tidy()


def _show(some: Sequence[Measured], meter: Meter) -> list[dict[str, Any]]:
    rows = [one.row(some, meter) for one in some]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def _look_inside(turns: Turns, way: str, inputs: Sequence[Any], *, kernels: bool) -> None:
    try:
        with turns.going(WAYS[way]):
            found = parts(turns.vlm, inputs, rounds=3) | around_blocks(turns.vlm, inputs)
            print(json.dumps({"way": way, **{name: round(ms, 2) for name, ms in found.items()}}), flush=True)
            if kernels and turns.vlm.device.type == "cuda":
                profile(lambda: turns.vlm.prefill_batch(inputs))
    except Exception as error:
        print(f"inside of {way}: {_told(error)}", flush=True)


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def main() -> None:
    begun = time.perf_counter()
    parser = arguments(__doc__)
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 4], choices=sorted(SIZES))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="those first that matter")
    parser.add_argument("--seconds", type=float, default=90, help="for all of it; ways are left out for that")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=3, help="without a pause, in a turn")
    parser.add_argument("--backend", help="of torch.compile; with --quick eager unless another is named")
    options = parser.parse_args()
    options.begun = begun
    options.backend = options.backend or ("eager" if options.quick else "inductor")
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick runs a small model on the CPU.")
    meter = Meter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            with mock.patch.object(full_size, "_expert_state", return_value={"vlm.placeholder": torch.zeros(1)}):
                checkpoint_dir = full_size.write_checkpoint(Path(folder) / "model", small=options.quick)
            rows = measure(make_vlm(checkpoint_dir), options, meter)
    finally:
        meter.close()
    hardware = torch.cuda.get_device_name() if cuda else hardware_name()
    finish("prefill_turns", rows, options, hardware=hardware)


if __name__ == "__main__":
    main()

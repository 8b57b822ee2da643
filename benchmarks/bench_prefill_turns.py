"""Ways to prefill that differ by a few percent: they take turns on one GPU, whose clock and power are watched.

A GPU's clock drifts by more in a minute than these ways differ. So each round has a turn of each way, and `over_eager`
and `over_compiled` are medians over rounds of ratios within a round. A turn is one batch alone (`alone_ms`), then
several without a pause, as `extract` has them (`batch_ms`, `samples_s`; `spread` is the slowest round's beyond the
fastest's). `sm_mhz`, `watt` (by the energy counter) and `limits` (what held the clock down, as shares of the time) are
of the latter. `first_s` is the first prefill, errors are as in `bench_prefill`.
"""

import copy
import ctypes
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import bench_prefill
import full_size
import torch
from bench_prefill import Joined, changed, errors, make_vlm, other_block, prompts, run_plain, seconds, tower_parts
from benchmark_report import arguments, finish, hardware_name
from torch import Tensor, nn

from alpacache.alpamayo import FrozenVLM, compiled_layers
from alpacache.alpamayo.text_layers import LayerKV
from alpacache.planning.time_model import prefill_batch

WAYS = {"eager": "eager", "compiled": "compiled", "gelu": "gelu", "all together": "cudnn joined gelu"}
"""Name -> words of `bench_prefill.changed`. `all together` is also what `everything_else` changes, and its last text
layer makes keys and values alone, so it has no hidden states."""
TIMES = (1, 2)
"""Batches are so many times what `extract` takes at once."""
_LIMITS = {0x1: "idle", 0x4: "power cap", 0x8: "hardware", 0x20: "temperature", 0x40: "hot", 0x80: "power brake"}
_to = Tensor.to


class Meter:
    """What the driver says of the first GPU, 50 times a second; nothing where there is no driver."""

    def __init__(self) -> None:
        self._found: list[tuple[float, int, int, int]] = []
        """When, MHz, bits of `_LIMITS`, millijoules."""
        self._over = threading.Event()
        self._device, cap = ctypes.c_void_p(), ctypes.c_uint()
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self._ask("nvmlInit_v2")
            self._ask("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self._device))
            self._ask("nvmlDeviceGetEnforcedPowerLimit", self._device, ctypes.byref(cap))
        except (OSError, RuntimeError) as error:
            print(f"clock and power are not known: {error}", flush=True)
            return
        print(f"the power cap is {cap.value / 1e3:.0f} W", flush=True)
        threading.Thread(target=self._watch, daemon=True).start()

    def _ask(self, name: str, *values: Any) -> None:
        code = getattr(self._nvml, name)(*values)
        if code:
            raise RuntimeError(f"{name} gives {code}")

    def _watch(self) -> None:
        clock, bits, energy = ctypes.c_uint(), ctypes.c_ulonglong(), ctypes.c_ulonglong()
        while not self._over.wait(0.02):
            self._ask("nvmlDeviceGetClockInfo", self._device, 1, ctypes.byref(clock))
            self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._device, ctypes.byref(bits))
            self._ask("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(energy))
            self._found.append((time.perf_counter(), clock.value, bits.value, energy.value))

    def between(self, windows: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """Median clock, mean power, and how often what held the clock down, in these times."""
        clocks: list[int] = []
        limits: Counter[str] = Counter()
        joules = spent = 0.0
        for begin, end in windows:
            inside = [row for row in list(self._found) if begin < row[0] < end]
            clocks += [row[1] for row in inside]
            for _, _, bits, _ in inside:
                names = [name for bit, name in _LIMITS.items() if bits & bit]
                limits[" and ".join(names) or (hex(bits) if bits else "nothing")] += 1
            changes = [row for before, row in itertools.pairwise(inside) if row[3] != before[3]]
            if len(changes) > 1:  # the counter stands still in between
                joules += 1e-3 * (changes[-1][3] - changes[0][3])
                spent += changes[-1][0] - changes[0][0]
        if not clocks:
            return {}
        told = ", ".join(f"{name} {100 * count // len(clocks)} %" for name, count in limits.items())
        watt = joules / spent if spent else None
        return {"sm_mhz": round(statistics.median(clocks)), "watt": watt, "limits": told}

    def close(self) -> None:
        self._over.set()


class Way:
    """One VLM's way, to be gone again and again: what compiled it stays."""

    def __init__(self, name: str, vlm: FrozenVLM, backend: str) -> None:
        self.name, self._vlm, self._backend = name, vlm, backend
        self._joined = Joined()
        self._forwards: dict[nn.Module, Any] = {}

    @contextmanager
    def going(self) -> Iterator[None]:
        """Within it the VLM goes this way."""
        with ExitStack() as stack:
            stack.enter_context(changed(WAYS[self.name], self._joined))
            stack.callback(run_plain, self._vlm)
            if self.name == "all together":
                stack.enter_context(everything_else())
            if self.name != "eager":
                self._take()
            yield

    def _take(self) -> None:
        vlm = self._vlm
        if not self._forwards:
            vlm.compile(backend=self._backend)
            self._run_layer: Any = vlm._run_layer
            self._forwards = {part: part.__dict__["forward"] for part in tower_parts(vlm)}
        if self._run_layer.__self__._failed:
            raise RuntimeError(f"{self.name} could not be compiled; see the warning.")
        text: Any = vlm.model.language_model
        alone = self.name == "all together"
        vlm._run_layer = partial(keys_alone, self._run_layer, text.layers[-1]) if alone else self._run_layer
        for part, forward in self._forwards.items():
            part.forward = forward


@contextmanager
def everything_else() -> Iterator[None]:
    """Text layers add to the hidden states within the products, the tower turns queries and keys together by index,
    and what is sent to the GPU is sent from page-locked memory, so that nobody waits for it.
    """
    text = partial(Joined.layer, add=add_product)
    block = partial(other_block, gelu=True, turn=turned_by_index)
    with (
        mock.patch.multiple(compiled_layers, text_layer=text, vision_block=block),
        mock.patch.object(Tensor, "to", sent),
    ):
        yield


@torch.library.custom_op("alpacache_bench::add_product", mutates_args=("to",))
def _add_product(to: Tensor, values: Tensor, weight: Tensor) -> None:
    to.flatten(0, -2).addmm_(values.flatten(0, -2), weight.t())


@_add_product.register_fake
def _(to: Tensor, values: Tensor, weight: Tensor) -> None:
    return None


def add_product(to: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """`to += values @ weight.T`, the sum rounded once."""
    torch.ops.alpacache_bench.add_product(to, values, weight)
    return to


def turned_by_index(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `_rotated` gives: the halves change places by their index, and the sign is the sine's."""
    half = values.shape[-1] // 2
    partner = values.unflatten(-1, (2, half)).flip(-2).flatten(-2)
    first = torch.arange(2 * half, device=sin.device) < half
    return values * cos + partner * torch.where(first, -sin, sin)


def keys_alone(
    run: Any, last: nn.Module, layer: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], kv: LayerKV, mask: Any
) -> Tensor:
    """`run`, but for keys and values of the last layer and nothing behind them."""
    if layer is not last:
        after: Tensor = run(layer, hidden, angles, kv, mask)
        return after
    attention, inner = layer.self_attn, layer.input_layernorm(hidden)
    heads = (*inner.shape[:-1], -1, attention.head_dim)
    key = attention.k_norm(attention.k_proj(inner).view(heads)).transpose(1, 2)
    cos, sin = (each.unsqueeze(1) for each in angles)
    kv.update(compiled_layers._rotated(key, cos, sin), attention.v_proj(inner).view(heads).transpose(1, 2))
    return hidden


def sent(tensor: Tensor, *where: Any, **how: Any) -> Tensor:
    """`Tensor.to` whose whole numbers go to a GPU from page-locked memory, without waiting."""
    if where and getattr(where[0], "type", "") == "cuda" and tensor.device.type == "cpu" and tensor.dtype == torch.long:
        tensor, how = tensor.pin_memory(), how | {"non_blocking": True}
    return _to(tensor, *where, **how)


class Measured:
    """Turns of one way on one group of samples."""

    def __init__(self, way: Way, cameras: int, inputs: Sequence[Any]) -> None:
        self.way, self.cameras, self.inputs = way, cameras, inputs
        self.alone: list[float] = []
        self.together: list[float] = []
        """Seconds a batch, round by round."""
        self.windows: list[tuple[float, float]] = []
        self.first: dict[str, float] = {}

    def prepare(self, vlm: FrozenVLM, reference: Sequence[Any]) -> None:
        """A first run, which compiles, and errors."""
        with self.way.going():
            self.first["first_s"] = seconds(lambda: vlm.prefill_batch(self.inputs), rounds=1)
            self.first |= errors(vlm.prefill_batch(self.inputs)[: len(reference)], reference)
        if self.way.name == "all together":
            del self.first["hidden_error"]

    def turn(self, vlm: FrozenVLM, *, batches: int) -> None:
        with self.way.going():
            self.alone.append(seconds(lambda: vlm.prefill_batch(self.inputs), rounds=1))
            begin = time.perf_counter()
            for _ in range(batches):
                vlm.prefill_batch(self.inputs)
            bench_prefill._synchronise()
            self.windows.append((begin, time.perf_counter()))
        self.together.append((self.windows[-1][1] - begin) / batches)

    def row(self, others: Sequence["Measured"], meter: Meter) -> Mapping[str, Any]:
        row = {"way": self.way.name, "cameras": self.cameras, "batch": len(self.inputs)}
        row |= {"tokens": len(self.inputs[0].input_ids), "rounds": len(self.together)}
        each = statistics.median(self.together)
        row |= {"alone_ms": 1e3 * statistics.median(self.alone), "batch_ms": 1e3 * each}
        row |= {"spread": max(self.together) / min(self.together) - 1, "samples_s": len(self.inputs) / each}
        for other in others:
            if other.inputs is self.inputs and other.way.name in ("eager", "compiled"):
                for name, suffix in (("alone", "_alone"), ("together", "")):
                    ratios = [a / b for a, b in zip(getattr(other, name), getattr(self, name), strict=True)]
                    row[f"over_{other.way.name}{suffix}"] = statistics.median(ratios)
        return row | meter.between(self.windows) | self.first


def measure(vlm: FrozenVLM, options: Any, meter: Meter) -> list[Mapping[str, Any]]:
    exact = FrozenVLM(copy.deepcopy(vlm.model).float(), future_start_id=vlm.future_start_id)
    groups, references = [], {}
    for cameras in options.cameras:
        batch = 2 if options.quick else prefill_batch(cameras=cameras, frames=full_size.FRAMES)
        inputs = prompts(vlm, cameras=cameras, batch=batch)
        references[cameras] = exact.prefill_batch(inputs)
        groups += [(cameras, inputs * times) for times in TIMES]
    del exact
    going = []
    for name in WAYS:
        bench_prefill._tidy()
        way = Way(name, vlm, "eager" if options.quick else "inductor")
        for cameras, inputs in groups:
            going.append(Measured(way, cameras, inputs))
            going[-1].prepare(vlm, references[cameras])
    references.clear()
    bench_prefill._tidy()
    for _ in range(options.rounds):
        for one in going:
            one.turn(vlm, batches=options.batches)
    return [one.row(going, meter) for one in going]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cameras", type=int, nargs="+", default=[1, 4], choices=sorted(bench_prefill.TOKENS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3, help="without a pause, in a turn")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick runs a small model on the CPU.")
    torch._dynamo.config.recompile_limit = 64  # ways share functions
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(full_size, "_expert_state", return_value={"vlm.placeholder": torch.zeros(1)}):
            checkpoint_dir = full_size.write_checkpoint(Path(folder) / "model", small=options.quick)
        rows = measure(make_vlm(checkpoint_dir), options, meter)
    meter.close()
    for row in rows:
        print(json.dumps(row), flush=True)
    finish("prefill_turns", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


if __name__ == "__main__":
    main()

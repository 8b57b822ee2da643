"""The codec `transform` on a GPU: its kernels against the numpy reference, and how fast they are.

Keys and values are random, of the released geometry (8 heads of 128 channels, but few layers), Laplacian in a random
basis with deviations as a small real language model's fall, so that streams are as long as theirs; bases and tables are
learnt from other random samples, at `--rate`. First the checks, each of which ends the run where it fails: what the GPU
decodes of the reference's bytes is within a bfloat16 step of the largest number of the token; what it encodes, the
reference decodes with the same error and size; a captured graph decodes the same bits; damaged bytes are no fault. Then
the speed: GB are those of bfloat16 keys and values.

`--by-component` lays bases out `[K, N]` on the device rather than `[N, K]`: K, the number of stored components, is any
number, so that rows of `[N, K]` begin off the 16 bytes that matrix units load at a time, and rows of `[K, N]` do not.
The numbers are the same; checks and speeds are then of that layout.

With `--quick` and TRITON_INTERPRET=1 a CPU interprets the kernels at a tiny size; those times mean nothing.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from benchmark_report import arguments, finish, hardware_name
from torch import Tensor

from alpacache.prefix import transform_kernels
from alpacache.prefix.calibration import KVSample, angles_of, calibrate, turned
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.layers_ahead import decode
from alpacache.prefix.packed import PackedPrefixes, pack
from alpacache.prefix.prefix import EncodedPrefix
from cache_store import TransformCodec

# Deviations of keys and values of a layer, at quantiles from the first component to the last, as measured on a small
# real language model.
KEYS = [20.5, 5.17, 3.48, 2.74, 2.27, 1.93, 1.66, 1.43, 1.23, 1.06, 0.913, 0.778, 0.65, 0.532, 0.413, 0.278]
VALUES = [16.5, 6.26, 4.66, 3.78, 3.2, 2.75, 2.4, 2.11, 1.86, 1.64, 1.44, 1.25, 1.08, 0.917, 0.746, 0.527]


class RandomModel:
    """A model whose keys and values are known in distribution: `kv` makes samples."""

    def __init__(self, layers: int, heads: int, channels: int, device: torch.device) -> None:
        self.layers, self.heads, self.channels, self.device = layers, heads, channels, device
        self._generator = torch.Generator(device).manual_seed(0)
        width = heads * channels
        self._mixes = [[self._mix(width, quantiles) for quantiles in (KEYS, VALUES)] for _ in range(layers)]
        half = channels // 2
        self.angles = (1e6 ** (-torch.arange(half, device=device) / half)).float()
        self.axes = torch.arange(half, device=device) % 3

    def _mix(self, width: int, quantiles: list[float]) -> Tensor:
        known = torch.tensor(quantiles, device=self.device).log()
        place = torch.linspace(0, len(known) - 1, width, device=self.device)
        lower = place.long().clamp(max=len(known) - 2)
        deviation = torch.lerp(known[lower], known[lower + 1], place - lower).exp()
        basis, _ = torch.linalg.qr(torch.randn(width, width, device=self.device, generator=self._generator))
        return deviation[:, None] * basis / 8

    def kv(self, tokens: int) -> tuple[Tensor, Tensor]:
        """bfloat16 `[layer, 2, head, token, channel]`, and positions `[3, token]` on the CPU."""
        positions = torch.stack([torch.arange(tokens), torch.arange(tokens) // 30, torch.arange(tokens) % 30])
        angle = angles_of(positions.to(self.device), self.angles, self.axes)
        made = torch.empty(self.layers, 2, self.heads, tokens, self.channels, device=self.device)
        for layer, mixes in enumerate(self._mixes):
            for kind, mix in enumerate(mixes):
                shape = (2, tokens, len(mix))
                uniform = torch.rand(shape, device=self.device, generator=self._generator).clamp(1e-7)
                laplace = (uniform[0].log() - uniform[1].log()) / math.sqrt(2)
                x = (laplace @ mix).view(tokens, self.heads, -1).transpose(0, 1)
                made[layer, kind] = turned(x, angle.cos(), angle.sin()) if kind == 0 else x
        return made.to(torch.bfloat16), positions


def lay_out_by_component() -> None:
    """Have the kernels' module keep bases as `[K, N]`, seen as `[N, K]`."""
    tables_on = transform_kernels._tables_on

    @cache
    def laid_out(codec: TransformCodec, device: torch.device) -> transform_kernels._TablesOnDevice:
        found = tables_on(codec, device)
        groups = tuple(replace(group, basis=group.basis.T.contiguous().T) for group in found.groups)
        return replace(found, groups=groups)

    transform_kernels._tables_on = laid_out


def check(codec: TransformCodec, model: RandomModel, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Rows of what was compared; raises `SystemExit` where the kernels are wrong."""
    prefixes, device = [], model.device
    for tokens in lengths:
        kv, positions = model.kv(tokens)
        kv[:, :, :, -1] *= 40  # a token that the basis does not fit
        shape, bits = tuple(kv.shape), kv.cpu().view(torch.uint16).numpy()
        reference = codec.encode(bits, positions.numpy())
        data, size = transform_kernels.encode(codec, kv, positions)
        found = data[: int(size)].cpu().numpy()
        errors = [relative(codec.decode(one, shape), kv) for one in (reference, found)]
        differ = abs(len(found) - len(reference)) / len(reference)
        if abs(errors[1] - errors[0]) > 0.01 * errors[0] + 1e-6 or differ > 0.01:
            raise SystemExit(f"the GPU encodes {tokens} tokens with error {errors[1]}, the reference with {errors[0]}.")
        yield {"check": "encoded", "tokens": tokens, "error": errors[1], "reference": errors[0], "sizes differ": differ}
        lengths_of = {"prefix_len": tokens, "start_position": tokens, "rope_delta": 0}
        prefixes.append(EncodedPrefix(data=torch.from_numpy(reference), codec=codec, shape=shape, **lengths_of))  # type: ignore[arg-type]
    batch = pack(prefixes, device=device, dtype=torch.bfloat16)
    worst, alike, total = 0.0, 0, 0
    for layer in range(model.layers):
        rows = layers_of(batch, layer, decode(batch, layer))
        for place, prefix in enumerate(prefixes):
            expected = tensor_codec(codec).decode_layer(prefix.data, layer, prefix.shape).float()
            got = rows[place][:, :, : prefix.prefix_len].cpu().float()
            step = 2.0 ** (torch.floor(torch.log2(expected.abs().amax((1, 3), keepdim=True).clamp(min=1e-30))) - 7)
            worst = max(worst, float(((got - expected).abs() / step).max()))
            alike, total = alike + int((got == expected).sum()), total + got.numel()
    if not worst <= 1:
        raise SystemExit(f"the GPU decodes {worst} bfloat16 steps of a token's largest number beside the reference.")
    yield {"check": "decoded", "tokens": sum(lengths), "steps": worst, "alike": alike / total}
    broken = batch.data.clone()
    broken[:, 12 * max(lengths) :: 7] ^= 0x55
    decode(PackedPrefixes(**{**batch.__dict__, "data": broken}), 0)
    if device.type == "cuda":
        torch.cuda.synchronize()
        yield {"check": "captured", "same": captured_same(batch)}


def captured_same(batch: PackedPrefixes) -> bool:
    scratch = decode(batch, 0).clone()
    again, graph = torch.empty_like(scratch), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(batch, 0, again)
    again.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for place, count in enumerate(batch.lengths.tolist()):
        one, other = (layers_of(batch, 0, x)[place][:, :, :count] for x in (scratch, again))
        if not torch.equal(one, other):
            raise SystemExit("a captured graph decodes other bits.")
    return True


def layers_of(batch: PackedPrefixes, layer: int, scratch: Tensor) -> Tensor:
    """`[B, 2, head, longest, channel]` of a layer."""
    together = batch.layout.tensor_codec.layers_together
    decoded = scratch[:, : batch.layout.order_at(batch.longest, 0)].view(torch.bfloat16)
    return decoded.view(len(scratch), together, *batch.layout.shape(batch.longest)[1:])[:, layer % together]


def relative(bits: "np.ndarray[Any, Any]", kv: Tensor) -> float:
    back = torch.from_numpy(bits).view(torch.bfloat16).float()
    return float((back - kv.cpu().float()).norm() / kv.float().norm())


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median, by events where there are any."""
    work()
    times = []
    for _ in range(repeats):
        if device.type != "cuda":
            started = time.perf_counter()
            work()
            times.append((time.perf_counter() - started) * 1e3)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def speed(
    codec: TransformCodec, model: RandomModel, tokens: int, samples: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows of decoding a batch and encoding a sample; a layer after the other, as in a step."""
    kv, positions = model.kv(tokens)
    data = tensor_codec(codec).encode(kv, positions).cpu()  # type: ignore[call-arg]
    lengths: dict[str, Any] = {"prefix_len": tokens, "start_position": tokens, "rope_delta": 0}
    prefix = EncodedPrefix(data=data, codec=codec, shape=tuple(kv.shape), **lengths)
    batch = pack([prefix] * samples, device=model.device, dtype=torch.bfloat16)
    scratch = decode(batch, 0)
    together, size_gb = codec.calibrated.together, kv.numel() * 2 / 1e9
    common = {"tokens": tokens, "samples": samples, "bits": len(data) * 8 / kv.numel()}
    groups = range(0, model.layers, together)
    ms = milliseconds(lambda: [decode(batch, layer, scratch) for layer in groups], model.device, repeats)
    yield {"speed": "decode", **common, "ms": ms, "gb_s": samples * size_gb / ms * 1e3}
    on_device, group = transform_kernels._tables_on(codec, model.device), 0
    learnt, columns = on_device.groups[group], samples * tokens
    codes = torch.zeros(len(learnt.classes), columns, dtype=torch.float16, device=model.device)
    tables = codec.calibrated

    def streams() -> None:
        transform_kernels.decode_streams[triton.cdiv(tokens, transform_kernels._LANES), tables.parts, samples](
            codes, batch.data, batch.rows, batch.lengths, batch.data.stride(0), on_device.decoding, learnt.runs,
            on_device.shift, learnt.runs.shape[1], group, len(tables.groups), tables.layers, tokens, columns,
            PARTS=tables.parts, BLOCK=transform_kernels._LANES, num_warps=1,
        )  # fmt: skip

    part_gb = samples * size_gb * len(tables.layers_of(group)) / model.layers
    for name, work in (("streams", streams), ("product", lambda: codes.T @ learnt.basis.T)):
        ms = milliseconds(work, model.device, repeats)
        yield {"speed": f"of which {name}", **common, "ms": ms, "gb_s": part_gb / ms * 1e3, "kept": len(learnt.classes)}
    ms = milliseconds(lambda: transform_kernels.encode(codec, kv, positions), model.device, repeats)
    yield {"speed": "encode", **common, "samples": 1, "ms": ms, "gb_s": size_gb / ms * 1e3}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rate", type=float, nargs="+", default=[2.2, 3.2, 6.7])
    parser.add_argument("--checks", action="store_true", help="no speed")
    parser.add_argument("--by-component", action="store_true", help="bases laid out [K, N] on the device")
    options = parser.parse_args()
    if options.by_component:
        lay_out_by_component()
    cuda = torch.cuda.is_available()
    if not cuda and not (options.quick and os.environ.get("TRITON_INTERPRET")):
        raise SystemExit("this needs a CUDA device; with TRITON_INTERPRET=1 and --quick a CPU interprets the kernels.")
    device = torch.device("cuda" if cuda else "cpu")
    full = cuda and not options.quick
    model = RandomModel(4, 8, 128, device) if full else RandomModel(2, 2, 32, device)
    rows: list[dict[str, Any]] = []
    for rate in options.rate if full else options.rate[:1]:
        learnt = [KVSample(kv=kv, positions=p) for kv, p in (model.kv(2000 if full else 300) for _ in range(8))]
        started = time.perf_counter()
        codec = calibrate(
            learnt, rate=rate, angles=model.angles, axes=model.axes, device=device,
            group_channels=2048 if full else 128,
        )  # fmt: skip
        tables_mb = len(codec.calibrated.to_bytes()) / 1e6
        rows.append({"rate": rate, "learnt in s": time.perf_counter() - started, "tables MB": tables_mb})
        found = list(check(codec, model, [809, 300, 1] if full else [40, 33, 1]))
        sizes = ((809, 8), (3000, 8), (3000, 1)) if full else ((20, 2),)
        for tokens, samples in () if options.checks else sizes:
            found += speed(codec, model, tokens, samples, 7 if full else 1)
        layout = {"basis": "[K, N]"} if options.by_component else {}
        rows += [{"rate": rate, **layout, **row} for row in found]
        print(rows, flush=True)
    finish("transform", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


if __name__ == "__main__":
    main()

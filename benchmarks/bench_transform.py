"""The codec `transform` on a GPU: its kernels against the numpy reference, and how fast they are.

Keys and values are random, of the released geometry (8 heads of 128 channels, but few layers), with streams as long as
those of a small real language model (`full_size.RandomKV`); bases and tables are learnt from other random samples, at
`--rate`. First the checks, each of which ends the run where it fails: what the GPU
decodes of the reference's bytes is within a bfloat16 step of the largest number of the token; what it encodes, the
reference decodes with the same error and size; a captured graph decodes the same bits; damaged bytes are no fault. Then
the speed: GB are those of bfloat16 keys and values.

With `--quick` and TRITON_INTERPRET=1 a CPU interprets the kernels at a tiny size; those times mean nothing.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from benchmark_report import arguments, finish, hardware_name
from full_size import RandomKV
from torch import Tensor

from alpacache.prefix import transform_kernels
from alpacache.prefix.calibration import KVSample, calibrate
from alpacache.prefix.codecs import tensor_codec
from alpacache.prefix.layers_ahead import decode, decode_groups
from alpacache.prefix.packed import PackedPrefixes, pack
from alpacache.prefix.prefix import EncodedPrefix
from cache_store import TransformCodec


def check(codec: TransformCodec, model: RandomKV, lengths: list[int]) -> Iterator[dict[str, Any]]:
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
    yield {"check": "together", "same": together_same(batch)}
    broken = batch.data.clone()
    broken[:, 12 * max(lengths) :: 7] ^= 0x55
    decode(PackedPrefixes(**{**batch.__dict__, "data": broken}), 0)
    if device.type == "cuda":
        torch.cuda.synchronize()
        yield {"check": "captured", "same": captured_same(batch)}


def together_same(batch: PackedPrefixes) -> bool:
    """Streams of several groups that are read in one go give what each gives alone."""
    firsts = range(0, batch.layout.layers, batch.layout.tensor_codec.layers_together)
    alone = [decode(batch, layer) for layer in firsts]
    several = [torch.empty_like(one) for one in alone]
    decode_groups(batch, 0, several)
    for first, one, other in zip(firsts, alone, several, strict=True):
        for place, count in enumerate(batch.lengths.tolist()):
            a, b = (layers_of(batch, first, x)[place][:, :, :count] for x in (one, other))
            if not torch.equal(a, b):
                raise SystemExit("groups that are decoded together have other bits.")
    return True


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


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work` as a graph, as training runs it."""
    if device.type != "cuda":
        return work
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def speed(codec: TransformCodec, model: RandomKV, tokens: int, samples: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of decoding a batch, all layers as in a step, and encoding a sample."""
    kv, positions = model.kv(tokens)
    data = tensor_codec(codec).encode(kv, positions).cpu()  # type: ignore[call-arg]
    lengths: dict[str, Any] = {"prefix_len": tokens, "start_position": tokens, "rope_delta": 0}
    prefix = EncodedPrefix(data=data, codec=codec, shape=tuple(kv.shape), **lengths)
    batch = pack([prefix] * samples, device=model.device, dtype=torch.bfloat16)
    size_gb = kv.numel() * 2 / 1e9
    scratch = [decode(batch, layer) for layer in range(0, model.layers, codec.calibrated.together)]
    common = {"tokens": tokens, "samples": samples, "bits": len(data) * 8 / kv.numel()}
    ms = milliseconds(captured(lambda: decode_groups(batch, 0, scratch), model.device), model.device, repeats)
    yield {"speed": "decode", **common, "ms": ms, "gb_s": samples * size_gb / ms * 1e3}
    ms = milliseconds(lambda: transform_kernels.encode(codec, kv, positions), model.device, repeats)
    yield {"speed": "encode", **common, "samples": 1, "ms": ms, "gb_s": size_gb / ms * 1e3}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rate", type=float, nargs="+", default=[2.2, 3.2, 6.7])
    parser.add_argument("--checks", action="store_true", help="no speed")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not (options.quick and os.environ.get("TRITON_INTERPRET")):
        raise SystemExit("this needs a CUDA device; with TRITON_INTERPRET=1 and --quick a CPU interprets the kernels.")
    device = torch.device("cuda" if cuda else "cpu")
    full = cuda and not options.quick
    model = RandomKV(4, 8, 128, device) if full else RandomKV(2, 2, 32, device)
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
        rows += [{"rate": rate, **row} for row in found]
        print(rows, flush=True)
    finish("transform", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


if __name__ == "__main__":
    main()

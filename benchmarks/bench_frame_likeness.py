"""Four frames of a camera are nearly equal: would telling them by their differences take fewer bits?

Image tokens of the demo's VLM, on generated drives with frames 0.1 s apart, in the basis of the codec `transform` that
other drives gave. The components of a token in steps are rounded as the codec does it, once as they are and once less
what the token at the same place of the frame before tells of them: each component's best share of what that token
decodes to. `bits` and `bits_from_before` are the entropies of the codes, by component, in bits a value of image tokens
of the second frame on; `correlation` is that of components with the frame before, weighed by their variance. The first
frame of a camera, text and streams are the same either way.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_report import arguments, finish

from alpacache.alpamayo import Checkpoint
from alpacache.demo.story import make_demo_checkpoint
from alpacache.extraction.codec_learning import WholeSample, learn_from, read_store
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.extract import extract
from cache_store import CacheReader
from cache_store.kv.layered import from_bfloat16
from cache_store.kv.transform import ROUNDING, SIZES, TransformTables, turned, turns, value_sizes

FRAMES = 4


def components(tables: TransformTables, index: int, sample: WholeSample) -> "np.ndarray[Any, Any]":
    """Components in steps `[token, component]` of one group of layers."""
    group, layers = tables.groups[index], tables.layers_of(index)
    values = from_bfloat16(sample.kv[layers.start : layers.stop].view(torch.uint16).numpy())
    assert sample.positions is not None
    cos, sin = turns(tables, sample.positions.numpy().astype(np.int32))
    values[:, 0] = turned(values[:, 0], cos, -sin)
    values[:, 1] /= SIZES[value_sizes(values[:, 1])][:, None, :, None]
    flat = values.transpose(3, 0, 1, 2, 4).reshape(values.shape[3], -1)
    return ((flat - group.mean) / group.scale) @ group.basis.astype(np.float32)


def rounded(x: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    return np.sign(x) * np.floor(np.abs(x) + ROUNDING)


def entropy(codes: "np.ndarray[Any, Any]") -> float:
    """Bits of all columns together, each with its own distribution."""
    bits = 0.0
    for column in codes.T:
        _, counts = np.unique(column, return_counts=True)
        share = counts / counts.sum()
        bits -= float((share * np.log2(share)).sum())
    return bits


def measure(tables: TransformTables, samples: list[WholeSample], spans: list[tuple[int, int]]) -> dict[str, Any]:
    plain = before = values = 0.0
    products, squares = 0.0, 0.0
    for index, group in enumerate(tables.groups):
        now, ago = [], []
        for sample in samples:
            y = components(tables, index, sample)
            frames = [y[first:end] for first, end in spans]
            now += frames[1:]
            ago += [rounded(frame) for frame in frames[:-1]]
        y, told = np.concatenate(now), np.concatenate(ago)
        share = (y * told).sum(0) / np.maximum((told * told).sum(0), 1e-9)
        plain += entropy(rounded(y))
        before += entropy(rounded(y - share * told))
        values += len(group.mean)
        exact = np.concatenate(now)
        centred, others = exact - exact.mean(0), told - told.mean(0)
        products += float((centred * others).sum())
        squares += float(np.sqrt((centred**2).sum() * (others**2).sum()))
    return {"bits": plain / values, "bits_from_before": before / values, "correlation": products / squares}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rate", type=float, nargs="+", default=[2.2, 4.0])
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args()
    count, rows = 8 if options.quick else options.samples, []
    with tempfile.TemporaryDirectory() as folder:
        model, store = make_demo_checkpoint(Path(folder) / "model"), Path(folder) / "store"
        config = ExtractConfig(
            source=f"synthetic:{count}", model=str(model), store=str(store), frames=FRAMES, device="cpu",
            hidden_states="none",
        )  # fmt: skip
        extract(config)
        reader = CacheReader(store)
        samples = list(read_store(reader, reader.sample_ids))
        spans = [(int(a), int(b)) for a, b in reader.read(reader.sample_ids[0], ["image_spans"])["image_spans"]]
        half = len(samples) // 2
        learnt = learn_from(samples[:half], Checkpoint(str(model)), None, torch.device("cpu"))
        for rate in options.rate:
            found = measure(learnt.codec(rate).calibrated, samples[half:], spans)
            rows.append({"rate": rate, "frames": FRAMES, "samples": len(samples) - half, **found})
    finish("frame_likeness", rows, options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

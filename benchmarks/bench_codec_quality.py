"""Does a coarser cache train a worse expert? The demo's training on keys and values that a codec has been over.

The demo's drives are extracted once in bfloat16. For each codec both stores, training and validation, are written again
with keys and values encoded and decoded, so that every run trains on and is judged by what a user of that codec has;
bfloat16 holds exactly what is decoded, so that only the bytes differ from a store of the codec. Each is trained from
several seeds, and judged by the slope of the predicted heading change at 6.4 s against the true one (1 is unbiased, 0
always straight) and minADE in metres, as `eval` has them. `bits` are bits a value of the validation samples, which no
codec is learnt from; a model as small as the demo's spends 0.4 of them on streams and positions, a released one 0.07.

`--folder` keeps stores and runs: the same command goes on where it was stopped.
"""

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_report import arguments, finish

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.demo.story import DemoSize, extract_config, make_demo_checkpoint, train_config
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.codec_learning import learn_from, read_store
from alpacache.prefix.codecs import tensor_codec
from cache_store import CacheReader, CacheWriter, KVCodec, TransformCodec, codec_named

CODECS = ("bf16", "int8", "int4", "transform:4", "transform:3", "transform:2", "transform:1.5")
LEARNT = 32


def codec_of(name: str, store: Path, checkpoint: Checkpoint) -> KVCodec | None:
    """The codec of this name; tables are learnt from samples spread over the training store."""
    codec = codec_named(name)
    if not isinstance(codec, TransformCodec):
        return codec
    reader = CacheReader(store)
    spread = reader.sample_ids[:: max(1, len(reader) // LEARNT)][:LEARNT]
    return learn_from(list(read_store(reader, spread)), checkpoint, None, torch.device("cpu")).codec(codec.rate)


def rewrite(source: Path, target: Path, codec: KVCodec | None) -> float:
    """The store again with what the codec leaves of keys and values; bits a value."""
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    reader, sizes, values = CacheReader(source), 0, 0
    with CacheWriter(partial, fields=list(reader.fields.values()), identity=reader.identity) as writer:
        for whole in read_store(reader, reader.sample_ids):
            arrays = dict(reader.read(whole.sample_id, list(reader.fields_of(whole.sample_id))))
            values += whole.kv.numel()
            if codec is None:
                sizes += 2 * whole.kv.numel()
            else:
                assert whole.positions is not None
                data, size = tensor_codec(codec).encode_at(whole.kv, whole.positions)
                if isinstance(codec, TransformCodec):
                    data = data[: int(size)]
                sizes += data.numel()
                back = tensor_codec(codec).decode(data, tuple(whole.kv.shape))
                arrays["kv"] = back.contiguous().view(torch.uint16).numpy()
            writer.write(whole.sample_id, arrays)
    partial.rename(target)
    return sizes * 8 / values


def measure(name: str, folder: Path, model: str, size: DemoSize, seeds: Sequence[int]) -> dict[str, Any]:
    """A row: stores, runs and evaluation of one codec."""
    home = folder / name.replace(":", "-")
    found = home / "row.json"
    if found.exists():
        return dict(json.loads(found.read_text()))
    home.mkdir(exist_ok=True)
    codec, bits = codec_of(name, folder / "train", Checkpoint(model)), 0.0
    for side in ("train", "val"):
        if not (home / side).exists():
            bits = rewrite(folder / side, home / side, codec)
            (home / f"{side}.json").write_text(json.dumps(bits))
    bits = json.loads((home / "val.json").read_text())
    for seed in seeds:
        run = home / f"run-{seed}"
        if not (home / f"run-{seed}.done").exists():
            shutil.rmtree(run, ignore_errors=True)
            alpacache.train(train_config((home / "train",), model, run, size=size, seed=seed))
            (home / f"run-{seed}.done").touch()
        print(name, "seed", seed, "is trained", flush=True)
    first, *others = seeds
    judging = EvalConfig(
        store=(str(home / "val"),),
        model=model,
        out=str(home / "report"),
        checkpoint=str(home / f"run-{first}"),
        compare={f"seed {seed}": str(home / f"run-{seed}") for seed in others},
        batch_size=16,
        device="cpu",
    )
    report = alpacache.evaluate(judging)
    everything = report.summary.strata["all"]
    labels = [label for label in report.summary.models if label != "base"]
    slopes = [one.slope for label in labels if (one := everything.bias[label]["heading"][6.4]) is not None]
    errors = [everything.metrics[label]["min_ade"] for label in labels]
    row: dict[str, Any] = {"codec": name, "bits": bits}
    for kind, values in (("slope", slopes), ("min_ade_m", errors)):
        row |= {kind: statistics.mean(values), f"{kind}_of_seeds": [round(value, 4) for value in values]}
        row[f"{kind}_sd"] = statistics.stdev(values) if len(values) > 1 else math.nan
    found.write_text(json.dumps(row))
    print(row, flush=True)
    return row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="stores and runs, kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=500)
    options = parser.parse_args()
    size = DemoSize(steps=options.steps, train_samples=options.samples, batch_size=16, draws=4)
    if options.quick:
        size = DemoSize(train_samples=48, val_samples=12, steps=24, batch_size=4)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "Demo-R1"
    if not model.exists():
        make_demo_checkpoint(model)
    clips = max(round(1.3 * size.train_samples), 13 * size.val_samples)
    for split, samples in (("train", size.train_samples), ("val", size.val_samples)):
        split_: Any = split
        alpacache.extract(
            extract_config(f"synthetic:{clips}", str(model), folder / split, split=split_, samples=samples)
        )
    rows = [measure(name, folder, str(model), size, options.seeds) for name in options.codecs]
    finish("codec_quality", rows, options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    np.seterr(all="raise")
    main()

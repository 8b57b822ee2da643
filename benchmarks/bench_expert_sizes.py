"""Experts of one's own size: bias slope and minADE against the layers that they attend to and their width.

The demo's tiny VLM (4 layers) and generated drives, on a CPU. Each new expert is trained from random weights, three
seeds each, from one full store, and judged on held-out drives beside the demo's own expert, which drives straight on.
The slope is of the predicted on the driven heading change after 6.4 s: 1 is unbiased, 0 always straight.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmark_report import Row, arguments, finish
from safetensors.torch import load_file

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.demo.story import DemoSize, eval_config, extract_config, make_demo_checkpoint, train_config
from alpacache.driving.sample import FUTURE_S
from alpacache.evaluation.evaluate import evaluate
from alpacache.evaluation.summary import EvalSummary
from alpacache.extraction.extract import extract
from alpacache.inference import BASE
from alpacache.planning.workload import expert_sizes
from alpacache.training.train import train

MAPS = ((3,), (1, 3), (0, 1, 2, 3))
"""The VLM's layers that the experts' layers attend to."""
WIDTHS = (32, 96)
SEEDS = (0, 1, 2)
CLIPS = 2000
"""Generated drives, a tenth of which are held out."""


def measure(out: Path, *, size: DemoSize, maps: tuple[tuple[int, ...], ...], widths: tuple[int, ...]) -> list[Row]:
    """Train and judge all experts in a directory; what lies there from a call before is used again."""
    model = out / "Demo-R1"
    if not model.exists():
        make_demo_checkpoint(model)
    for split, samples in (("train", size.train_samples), ("val", size.val_samples)):
        extract(extract_config(f"synthetic:{CLIPS}", str(model), out / split, split=split, samples=samples))
    runs = {}
    for layer_map in maps:
        for width in widths:
            for seed in SEEDS:
                name = f"{'-'.join(map(str, layer_map))} x {width}, seed {seed}"
                runs[name] = str(out / "runs" / name.replace(" ", ""))
                config = train_config((out / "train",), str(model), Path(runs[name]), size=size, seed=seed)
                new = {"from_scratch": True, "expert_map": layer_map, "expert_width": width}
                train(replace(config, **new, resume=True, track="none"))
    judging = replace(eval_config(out / "val", str(model), out / "report", run=out), checkpoint=None, compare=runs)
    summary = evaluate(judging).summary
    own = expert_sizes(Checkpoint(str(model)).shapes(*EXPERT_PARTS), "all", 1)["parameters"]
    first = {"layers": "the model's own: 0, 1, 2, 3", "width": 96, "parameters": own}
    rows: list[Row] = [first | _numbers(summary, [BASE])]
    for layer_map in maps:
        for width in widths:
            names = [f"{'-'.join(map(str, layer_map))} x {width}, seed {seed}" for seed in SEEDS]
            tensors = load_file(Path(runs[names[0]]) / "last" / "model.safetensors")
            sizes = {"parameters": sum(tensor.numel() for tensor in tensors.values())}
            rows.append({"layers": ", ".join(map(str, layer_map)), "width": width} | sizes | _numbers(summary, names))
    return rows


def _numbers(summary: EvalSummary, labels: list[str]) -> dict[str, str]:
    """Mean over seeds, and the least and the largest."""
    stratum = summary.strata["all"]
    fits = [stratum.bias[label]["heading"][FUTURE_S] for label in labels]
    slopes = [float("nan") if fit is None else fit.slope for fit in fits]
    errors = [stratum.metrics[label]["min_ade"] for label in labels]
    return {"slope": _spread(slopes), "minADE, m": _spread(errors)}


def _spread(values: list[float]) -> str:
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="directory to keep model, stores and runs in")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    size = DemoSize(train_samples=240, val_samples=80, steps=options.steps, batch_size=8, draws=2)
    maps, widths = MAPS, WIDTHS
    if options.quick:
        size, maps, widths = DemoSize(train_samples=8, val_samples=8, steps=25, batch_size=4, draws=1), ((1, 3),), (32,)
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(options.work or Path(temporary), size=size, maps=maps, widths=widths)
    finish("expert_sizes", rows, options)


if __name__ == "__main__":
    main()

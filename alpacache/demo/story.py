"""The whole way on a CPU, offline, in minutes: a biased expert, cached features, retraining, and the bias gone.

Every file format and every stage is the real one; only the model is tiny. Its VLM was trained on generated drives, its
expert on straight drives alone, with the pictures of others, so that it drives straight on and hardly looks, as the
released one does with one camera. The weights of both are shipped; `benchmarks/demo_weights/` in the repository makes
them. Retraining takes drives of all shapes, and cars that have strayed and return: whoever learns from cars in the
middle of their lane alone never sees how to come back to it, and in the closed loop small errors add up.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driver.closed_loop import LoopSummary, drive_roads, loop_roads, summarise
from alpacache.driver.driver import load_driver
from alpacache.driver.loop_film import telling, write_loop_film
from alpacache.driver.loop_page import Beside, add_to_report, write_loop_page
from alpacache.driving.sample import FUTURE_S
from alpacache.durable import check_out
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.evaluate import EvalReport, evaluate
from alpacache.evaluation.summary import EvalSummary
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.extract import extract
from alpacache.inference import BASE, TRAINED
from alpacache.metrics.bootstrap import range_text
from alpacache.progress import OnProgress, Progress
from alpacache.training.config import TrainConfig
from alpacache.training.run_log import TrainReport
from alpacache.training.train import train

WEIGHTS = "demo_model.safetensors"
LOOP_PATHS, LOOP_FLOW_STEPS = 3, 5
"""Closed loop: the car follows the mean of so many paths, of so few flow steps each."""
_ERRORS = {"min_ade": "minADE", "ade": "ADE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSize:
    """Numbers of samples and steps; the tests run the same story shortened."""

    train_samples: int = 500
    recoveries: int = 2000
    """Samples for training of cars that have strayed and go back to the middle of their lane."""
    val_samples: int = 120
    steps: int = 600
    batch_size: int = 32
    draws: int = 1
    lr: float = 3e-3
    roads: int = 40
    """Roads of the closed loop; 0 leaves it out."""
    played: int = 6
    """Roads that the page of the closed loop plays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The model's directory, the reports of training and evaluation, and how both models drove."""

    model: str
    run: TrainReport
    evaluation: EvalReport
    loop: Mapping[str, LoopSummary]
    """Summary by label; empty without a closed loop."""

    @property
    def open_loop(self) -> dict[str, dict[str, str]]:
        """Label -> the evaluation of the same model in a few words, to stand beside the closed loop."""
        return open_loop(self.evaluation.summary)


Stage = Callable[[str, str], AbstractContextManager[OnProgress]]
"""Context manager around each stage: `(title, the command that does the same) -> progress listener`."""


def run_demo(out: Path | str, *, seed: int = 0, size: DemoSize | None = None, stage: Stage) -> DemoReport:
    """Make the model, extract, train, evaluate, and let both models drive; `out` must be new or empty."""
    out, size = Path(out), size or DemoSize()
    check_out(out)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; choose another --out or remove it.")
    out.mkdir(parents=True, exist_ok=True)
    model = str(make_demo_checkpoint(out / "Demo-R1"))
    clips = max(round(1.3 * size.train_samples), 13 * size.val_samples)  # a tenth of them is validation
    drives, returns = f"synthetic:{clips}", f"synthetic:{size.recoveries}:recovery"
    parts: dict[str, tuple[str, Literal["train", "val", "all"], int]] = {
        "train": (drives, "train", size.train_samples),
        "recoveries": (returns, "all", size.recoveries),
        "val": (drives, "val", size.val_samples),
    }
    for name, (source, split, samples) in parts.items():
        config = extract_config(source, model, out / name, split=split, samples=samples)
        command = f"alpacache extract {source} --split {split} --samples {samples} --store {out}/{name} ..."
        with stage(f"extract {name}", command) as on_progress:
            extract(config, on_progress=on_progress)
    settings = train_config((out / "train", out / "recoveries"), model, out / "run", size=size, seed=seed)
    stores = " ".join(f"--store {store}" for store in settings.stores)
    with stage("train", f"alpacache train {stores} --steps {size.steps} ...") as on_progress:
        trained = train(settings, on_progress=on_progress)
    judging = eval_config(out / "val", model, out / "report", run=out / "run", seed=seed)
    with stage(
        "eval", f"alpacache eval --store {out}/val --checkpoint {out}/run --control shuffled ..."
    ) as on_progress:
        report = evaluate(judging, on_progress=on_progress)
    loop: dict[str, LoopSummary] = {}
    if size.roads:
        with stage(f"drive {size.roads} roads", "python: alpacache.driver.closed_loop.drive_roads(...)") as on_progress:
            page, beside = out / "report/closed_loop.html", open_loop(report.summary)
            loop = closed_loop(model, out / "run", page, beside=beside, size=size, on_progress=on_progress)
    return DemoReport(model=model, run=trained, evaluation=report, loop=loop)


def open_loop(summary: EvalSummary) -> dict[str, dict[str, str]]:
    """Label -> minADE, ADE and share of the turn over all samples."""
    stratum = summary.strata["all"]
    told: dict[str, dict[str, str]] = {}
    for label in summary.models:
        slope = stratum.bias[label]["heading"][FUTURE_S]
        turn = "-" if slope is None else f"{slope.slope:.2f} {range_text(slope.low, slope.high, '.2f')}".rstrip()
        errors = {f"open loop: {name} m": f"{stratum.metrics[label][key]:.2f}" for key, name in _ERRORS.items()}
        told[label] = errors | {"turn taken": turn}
    return told


def closed_loop(
    model: str, run: Path, page: Path, *, beside: Beside, size: DemoSize, on_progress: OnProgress
) -> dict[str, LoopSummary]:
    """Both models drive the same roads themselves: by label how well. The report and a page play some, a film one."""
    trained, roads = load_driver(model, str(run), device="cpu"), loop_roads(size.roads)
    drivers, driven, started = {BASE: trained.alongside(None), TRAINED: trained}, {}, time.monotonic()
    for number, (label, driver) in enumerate(drivers.items()):

        def tell(done: int, total: int, label: str = label, before: int = number) -> None:
            done, total = done + before * total, len(drivers) * total
            rate = done / (time.monotonic() - started)
            on_progress(Progress(done=done, total=total, unit="steps", rate=rate, notes={"model": label}))

        given: dict[str, Any] = {"paths": LOOP_PATHS, "follow": "mean", "flow_steps": LOOP_FLOW_STEPS}
        driven[label] = drive_roads(driver, roads, pictures=size.played, on_step=tell, **given)
    loop = {label: summarise(drives, before=driven[BASE]) for label, drives in driven.items()}
    about = f"{size.roads} generated roads: straight, bends, S. Each model sees what its own driving leads to."
    write_loop_page(page, driven, loop, about=about, beside=beside)
    add_to_report(page.with_name("report.html"), page)
    best = telling(driven)
    write_loop_film(page.with_suffix(".webp"), {label: drives[best] for label, drives in driven.items()})
    return loop


def extract_config(
    source: str, model: str, store: Path, *, split: Literal["train", "val", "all"] = "all", samples: int | None = None
) -> ExtractConfig:
    """Stage one of the demo: one front image a sample."""
    return ExtractConfig(
        source=source,
        model=model,
        store=str(store),
        split=split,
        samples=samples,
        frames=1,
        hidden_states="none",
        device="cpu",
    )


def train_config(stores: Sequence[Path], model: str, run: Path, *, size: DemoSize, seed: int = 0) -> TrainConfig:
    """Stage two of the demo."""
    return TrainConfig(
        stores=tuple(map(str, stores)),
        model=model,
        out=str(run),
        steps=size.steps,
        batch_size=size.batch_size,
        draws=size.draws,
        lr=size.lr,
        warmup=20,
        seed=seed,
        save_every=size.steps,
        in_memory=True,
        device="cpu",
    )


def eval_config(store: Path, model: str, out: Path, *, run: Path, seed: int = 0) -> EvalConfig:
    """Before against after, on held-out clips, and with the pictures of others: does it look?"""
    return EvalConfig(
        store=(str(store),),
        model=model,
        out=str(out),
        checkpoint=str(run),
        control=("shuffled",),
        batch_size=16,
        seed=seed,
        device="cpu",
    )


def make_demo_checkpoint(directory: Path) -> Path:
    """Write the tiny checkpoint with the shipped weights in place of its random ones."""
    make_tiny_checkpoint(directory, seed=0, shards=1)
    with as_file(files("alpacache.demo") / WEIGHTS) as shipped:
        overlay(directory, load_file(shipped))
    return directory


def overlay(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace tensors of a single-shard tiny checkpoint. Raises `UsageError` for names or shapes it does not have."""
    (shard,) = set(Checkpoint(str(directory)).names.values())
    state = load_file(directory / shard)
    wrong = [name for name, tensor in tensors.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise UsageError(f"the demo weights do not fit the tiny checkpoint: {', '.join(sorted(wrong)[:5])}.")
    save_file(state | dict(tensors), directory / shard, {"format": "pt"})

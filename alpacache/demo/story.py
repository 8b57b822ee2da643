"""The whole story on a CPU, offline, in minutes: a biased expert, cached features, retraining, and the bias gone.

What is real: every file format and every stage, as at full size. What is tiny: the model. Its VLM was trained on
generated drives (`alpacache.demo.pretrain`), its expert on straight drives alone, so that it drives
straight, as the real one does with one camera. Both are shipped in the package; `python -m alpacache.demo.ship` makes
them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driving.sample import Sample, SampleRef
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.evaluate import EvalReport, evaluate
from alpacache.extraction.config import ExtractConfig
from alpacache.extraction.extract import extract
from alpacache.progress import OnProgress
from alpacache.sources.synthetic import SyntheticSource
from alpacache.training.config import TrainConfig
from alpacache.training.train import TrainReport, train

WEIGHTS = "demo_model.safetensors"
MODEL_NAME = "Demo-R1"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSize:
    """How much of everything; the tests run the same story shortened."""

    train_samples: int = 500
    val_samples: int = 120
    steps: int = 300
    batch_size: int = 16
    draws: int = 4
    lr: float = 3e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Where everything lies, and what was found."""

    model: str
    run: TrainReport
    evaluation: EvalReport


Stage = Callable[[str, str], AbstractContextManager[OnProgress]]
"""`(title, the command that does the same) -> progress listener` around each stage."""


def run_demo(out: Path | str, *, seed: int = 0, size: DemoSize | None = None, stage: Stage) -> DemoReport:
    """Make the model, extract, train, evaluate. `out` must be new or empty."""
    out, size = Path(out), size or DemoSize()
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; choose another --out or remove it.")
    out.mkdir(parents=True, exist_ok=True)
    model = str(make_demo_checkpoint(out / MODEL_NAME))
    for split, samples in (("train", size.train_samples), ("val", size.val_samples)):
        config = extraction(f"synthetic:{_clips(size)}", model, out / split, split=split, samples=samples)
        with stage(
            f"extract {split}", f"alpacache extract {config.source} --split {split} --samples {samples} ..."
        ) as on_progress:
            extract(config, on_progress=on_progress)
    settings = training(out / "train", model, out / "run", size=size, seed=seed)
    with stage("train", f"alpacache train --store {out}/train --steps {size.steps} ...") as on_progress:
        trained = train(settings, on_progress=on_progress)
    judging = evaluation(out / "val", model, out / "report", run=out / "run", seed=seed)
    with stage("eval", f"alpacache eval --store {out}/val --checkpoint {out}/run ...") as on_progress:
        report = evaluate(judging, on_progress=on_progress)
    return DemoReport(model=model, run=trained, evaluation=report)


def extraction(
    source: str, model: str, store: Path, *, split: str = "all", samples: int | None = None
) -> ExtractConfig:
    """Stage one of the demo: one front image a sample."""
    return ExtractConfig(
        source=source,
        model=model,
        store=str(store),
        split=split,  # type: ignore[arg-type]
        samples=samples,
        frames=1,
        hidden_states="none",
        device="cpu",
    )


def training(store: Path, model: str, run: Path, *, size: DemoSize, seed: int = 0) -> TrainConfig:
    """Stage two of the demo."""
    return TrainConfig(
        stores=(str(store),),
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


def evaluation(store: Path, model: str, out: Path, *, run: Path, seed: int = 0) -> EvalConfig:
    """Before against after, on held-out clips."""
    return EvalConfig(
        store=str(store), model=model, out=str(out), checkpoint=str(run), batch_size=16, seed=seed, device="cpu"
    )


def make_demo_checkpoint(directory: Path) -> Path:
    """The tiny checkpoint with the shipped weights in the place of its random ones."""
    make_tiny_checkpoint(directory, seed=0, shards=1)
    with as_file(files("alpacache.demo") / WEIGHTS) as shipped:
        overlay(directory, load_file(shipped))
    return directory


def overlay(directory: Path, tensors: Mapping[str, object]) -> None:
    """Replace tensors of a single-shard tiny checkpoint; names and shapes must be its own."""
    (shard,) = set(Checkpoint(str(directory)).names.values())
    state = load_file(directory / shard)
    wrong = [
        name
        for name, tensor in tensors.items()
        if name not in state or state[name].shape != getattr(tensor, "shape", None)
    ]
    if wrong:
        raise UsageError(f"the demo weights do not fit the tiny checkpoint: {', '.join(sorted(wrong)[:5])}.")
    save_file({**state, **tensors}, directory / shard, {"format": "pt"})  # type: ignore[dict-item]


class ShuffledImages(SyntheticSource):
    """Drives whose pictures belong to other clips: the control that shows it is the picture that teaches."""

    def load(self, ref: SampleRef, *, cameras: Sequence[str], frames: int) -> Sample:
        """The sample's own poses, another clip's frames."""
        from dataclasses import replace

        own = super().load(ref, cameras=cameras, frames=frames)
        order = np.random.default_rng(self.seed + 1).permutation(len(self.clip_ids))
        other = self.clip_ids[order[self.clip_ids.index(ref.clip_id)]]
        stranger = super().load(SampleRef(clip_id=other, t0_us=ref.t0_us), cameras=cameras, frames=frames)
        return replace(own, frames=stranger.frames)


def _clips(size: DemoSize) -> int:
    """Enough clips for both splits, a tenth of which is validation."""
    return max(round(1.3 * size.train_samples), 13 * size.val_samples)

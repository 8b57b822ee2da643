"""The demo's claim, shortened and in full: biased before, not after, and it is the picture that teaches.

Judged on held-out drives that are straight throughout their history and curve after t0, where only the image knows.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from alpacache.demo.story import (
    DemoSize,
    eval_config,
    extract_config,
    make_demo_checkpoint,
    run_demo,
    train_config,
)
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import SampleRef
from alpacache.driving.strata import LATE_CURVE
from alpacache.evaluation.evaluate import evaluate
from alpacache.extraction.extract import extract
from alpacache.progress import ignore
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource
from alpacache.training.train import train

SHORT = DemoSize(train_samples=300, recoveries=300, val_samples=60, steps=150, roads=6, played=1)


class ShuffledImages(SyntheticSource):
    """Drives whose pictures belong to other clips: the control that shows it is the picture that teaches."""

    def load(self, ref, *, cameras, frames):
        """The sample's own poses, another clip's frames."""
        own = super().load(ref, cameras=cameras, frames=frames)
        order = np.random.default_rng(self.seed + 1).permutation(len(self.clip_ids))
        other = self.clip_ids[order[self.clip_ids.index(ref.clip_id)]]
        stranger = super().load(SampleRef(clip_id=other, t0_us=ref.t0_us), cameras=cameras, frames=frames)
        return replace(own, frames=stranger.frames)


@contextmanager
def silent(title, command):
    yield ignore


def slope(summary, label):
    return summary.strata[LATE_CURVE].bias[label]["heading"][6.4].slope


def judge(summary, *, least):
    late = summary.strata[LATE_CURVE]
    assert late.samples >= least
    assert slope(summary, "base") < 0.3
    assert slope(summary, "trained") > 0.7
    assert slope(summary, "constant turn rate") < 0.3
    looks = {label: by_control["shuffled"] for label, by_control in summary.controls["all"].items()}
    assert looks["trained"].answer == "looks"
    verdicts = {label: verdict.answer for label, verdict in summary.strata["all"].verdicts.items()}
    assert verdicts["base"] == "biased"
    assert verdicts["trained"] not in ("biased", "bimodal", "overshoots")
    return verdicts, {label: told.rise.estimate for label, told in looks.items()}


def shuffled_slope(out):
    """Train on the same drives with pictures of other clips, judge on the same held-out drives."""
    size = DemoSize()
    model = str(make_demo_checkpoint(out / "Demo-R1"))
    source = ShuffledImages(size.train_samples)
    refs, _ = select(source)
    prepare(source, refs, out / "shuffled", cameras=[CAMERAS[1]], frames=1)
    extract(extract_config(str(out / "shuffled"), model, out / "train"))
    extract(
        extract_config(f"synthetic:{13 * size.val_samples}", model, out / "val", split="val", samples=size.val_samples)
    )
    train(train_config((out / "train",), model, out / "run", size=size))
    summary = evaluate(eval_config(out / "val", model, out / "report", run=out / "run")).summary
    return slope(summary, "trained")


@pytest.mark.ci
def test_the_story_shortened(tmp_path):
    report = run_demo(tmp_path / "demo", size=SHORT, stage=silent)
    _, rises = judge(report.evaluation.summary, least=12)
    assert rises["base"] < 0.05 < 0.5 < rises["trained"]
    assert (tmp_path / "demo/report/report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_full_story(tmp_path):
    report = run_demo(tmp_path / "demo", stage=silent)
    verdicts, rises = judge(report.evaluation.summary, least=40)
    assert verdicts["trained"] == "takes the turn"
    assert rises["base"] < 0.05  # 0.00 [-0.01, 0.01], measured
    assert rises["trained"] > 1.0  # 3.81 [3.06, 4.58]
    looks = report.evaluation.summary.controls["all"]["base"]["shuffled"]
    assert looks.answer == "hardly looks"
    assert report.loop["base"].kept.estimate < 0.3  # 0.10 [0.00, 0.22], measured
    assert report.loop["base"].finished.estimate < 0.4  # 0.17 [0.07, 0.31]
    assert report.loop["trained"].more_kept.low > 0.4  # 0.78 [0.65, 0.91]
    assert report.loop["trained"].more_finished.low > 0.4  # 0.82 [0.71, 0.95]
    assert (tmp_path / "demo/report/closed_loop.webp").stat().st_size < 2_000_000


@pytest.mark.slow
def test_shuffled_pictures_teach_nothing(tmp_path):
    assert shuffled_slope(tmp_path) < 0.3

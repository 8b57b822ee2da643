"""The verdict on planted models: exact, biased, uncertain, bimodal, overshooting, or judged on too few clips."""

import numpy as np
import pytest

from alpacache.evaluation.bias_verdict import judge_bias
from alpacache.metrics.bias import fit_slope
from alpacache.metrics.corridor import leaving, summarise_corridor

SPREAD_RAD = 0.4
METRES_A_RAD = 30.0


def planted(kind, *, clips=150, paths=6, seed=0):
    """Driven heading changes `[N]` and those of K paths `[N, K]`."""
    rng = np.random.default_rng(seed)
    truth = SPREAD_RAD * rng.normal(size=clips)
    small = 0.02 * rng.normal(size=(clips, paths))
    if kind == "exact":
        return truth, truth[:, None] + small
    if kind == "half":
        return truth, 0.5 * truth[:, None] + small
    if kind == "straight":
        return truth, small
    if kind == "overshooting":
        return truth, 1.4 * truth[:, None] + small
    if kind == "mirrored":
        return truth, -0.8 * truth[:, None] + small
    if kind in ("guessing", "straight where few bend"):  # draws from all roads, of which few bend, or from none
        spread = SPREAD_RAD * (rng.random((clips, 1 + paths)) < 0.2) + 0.02
        drawn = spread * rng.normal(size=spread.shape)
        return drawn[:, 0], drawn[:, 1:] if kind == "guessing" else small
    if kind == "turns or drives on":
        return truth, (rng.random((clips, paths)) < 0.5) * truth[:, None] + small
    if kind == "left or right":
        sides = np.array([-SPREAD_RAD, SPREAD_RAD])
        return rng.choice(sides, clips) + small[:, 0], rng.choice(sides, (clips, paths)) + small
    known = float(kind.removeprefix("knows "))
    seen = SPREAD_RAD * np.sqrt(known) * rng.normal(size=clips)
    unseen = SPREAD_RAD * np.sqrt(1 - known)
    return seen + unseen * rng.normal(size=clips), seen[:, None] + unseen * rng.normal(size=(clips, paths))


def ending(heading_rad):
    """Paths `[..., 64, 3]` whose lateral offset at 6.4 s goes with the heading change."""
    heading = np.asarray(heading_rad)[..., None]
    lateral = METRES_A_RAD * heading * np.linspace(0, 1, 64)
    return np.stack([np.zeros_like(lateral), lateral, np.zeros_like(lateral)], axis=-1)


def verdict(truth, paths):
    noise = None if paths.shape[1] == 1 else paths.var(axis=1, ddof=1) / paths.shape[1]
    slope = fit_slope(truth, paths.mean(axis=1), noise=noise)
    ends = [leaving(ending(each), ending(driven)) for driven, each in zip(truth, paths, strict=True)]
    return judge_bias(slope, summarise_corridor(ends, [str(index) for index in range(len(truth))]))


@pytest.mark.parametrize(
    ("kind", "answer", "words"),
    [
        ("exact", "takes the turn", "means what it predicts"),
        ("half", "biased", "and knows more than it takes"),
        ("straight", "biased", "none to speak of"),
        ("knows 0.6", "uncertain", "as much as it knows"),
        ("knows 0.95", "takes the turn", "means what it predicts"),
        ("turns or drives on", "bimodal", "its paths fall into two bundles"),
        ("left or right", "bimodal", "its paths fall into two bundles"),
        ("overshooting", "overshoots", "more than it knows of"),
        ("mirrored", "turns the other way", "its left is the road's right"),
        ("guessing", "uncertain", "as often as the road does, but elsewhere"),
        ("straight where few bend", "biased", "none to speak of"),
    ],
)
def test_the_right_word_for_each(kind, answer, words):
    for seed in range(3):
        found = verdict(*planted(kind, clips=600 if kind == "guessing" else 150, seed=seed))
        assert found.answer == answer, found
        assert words in found.sentence


def test_a_model_that_cannot_know_everything_is_never_called_biased():
    answers = [
        verdict(*planted(f"knows {known}", clips=60, seed=seed)).answer for known in (0.3, 0.6) for seed in range(20)
    ]
    assert {"biased", "bimodal"}.isdisjoint(answers)


def test_what_is_missing_is_said():
    truth, paths = planted("half", clips=9)
    assert verdict(truth, paths).sentence.endswith(" of the turn; 9 clips give no interval, 10 may")
    truth, paths = planted("half", clips=40)
    truth[0], paths[0] = 1.0, 0.5
    truth[1:], paths[1:] = 0.01 * truth[1:], 0.01 * paths[1:]
    assert "weigh as much as 1.1 equal ones, which give no interval; 5 would" in verdict(truth, paths).sentence
    assert "one path a sample" in verdict(*planted("exact", paths=1)).sentence
    truth, paths = planted("turns or drives on", paths=3)
    found = verdict(truth, paths)
    assert (found.answer, "whether its paths fall into two bundles is open" in found.sentence) == ("cannot tell", True)
    few = verdict(*planted("knows 0.6", clips=14, seed=1))
    assert few.answer == "cannot tell"
    assert verdict(np.zeros(30), paths[:30]).answer == "cannot tell"

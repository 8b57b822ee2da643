"""Brain or hands, from store to verdict: what is planted is said to be there, what is shuffled is not."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import alpacache
from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.cached_samples.features import from_bf16_bits
from alpacache.driving.strata import LATE_CURVE, classify
from alpacache.errors import DataError, UsageError
from alpacache.evaluation import probe_features
from alpacache.evaluation.config import ProbeConfig
from alpacache.evaluation.probe import (
    ALL,
    SHUFFLED,
    TOGETHER,
    probe_data,
)
from alpacache.evaluation.probe_features import (
    CURVATURE,
    HEADING,
    LEAST_PATH_M,
    SKETCH,
    SPEED,
    TARGETS,
    ProbeData,
    choose_samples,
    future_targets,
    history_features,
    read_probe_data,
)
from alpacache.evaluation.probe_verdict import Cell, judge_target
from alpacache.extraction.config import ExtractConfig
from alpacache.metrics.bootstrap import Interval
from cache_store import CacheReader, SampleReadError

pytestmark = pytest.mark.system  # whole probes

N = 450
DENIED = {"not there", "too few samples"}
"""A planted product of two components is just found among so many samples, or just not."""


def planted(seed=0):
    """450 samples of 225 clips; features hold the first two targets, half of the samples are late curves."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(N, 4))
    history = rng.normal(size=(N, 62))
    features = hidden @ rng.normal(size=(4, 300)) + rng.normal(size=(N, 300))
    late = np.arange(N) % 2 == 0
    history[late, 0] = 0
    targets = np.stack([hidden[:, 0] + history[:, 0], hidden[:, 0] * hidden[:, 1], rng.normal(size=N)], axis=-1)
    clips = [f"clip-{index // 2}" for index in range(N)]
    return ProbeData(
        clips=clips,
        features={"hidden": features.astype(np.float32)},
        history=history,
        targets=targets + 0.2 * rng.normal(size=(N, 3)),
        late_curve=late,
        tokens=rng.normal(size=(N, 20, SKETCH)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def found():
    return probe_data(planted())


@pytest.mark.ci
def test_planted_information_is_there(found):
    heading, curvature, speed = found.verdicts
    assert (heading.answer, heading.stratum) == ("there", LATE_CURVE)
    assert curvature.answer == "there"
    assert "(products)" in curvature.sentence  # it is one: of two components
    assert (speed.answer in DENIED, speed.stratum) == (True, ALL)
    cells = found.scores[LATE_CURVE][HEADING]["hidden"]
    assert cells["ridge"].gain.low > 0.8
    gain = max((cell.gain for cell in cells.values()), key=lambda gain: gain.estimate)
    assert f"a gain of {gain.estimate:.2f} [{gain.low:.2f}, {gain.high:.2f}]" in heading.sentence
    assert found.conclusion == (
        f"{heading.sentence} An expert that drives straight on all the same ignores it: retrain the expert."
    )
    assert heading.sentence.startswith(
        "heading change: the information is there. 225 samples of 225 clips that go straight until t0 and curve "
        "afterwards: history explains 0.00 of the variance, history and features 0."
    )


@pytest.mark.ci
def test_shuffled_features_hold_nothing():
    data = planted()
    order = np.random.default_rng(5).permutation(N)
    report = probe_data(replace(data, features={"hidden": data.features["hidden"][order]}))
    assert all("A planted signal that explains 0.3" in verdict.sentence for verdict in report.verdicts)
    heading, *others = (verdict.answer for verdict in report.verdicts)
    assert heading == "not there"
    assert set(others) <= DENIED
    assert "more cameras, other frames or fine-tuning of the VLM" in report.conclusion
    for probe in ("ridge", "mlp"):
        for target in TARGETS:
            assert report.scores[ALL][target]["hidden"][probe].features.low < 0.02


@pytest.mark.ci
def test_the_control_finds_nothing(found):
    for cells in found.scores[LATE_CURVE].values():
        for cell in cells[SHUFFLED].values():
            assert cell.features.low < 0.02
            assert cell.gain.estimate < 0.05


def test_few_clips_do_not_deny():
    data = planted()
    few = slice(0, 120)
    data = ProbeData(
        clips=data.clips[few],
        features={"hidden": np.random.default_rng(0).normal(size=(120, 50)).astype(np.float32)},
        history=data.history[few],
        targets=data.targets[few],
        late_curve=data.late_curve[few],
    )
    report = probe_data(data)
    assert {verdict.answer for verdict in report.verdicts} == {"too few samples"}
    assert "Extract more clips" in report.conclusion


@pytest.mark.slow
def test_single_layers_are_scored_beside_all_together():
    data = planted()
    noise = np.random.default_rng(1).normal(size=(N, 64)).astype(np.float32)
    report = probe_data(replace(data, features={"layer 0": noise, "layer 1": data.features["hidden"]}))
    assert report.main == TOGETHER
    scores = report.scores[LATE_CURVE][HEADING]
    assert scores["layer 0"]["ridge"].features.low < 0
    assert scores["layer 1"]["ridge"].features.low > 0.7
    assert scores[TOGETHER]["ridge"].gain.low > 0.7
    assert scores["layer 1"]["ridge"].gain is None
    assert report.verdicts[0].answer == "there"


def interval(low, high):
    return Interval(estimate=(low + high) / 2, low=low, high=high, n=100, clips=50)


FOUND, MISSED = (0.15, 0.35), (0.05, 0.15)


@pytest.mark.parametrize(
    ("gain", "counts", "control", "planted", "answer"),
    [
        ((0.05, 0.3), (100, 50), 0.0, FOUND, "there"),
        ((0.05, 0.3), (100, 50), 0.06, FOUND, "too few samples"),
        ((0.05, 0.3), (29, 29), 0.0, FOUND, "too few samples"),
        ((0.05, 0.3), (500, 19), 0.0, FOUND, "too few samples"),
        ((-0.1, 0.4), (500, 500), 0.0, FOUND, "too few samples"),
        ((0.01, 0.15), (500, 500), 0.0, FOUND, "too few samples"),
        ((-0.05, 0.09), (200, 200), 0.0, FOUND, "not there"),
        ((-0.05, 0.09), (200, 200), 0.0, (-0.01, 0.4), "too few samples"),
        ((-0.05, 0.09), (200, 200), 0.0, (0.05, 0.14), "too few samples"),
        ((-0.05, 0.09), (200, 200), 0.0, None, "too few samples"),
        ((-0.05, 0.09), (500, 199), 0.0, FOUND, "too few samples"),
    ],
)
def test_rules(gain, counts, control, planted, answer):
    def cell(values):
        return Cell(history=interval(0, 0.1), features=interval(0, 0.1), both=interval(0, 0.1), gain=interval(*values))

    rules = {"looked_at": "x", "planted": planted and {"ridge": interval(*planted)}}
    for stratum, target in ((LATE_CURVE, HEADING), (ALL, SPEED)):
        verdict = judge_target(target, stratum, counts, {"ridge": cell(gain)}, {"ridge": cell((control,) * 2)}, **rules)
        assert verdict.answer == answer
    # Where the history turns, no gain over what probes make of it is sight.
    verdict = judge_target(HEADING, ALL, counts, {"ridge": cell(gain)}, {"ridge": cell((control,) * 2)}, **rules)
    assert verdict.answer == "too few samples"


@pytest.mark.ci
def test_intervals_hold_what_another_fit_would_change(found):
    """A probe of another random half of the clips gains within the interval that this one was given."""
    gain = found.scores[LATE_CURVE][HEADING]["hidden"]["ridge"].gain
    data = planted()
    half = np.array([int(clip.split("-")[1]) % 2 == 0 for clip in data.clips])
    other = probe_data(
        replace(
            data,
            clips=[clip for clip, keep in zip(data.clips, half, strict=True) if keep],
            features={"hidden": data.features["hidden"][half]},
            history=data.history[half],
            targets=data.targets[half],
            late_curve=data.late_curve[half],
            tokens=None,
        )
    )
    again = other.scores[LATE_CURVE][HEADING]["hidden"]["ridge"].gain
    assert again.low < gain.estimate < again.high


def poses(radius_m=50.0, speed_mps=8.0, steps=64):
    turned = 0.1 * speed_mps * np.arange(1, steps + 1) / radius_m
    xyz = np.stack([radius_m * np.sin(turned), radius_m * (1 - np.cos(turned)), 0 * turned], axis=-1)
    rot = np.zeros((steps, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(turned)
    rot[:, 1, 0], rot[:, 0, 1], rot[:, 2, 2] = np.sin(turned), -np.sin(turned), 1
    return xyz, rot


HISTORY_XYZ = np.stack([0.5 * np.arange(-15.0, 1.0), np.zeros(16), np.zeros(16)], axis=-1)
HISTORY_ROT = np.tile(np.eye(3), (16, 1, 1))


def test_targets_of_a_circle():
    xyz, rot = poses()
    strata = classify(HISTORY_XYZ, HISTORY_ROT, xyz, rot)
    heading, curvature, speed = future_targets(HISTORY_XYZ, xyz, strata)
    assert heading == pytest.approx(6.4 * 8 / 50)
    assert curvature == pytest.approx(1 / 50, rel=1e-3)
    assert speed == pytest.approx(8 - 5, abs=1e-3)
    assert list(TARGETS) == [HEADING, CURVATURE, SPEED]


def test_curvature_of_a_standing_vehicle_stays_small():
    xyz, rot = poses(radius_m=0.01, speed_mps=0.0005)
    strata = classify(HISTORY_XYZ, HISTORY_ROT, xyz, rot)
    heading, curvature, _ = future_targets(HISTORY_XYZ, xyz, strata)
    assert curvature == pytest.approx(heading / LEAST_PATH_M)
    assert abs(curvature) < 0.1


def test_history_features():
    found = history_features(HISTORY_XYZ, HISTORY_ROT)
    assert found.shape == (62,)
    assert np.allclose(found[:15], 5.0)
    assert np.allclose(found[15:30], 0.0)
    assert np.allclose(found[30:].reshape(16, 2), HISTORY_XYZ[:, :2])


def test_samples_are_chosen_by_whole_clips():
    ids = [f"clip-{clip}@{t0}#0" for clip in range(20) for t0 in (1, 2, 3)]
    chosen = choose_samples(ids, 10, seed=0)
    assert (len(chosen), chosen) == (10, sorted(chosen))
    counts = sorted([sum(item.startswith(f"clip-{clip}@") for item in chosen) for clip in range(20)], reverse=True)
    assert counts[:5] == [3, 3, 3, 1, 0]
    assert chosen == choose_samples(ids[::-1], 10, seed=0) != choose_samples(ids, 10, seed=1)
    assert choose_samples(ids, 100, seed=0) == sorted(ids)


@pytest.fixture(scope="module")
def stores(tiny_checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    common = {"source": "synthetic:12", "model": str(tiny_checkpoint), "frames": 1, "device": "cpu"}
    alpacache.extract(ExtractConfig(**common, store=str(root / "bf16")))
    alpacache.extract(ExtractConfig(**common, store=str(root / "int8"), codec="int8", hidden_states="none"))
    return root


def test_pooled_vectors_are_those_of_the_store(stores):
    reader = CacheReader(stores / "bf16")
    ids = list(reader.sample_ids)
    data = read_probe_data(reader, ids, layers=(1,), pool="both")
    arrays = reader.read(ids[3], fields=["hidden", "kv"])
    hidden = from_bf16_bits(arrays["hidden"]).float().numpy()
    assert np.allclose(data.features["hidden"][3], np.concatenate([hidden[-1], hidden.mean(0)]), atol=1e-5)
    values = from_bf16_bits(arrays["kv"])[1, 1].float().numpy()
    by_token = values.transpose(1, 0, 2).reshape(values.shape[1], -1)
    assert np.allclose(data.features["layer 1"][3], np.concatenate([by_token[-1], by_token.mean(0)]), atol=1e-5)
    last = read_probe_data(reader, ids, layers="last", pool="last")
    assert np.array_equal(last.features["hidden"][3], hidden[-1])
    assert set(last.features) == {"hidden"}


def test_quantised_values_are_decoded(stores, relative_error):
    exact, near = (
        read_probe_data(CacheReader(stores / name), CacheReader(stores / name).sample_ids, layers="all", pool="both")
        for name in ("bf16", "int8")
    )
    assert set(near.features) == set(exact.features) - {"hidden"}
    for name, vectors in near.features.items():
        assert 0 < relative_error(vectors, exact.features[name]) < 0.01


def test_hidden_states_are_read_without_keys_and_values(stores, monkeypatch):
    asked, read = [], CacheReader.read

    def noted(reader, sample_id, fields):
        asked.extend(fields)
        return read(reader, sample_id, fields)

    monkeypatch.setattr(CacheReader, "read", noted)
    reader = CacheReader(stores / "bf16")
    read_probe_data(reader, reader.sample_ids, layers="last", pool="mean")
    assert set(asked) == {"hidden", "history_xyz", "history_rot", "future_xyz", "future_rot"}


@pytest.mark.ci
def test_the_whole_way(stores, tmp_path):
    seen = []
    config = ProbeConfig(store=str(stores / "bf16"), out=str(tmp_path / "out"), layers=(0, 3))
    report = alpacache.probe(config, on_progress=seen.append)
    document = json.loads((tmp_path / "out/probe.json").read_text())
    assert document["settings"]["layers"] == [0, 3]
    assert (document["samples"], document["clips"], document["main"]) == (12, 12, TOGETHER)
    assert list(document["vectors"]) == ["hidden", "layer 0", "layer 3"]
    assert document["strata"][ALL] == {"samples": 12, "clips": 12}
    assert document["verdicts"][0]["answer"] == "too few samples"
    assert document["conclusion"] == report.conclusion
    cell = document["scores"][ALL][HEADING][TOGETHER]["ridge"]
    assert cell["both"]["estimate"] == report.scores[ALL][HEADING][TOGETHER]["ridge"].both.estimate
    assert (tmp_path / "out/probe.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (seen[-1].done, seen[-1].total) == (25, 25)
    again = alpacache.probe(replace(config, seed=config.seed))  # takes the place of its own files
    assert again.scores == report.scores


@pytest.mark.ci
@pytest.mark.parametrize("fault", ["record", "hidden"])
def test_a_sample_that_cannot_be_read_is_left_out_if_asked_for_and_named(stores, tmp_path, fault):
    store = shutil.copytree(stores / "bf16", tmp_path / "store")
    reader = CacheReader(store)
    damaged = list(reader.sample_ids[:2])  # the first tells how many layers there are

    def damage(sample_id):
        group = store / reader.record(sample_id).folder
        records = list(store.glob(f"commits/{group.name.partition('.')[0]}.json"))
        (file,) = records if fault == "record" else list(group.glob("hidden/c.*"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    for sample_id in damaged:
        damage(sample_id)
    config = ProbeConfig(store=str(store), out=str(tmp_path / "out"), layers=(0,))
    with pytest.raises(SampleReadError, match=damaged[0]):
        alpacache.probe(config)
    assert not (tmp_path / "out").exists()
    report = alpacache.probe(replace(config, on_damage="skip"))
    assert [sample.sample_id for sample in report.left_out] == damaged
    assert (report.samples, report.clips) == (10, 10)
    document = json.loads((tmp_path / "out/probe.json").read_text())
    assert [sample["sample_id"] for sample in document["left_out"]] == damaged
    damage(reader.sample_ids[2])
    with pytest.raises(UsageError, match=r"come from 9 clips, 3 more cannot be read; .* needs 10"):
        alpacache.probe(replace(config, on_damage="skip"))
    for sample_id in reader.sample_ids[3:7]:
        damage(sample_id)
    with pytest.raises(SampleReadError):
        alpacache.probe(replace(config, on_damage="skip"))


def test_stored_poses_that_are_not_finite_name_their_sample(stores, tiny_checkpoint, monkeypatch):
    read = CacheReader.read

    def broken(reader, sample_id, fields=None, **given):
        arrays = read(reader, sample_id, fields, **given)
        if "future_xyz" in arrays and sample_id == reader.sample_ids[2]:
            arrays["future_xyz"][5, 1] = np.nan
        return arrays

    monkeypatch.setattr(CacheReader, "read", broken)
    sample_id = CacheReader(stores / "bf16").sample_ids[2]
    with pytest.raises(DataError, match=f"sample '{sample_id}': its future holds values that are not finite"):
        alpacache.probe(ProbeConfig(store=str(stores / "bf16")))
    with pytest.raises(DataError, match=f"sample '{sample_id}': its future holds"):
        CachedDataset([stores / "bf16"], Checkpoint(tiny_checkpoint)).turns  # noqa: B018


@pytest.mark.parametrize("name", ["probe.json", "probe.png"])
def test_files_of_someone_else_stay(tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UsageError, match=f"holds {name}, but no whole probe; nothing is written over"):
        alpacache.probe(ProbeConfig(store=str(tmp_path / "none"), out=str(tmp_path)))
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_refusals(stores, monkeypatch):
    with pytest.raises(UsageError, match=r"no hidden states .*--layers 3 to probe the cached values"):
        alpacache.probe(ProbeConfig(store=str(stores / "int8")))
    with pytest.raises(UsageError, match=r"--layers has 36, but .* has 4 layers, 0 to 3"):
        alpacache.probe(ProbeConfig(store=str(stores / "bf16"), layers=(0, 36)))
    with pytest.raises(UsageError, match=r"9 samples of .* come from 9 clips; .* needs 10"):
        alpacache.probe(ProbeConfig(store=str(stores / "bf16"), samples=9))
    for bad in ({"layers": ()}, {"layers": (-1,)}, {"pool": "max"}, {"samples": 0}):
        with pytest.raises(UsageError, match=f"{next(iter(bad))} is"):
            ProbeConfig(store="x", **bad)
    monkeypatch.setattr(probe_features, "from_bf16_bits", lambda bits: torch.full(bits.shape, torch.nan))
    with pytest.raises(UsageError, match="hidden holds NaN or infinity"):
        alpacache.probe(ProbeConfig(store=str(stores / "bf16")))

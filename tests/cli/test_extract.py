"""`alpacache extract`: each option reaches the store, one JSON object, and one process a GPU under torchrun."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt import CAMERA_TITLES
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.extraction.task import share
from alpacache.gpu.device import own_device
from alpacache.sources.registry import open_source
from alpacache.sources.synthetic import SyntheticSource
from alpacache.sources.views import draw
from benchmarks.pai_tree import write_tree
from cache_store import CODECS, CacheReader, IdentityMismatchError, verify
from cli.main import app

pytestmark = pytest.mark.system  # whole extractions

FIRST = "synthetic-0-000000@5100000#0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("extract") / "Tiny-R1")


@pytest.fixture(scope="module")
def model_15(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("extract") / "Tiny-1.5", family="1.5", shards=1)


def extract(model, store, *options, source="synthetic:1", code=0):
    """The command in this process: its JSON."""
    arguments = ["extract", source, "--model", model, "--store", store, "--device", "cpu", "--json", *options]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("cameras", "frames"), [("front_wide", 1), ("front_tele,cross_left", 2), ("rear_tele,rear_left,cross_right", 3)]
)
def test_cameras_and_frames(cameras, frames, model_15, tmp_path):
    extract(model_15, tmp_path / "store", "--cameras", cameras, "--frames", frames)
    reader = CacheReader(tmp_path / "store")
    stored = reader.read(FIRST)
    names = sorted(
        (name for name in CAMERAS if any(f"_{part}_" in name for part in cameras.split(","))), key=CAMERAS.index
    )
    assert list(stored["cameras"]) == names == reader.identity["cameras"]
    assert reader.identity["frames"] == frames
    assert stored["image_spans"].shape == (len(names) * frames, 2)
    assert stored["frame_timestamps_us"].shape == (len(names), frames)
    assert stored["frame_timestamps_us"][0, -1] <= 5_100_000
    assert (np.diff(stored["frame_timestamps_us"]) == 100_000).all()


def test_every_subset_of_cameras_and_number_of_frames_has_its_prompt(model, model_15):
    builder, plain = InputBuilder(Checkpoint(str(model_15))), InputBuilder(Checkpoint(str(model)))
    for count in range(1, 8):
        for cameras in combinations(CAMERAS, count):
            for frames in range(1, 5):
                text, ids, tokens = builder.prompt(cameras, frames=frames, height=128, width=256)
                images = [
                    f"frame {number} <|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
                    for number in range(frames)
                ]
                titles = [f"{CAMERA_TITLES[CAMERAS.index(camera)]}: " for camera in cameras]
                body = "".join(title + "".join(images) for title in titles)
                assert text.split("<|im_start|>user\n")[1].split("<|traj_history_start|>")[0] == body
                assert (ids == builder.tokenizer.id_of("<|image_pad|>")).sum() == count * frames * tokens
                assert "frame " not in plain.prompt(cameras, frames=frames, height=128, width=256)[0]


@pytest.mark.parametrize("frames", [0, 5])
def test_other_numbers_of_frames_are_refused(frames, model, tmp_path):
    with pytest.raises(UsageError, match=f"frames is {frames}; expected 1, 2, 3 or 4"):
        extract(model, tmp_path / "store", "--frames", frames)


IMAGE = "<|vision_start|>" + "<|image_pad|>" * 32 + "<|vision_end|>"
FULL = f"Front camera: frame 0 {IMAGE}frame 1 {IMAGE}"


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("r1", (), IMAGE * 2),
        ("1.5", (), FULL),
        ("1.5", ("--camera-names", "--frame-numbers"), FULL),
        ("1.5", ("--no-camera-names",), f"frame 0 {IMAGE}frame 1 {IMAGE}"),
        ("1.5", ("--no-frame-numbers",), f"Front camera: {IMAGE}{IMAGE}"),
        ("1.5", ("--no-camera-names", "--no-frame-numbers"), IMAGE * 2),
        ("r1", ("--camera-names", "--frame-numbers"), FULL),
    ],
)
def test_camera_names_and_frame_numbers_in_the_prompt(family, options, expected, model, model_15, tmp_path):
    chosen = model if family == "r1" else model_15
    extract(chosen, tmp_path / "store", "--frames", 2, *options)
    reader = CacheReader(tmp_path / "store")
    stored = reader.read(FIRST)
    text = str(stored["prompt"])
    assert text.split("<|im_start|>user\n")[1].split("<|traj_history_start|>")[0] == expected
    builder = InputBuilder(Checkpoint(str(chosen)))
    assert len(stored["input_ids"]) == len(builder.tokenizer.encode(text))
    assert ("Front camera" in expected) == reader.identity["prompt"]["camera_names"]
    assert ("frame 0" in expected) == ("frame 0" in reader.identity["prompt"]["template"])


def told(model, store, *options, code=0):
    """The command in this process: what it says to people."""
    arguments = ["extract", "synthetic:1", "--model", model, "--store", store, "--device", "cpu", "--frames", 2]
    done = CliRunner().invoke(app, list(map(str, (*arguments, *options))))
    assert done.exit_code == code, done.output
    return " ".join((done.stderr if code == 0 else str(done.exception)).split())


@pytest.fixture
def renamed(model_15, tmp_path):
    """The 1.5 checkpoint under R1's names, as the public conversion script leaves it; its weights are links."""
    out = tmp_path / "Tiny-as-R1"
    shutil.copytree(model_15 / "vlm", out / "vlm")
    (out / "config.json").write_text((model_15 / "config.json").read_text().replace("alpamayo1_5", "alpamayo_r1"))
    for file in model_15.glob("model*"):
        (out / file.name).symlink_to(file)
    return out


def test_a_renamed_checkpoint_keeps_its_prompt_and_the_choice_is_told_and_kept(renamed, model_15, tmp_path):
    store = tmp_path / "store"
    said = told(renamed, store)
    assert (
        "note: prompt: cameras named, frames numbered. Family 1.5: the weights hold no freqs and no action_space.* (as "
        "1.5's); its classes are named alpamayo_r1. --camera-names, --frame-numbers and their --no- forms overrule it."
    ) in said
    assert "precision" not in said
    reader = CacheReader(store)
    assert FULL in str(reader.read(FIRST)["prompt"])
    assert reader.identity["model"]["settings"]["family"] == "1.5"
    assert reader.identity["model"]["family_by"].endswith("its classes are named alpamayo_r1")
    assert extract(model_15, store, "--frames", 2)["already_there"] == 1  # it is the same model
    about = CliRunner().invoke(app, ["info", str(store)]).output
    assert " ".join(about.split()).count("1.5 (the weights hold no freqs and no action_space.*") == 1
    assert "cameras named, frames numbered, no routes" in about
    refused = told(renamed, store, "--no-frame-numbers", code=1)
    assert (
        "the store's prompts were written with --camera-names --frame-numbers, this run's with --camera-names "
        "--no-frame-numbers: pass --camera-names --frame-numbers, or another --store." in refused
    )
    plain = told(renamed, tmp_path / "plain", "--no-camera-names", "--no-frame-numbers")
    assert "prompt: cameras not named, frames not numbered, as asked for. Family 1.5" in plain


def test_a_contradictory_checkpoint_asks_for_the_prompt(renamed, tmp_path):
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps({**config, "include_camera_ids": False}))
    said = told(renamed, tmp_path / "store", code=1)
    assert "does not tell which prompt it was trained with" in said
    assert not (tmp_path / "store").exists()
    asked = told(renamed, tmp_path / "store", "--camera-names", "--frame-numbers")
    assert "prompt: cameras named, frames numbered, as asked for. Family unclear: the weights hold no freqs" in asked
    assert CacheReader(tmp_path / "store").identity["model"]["settings"]["family"] == "1.5"


def test_the_vlms_precision_is_told_and_can_be_chosen(tmp_path):
    model = make_tiny_checkpoint(tmp_path / "Tiny-R1", dtype="float32", shards=1)
    said = told(model, tmp_path / "bf16")
    assert (
        "note: the VLM's weights are stored as F32, and it runs in bfloat16; --vlm-dtype fp32 keeps their precision."
        in said
    )
    assert "stored as" not in told(model, tmp_path / "fp32", "--vlm-dtype", "fp32")
    readers = [CacheReader(tmp_path / name) for name in ("bf16", "fp32")]
    assert [reader.identity["dtype"] for reader in readers] == ["bfloat16", "float32"]
    vlm, builder = load_vlm(str(model), dtype=torch.float32), InputBuilder(Checkpoint(str(model)))
    ref = SampleRef.parse(FIRST)
    source = open_source("synthetic:1")
    inputs = builder.build(source.load(ref, cameras=source.cameras, frames=2))
    live = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
    low, high = (reader.read(FIRST, fields=["kv"])["kv"] for reader in readers)
    assert np.array_equal(high[:, 0], live.keys.to(torch.bfloat16).view(torch.uint16).numpy())
    assert not np.array_equal(low, high)
    with pytest.raises(IdentityMismatchError, match=r'identity\.dtype: expected "bfloat16", found "float32"'):
        extract(model, tmp_path / "fp32", "--frames", 2)


def test_another_prompt_is_another_store(model_15, tmp_path):
    extract(model_15, tmp_path / "store", "--frames", 1)
    with pytest.raises(IdentityMismatchError, match=r"identity\.prompt\.template"):
        extract(model_15, tmp_path / "store", "--frames", 1, "--no-frame-numbers")
    with pytest.raises(IdentityMismatchError, match=r"identity\.prompt\.camera_names: expected false, found true"):
        extract(model_15, tmp_path / "store", "--frames", 1, "--no-camera-names")


@pytest.mark.parametrize("hidden", ["last", "none"])
def test_hidden_states(hidden, model, tmp_path):
    extract(model, tmp_path / "store", "--frames", 1, "--hidden-states", hidden)
    reader = CacheReader(tmp_path / "store")
    assert ("hidden" in reader.fields) == (hidden == "last")
    if hidden == "last":
        stored = reader.read(FIRST, fields=["hidden", "prefix_len"])
        assert stored["hidden"].shape == (int(stored["prefix_len"]), 128)


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8", "int5", "int4"])
def test_codecs(codec, model, tmp_path):
    extract(model, tmp_path / "store", "--frames", 1, "--codec", codec)
    reader = CacheReader(tmp_path / "store")
    assert reader.identity["codec"] == codec
    assert reader.fields["kv"].dtype == ("uint8" if codec in CODECS else "bfloat16")


@pytest.mark.parametrize(("t0", "times"), [("7.25", [7.25]), ("every:2.0", [2, 4, 6, 8, 10, 12])])
def test_several_moments_of_a_clip(t0, times, model, tmp_path):
    extract(model, tmp_path / "store", "--frames", 1, "--t0", t0)
    ids = sorted(map(SampleRef.parse, CacheReader(tmp_path / "store").sample_ids), key=lambda ref: ref.t0_us)
    assert [ref.t0_us / 1e6 for ref in ids] == times


def test_events_of_generated_drives(model, tmp_path):
    report = extract(model, tmp_path / "store", "--frames", 1, "--t0", "events", source="synthetic:6")
    source = open_source("synthetic:6")
    fitting = {
        f"{clip}@{time}#0"
        for clip in source.clip_ids
        for time in source.event_times_us(clip)
        if 1_600_000 < time <= 13_600_000
    }
    assert set(CacheReader(tmp_path / "store").sample_ids) == fitting
    assert report["extracted"] == len(fitting) > 0


def test_events_of_the_clip_index(model, tmp_path):
    """Of PhysicalAI-AV: 3.0, 7.5 and 19.5 s; the clips are too short for the others."""
    pytest.importorskip("physical_ai_av")
    drives = SyntheticSource(2, size=(64, 32))
    clips = write_tree(tmp_path / "tree", source=drives, cameras=[CAMERAS[1]])
    extract(model, tmp_path / "store", "--frames", 1, "--t0", "events", source=f"pai:{tmp_path / 'tree'}")
    assert CacheReader(tmp_path / "store").sample_ids == sorted(f"{clip}@3000000#0" for clip in clips)


def test_views(model, tmp_path):
    report = extract(model, tmp_path / "store", "--frames", 1, "--views", 3, "--seed", 4, source="synthetic:2")
    assert (report["selected"], report["extracted"], report["wanted"]) == (6, 6, 6)
    reader = CacheReader(tmp_path / "store")
    assert reader.sample_ids == sorted(
        f"synthetic-0-00000{clip}@5100000#{view}" for clip in (0, 1) for view in range(3)
    )
    assert reader.identity["views"]["seed"] == 4
    ref = SampleRef(clip_id="synthetic-0-000001", t0_us=5_100_000, view=2)
    jitter = json.loads(str(reader.read(ref.sample_id, fields=["jitter"])["jitter"]))
    assert jitter == asdict(draw(ref, seed=4))


def test_vlm(model, model_15, tmp_path):
    extract(model, tmp_path / "store", "--frames", 1, "--vlm", model_15)
    identity = CacheReader(tmp_path / "store").identity["model"]
    assert (identity["id"], identity["vlm"]) == ("Tiny-R1", "Tiny-1.5")


def test_json_tells_of_this_worker_and_of_all(model, tmp_path):
    first = extract(model, tmp_path / "store", "--frames", 1, "--shard", "0/2", source="synthetic:5")
    assert (first["selected"], first["extracted"], first["committed"], first["wanted"]) == (3, 3, 3, 5)
    assert first["bytes_written"] > 3 * 100_000
    assert first["samples_per_s"] == pytest.approx(3 / first["seconds"])
    second = extract(model, tmp_path / "store", "--frames", 1, "--shard", "1/2", source="synthetic:5")
    assert (second["selected"], second["extracted"], second["committed"], second["wanted"]) == (2, 2, 5, 5)
    again = extract(model, tmp_path / "store", "--frames", 1, source="synthetic:5")
    assert (again["extracted"], again["already_there"], again["committed"], again["quarantined"]) == (0, 5, 5, {})


def fails_at(monkeypatch, clip):
    good = SyntheticSource.load

    def load(self, ref, **wanted):
        if ref.clip_id.endswith(clip):
            raise BadClipError("not_finite", f"{ref.clip_id}: pose 17 is NaN.")
        return good(self, ref, **wanted)

    monkeypatch.setattr(SyntheticSource, "load", load)


def test_refused_samples_are_exit_3_but_not_under_torchrun(model, tmp_path, monkeypatch):
    """torchrun would end the other processes for an exit code that is not 0."""
    fails_at(monkeypatch, "1")
    report = extract(model, tmp_path / "store", "--frames", 1, source="synthetic:2", code=3)
    assert list(report["quarantined"]) == ["synthetic-0-000001@5100000#0"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    extract(model, tmp_path / "two", "--frames", 1, source="synthetic:2")
    monkeypatch.setenv("RANK", "1")
    arguments = ["extract", "synthetic:2", "--model", model, "--store", tmp_path / "two", "--device", "cpu"]
    done = CliRunner().invoke(app, list(map(str, [*arguments, "--frames", 1, "--json"])), catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "process 1 refused 1 samples" in done.stderr
    assert "synthetic-0-000001@5100000#0" in CacheReader(tmp_path / "two").quarantined


def test_a_shard_is_divided_among_its_processes(monkeypatch):
    assert share((1, 3)) == (1, 3)
    monkeypatch.setenv("WORLD_SIZE", "4")
    places = []
    for shard in range(3):
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            places.append(share((shard, 3)))
    assert places == [(number, 12) for number in range(12)]


def test_each_process_has_the_gpu_of_its_local_number(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert str(own_device(None)) == "cuda"
    for name, value in {"WORLD_SIZE": "8", "RANK": "7", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert str(own_device(None)) == "cuda:3"
    assert str(own_device("cpu")) == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UsageError, match="PyTorch sees 4 CUDA devices"):
        own_device(None)


@pytest.mark.ci
def test_torchrun_extracts_with_one_process_a_share(model, tmp_path):
    store = tmp_path / "store"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "cli.main", "extract", "synthetic:5"]
    command += ["--model", str(model), "--store", str(store), "--frames", "1", "--device", "cpu", "--json"]
    command += ["--weights", "ram"]  # which the two processes share
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)  # one object: the first process's
    assert (report["selected"], report["extracted"], report["wanted"]) == (3, 3, 5)
    found = verify(store, deep=True)
    assert (found.ok, found.samples) == (True, 5)

"""Stage two: it learns, it never loads the VLM, and a killed run ends with the same bits."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import google_crc32c
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import alpacache
from alpacache.cached_samples.identity import store_identity
from alpacache.cached_samples.order import GlobalOrder
from alpacache.cached_samples.ring import BatchRing
from alpacache.distributed.world import World
from alpacache.errors import DataError, InterruptedRunError, NonFiniteError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.gpu import checksum
from alpacache.training import absence
from alpacache.training import train as training
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory, read_checkpoint, read_trained
from alpacache.training.run_state import sealed
from alpacache.training.schedule import FORMER_SCHEDULE, SCHEDULE, LearningRate
from cache_store import (
    CacheReader,
    CacheWriter,
    CorruptSampleError,
    UnreachableStoreError,
    UnreadableSampleError,
    rereading,
)
from cache_store.format.names import sample_key

pytestmark = pytest.mark.system  # whole runs of a tiny model


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("train") / "store"
    config = ExtractConfig(source="synthetic:10", model=str(tiny_checkpoint), store=str(path), frames=1, device="cpu")
    assert alpacache.extract(config).extracted == 10
    return path


@pytest.fixture(scope="module")
def int8_store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("train8") / "store"
    config = {"source": "synthetic:10", "model": str(tiny_checkpoint), "store": str(path), "frames": 1, "device": "cpu"}
    assert alpacache.extract(ExtractConfig(**config, codec="int8")).extracted == 10
    return path


def config(checkpoint, store, out, **changes):
    values = {
        "stores": (str(store),),
        "model": str(checkpoint),
        "out": str(out),
        "steps": 6,
        "batch_size": 4,
        "draws": 2,
    }
    values |= {"lr": 1e-3, "warmup": 2, "save_every": 100, "device": "cpu", "on_overlap": "allow"}
    return TrainConfig(**values | changes)


def weights(out):
    return load_file(RunDirectory(out).path / "last" / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def rows(out):
    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


def validated(out):
    """The rows of validations, without times."""
    found = [row for row in rows(out) if "val_loss" in row]
    return [{name: row[name] for name in row if name == "step" or name.startswith(("val_", "train_"))} for row in found]


@pytest.mark.ci
def test_the_loss_falls(tiny_checkpoint, store, tmp_path):
    settings = {"steps": 80, "draws": 4, "lr": 1e-2, "warmup": 10, "in_memory": True}
    report = alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", **settings, val=str(store), val_every=40))
    assert report.steps == 80
    assert report.last_loss < 0.87 * report.first_loss
    assert report.val_loss == report.best_val_loss < 0.87 * report.first_loss
    assert (tmp_path / "run" / "best").resolve().name == "step-0000080"


@pytest.mark.slow
def test_ten_samples_can_be_learnt_by_heart(tiny_checkpoint, store, tmp_path):
    settings = {"steps": 600, "draws": 8, "batch_size": 5, "lr": 3e-3, "warmup": 20, "in_memory": True}
    report = alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", **settings))
    assert report.last_loss < 0.4 * report.first_loss


@pytest.mark.ci
@pytest.mark.system
def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny_checkpoint, store, tmp_path):
    for name, changes in (("a", {}), ("b", {"in_memory": True}), ("c", {"seed": 1})):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / name, **changes))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_resumed_equals_uninterrupted(tiny_checkpoint, store, tmp_path):
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "whole", save_every=2, keep=9))
    RunDirectory(tmp_path / "parts")
    parts = tmp_path / "parts"
    (parts / "checkpoints").mkdir(parents=True)
    (parts / "checkpoints/step-0000004").symlink_to(tmp_path / "whole/checkpoints/step-0000004")
    (parts / "metrics.jsonl").write_text((tmp_path / "whole/metrics.jsonl").read_text() + '{"step": 7, "lo')
    alpacache.train(config(tiny_checkpoint, store, parts, resume=True))
    assert same(weights(tmp_path / "whole"), weights(parts))
    whole, resumed = rows(tmp_path / "whole"), rows(parts)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    first, second = (load_file(out / "last/optimizer.safetensors") for out in (tmp_path / "whole", parts))
    assert same(first, second)


@pytest.mark.ci
def test_kill_9_at_a_random_step_and_resume_ends_with_the_same_bits(tiny_checkpoint, store, tmp_path):
    settings = {"steps": 40, "save_every": 5, "draws": 1}
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "whole", **settings))
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "train",
        "--store",
        str(store),
        "--model",
        str(tiny_checkpoint),
        "--out",
        str(out),
    ]
    command += [
        "--steps",
        "40",
        "--save-every",
        "5",
        "--batch-size",
        "4",
        "--lr",
        "1e-3",
        "--warmup",
        "2",
        "--device",
        "cpu",
        "--resume",
    ]
    kill_after = random.Random(os.getpid()).randint(6, 25)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (
        metrics.is_file() and len(metrics.read_text().splitlines()) >= kill_after
    ):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < max(RunDirectory(out).steps) < 40
    subprocess.run(command, check=True, capture_output=True)
    assert same(weights(tmp_path / "whole"), weights(out))
    assert [row["loss"] for row in rows(out)] == [row["loss"] for row in rows(tmp_path / "whole")]


@pytest.mark.ci
def test_sigterm_saves_and_exits_130(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "train",
        "--store",
        str(store),
        "--model",
        str(tiny_checkpoint),
        "--out",
        str(out),
    ]
    command += ["--steps", "100000", "--batch-size", "2", "--device", "cpu", "--save-every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "metrics.jsonl").is_file():
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved. Run again with --resume" in errors
    assert RunDirectory(out).steps == [len(rows(out))]


def test_stage_two_reads_nothing_of_the_vlm(tiny_checkpoint, store, tmp_path):
    """A checkpoint without a single VLM tensor trains all the same."""
    from safetensors.torch import save_file

    from alpacache.alpamayo.checkpoint import INDEX

    lean = shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    state = {}
    for shard in lean.glob("*.safetensors"):
        state |= load_file(shard)
        shard.unlink()
    (lean / INDEX).unlink()
    save_file(
        {name: tensor for name, tensor in state.items() if not name.startswith("vlm.")}, lean / "model.safetensors"
    )
    alpacache.train(config(lean, store, tmp_path / "lean"))
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "full"))
    assert same(weights(tmp_path / "lean"), weights(tmp_path / "full"))


def test_head_trains_projections_and_final_norm_only(tiny_checkpoint, store, tmp_path):
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", trainable="head"))
    names = set(weights(tmp_path / "run"))
    assert names
    assert all(name.startswith(("action_in_proj.", "action_out_proj.", "expert.norm.")) for name in names)


def test_an_existing_run_needs_resume_and_the_same_settings(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    alpacache.train(config(tiny_checkpoint, store, out))
    with pytest.raises(UsageError, match=r"already holds a run \(step 6\); pass --resume"):
        alpacache.train(config(tiny_checkpoint, store, out))
    with pytest.raises(UsageError, match=r"lr: the run has 0.001, now 0.002"):
        alpacache.train(config(tiny_checkpoint, store, out, resume=True, lr=2e-3))


def test_a_run_goes_on_with_its_stores_in_their_order_wherever_they_lie(tiny_checkpoint, store, int8_store, tmp_path):
    out, moved = tmp_path / "run", shutil.copytree(store, tmp_path / "moved")
    fewer = ExtractConfig(
        source="synthetic:3", model=str(tiny_checkpoint), store=str(tmp_path / "three"), frames=1, device="cpu"
    )
    alpacache.extract(fewer)
    both = (str(store), fewer.store)
    alpacache.train(config(tiny_checkpoint, store, out, stores=both, steps=2, warmup=0))

    def resume(*stores):
        return alpacache.train(config(tiny_checkpoint, store, out, stores=stores, steps=2, warmup=0, resume=True))

    assert resume(str(moved), fewer.store).steps == 2
    with pytest.raises(UsageError, match=r"the order of the stores: the run has .*store, .*three\n  now .*three, "):
        resume(*reversed(both))
    with pytest.raises(UsageError, match=r"three has lost samples: 3, 10 when the run began"):
        resume(fewer.store, fewer.store)
    with pytest.raises(
        UsageError, match=r'store has other features than .*store had: codec: expected "bf16", found "int8"'
    ):
        alpacache.train(config(tiny_checkpoint, store, out, stores=(str(int8_store),) * 2, resume=True))
    state = json.loads((out / "last/state.json").read_text())
    for base in (state["base"], state["settings"].get("base")):  # of a snapshot of the hub that is a directory now
        if base is not None:
            base["revision"] = "abc"
    del state["document_crc32c"]
    (out / "last/state.json").write_bytes(sealed(state))
    assert resume(*both).steps == 2


def test_a_resumed_run_keeps_seed_draws_and_average_and_says_what_it_goes_on_from(tiny_checkpoint, store, tmp_path):
    whole, parts, notes = tmp_path / "whole", tmp_path / "parts", []
    values = {"seed": 7, "draws": 2, "ema": 0.9, "ema_every": 4, "save_every": 3, "keep": 9}
    alpacache.train(config(tiny_checkpoint, store, whole, **values))
    shutil.copytree(whole / "checkpoints/step-0000003", parts / "checkpoints/step-0000003")
    less = config(tiny_checkpoint, store, parts, draws=None, steps=None, epochs=2.4, keep=1, resume=True)
    alpacache.train(less, on_note=notes.append)
    alpacache.train(replace(less, epochs=None, steps=6), on_note=notes.append)
    for name in ("model", "average"):
        first, second = (load_file(out / f"last/{name}.safetensors") for out in (whole, parts))
        assert same(first, second)
    assert len(notes) == 3
    assert "config.toml" in notes[1]  # the copied checkpoint came without one
    assert notes[0].startswith(f"{parts} goes on from step 3 of 6, other than before: ")
    for text in (f'out "{whole}" -> "{parts}"', "save_every 3 -> 100", "keep 9 -> 1"):
        assert text in notes[0]
    assert "ema" not in notes[0]
    assert notes[2] == f"{parts} is finished (step 6 of 6); nothing is left to train."
    assert RunDirectory(parts).steps == [6]


def test_a_run_of_an_earlier_version_keeps_its_schedule(tiny_checkpoint, store, tmp_path):
    values = {"save_every": 3, "keep": 9, "warmup": 1}
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "new", **values))
    old = shutil.copytree(tmp_path / "new/checkpoints/step-0000003", tmp_path / "old/checkpoints/step-0000003")
    state = json.loads((old / "state.json").read_text())
    assert state["settings"].pop("schedule") == "recipe"
    del state["document_crc32c"]
    (old / "state.json").write_bytes(sealed(state))
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "old", resume=True, **values))
    rates = {name: {row["step"]: row["lr"] for row in rows(tmp_path / name)} for name in ("new", "old")}
    for name, schedule in (("new", SCHEDULE), ("old", FORMER_SCHEDULE)):
        rate = LearningRate(peak=1e-3, final=rates["new"][6], warmup=1, total=6, schedule=schedule)
        assert [rates[name][step] for step in (4, 5, 6)] == pytest.approx([rate(step - 1) for step in (4, 5, 6)])
    assert rates["old"][4] > rates["new"][4]
    assert json.loads((tmp_path / "old/last/state.json").read_text())["settings"]["schedule"] == FORMER_SCHEDULE


@pytest.mark.parametrize("earlier", [False, True])
def test_another_prompt_is_warned_of_where_nobody_chose_it(earlier, renamed_15, tmp_path, caplog, monkeypatch):
    """Earlier versions went by the names of classes, and left out the text that 1.5 was trained with."""

    def without_evidence(*arguments, **settings):
        identity = store_identity(*arguments, **settings)
        del identity["model"]["family_by"]
        return identity

    if earlier:
        monkeypatch.setattr("alpacache.extraction.target_store.store_identity", without_evidence)
    store, plain = tmp_path / "store", {"camera_names": False, "frame_numbers": False}
    common = {"source": "synthetic:4", "model": str(renamed_15), "frames": 1, "device": "cpu"}
    alpacache.extract(ExtractConfig(**common, store=str(store), **plain))
    alpacache.train(config(renamed_15, store, tmp_path / "one", steps=1, warmup=0))
    assert ("an earlier version with another prompt than" in caplog.text) == earlier


def test_two_trainings_do_not_write_to_one_run(tiny_checkpoint, store, tmp_path):
    with RunDirectory(tmp_path / "run").owned(), pytest.raises(UsageError, match=r"is being written by .*--take-over"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_one_of_several_tasks_without_torchrun_is_refused(tiny_checkpoint, store, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match=r"several tasks that srun has started .*unset SLURM_PROCID"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class _Two(World):
    """One of two processes that are threads here."""

    boxes: ClassVar = [None, None]
    barrier: ClassVar = threading.Barrier(2, timeout=60)

    def all_gather(self, value):
        self.boxes[self.rank] = value
        self.barrier.wait()
        found = list(self.boxes)
        self.barrier.wait()
        return found


def test_processes_that_would_begin_at_other_steps_all_refuse(tiny_checkpoint, store, tmp_path, monkeypatch):
    """As where one machine does not see the run directory: it would begin anew while the first goes on."""
    seen, unseen = tmp_path / "run", tmp_path / "unseen"
    alpacache.train(config(tiny_checkpoint, store, seen, steps=1, warmup=0))

    def begin(rank):
        settings = {"steps": 1, "warmup": 0, "resume": True, "device": str(rank)}
        return training.train(config(tiny_checkpoint, store, (seen, unseen)[rank], **settings))

    def join(device):
        return nullcontext(_Two(rank=int(device), size=2, device=torch.device("cpu")))

    monkeypatch.setattr(training, "join_world", join)
    with ThreadPoolExecutor(2) as pool:
        found = [future.exception(timeout=60) for future in [pool.submit(begin, rank) for rank in range(2)]]
    for error in found:
        assert isinstance(error, UsageError)
        assert "checkpoint to go on from: step 1 (crc32c" in str(error)
        assert ") in process 0; none in process 1" in str(error)
        assert "samples" not in str(error).partition("Nothing was changed")[0]
    assert not unseen.exists()


def test_a_resumed_run_keeps_its_micro_batch(tiny_checkpoint, store, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    alpacache.train(config(tiny_checkpoint, store, whole, steps=3, micro_batch=1, save_every=1, keep=9))
    shutil.copytree(whole / "checkpoints/step-0000001", parts / "checkpoints/step-0000001")
    alpacache.train(config(tiny_checkpoint, store, parts, steps=3, resume=True))
    assert same(weights(whole), weights(parts))
    assert read_checkpoint(parts / "last").state["settings"]["micro_batch"] == 1
    alpacache.train(config(tiny_checkpoint, store, parts, steps=3, resume=True, micro_batch=2))


def test_a_store_of_another_model_is_refused(tiny_checkpoint_15, store, tmp_path):
    with pytest.raises(UsageError, match="extracted with another model") as caught:
        alpacache.train(config(tiny_checkpoint_15, store, tmp_path / "run"))
    assert "Pass the model that the store was made with" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_flipped_bit_stops_training_with_the_samples_name(tiny_checkpoint, store, tmp_path):
    broken = shutil.copytree(store, tmp_path / "store")
    chunk = next(path for path in sorted(broken.glob("samples/*/kv/c*")) if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(CorruptSampleError, match=r"synthetic-0-00000\d@5100000#0"):
        alpacache.train(config(tiny_checkpoint, broken, tmp_path / "run", steps=10))


def test_non_finite_steps_are_not_applied_and_stop_after_three(tiny_checkpoint, store, tmp_path, monkeypatch):
    from alpacache import flow_matching

    good = flow_matching.loss
    monkeypatch.setattr(flow_matching, "loss", lambda *args, **named: good(*args, **named) * float("nan"))
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, last at step 3 with synthetic"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run"))
    assert [row["loss"] for row in rows(tmp_path / "run")] == [None, None]
    assert all(len(row["skipped"]) == 4 for row in rows(tmp_path / "run"))


def test_a_damaged_checkpoint_is_named(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    alpacache.train(config(tiny_checkpoint, store, out))
    file = out / "last/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"model.safetensors is damaged"):
        read_checkpoint(out / "last")


def test_a_full_disk_keeps_earlier_checkpoints(tiny_checkpoint, store, tmp_path, monkeypatch):
    from alpacache.training import run_directory

    out = tmp_path / "run"
    good = run_directory.save_file

    def full(tensors, path, metadata):
        if "0000002" not in str(path):
            raise OSError(28, "No space left on device")
        good(tensors, path, metadata)

    monkeypatch.setattr(run_directory, "save_file", full)
    with pytest.raises(DataError, match=r"step 6 could not be written .* needs \d+ bytes"):
        alpacache.train(config(tiny_checkpoint, store, out, save_every=2))
    assert RunDirectory(out).steps == [2]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-0000002"]
    monkeypatch.undo()
    alpacache.train(config(tiny_checkpoint, store, out, resume=True))
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "whole"))
    assert same(weights(out), weights(tmp_path / "whole"))


def test_only_the_newest_checkpoints_and_the_best_are_kept(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    alpacache.train(config(tiny_checkpoint, store, out, save_every=1, keep=2))
    assert RunDirectory(out).steps == [5, 6]


def test_stores_that_overlap_are_refused_with_counts(tiny_checkpoint, store, tmp_path, caplog):
    three = ExtractConfig(
        source="synthetic:3", model=str(tiny_checkpoint), store=str(tmp_path / "three"), frames=1, device="cpu"
    )
    alpacache.extract(three)
    stores, val = (str(store), three.store), str(store)
    with pytest.raises(UsageError, match="the stores overlap") as caught:
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", stores=stores, val=val, on_overlap="stop"))
    assert f"3 of 3 samples of --store {three.store} are in {store} too: they would count twice" in str(caught.value)
    assert not (tmp_path / "run").exists()
    report = alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", stores=stores, val=val, steps=3))
    assert report.samples == 10
    assert [record.getMessage()[:15] for record in caplog.records] == ["3 of 3 samples ", "10 of 10 clips "]
    again = {"stores": (str(store), str(store)), "on_overlap": "stop"}
    with pytest.raises(UsageError, match=r"10 of 10 samples of --store .* are in .* too"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "twice", **again))


def test_epochs_count_samples(tiny_checkpoint, store, tmp_path):
    assert alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", steps=None, epochs=1)).steps == 3


def test_best_is_the_step_that_was_validated(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    alpacache.train(config(tiny_checkpoint, store, out, steps=7, val=str(store), val_every=2, save_every=3, keep=9))
    validated = {row["step"]: row["val_loss"] for row in rows(out) if "val_loss" in row}
    best = min(validated, key=validated.get)
    assert sorted(validated) == [2, 4, 6, 7]
    assert (out / "best").resolve().name == f"step-{best:07d}"
    found = read_checkpoint(out / "best").state["best"]
    assert found == {"step": best, "value": validated[best], "by": "loss", "since": 0}


def test_a_run_that_died_before_its_first_checkpoint_starts_its_metrics_anew(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    RunDirectory(out).begin("")
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.0}\n')
    alpacache.train(config(tiny_checkpoint, store, out, resume=True))
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert rows(out)[0]["loss"] != 9.0


def test_resuming_a_finished_run_does_nothing(tiny_checkpoint, store, tmp_path):
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "run"))
    before = weights(tmp_path / "run")
    report = alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", resume=True))
    assert (report.steps, report.first_loss, report.samples_per_s) == (6, None, 0.0)
    assert same(before, weights(tmp_path / "run"))


def test_a_resumed_run_writes_its_lost_config_again(tiny_checkpoint, store, tmp_path):
    out, notes = tmp_path / "run", []
    alpacache.train(config(tiny_checkpoint, store, out, steps=2, warmup=0))
    text = (out / "config.toml").read_text()
    (out / "config.toml").unlink()
    again = config(tiny_checkpoint, store, out, steps=2, warmup=0, resume=True)
    alpacache.train(again, on_note=notes.append)
    assert (out / "config.toml").read_text() == text
    assert any("had no config.toml any more; it is written again" in note for note in notes)
    (out / "config.toml").write_text(f"{text}# mine\n")
    alpacache.train(again, on_note=notes.append)
    assert (out / "config.toml").read_text() == f"{text}# mine\n"


def test_stores_of_other_prompts_do_not_mix_and_of_other_frames_do(tiny_checkpoint, store, tmp_path):
    two = ExtractConfig(
        source="synthetic:2", model=str(tiny_checkpoint), store=str(tmp_path / "two"), frames=2, device="cpu"
    )
    alpacache.extract(two)
    mixed = (str(store), str(tmp_path / "two"))
    assert (
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", stores=mixed)).samples == 10
    )  # two are in both
    shutil.rmtree(tmp_path / "run")
    from alpacache.cached_samples import dataset

    class Other(dataset.CacheReader):
        @property
        def identity(self):
            return {**self._identity, "prompt": {"template": self.path.name}}

        @identity.setter
        def identity(self, value):
            self._identity = value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "CacheReader", Other)
        with pytest.raises(UsageError, match=r"cannot be mixed with .*\n  prompt.template"):
            alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", stores=mixed))


@pytest.mark.system
def test_a_quantised_store_trains_and_resumes_to_the_same_bits(tiny_checkpoint, int8_store, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"val": str(int8_store), "val_every": 3}
    alpacache.train(config(tiny_checkpoint, int8_store, whole, save_every=2, keep=9, **settings))
    shutil.copytree(whole / "checkpoints/step-0000002", parts / "checkpoints/step-0000002")
    (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    alpacache.train(config(tiny_checkpoint, int8_store, parts, resume=True, in_memory=True, **settings))
    assert same(weights(whole), weights(parts))
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(whole)]
    assert rows(parts)[-1]["val_loss"] == rows(whole)[-1]["val_loss"]


def test_stores_of_different_codecs_are_refused(tiny_checkpoint, store, int8_store, tmp_path):
    with pytest.raises(UsageError, match="codec"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "mixed", stores=(str(store), str(int8_store))))


def test_a_warm_up_longer_than_the_run_is_refused(tiny_checkpoint, store, tmp_path):
    with pytest.raises(UsageError, match="warmup is 6 of 6 steps"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", warmup=6))
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", steps=20, warmup=None))
    falling = 1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 18))
    assert [row["lr"] for row in rows(tmp_path / "run")][:3] == pytest.approx([5e-4, 1e-3, falling])


def damaged_copy(store, path, count, *, first=0):
    """A copy of a store with a flipped bit in `count` samples; their ids."""
    shutil.copytree(store, path)
    reader = CacheReader(path)
    ids = sorted(reader.sample_ids)[first : first + count]
    for sample_id in ids:
        chunk = sorted((path / reader.record(sample_id).folder / "kv").glob("c.*"))[0]
        data = bytearray(chunk.read_bytes())
        data[100] ^= 1
        chunk.write_bytes(data)
    return ids


def test_damaged_samples_are_left_out_and_counted_if_asked_for(tiny_checkpoint, store, tmp_path):
    ids = damaged_copy(store, tmp_path / "broken", 2)
    out = tmp_path / "run"
    report = alpacache.train(config(tiny_checkpoint, tmp_path / "broken", out, steps=8, on_damage="skip"))
    assert (report.steps, report.damaged) == (8, 2)
    noted = [row["damaged"] for row in rows(out) if "damaged" in row]
    assert sorted(noted) == ids
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 9))
    assert read_checkpoint(out / "last").state["damaged"] == ids
    more = config(tiny_checkpoint, tmp_path / "broken", out, steps=8, on_damage="skip", resume=True)
    assert alpacache.train(more).damaged == 2


@pytest.mark.parametrize("lasts", ["the first step", "for ever"])
def test_a_sample_that_cannot_be_read_for_a_while_comes_back(tiny_checkpoint, store, tmp_path, monkeypatch, lasts):
    sample_id = sorted(CacheReader(store).sample_ids)[0]
    away, opened, out = f"/{Path(CacheReader(store).record(sample_id).folder).name}/", os.open, tmp_path / "run"

    def failing(path, *args, **kwargs):
        begun = (out / "metrics.jsonl").exists() and any("loss" in row for row in rows(out))
        if away in os.fspath(path) and (lasts == "for ever" or not begun):
            raise FileNotFoundError(2, "No such file or directory", path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    seed = next(seed for seed in range(99) if GlobalOrder(seed, 10)[0] == 0)
    report = alpacache.train(config(tiny_checkpoint, store, out, steps=15, seed=seed, on_damage="skip"))
    assert (report.damaged, report.missed) == ((0, 1) if lasts == "the first step" else (1, 0))
    assert [row["missed"] for row in rows(out) if "missed" in row] == [sample_id]
    lasting = [sample_id] * report.damaged
    assert [row["damaged"] for row in rows(out) if "damaged" in row] == lasting
    assert read_checkpoint(out / "last").state["damaged"] == lasting


@pytest.mark.parametrize("field", ["history_xyz", "future_rot"])
def test_a_stored_path_that_is_not_finite_is_named_and_can_be_left_out(tiny_checkpoint, store, tmp_path, field):
    whole = CacheReader(store)
    broken = CacheWriter(tmp_path / "broken", fields=list(whole.fields.values()), identity=dict(whole.identity))
    for number, sample_id in enumerate(whole.sample_ids):
        arrays = {name: np.array(array) for name, array in whole.read(sample_id).items()}
        if number == 3:
            arrays[field].flat[0] = math.nan
        broken.write(sample_id, arrays)
    bad = whole.sample_ids[3]
    told = rf"sample '{bad}': its stored path is not finite\. Leave it out with --except"
    with pytest.raises(DataError, match=told):
        alpacache.train(config(tiny_checkpoint, tmp_path / "broken", tmp_path / "run", steps=5))
    report = alpacache.train(config(tiny_checkpoint, tmp_path / "broken", tmp_path / "other", steps=5, exclude=(bad,)))
    assert (report.steps, report.chosen["samples"]) == (5, 9)


def damaged_record(store, path):
    """A copy of a store, and the id of its second sample, whose commit record has a flipped bit."""
    shutil.copytree(store, path)
    sample_id = sorted(CacheReader(path).sample_ids)[1]
    record = path / "commits" / f"{sample_key(sample_id)}.json"
    record.write_bytes(record.read_bytes().replace(b'"shape"', b'"shbpe"', 1))
    return sample_id


def test_a_damaged_record_costs_one_sample(tiny_checkpoint, store, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "run"
    sample_id = damaged_record(store, broken)
    with pytest.raises(CorruptSampleError, match=sample_id):
        alpacache.train(config(tiny_checkpoint, broken, tmp_path / "stop", steps=1))
    assert not (tmp_path / "stop").exists()
    report = alpacache.train(config(tiny_checkpoint, broken, out, steps=3, on_damage="skip", in_memory=True))
    assert (report.samples, report.damaged) == (10, 1)
    assert [row["damaged"] for row in rows(out) if "damaged" in row] == [sample_id]
    group = next(broken.glob(f"samples/{sample_key(sample_id)}.*"))
    (group / "zarr.json").unlink()
    (broken / "commits" / f"{sample_key(sample_id)}.json").write_bytes(b"")  # now nothing tells the id
    report = alpacache.train(config(tiny_checkpoint, broken, tmp_path / "run2", steps=3, on_damage="skip"))
    assert (report.samples, report.damaged) == (9, 1)


def test_a_store_that_goes_away_ends_the_run_saved(tiny_checkpoint, store, tmp_path, monkeypatch):
    place, opened, out = shutil.copytree(store, tmp_path / "disk"), os.open, tmp_path / "run"

    def failing(path, *args, **kwargs):
        if place.exists() and (out / "metrics.jsonl").exists() and any("loss" in row for row in rows(out)):
            place.rename(tmp_path / "unmounted")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", failing)
    monkeypatch.setattr(absence, "_LONGEST_S", 0.0)
    settings = {"steps": 20, "save_every": 99, "on_damage": "skip"}
    with pytest.raises(UnreachableStoreError, match=r"not there any more.*mounted"):
        alpacache.train(config(tiny_checkpoint, place, out, **settings))
    steps = [row["step"] for row in rows(out) if "loss" in row]
    assert RunDirectory(out).steps == steps[-1:]
    assert len(steps) < 20
    (tmp_path / "unmounted").rename(place)
    monkeypatch.undo()
    report = alpacache.train(config(tiny_checkpoint, place, out, **settings, resume=True))
    assert (report.steps, report.damaged, report.missed) == (20, 0, 0)


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["trained", "validated"])
def test_a_store_that_comes_back_costs_nothing(tiny_checkpoint, store, tmp_path, monkeypatch, caplog, kind):
    """It is away for longer than any read is tried again; the run ends with the same weights as an undisturbed one."""
    place, opened, out = shutil.copytree(store, tmp_path / "disk"), os.open, tmp_path / "run"
    settings = {"steps": 8, "on_damage": "skip", "ema": 0.9, "val": str(place), "val_every": 4, "val_samples": 3}
    trained = place if kind == "trained" else store
    alpacache.train(config(tiny_checkpoint, trained, tmp_path / "calm", **settings))
    gone = []

    def failing(path, *args, **kwargs):
        if not gone and (out / "metrics.jsonl").exists() and any("loss" in row for row in rows(out)):
            gone.append(path)
            place.rename(tmp_path / "unmounted")
        return opened(path, *args, **kwargs)

    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 75:  # in the second pause
            (tmp_path / "unmounted").rename(place)

    monkeypatch.setattr(os, "open", failing)
    monkeypatch.setattr(rereading, "WAITS_S", (0.0, 0.0))  # between two looks at the store it may be back
    monkeypatch.setattr(absence, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=sleep))
    report = alpacache.train(config(tiny_checkpoint, trained, out, **settings))
    assert 75 <= len(slept) <= 110
    assert (report.steps, report.damaged, report.missed) == (8, 0, 0)
    assert caplog.text.count("the store is not there any more; training waits for it up to 10 minutes") == 1
    calm, disturbed = (read_checkpoint(run / "last", average=True) for run in (tmp_path / "calm", out))
    for kind in ("model", "average"):
        first, second = getattr(calm, kind), getattr(disturbed, kind)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["step"] for row in rows(out)] == list(range(1, 9))
    losses = [[row["val_loss"] for row in rows(run) if "val_loss" in row] for run in (tmp_path / "calm", out)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_a_ring_of_samples_in_memory_is_gone_before_the_next_is_made(tiny_checkpoint, store, tmp_path, monkeypatch):
    """Else both would have to fit into RAM."""
    damaged_copy(store, tmp_path / "broken", 2)
    rings = []

    def make(*args, **settings):
        assert all(ring() is None for ring in rings)
        made = BatchRing(*args, **settings)
        rings.append(weakref.ref(made._source.slabs))
        return made

    monkeypatch.setattr(training, "BatchRing", make)
    settings = {"on_damage": "skip", "in_memory": True}
    assert alpacache.train(config(tiny_checkpoint, tmp_path / "broken", tmp_path / "run", **settings)).damaged == 2
    assert len(rings) >= 3


def test_only_the_damaged_one_of_two_samples_of_a_name_is_left_out(tiny_checkpoint, store, tmp_path):
    ids = damaged_copy(store, tmp_path / "broken", 1)
    stores, out = (str(store), str(tmp_path / "broken")), tmp_path / "run"
    settings = {"stores": stores, "steps": 5, "on_damage": "skip"}
    assert alpacache.train(config(tiny_checkpoint, store, out, **settings)).damaged == 1
    state = read_checkpoint(out / "last").state
    assert (state["damaged"], state["damaged_indices"]) == (ids, [10])
    assert alpacache.train(config(tiny_checkpoint, store, out, **settings, resume=True)).damaged == 1


def test_a_damaged_path_is_left_out_where_curvature_is_balanced(tiny_checkpoint, store, tmp_path):
    broken, out = shutil.copytree(store, tmp_path / "broken"), tmp_path / "run"
    reader = CacheReader(broken)
    sample_id = sorted(reader.sample_ids)[0]
    small = broken / reader.record(sample_id).folder / "small/c.0"  # its poses, too
    small.write_bytes(bytes(255 - byte for byte in small.read_bytes()))
    settings = {"balance": "curvature", "on_damage": "skip"}
    assert alpacache.train(config(tiny_checkpoint, broken, out, **settings)).damaged == 1
    assert [row["damaged"] for row in rows(out) if "damaged" in row] == [sample_id]
    with pytest.raises(CorruptSampleError):
        alpacache.train(config(tiny_checkpoint, broken, tmp_path / "stop", balance="curvature"))


def test_a_damaged_validation_sample_ends_the_run_saved(tiny_checkpoint, store, tmp_path):
    damaged_copy(store, tmp_path / "val", 1)
    out = tmp_path / "run"
    settings = {"val": str(tmp_path / "val"), "val_every": 2, "on_damage": "skip"}
    with pytest.raises(DataError, match=r"validation on .*val failed: (.|\n)*Saved at step 2\. Mend it with"):
        alpacache.train(config(tiny_checkpoint, store, out, **settings))
    assert read_checkpoint(out / "last").state["damaged"] == []
    assert [row["step"] for row in rows(out)] == [1, 2]
    assert alpacache.train(config(tiny_checkpoint, store, out, val=str(store), resume=True)).steps == 6


def test_a_run_that_stops_at_a_damaged_sample_keeps_what_it_did(tiny_checkpoint, store, tmp_path):
    damaged_copy(store, tmp_path / "broken", 1)
    out = tmp_path / "run"
    with pytest.raises(CorruptSampleError):
        alpacache.train(config(tiny_checkpoint, tmp_path / "broken", out, steps=20))
    done = [row["step"] for row in rows(out)]
    assert RunDirectory(out).steps == ([done[-1]] if done else [])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def checking_device(request, monkeypatch):
    """A device that checks rows itself; on the CPU plain Python stands in for the kernels."""
    pytest.importorskip("triton")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return "cuda"

    def build(chunks, device):
        return SimpleNamespace(chunks=chunks.tolist(), scratch_words=len(chunks))

    def check_rows(data, table, damage, scratch):
        assert len(scratch) >= table.scratch_words
        for row, start, size, crc in table.chunks:
            damage[row] |= google_crc32c.value(data[row, start : start + size].numpy().tobytes()) != crc

    monkeypatch.setattr("alpacache.cached_samples.ring.has_kernels", lambda device: True)
    monkeypatch.setattr("alpacache.gpu.checksum.ChunkTable", SimpleNamespace(build=build))
    monkeypatch.setattr("alpacache.gpu.checksum.check_rows", check_rows)
    return "cpu"


@pytest.mark.ci
@pytest.mark.system
@pytest.mark.parametrize("in_memory", [False, True])
def test_damage_that_the_device_finds_stops_the_run_before_its_step(
    tiny_checkpoint, store, tmp_path, checking_device, in_memory, monkeypatch
):
    """What is saved is what a run that ends there has, and the error names the sample."""
    settings = {"steps": 12, "device": checking_device, "in_memory": in_memory, "compile": False}
    seen_last = GlobalOrder(0, 10)[9]
    (sample_id,) = damaged_copy(store, tmp_path / "broken", 1, first=seen_last)
    out, clean = tmp_path / "run", tmp_path / "clean"
    with pytest.raises(CorruptSampleError, match=sample_id):
        alpacache.train(config(tiny_checkpoint, tmp_path / "broken", out, **settings))
    done = [row["step"] for row in rows(out)]
    assert done in ([1], [1, 2])
    assert RunDirectory(out).steps == done[-1:]
    alpacache.train(config(tiny_checkpoint, store, clean, save_every=done[-1], keep=99, **settings))
    saved = load_file(clean / f"checkpoints/step-{done[-1]:07d}/model.safetensors")
    if checking_device == "cpu":
        assert done == [1, 2]
        assert same(weights(out), saved)
        monkeypatch.setattr("alpacache.gpu.checksum.check_rows", lambda *given: None)
        alpacache.train(config(tiny_checkpoint, tmp_path / "broken", tmp_path / "unchecked", **settings))
    else:
        assert all(torch.allclose(value, saved[name], atol=1e-2) for name, value in weights(out).items())


def test_damage_of_the_way_to_the_device_is_no_damage_of_the_store(
    tiny_checkpoint, store, tmp_path, checking_device, monkeypatch
):
    check_rows = checksum.check_rows

    def bent(data, *rest):
        data[:, 5] ^= 1
        check_rows(data, *rest)

    monkeypatch.setattr("alpacache.gpu.checksum.check_rows", bent)
    with pytest.raises(UnreadableSampleError, match=r"reached the GPU damaged, and .* holds it undamaged"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", device=checking_device, compile=False))
    assert not RunDirectory(tmp_path / "run").steps


def test_a_fault_of_the_way_to_the_device_that_passes_costs_nothing(
    tiny_checkpoint, store, tmp_path, checking_device, monkeypatch
):
    check_rows, calls = checksum.check_rows, []

    def bent_now_and_then(data, *rest):
        calls.append(1)
        if len(calls) in (2, 5):
            data[:, 5] ^= 1
        check_rows(data, *rest)

    monkeypatch.setattr("alpacache.gpu.checksum.check_rows", bent_now_and_then)
    settings = {"device": checking_device, "compile": False, "steps": 6}
    report = alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", **settings))
    assert (report.steps, report.damaged, report.missed > 0) == (6, 0, True)
    monkeypatch.setattr("alpacache.gpu.checksum.check_rows", check_rows)
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "clean", **settings))
    if checking_device == "cpu":
        assert same(weights(tmp_path / "run"), weights(tmp_path / "clean"))


def test_too_many_damaged_samples_stop_the_run(tiny_checkpoint, store, tmp_path):
    damaged_copy(store, tmp_path / "broken", 6)
    with pytest.raises(CorruptSampleError):
        alpacache.train(config(tiny_checkpoint, tmp_path / "broken", tmp_path / "run", steps=30, on_damage="skip"))


def test_weights_of_stores_decide_what_is_seen(tiny_checkpoint, store, tmp_path):
    shutil.copytree(store, tmp_path / "other")
    mixed = (f"{store}=3", str(tmp_path / "other"))
    settings = {"stores": mixed, "steps": 5, "batch_size": 4}
    seen = []
    from alpacache.cached_samples import ring as batches

    original = batches.BatchRing._next

    def noting(ring, samples):
        batch = original(ring, samples)
        seen.extend(ring._dataset.locate(p)[0].path for p in map(order.__getitem__, batch.positions)) if batch else None
        return batch

    from alpacache.alpamayo import Checkpoint
    from alpacache.cached_samples.dataset import CachedDataset
    from alpacache.training.data_order import global_order

    chosen = config(tiny_checkpoint, store, tmp_path / "run", **settings)
    data = CachedDataset([store, tmp_path / "other"], Checkpoint(str(tiny_checkpoint)))
    weighted = [(str(store), 3.0), (mixed[1], 1.0)]
    order, _ = global_order(data, weighted, seed=0, by_curvature=False, skip_damaged=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.BatchRing, "_next", noting)
        alpacache.train(chosen)
    assert len(seen) == 20
    assert sum(path == store for path in seen) == 15
    changed = config(tiny_checkpoint, store, tmp_path / "run", **{**settings, "stores": (f"{store}=2", mixed[1])})
    with pytest.raises(UsageError, match="store_weights"):
        alpacache.train(replace(changed, resume=True))


def test_the_average_is_kept_and_resumed_to_the_same_bits(tiny_checkpoint, store, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"ema": 0.5, "ema_every": 2, "save_every": 3, "keep": 9}
    alpacache.train(config(tiny_checkpoint, store, whole, **settings))
    shutil.copytree(whole / "checkpoints/step-0000003", parts / "checkpoints/step-0000003")
    (parts / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    alpacache.train(config(tiny_checkpoint, store, parts, resume=True, **settings))
    first, second = (load_file(out / "last/average.safetensors") for out in (whole, parts))
    assert same(first, second)
    plain = weights(whole)
    assert first.keys() == plain.keys()
    assert not same(first, plain)
    assert same(read_trained(whole / "last", average=True).model, first)
    assert same(read_trained(whole / "last", average=False).model, plain)
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "none"))
    with pytest.raises(UsageError, match="no average"):
        read_trained(tmp_path / "none/last", average=True)


@pytest.mark.ci
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_average_is_up_to_date_resumable_and_does_not_depend_on_saving(tiny_checkpoint, store, tmp_path, cut):
    settings = {"ema": 0.9, "ema_every": 4, "keep": 9, "steps": 7}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    alpacache.train(config(tiny_checkpoint, store, whole, save_every=100, **settings))
    alpacache.train(config(tiny_checkpoint, store, parts, save_every=1, **settings))
    for step in range(cut + 1, 8):
        shutil.rmtree(parts / f"checkpoints/step-{step:07d}")
    alpacache.train(config(tiny_checkpoint, store, parts, resume=True, save_every=2, **settings))
    first, second = (load_file(out / "last/average.safetensors") for out in (whole, parts))
    assert same(first, second)
    one, two = (read_trained(out / "last", average=True) for out in (whole, parts))
    assert same(one.model, two.model)
    assert one.state["average"] == {"decay": 0.9, "behind": 3} == two.state["average"]
    plain = weights(whole)
    assert all(torch.equal(one.model[n], first[n].lerp(plain[n].float(), 1 - 0.9**3)) for n in first)
    assert not same(one.model, first)


def test_training_stops_when_validation_stops_getting_better(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    settings = {"val": str(store), "val_every": 1, "patience": 2, "lr": 1e-30, "min_lr": 0.0, "steps": 20}
    report = alpacache.train(config(tiny_checkpoint, store, out, **settings))
    assert report.stopped_early
    assert report.steps == 3
    assert (out / "best").resolve().name == "step-0000001"
    assert (out / "last").resolve().name == "step-0000003"
    again = alpacache.train(config(tiny_checkpoint, store, out, resume=True, **settings))
    assert (again.steps, again.stopped_early) == (3, True)
    more = alpacache.train(config(tiny_checkpoint, store, out, resume=True, **settings | {"patience": 4}))
    assert (more.steps, more.stopped_early) == (5, True)


def test_a_validation_that_is_not_finite_is_null_warns_and_is_never_the_best(
    tiny_checkpoint, store, tmp_path, monkeypatch, caplog
):
    losses = iter([math.nan, 0.5, math.inf, 0.4, math.nan])
    monkeypatch.setattr(training.Validation, "run", lambda *_: {"val_loss": next(losses)})
    out = tmp_path / "run"
    told = []
    settings = {"steps": 5, "val": str(store), "val_every": 1, "keep": 9}
    report = alpacache.train(config(tiny_checkpoint, store, out, **settings), on_progress=told.append)
    assert report.best_val_loss == 0.4
    assert [progress.notes["val"] for progress in told] == [
        "not finite",
        "0.5000",
        "not finite",
        "0.4000",
        "not finite",
    ]
    assert (out / "best").resolve().name == "step-0000004"
    assert read_checkpoint(out / "last").state["best"] == {"step": 4, "value": 0.4, "by": "loss", "since": 1}
    assert [row["val_loss"] for row in rows(out)] == [None, 0.5, None, 0.4, None]
    assert math.isnan(report.val_loss)
    warned = [record.getMessage() for record in caplog.records if "the weights" in record.getMessage()]
    assert len(warned) == 3
    assert warned[0].startswith("validation at step 1 is not finite (val_loss): the weights are broken")


def broken_from(step, monkeypatch):
    """Losses of training that are NaN from the `step`-th on; validation is of other draws."""
    from alpacache import flow_matching

    good, seen = flow_matching.loss, []

    def loss(velocity, *rest, **named):
        if velocity.requires_grad:
            seen.append(1)
        return good(velocity, *rest, **named) * (float("nan") if velocity.requires_grad and len(seen) >= step else 1.0)

    monkeypatch.setattr(flow_matching, "loss", loss)


def test_a_run_that_breaks_its_model_fails_with_strict_json(tiny_checkpoint, store, tmp_path, monkeypatch):
    """Its steps end before enough were skipped in a row to end it; whoever resumes it hears the same."""
    broken_from(2, monkeypatch)
    monkeypatch.setattr(training.Validation, "run", lambda *_: {"val_loss": math.nan})
    out = tmp_path / "run"
    settings = {"warmup": 0, "steps": 3, "val": str(store), "val_every": 1}
    with pytest.raises(NonFiniteError, match=r"not finite in 2 of 3 steps, the last 2 of them; these were not"):
        alpacache.train(config(tiny_checkpoint, store, out, **settings))
    written = rows(out)
    assert [row["loss"] is None for row in written] == [False, True, True]
    assert [row["val_loss"] for row in written] == [None] * 3
    state = json.loads((out / "last/state.json").read_text(), parse_constant=refuse)
    assert state["best"] == {"step": None, "value": None, "by": "loss", "since": 3}
    assert state["skipped"] == {"total": 2, "in_a_row": 2}
    assert not (out / "best").exists()
    with pytest.raises(NonFiniteError, match=r"not finite in 2 of 3 steps"):
        alpacache.train(config(tiny_checkpoint, store, out, resume=True, **settings))


def test_a_run_whose_steps_were_all_skipped_fails(tiny_checkpoint, store, tmp_path, monkeypatch):
    broken_from(1, monkeypatch)
    with pytest.raises(NonFiniteError, match="not finite in 2 of 2 steps"):
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "run", steps=2, warmup=0))
    assert RunDirectory(tmp_path / "run").steps == [2]


def test_a_checkpoint_that_follows_a_skipped_step_pushes_no_other_out(tiny_checkpoint, store, tmp_path, monkeypatch):
    out, settings = tmp_path / "run", {"save_every": 1, "keep": 2}
    with monkeypatch.context() as patch:
        broken_from(4, patch)
        with pytest.raises(NonFiniteError, match="3 steps in a row, last at step 6"):
            alpacache.train(config(tiny_checkpoint, store, out, steps=8, **settings))
    assert RunDirectory(out).steps == [2, 3, 4, 5]
    report = alpacache.train(config(tiny_checkpoint, store, out, steps=8, resume=True, **settings))
    assert (report.steps, report.skipped) == (8, 2)
    assert RunDirectory(out).steps == [7, 8]


def test_what_is_not_finite_is_neither_saved_nor_taken_up(tiny_checkpoint, store, tmp_path, monkeypatch):
    """As after a fault of memory: no setting that is allowed writes it."""
    from alpacache.training.learner import Learner

    name, run = "action_out_proj.weight", tmp_path / "run"
    good = Learner.not_finite

    def hit(learner):
        with torch.no_grad():
            learner.parameters[name][0, 3] = math.inf
        return good(learner)

    alpacache.train(config(tiny_checkpoint, store, run, steps=2, save_every=2, warmup=0))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "not_finite", hit)
        with pytest.raises(NonFiniteError, match=rf"after step 1 .* infinity\): {name}\. They are not saved"):
            alpacache.train(config(tiny_checkpoint, store, tmp_path / "hit", steps=1, warmup=0))
        assert not RunDirectory(tmp_path / "hit").steps
        patch.setattr(Learner, "not_finite", lambda learner: hit(learner) and [])
        alpacache.train(config(tiny_checkpoint, store, tmp_path / "old", steps=1, warmup=0))
    with pytest.raises(DataError, match=rf"model.safetensors has tensors that are not finite .*: {name}; use an earli"):
        read_trained(tmp_path / "old/last", average=False)


def test_a_base_model_that_is_not_finite_is_refused(tiny_checkpoint, store, tmp_path):
    from safetensors.torch import save_file

    sick = shutil.copytree(tiny_checkpoint, tmp_path / tiny_checkpoint.name)
    name = "expert.layers.1.mlp.up_proj.weight"
    shard = next(path for path in sick.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name][2, 5] = math.nan
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UsageError, match=rf"weights that are not finite \(NaN or infinity\): {name}\. Fetch"):
        alpacache.train(config(sick, store, tmp_path / "run"))
    assert not RunDirectory(tmp_path / "run").steps


def test_a_validation_can_be_interrupted_and_is_made_up_for(tiny_checkpoint, store, tmp_path, monkeypatch):
    from alpacache.training.validation import Validation

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {"steps": 4, "val": str(store), "val_every": 2}
    alpacache.train(config(tiny_checkpoint, store, whole, **settings))
    good = Validation._losses

    def losses(*given):
        signal.raise_signal(signal.SIGTERM)
        return good(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_losses", losses)
        for resume in (False, True):  # also where it is made up for
            with pytest.raises(InterruptedRunError, match="stopped on request at step 2; saved"):
                alpacache.train(config(tiny_checkpoint, store, parts, resume=resume, **settings))
    assert [row["step"] for row in rows(parts)] == [1, 2]
    alpacache.train(config(tiny_checkpoint, store, parts, resume=True, **settings))
    assert validated(whole) == validated(parts)
    assert same(weights(whole), weights(parts))


def test_training_losses_by_turn_are_the_same_over_a_resume(tiny_checkpoint, store, tmp_path):
    whole = tmp_path / "whole"
    settings = {"steps": 5, "val": str(store), "val_every": 3, "val_samples": 1}
    alpacache.train(config(tiny_checkpoint, store, whole, **settings, save_every=1, keep=9))
    assert [any(name.startswith("train_loss/") for name in row) for row in validated(whole)] == [True, True]
    for step in (1, 4):
        parts = tmp_path / f"from-{step}"
        shutil.copytree(whole / f"checkpoints/step-{step:07d}", parts / f"checkpoints/step-{step:07d}")
        shutil.copy(whole / "metrics.jsonl", parts)
        alpacache.train(config(tiny_checkpoint, store, parts, **settings, resume=True))
        assert validated(parts) == validated(whole)


def test_the_best_may_be_chosen_by_min_ade_and_strata_are_told_apart(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    settings = {"val": str(store), "val_every": 3, "best_by": "min_ade", "val_samples": 4}
    report = alpacache.train(config(tiny_checkpoint, store, out, **settings))
    validated = {row["step"]: row for row in rows(out) if "val_loss" in row}
    found = {step: row["val_min_ade"] for step, row in validated.items()}
    assert (out / "best").resolve().name == f"step-{min(found, key=found.get):07d}"
    assert report.val_min_ade == found[6]
    for row in validated.values():
        turns = [name.split("/")[1] for name in row if name.startswith("val_loss/")]
        assert turns
        assert min(row[f"val_loss/{turn}"] for turn in turns) <= row["val_loss"]
        assert max(row[f"val_loss/{turn}"] for turn in turns) >= row["val_loss"]
        assert any(name.startswith("train_loss/") for name in row)


def test_every_number_is_in_the_tensorboard_events(tiny_checkpoint, store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    alpacache.train(config(tiny_checkpoint, store, out, val=str(store), val_every=3))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows(out)])
    assert [event.step for event in events.Scalars("val_loss")] == [3, 6]
    alpacache.train(config(tiny_checkpoint, store, tmp_path / "silent", track="none"))
    assert not (tmp_path / "silent/tensorboard").exists()

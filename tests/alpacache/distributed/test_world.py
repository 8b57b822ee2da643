"""Several processes of one run, on CPUs: the same curve as one process, exact resume on another number, failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import alpacache
from alpacache.distributed.world import World, join_world
from alpacache.errors import LostProcessError, ProcessGroupError, UsageError
from alpacache.extraction.config import ExtractConfig
from alpacache.training.config import TrainConfig
from alpacache.training.run_directory import RunDirectory
from cache_store import CacheReader

STEPS, BATCH = 6, 4


@pytest.fixture(scope="module")
def store(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "store"
    config = ExtractConfig(source="synthetic:10", model=str(tiny_checkpoint), store=str(path), frames=1, device="cpu")
    alpacache.extract(config)
    return path


@pytest.fixture(scope="module")
def alone(tiny_checkpoint, store, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    settings = {"steps": STEPS, "batch_size": BATCH, "draws": 2, "lr": 1e-3, "warmup": 2, "val_every": 3}
    alpacache.train(
        TrainConfig(
            stores=(str(store),),
            model=str(tiny_checkpoint),
            out=str(out),
            val=str(store),
            on_overlap="allow",
            device="cpu",
            **settings,
        )
    )
    return out


def launch(processes, store, model, out, *extra):
    """`torchrun ... alpacache train`, begun."""
    settings = ["--steps", str(STEPS), "--batch-size", str(BATCH), "--draws", "2", "--lr", "1e-3", "--warmup", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "cli.main", "train"]
    command += ["--store", str(store), "--model", str(model), "--out", str(out), "--device", "cpu", *settings, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def close(first, second):
    """Weights that differ by rounding: AdamW makes whole steps of gradients that are nearly zero."""
    one, other = (load_file(RunDirectory(out).path / "last/model.safetensors") for out in (first, second))
    assert one.keys() == other.keys()
    moved = torch.cat([(one[name] - other[name]).flatten() for name in one])
    return float(moved.norm() / torch.cat([one[name].flatten() for name in one]).norm())


@pytest.fixture(scope="module")
def parallel(tiny_checkpoint, store, tmp_path_factory):
    """The run of so many processes, made once."""
    made = {}

    def run(processes):
        if processes not in made:
            out = tmp_path_factory.mktemp("parallel") / "run"
            options = ("--val", str(store), "--on-overlap", "allow", "--val-every", "3", "--save-every", "3", "--json")
            code, printed, errors = finished(launch(processes, store, tiny_checkpoint, out, *options))
            assert code == 0, errors[-3000:]
            assert json.loads(printed)["steps"] == STEPS  # one report, of the first process
            made[processes] = out
        return made[processes]

    return run


@pytest.mark.ci
@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_global_batch_gives_the_same_curve(alone, parallel, processes):
    out = parallel(processes)
    got, expected = rows(out), rows(alone)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for name in ("loss", "grad_norm", "lr"):
        assert [row[name] for row in got] == pytest.approx([row[name] for row in expected], rel=2e-5)
    for row, other in zip(got, expected, strict=True):
        for name in (name for name in other if name.startswith(("val_loss", "train_loss"))):
            assert row[name] == pytest.approx(other[name], rel=1e-4)
    assert close(out, alone) < 1e-4


@pytest.mark.ci
def test_a_run_goes_on_with_another_number_of_processes(tiny_checkpoint, store, alone, parallel, tmp_path):
    half = tmp_path / "half"
    (half / "checkpoints").mkdir(parents=True)
    shutil.copytree(parallel(2) / "checkpoints/step-0000003", half / "checkpoints/step-0000003")
    shutil.copy(parallel(2) / "metrics.jsonl", half)
    resumed = TrainConfig(
        stores=(str(store),),
        model=str(tiny_checkpoint),
        out=str(half),
        steps=STEPS,
        batch_size=BATCH,
        draws=2,
        lr=1e-3,
        warmup=2,
        device="cpu",
        resume=True,
    )
    alpacache.train(resumed)
    assert [row["loss"] for row in rows(half)] == pytest.approx([row["loss"] for row in rows(alone)], rel=2e-5)


@pytest.mark.ci
def test_a_failing_process_ends_all_with_its_message_alone(tiny_checkpoint, store, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    reader = CacheReader(broken)
    for sample_id in reader.sample_ids[:1]:
        chunk = sorted((broken / reader.record(sample_id).folder / "kv").glob("c.*"))[0]
        data = bytearray(chunk.read_bytes())
        data[100] ^= 1
        chunk.write_bytes(data)
    code, _, errors = finished(launch(2, broken, tiny_checkpoint, tmp_path / "run", "--steps", "30"))
    assert code != 0
    ours = [line for line in errors.splitlines() if line.startswith("alpacache: ")]
    assert len(ours) == 1, errors[-3000:]
    assert reader.sample_ids[0] in ours[0]
    assert "Traceback" not in errors.split("torch/distributed")[0]


@pytest.mark.ci
def test_a_request_to_stop_saves_once_and_resumes(tiny_checkpoint, store, tmp_path):
    out = tmp_path / "run"
    process = launch(2, store, tiny_checkpoint, out, "--steps", "4000")
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or len(rows(out)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    finished(process)
    step = RunDirectory(out).steps[-1]
    assert [row["step"] for row in rows(out)] == list(range(1, step + 1))


def test_a_batch_that_cannot_be_shared_is_refused():
    world = World(rank=1, size=3, device=torch.device("cpu"))
    assert world.local_batch_size(12) == 4
    with pytest.raises(UsageError, match="over 3 processes; expected a multiple of 3"):
        world.local_batch_size(8)


@pytest.fixture
def joined(monkeypatch):
    """The world of a process that torchrun has started, without the others."""
    monkeypatch.setattr(dist, "init_process_group", lambda *backend, **settings: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return join_world("cpu")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:9"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection reset by peer"),
        dist.DistNetworkError(
            "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?"
        ),
        dist.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error, NCCL version 2.27.7"
        ),
    ],
)
def test_a_process_that_has_ended_says_itself_why(joined, error):
    with pytest.raises(LostProcessError), joined:
        raise error


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3\nCuda failure 2 'out of memory'"),
            "out of memory'\nNCCL takes GPU memory of its own, .* smaller --memory-budget",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc] Timed out waiting 1800000ms for recv"),
            "see what each of them said",
        ),
        (dist.DistBackendError("NCCL error: unhandled system error"), "NCCL_DEBUG=WARN"),
    ],
)
def test_any_other_error_of_the_group_has_a_text(joined, error, remedy):
    with pytest.raises(ProcessGroupError, match=rf"(?s)^process 1 of 2: talking to .*{remedy}") as caught, joined:
        raise error
    assert not isinstance(caught.value, LostProcessError)
    assert "--resume" in str(caught.value)


def test_an_error_of_something_else_is_left_as_it_is(joined):
    with pytest.raises(RuntimeError, match="Connection reset by the object store"), joined:
        raise RuntimeError("Connection reset by the object store")

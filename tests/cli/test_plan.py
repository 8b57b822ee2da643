"""`alpacache plan`: what is printed, one JSON object, exit codes."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from alpacache.planning import plan as planning
from alpacache.planning.machine import DiskSpeed

PAGE = Path(__file__).parents[2] / "docs/how-to/plan-a-run.md"

ASK = ("--samples", "1000", "--codec", "int8", "--epochs", "10", "--batch-size", "4", "--gpu", "4090")


@pytest.fixture
def run(run_here):
    return partial(run_here, "plan")


def test_json_is_one_object_with_every_number(tmp_path, run):
    found = json.loads(run(*ASK, "--memory-budget", "24GB", "--store", tmp_path / "store", "--json").stdout)
    assert (found["tokens"], found["images"], found["tokens_an_image"]) == (809, 4, 180)
    assert found["store_bytes"] == 1000 * sum(found["bytes_by_field"].values())
    assert found["bytes_by_codec"]["int8"] == sum(found["bytes_by_field"].values())
    assert set(found["bytes_by_codec"]) == set(found["kv_bytes_by_codec"]) == {"bf16", "fp8", "int8", "int5", "int4"}
    assert found["train"]["steps"] == 2500
    machine = found["machine"]
    assert (machine["gpu"]["memory_gb"], machine["gpu_is"], machine["disk_is"]) == (24, "scaled", "assumed")
    assert found["memory"]["micro_batch"] == 4
    assert found["memory_bytes"] < found["cap_bytes"] == int(23.5 * 2**30)
    assert found["free_bytes"] > 0
    assert {"hours", "prefill_s", "reading_s", "write_s", "bus_s", "weights_bytes", "memory"} == set(found["extract"])
    assert list(tmp_path.iterdir()) == []


def test_tables_say_what_is_an_estimate(run):
    text = " ".join(run(*ASK).stdout.split())
    assert "809, of which 4 images of 180" in text
    assert "int8 * 63.3 70.0 70.0" in text
    assert "Times are estimates: measured on one H100 80GB only, scaled to GeForce RTX 4090" in text
    assert "sum, to be reserved" in text


def test_a_stage_one_that_does_not_fit_has_no_hours(run):
    ask = ("--samples", "1000", "--codec", "int8", "--gpu", "4080", "--memory-budget", "16GB", "--reasoning", "rollout")
    text = " ".join(run(*ask).stdout.split())
    assert "extract does not fit, see below weights 16.4 GiB train" in text
    assert "both stages: stage one does not fit GPU memory of train" in text
    assert "Stage one does not fit: reasoning rollouts need" in text
    found = json.loads(run(*ask, "--json").stdout)
    assert (found["extract"]["hours"], found["loop"]["cached_hours"]) == (None, None)


def test_hours_without_generating_rollouts_are_at_least(run):
    text = " ".join(run(*ASK, "--reasoning", "rollout").stdout.split())
    assert re.search(r"extract at least \d\.\d min a sample .* generating rollouts is not counted weights", text)
    assert re.search(r"both stages: at least \S+ min, 22 GiB and 201 GB of disk", text)
    assert "from RAM, without generating rollouts" in text
    assert "at least" not in run(*ASK).stdout


def test_the_rate_of_weights_that_arrive_is_told(run, monkeypatch, tmp_path):
    ask = (*ASK, "--memory-budget", "12GB")
    assert re.search(r"in RAM, \d+ ms a sample to arrive \(assumed 25 GB/s each way\)", run(*ask).stdout)
    speed = DiskSpeed(write_bytes_s=1e9, read_bytes_s=1.8e9, probe_bytes=2**29)
    monkeypatch.setattr(planning, "disk_speed", lambda path: speed)
    monkeypatch.setattr(planning, "available_bytes", lambda: 14 * 10**9)
    monkeypatch.setattr(planning.torch.cuda, "is_available", lambda: False)
    text = run(*ask, "--probe", "--store", tmp_path).stdout
    assert re.search(r"in the files, \d+ ms a sample to arrive \(probed 1\.80 GB/s\)", text)


def test_the_page_shows_what_is_printed(run):
    _, command, _, shown, *_ = PAGE.read_text().split("```")
    printed = run(*command.split()[3:]).stdout
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "1", "--codec", "int3"), "codec is 'int3'; expected bf16"),
        (("--samples", "1", "--picture", "full"), "picture is 'full'; expected HEIGHTxWIDTH"),
        (("--samples", "1", "--memory-budget", "5GB", "--batch-size", "1"), "Use --trainable lora"),
    ],
)
def test_what_cannot_be_is_exit_2(arguments, message, run):
    done = run(*arguments, code=2)
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_the_table_of_500_clips_is_what_a_source_of_as_many_comes_to(run_here):
    page = PAGE.read_text()
    rows = re.findall(r"^\| `(5.1|every:\S+)` \| (\d+) \| ([\d.]+) GB \| ([\d.]+) min \| ([\d.]+) min \|$", page, re.M)
    assert len(rows) == 3
    for t0, samples, store_gb, extract_min, train_min in rows:
        ask = ("--t0", t0, "--codec", "int8", "--batch-size", "8", "--gpu", "4090", "--memory-budget", "24GB")
        planned = json.loads(run_here("plan", "synthetic:500", *ask, "--json").stdout)
        assert planned["samples"] == int(samples)
        found = planned["store_bytes"] / 1e9, planned["extract"]["hours"] * 60, planned["train"]["hours"] * 60
        assert [f"{value:.1f}" for value in found] == [store_gb, extract_min, train_min]

"""Object storage from the command line: each command that takes a store, and copies."""

import json
import sys

import pytest

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "Tiny-R1")


@pytest.mark.ci
def test_the_whole_way_in_a_bucket(model, tmp_path, run_here, s3):
    common = ("--model", model, "--device", "cpu", "--json")
    extract = ("extract", "synthetic:4", "--store", s3.uri(), "--frames", 1, *common)
    assert json.loads(run_here(*extract).stdout)["extracted"] == 4
    again = json.loads(run_here(*extract, "--retry-quarantined").stdout)
    assert (again["already_there"], again["committed"]) == (4, 4)
    found = json.loads(run_here("info", s3.uri(), "--json").stdout)
    assert (found["path"], found["samples"]) == (s3.uri(), 4)
    assert json.loads(run_here("verify", s3.uri(), "--deep", "--json").stdout)["damaged"] == []
    train = (
        "train",
        "--val",
        s3.uri(),
        "--on-overlap",
        "allow",
        "--val-every",
        1,
        "--steps",
        2,
        "--batch-size",
        2,
        "--balance",
        "curvature",
    )
    remote = json.loads(run_here(*train, "--store", s3.uri(), "--out", tmp_path / "run", *common).stdout)
    copied = json.loads(run_here("copy", s3.uri(), tmp_path / "local", "--json").stdout)
    assert (copied["copied"], copied["damaged"]) == (4, [])
    local = json.loads(run_here(*train, "--store", tmp_path / "local", "--out", tmp_path / "run2", *common).stdout)
    assert (remote["steps"], remote["last_loss"]) == (2, local["last_loss"])
    config = (tmp_path / "run/config.toml").read_text()
    assert s3.uri() in config
    evaluate = ("eval", "--checkpoint", tmp_path / "run", "--paths", 2, "--flow-steps", 2, *common)
    for store, out in ((s3.uri(), "remote"), (tmp_path / "local", "judged")):
        run_here(*evaluate, "--store", store, "--out", tmp_path / out)
    summaries = [json.loads((tmp_path / name / "eval.json").read_text())["summary"] for name in ("remote", "judged")]
    assert summaries[0]["strata"] == summaries[1]["strata"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or s3.secret_key.encode() not in path.read_bytes(), path


def test_a_copy_says_what_it_did(run_here, tmp_path, model, s3):
    run_here("extract", "synthetic:2", "--model", model, "--store", tmp_path / "a", "--frames", 1, "--device", "cpu")
    text = " ".join(run_here("copy", tmp_path / "a", s3.uri()).stdout.split())
    assert "copied 2 of 2 samples, 0 were there already" in text
    found = run_here("copy", tmp_path / "a", s3.uri())
    assert "copied 0 of 2 samples, 2 were there already" in " ".join(found.stdout.split())
    chunk = next(path for path in sorted((tmp_path / "a").glob("samples/*/kv/c*")))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    damaged = json.loads(run_here("copy", tmp_path / "a", tmp_path / "b", "--json", code=1).stdout)
    assert (damaged["copied"], len(damaged["damaged"])) == (1, 1)
    assert "field 'kv'" in damaged["damaged"][0]


def test_what_is_wrong_is_one_message_and_exit_2(run_here, monkeypatch, s3, tmp_path, model):
    assert "no bucket 'nobucket'" in run_here("info", "s3://nobucket/x", code=2).stderr
    assert f"no store at {s3.uri()}" in run_here("verify", s3.uri(), code=2).stderr
    assert "scheme gs://" in run_here("copy", s3.uri(), "gs://bucket/x", code=2).stderr
    refused = run_here("info", f"s3://{s3.access_key}:{s3.secret_key}@{s3.bucket}/x", code=2).stderr
    assert "credentials in a URI" in refused
    assert s3.secret_key not in refused
    assert "is object storage" in run_here("plan", "--samples", 1, "--store", s3.uri(), code=2).stderr
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials in AWS_ACCESS_KEY_ID" in run_here("info", s3.uri(), code=2).stderr
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert 'pip install "alpacache[s3]"' in run_here("info", s3.uri(), code=2).stderr


def test_a_server_that_fails_is_exit_1(run_here, s3, model):
    extract = ("extract", "synthetic:2", "--model", model, "--store", s3.uri(), "--frames", 1, "--device", "cpu")
    fault = s3.fail("500", "PUT", "/kv/c.", times=10**6)
    said = run_here(*extract, code=1).stderr
    assert "run the same command again" in said
    assert "Traceback" not in said
    fault.times = 0
    assert json.loads(run_here(*extract, "--json").stdout)["extracted"] == 2

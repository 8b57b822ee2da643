"""Object storage from the command line: each command that takes a store, and copies."""

import json
import signal
import sys

import pytest

from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "Tiny-R1")


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process, as starting it anew six times would take most of a minute."""

    def call(*arguments, code=0):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["alpacache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        assert (ended.value.code or 0) == code, found.err
        return found

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def test_the_whole_way_in_a_bucket(model, tmp_path, run, s3):
    common = ("--model", model, "--device", "cpu", "--json")
    extract = ("extract", "synthetic:4", "--store", s3.uri(), "--frames", 1, *common)
    assert json.loads(run(*extract).out)["extracted"] == 4
    again = json.loads(run(*extract, "--retry-quarantined").out)
    assert (again["already_there"], again["committed"]) == (4, 4)
    found = json.loads(run("info", s3.uri(), "--json").out)
    assert (found["path"], found["samples"]) == (s3.uri(), 4)
    assert json.loads(run("verify", s3.uri(), "--deep", "--json").out)["damaged"] == []
    train = ("train", "--val", s3.uri(), "--val-every", 1, "--steps", 2, "--batch-size", 2, "--balance", "curvature")
    remote = json.loads(run(*train, "--store", s3.uri(), "--out", tmp_path / "run", *common).out)
    copied = json.loads(run("copy", s3.uri(), tmp_path / "local", "--json").out)
    assert (copied["copied"], copied["damaged"]) == (4, [])
    local = json.loads(run(*train, "--store", tmp_path / "local", "--out", tmp_path / "run2", *common).out)
    assert (remote["steps"], remote["last_loss"]) == (2, local["last_loss"])
    config = (tmp_path / "run/config.toml").read_text()
    assert s3.uri() in config
    evaluate = ("eval", "--checkpoint", tmp_path / "run", "--paths", 2, "--flow-steps", 2, *common)
    for store, out in ((s3.uri(), "remote"), (tmp_path / "local", "local")):
        run(*evaluate, "--store", store, "--out", tmp_path / out)
    summaries = [json.loads((tmp_path / name / "eval.json").read_text())["summary"] for name in ("remote", "local")]
    assert summaries[0]["strata"] == summaries[1]["strata"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or s3.secret_key.encode() not in path.read_bytes(), path


def test_a_copy_says_what_it_did(run, tmp_path, model, s3):
    run("extract", "synthetic:2", "--model", model, "--store", tmp_path / "a", "--frames", 1, "--device", "cpu")
    text = " ".join(run("copy", tmp_path / "a", s3.uri()).out.split())
    assert "copied 2 of 2 samples, 0 were there already" in text
    found = run("copy", tmp_path / "a", s3.uri())
    assert "copied 0 of 2 samples, 2 were there already" in " ".join(found.out.split())
    chunk = next(path for path in sorted((tmp_path / "a").glob("samples/*/kv/c*")))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    damaged = json.loads(run("copy", tmp_path / "a", tmp_path / "b", "--json", code=1).out)
    assert (damaged["copied"], len(damaged["damaged"])) == (1, 1)
    assert "field 'kv'" in damaged["damaged"][0]


def test_what_is_wrong_is_one_message_and_exit_2(run, monkeypatch, s3, tmp_path, model):
    assert "no bucket 'nobucket'" in run("info", "s3://nobucket/x", code=2).err
    assert f"no store at {s3.uri()}" in run("verify", s3.uri(), code=2).err
    assert "scheme gs://" in run("copy", s3.uri(), "gs://bucket/x", code=2).err
    refused = run("info", f"s3://{s3.access_key}:{s3.secret_key}@{s3.bucket}/x", code=2).err
    assert "credentials in a URI" in refused
    assert s3.secret_key not in refused
    assert "is object storage" in run("plan", "--samples", 1, "--store", s3.uri(), code=2).err
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials in AWS_ACCESS_KEY_ID" in run("info", s3.uri(), code=2).err
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert 'pip install "alpacache[s3]"' in run("info", s3.uri(), code=2).err


def test_a_server_that_fails_is_exit_1(run, s3, model):
    extract = ("extract", "synthetic:2", "--model", model, "--store", s3.uri(), "--frames", 1, "--device", "cpu")
    fault = s3.fail("500", "PUT", "/kv/c.", times=10**6)
    said = run(*extract, code=1).err
    assert "run the same command again" in said
    assert "Traceback" not in said
    fault.times = 0
    assert json.loads(run(*extract, "--json").out)["extracted"] == 2

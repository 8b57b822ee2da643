"""The command line: exit codes, one JSON object on stdout, messages that say the next step."""

import json
import sys

import pytest

import alpacache
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("cli") / "Tiny-R1")


@pytest.mark.system
@pytest.mark.ci
def test_the_whole_way_with_json(model, tmp_path, run, run_here):
    common = ("--model", model, "--device", "cpu", "--json")
    prepared = json.loads(run("prepare", "synthetic:4", "--out", tmp_path / "samples", "--frames", 1, "--json").stdout)
    assert (prepared["samples"], prepared["rejected"]) == (4, {})
    extract = ("extract", tmp_path / "samples", "--store", tmp_path / "store", "--frames", 1, *common)
    extract += ("--codec", "int8")
    assert json.loads(run(*extract).stdout)["extracted"] == 4
    assert json.loads(run_here(*extract).stdout)["already_there"] == 4
    info = json.loads(run("info", tmp_path / "store", "--json").stdout)
    assert (info["samples"], info["quarantined"]) == (4, 0)
    assert info["size_bytes"] == sum(info["size_by_field"].values())
    assert (info["identity"]["codec"], info["identity"]["codec_definition"]["kind"]) == ("int8", "affine")
    assert (info["fields"]["kv"]["dtype"], info["size_by_field"]["kv_shape"]) == ("uint8", 4 * 40)
    assert "codec int8 from bfloat16" in " ".join(run_here("info", tmp_path / "store").stdout.split())
    refused = run_here(*extract, "--codec", "int4", code=2)
    assert 'identity.codec: expected "int4", found "int8"' in " ".join(refused.stderr.split())
    verified = json.loads(run("verify", tmp_path / "store", "--deep", "--json").stdout)
    assert (verified["samples"], verified["damaged"]) == (4, [])
    train = (
        "train",
        "--store",
        tmp_path / "store",
        "--out",
        tmp_path / "run",
        "--steps",
        2,
        "--batch-size",
        2,
        *common,
    )
    assert json.loads(run(*train).stdout)["steps"] == 2
    evaluate = ("eval", "--store", tmp_path / "store", "--checkpoint", tmp_path / "run", "--out", tmp_path / "eval")
    summary = json.loads(run(*evaluate, "--paths", 2, "--flow-steps", 2, *common).stdout)["summary"]
    assert summary["samples"] == 4
    assert set(summary["strata"]["all"]["metrics"]) == {"base", "trained", "constant velocity", "constant turn rate"}
    export = ("export", "--model", model, "--checkpoint", tmp_path / "run", "--out")
    exported = json.loads(run(*export, tmp_path / "full", "--json").stdout)
    assert (exported["step"], exported["linked_files"], exported["expert_only"]) == (2, 1, False)
    text = " ".join(run_here(*export, tmp_path / "lean", "--expert-only").stdout.split())
    assert f"next alpacache eval --store STORE --model {tmp_path / 'lean'} --out EVAL" in text
    alone = ("eval", "--store", tmp_path / "store", "--out", tmp_path / "alone", "--paths", 2, "--flow-steps", 2)
    alone += ("--device", "cpu", "--json", "--model")
    for name in ("full", "lean"):
        assert json.loads(run_here(*alone, tmp_path / name).stdout)["summary"]["models"] == ["base"]
    again = run_here(*export, tmp_path / "full", "--json")
    assert "holds this export already, whole; nothing was written" in again.stderr
    assert json.loads(again.stdout)["existed"] is True
    refused = run_here(*export, tmp_path / "store", "--json", code=2)
    assert "is a store" in refused.stderr
    assert refused.stdout == ""
    refused = run_here(*train, code=2)
    assert "pass --resume to go on" in refused.stderr
    assert refused.stdout == ""


@pytest.mark.system
def test_reasoning_rollouts(model, tmp_path, run_here):
    store, common = tmp_path / "store", ("--model", model, "--device", "cpu", "--json")
    extract = ("extract", "synthetic:1", "--store", store, "--frames", 1, "--reasoning", "rollout", "--rollouts", 2)
    assert json.loads(run_here(*extract, *common).stdout)["extracted"] == 1
    assert json.loads(run_here("info", store, "--json").stdout)["identity"]["reasoning"]["rollouts"] == 2
    evaluate = ("eval", "--store", store, "--out", tmp_path / "eval", "--flow-steps", 2, *common)
    refused = run_here(*evaluate, code=2)
    assert "has 2 reasoning rollouts per sample, 6 paths need one each" in " ".join(refused.stderr.split())
    for options, reasoning in ((("--paths", 2), "rollout"), (("--reasoning", "none"), "none")):
        run_here(*evaluate, *options)
        assert json.loads((tmp_path / "eval/eval.json").read_text())["settings"]["reasoning"] == reasoning


@pytest.mark.ci
def test_probe(model, tmp_path, run_here):
    store = tmp_path / "store"
    run_here("extract", "synthetic:10", "--model", model, "--store", store, "--frames", 1, "--device", "cpu")
    probe = ("probe", "--store", store, "--out", tmp_path / "probe")
    found = json.loads(run_here(*probe, "--json").stdout)
    written = json.loads((tmp_path / "probe/probe.json").read_text())
    assert found["conclusion"] == written["conclusion"]
    assert (found["vectors"], found["main"]) == ({"hidden": 256}, "hidden")
    assert [verdict["answer"] for verdict in found["verdicts"]] == ["too few samples"] * 3
    text = " ".join(run_here(*probe, "--layers", "0,3", "--pool", "last").stdout.split())
    assert "R^2 on clips not seen, 10 samples of 10 clips" in text
    assert "R^2 of single layers, ridge, features alone" in text
    assert "heading change: too few samples to conclude." in text
    assert "layers is 'first'; expected last, all or layer" in run_here(*probe, "--layers", "first", code=2).stderr
    refused = run_here(*probe, "--samples", 5, "--json", code=2)
    assert "come from 5 clips" in refused.stderr
    assert refused.stdout == ""


def test_damage_is_exit_1_and_names_the_sample(model, tmp_path, run_here):
    store = tmp_path / "store"
    run_here("extract", "synthetic:1", "--model", model, "--store", store, "--frames", 1, "--device", "cpu")
    chunk = next(path for path in sorted(store.glob("samples/*/kv/c*")) if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    run_here("verify", store)
    damaged = json.loads(run_here("verify", store, "--deep", "--json", code=1).stdout)["damaged"]
    assert {item["sample_id"] for item in damaged} == {"synthetic-0-000000@5100000#0"}


def test_quarantine_is_exit_3(model, tmp_path, run_here):
    folder = tmp_path / "drives"
    (folder / "clips/a").mkdir(parents=True)
    cameras = ["camera_front_wide_120fov"]
    (folder / "dataset.json").write_text(json.dumps({"name": "broken", "cameras": cameras, "clips": ["a"]}))
    done = run_here(
        "extract",
        f"folder:{folder}",
        "--model",
        model,
        "--store",
        tmp_path / "store",
        "--device",
        "cpu",
        "--json",
        code=3,
    )
    (reason,) = json.loads(done.stdout)["quarantined"].values()
    assert "egomotion" in reason
    assert "holds no sample of this selection: all 1 are refused. Mend" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("extract", "nonsense:3", "--model", "MODEL", "--store", "x"), "is no data source; expected folder:DIR"),
        (("extract", "synthetic:3", "--model", "./nowhere", "--store", "x"), "neither a directory nor a hub id"),
        (
            ("extract", "synthetic:3", "--model", "MODEL", "--store", "x", "--codec", "int3"),
            "codec is 'int3'; expected bf16",
        ),
        (("extract", "synthetic:3", "--model", "MODEL", "--store", "x", "--cameras", "roof"), "unknown camera 'roof'"),
        (
            ("extract", "synthetic:3", "--model", "MODEL", "--store", "x", "--shard", "3/3"),
            "expected I/N with 0 <= I < N",
        ),
        (("train", "--steps", "3"), "--store, --model, --out missing"),
        (("train", "--store", "nowhere", "--model", "MODEL", "--out", "r", "--steps", "1"), "nowhere"),
        (("train", "--store", "s", "--model", "MODEL", "--out", "r"), "neither is given; expected one of the two"),
        (("eval", "--store", "nowhere", "--model", "MODEL", "--out", "e"), "nowhere"),
        (("export", "--model", "MODEL", "--checkpoint", "nowhere", "--out", "e"), "nowhere is neither a run directory"),
        (("info", "nowhere"), "nowhere"),
        (("extract", "synthetic:3", "--model", "MODEL", "--store", "x", "--device", "foo"), "device 'foo' is unknown"),
        (("extract", "synthetic:3", "--model", "MODEL", "--store", "x", "--device", "cuda:99"), "is not there"),
    ],
)
def test_bad_input_is_exit_2_and_touches_nothing(arguments, message, model, tmp_path, run_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = run_here(*(model if item == "MODEL" else item for item in arguments), code=2)
    assert message in " ".join(refused.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_config_key_names_the_nearest(tmp_path, run_here):
    config = tmp_path / "train.toml"
    config.write_text('stores = ["s"]\nmodel = "m"\nout = "r"\nsteps = 1\nbatchsize = 3\n')
    assert "unknown key 'batchsize'; did you mean 'batch_size'?" in run_here("train", "--config", config, code=2).stderr


@pytest.mark.parametrize(
    "command", ["prepare", "plan", "extract", "train", "eval", "export", "info", "verify", "clean", "doctor", "demo"]
)
def test_every_command_has_help_with_an_example(command, run_here):
    text = run_here(command, "--help").stdout
    assert "Usage: " in text
    if command not in ("info", "verify"):
        assert "Example: " in text


def test_versions_of_what_matters_are_printed(run):
    lines = run("--version").stdout.splitlines()
    assert lines[0] == f"alpacache {alpacache.__version__}"
    assert any(line.startswith("torch ") for line in lines)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; everything committed so far is kept."),
        (PermissionError(13, "Permission denied", "/there"), 1, "/there: Permission denied. See that you may read and"),
        (
            OSError(28, "No space left on device", "/full"),
            1,
            "/full: No space left on device. Make room there, and run",
        ),
        (FileNotFoundError(2, "No such file", "/gone"), 1, "/gone: No such file. See that the place is there, and"),
        (OSError(36, "File name too long", "/xx"), 2, "/xx: File name too long. Choose a shorter name."),
        (OSError("pipe of a reader"), 1, "pipe of a reader. Mend what it names, and run the same command again; what"),
    ],
)
def test_what_ends_a_command_from_outside_is_said(error, code, message, monkeypatch, capsys):
    def end(*given, **named):
        raise error

    monkeypatch.setattr("cache_store.info", end)
    monkeypatch.setattr(sys, "argv", ["alpacache", "info", "STORE"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code
    assert message in capsys.readouterr().err

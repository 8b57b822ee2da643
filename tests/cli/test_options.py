"""Options are made from configs: each setting has one, what is typed wins over the file, the file over the default."""

import dataclasses
import json
import re

import pytest
import typer
from typer.testing import CliRunner

from alpacache import CodecsConfig, EvalConfig, ExportConfig, ExtractConfig, PlanConfig, ProbeConfig, TrainConfig, hub
from alpacache.demo.config import DemoConfig
from alpacache.driver.config import DriveConfig
from alpacache.errors import UsageError
from alpacache.sources.config import CheckConfig, PrepareConfig
from cli.main import app
from cli.options import ConfigCommand, from_config

KINDS = {
    "check": CheckConfig,
    "prepare": PrepareConfig,
    "plan": PlanConfig,
    "codecs": CodecsConfig,
    "extract": ExtractConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "probe": ProbeConfig,
    "drive": DriveConfig,
    "demo": DemoConfig,
}
REQUIRED = {
    "check": ["synthetic:2"],
    "prepare": ["synthetic:2", "--out", "o"],
    "codecs": ["synthetic:2", "--model", "m"],
    "extract": ["synthetic:2", "--model", "m", "--store", "s"],
    "train": ["--store", "s", "--model", "m", "--out", "o", "--steps", "2"],
    "eval": ["--store", "s", "--model", "m", "--out", "o"],
    "probe": ["--store", "s"],
    "plan": ["--samples", "2"],
    "drive": ["synthetic:2", "--model", "m", "--out", "o.mp4"],
    "demo": [],
}
"""The least that must be typed."""
TYPED = {("train", "steps"), ("plan", "samples")}
"""Settings among these that have a default."""
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", KINDS)
def test_every_setting_has_an_option_and_a_key(name):
    params = {parameter.name: parameter for parameter in COMMANDS[name].params}
    fields = {field.name for field in dataclasses.fields(KINDS[name])}
    assert params.keys() == fields | {"config", "json"}
    for field in fields - {"source", "stores", "input"}:
        name = {"exclude": "except"}.get(field, field)
        assert f"--{name.replace('_', '-')}" in params[field].opts


def parsed(kind, *arguments, **rest):
    """The config that a command of this kind gets."""
    seen = []
    program = typer.Typer()
    program.command(cls=ConfigCommand)(from_config(kind, **rest)(lambda config, json: seen.append((config, json))))
    done = CliRunner().invoke(program, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    ((config, wants_json),) = seen
    return config, wants_json


TRAIN = ("--store", "a", "--store", "b=2", "--model", "m", "--out", "o")


def test_what_is_typed_reaches_the_config():
    more = ("--steps", 3, "--betas", "0.5,0.75", "--draws", "auto", "--lora-alpha", 4, "--no-capture", "--resume")
    config, wants_json = parsed(TrainConfig, *TRAIN, *more, "--memory-budget", "24GB", "--min-lr", 0, "--json")
    assert config == TrainConfig(
        **{"stores": ("a", "b=2"), "model": "m", "out": "o", "steps": 3, "betas": (0.5, 0.75), "draws": "auto"},
        **{"lora_alpha": 4.0, "capture": False, "resume": True, "memory_budget": "24GB", "min_lr": 0.0},
    )
    assert wants_json
    extract = ("synthetic:3", "--model", "m", "--store", "s", "--cameras", "front_wide,rear_tele", "--shard", "1/4")
    config, wants_json = parsed(ExtractConfig, *extract, "--no-camera-names")
    assert (config.source, config.shard, config.camera_names, config.frame_numbers) == (
        "synthetic:3",
        (1, 4),
        False,
        None,
    )
    assert config.cameras == ("camera_front_wide_120fov", "camera_rear_tele_30fov")
    assert not wants_json
    judged, _ = parsed(EvalConfig, "--store", "s", "--model", "m", "--out", "o", "--compare", "a=x", "--compare", "b=y")
    assert judged.compare == {"a": "x", "b": "y"}


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"export"}))
def test_without_options_a_config_has_its_defaults(name):
    config, _ = parsed(KINDS[name], *REQUIRED[name])
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING and (name, field.name) not in TYPED:
            assert getattr(config, field.name) == field.default, field.name


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "train.toml"
    file.write_text(
        'stores = ["a"]\nmodel = "m"\nout = "o"\nepochs = 2\nbatch-size = 3\n'
        "seed = 4\nresume = true\nbetas = [0.5, 0.5]\n"
    )
    alternatives = {"alternatives": ("steps", "epochs")}
    config, _ = parsed(TrainConfig, "--config", file, **alternatives)
    assert (config.stores, config.epochs, config.batch_size, config.keep) == (("a",), 2.0, 3, 2)
    typed = ("--steps", 7, "--seed", 0, "--no-resume", "--store", "b")
    config, _ = parsed(TrainConfig, "--config", file, *typed, **alternatives)
    assert (config.steps, config.epochs, config.seed, config.resume) == (7, None, 0, False)
    assert (config.stores, config.betas) == (("b",), (0.5, 0.5))


@pytest.mark.parametrize("name", ["extract", "codecs", "plan", "prepare", "eval", "probe", "export", "drive"])
def test_every_config_can_come_from_a_file(name, tmp_path, run_here):
    file = tmp_path / "settings.toml"
    file.write_text("nonsense = 1\n")
    assert "unknown key 'nonsense'" in run_here(name, "--config", file, code=2).stderr
    file.write_text("")
    assert "missing; give it as an option or in --config FILE.toml" in run_here(name, "--config", file, code=2).stderr


def test_a_plan_from_a_file(tmp_path, run_here):
    file = tmp_path / "plan.toml"
    file.write_text('samples = 10\ncodec = "int8"\ncameras = ["front_wide"]\npicture = "720x1280"\n')
    planned = json.loads(run_here("plan", "--config", file, "--samples", 20, "--json").stdout)
    assert (planned["samples"], planned["codec"], planned["tokens"]) == (20, "int8", 809)


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        *(
            (name, ["--seed", "-1"], "seed is -1; expected at least 0.")
            for name in REQUIRED
            if name not in ("check", "plan")
        ),
        ("train", ["--micro-batch", "0"], "micro_batch is 0; expected at least 1."),
        ("train", ["--patience", "0"], "patience is 0; expected at least 1."),
        ("train", ["--betas", "1,2"], "betas is '1,2'; expected each below 1."),
        ("train", ["--weight-decay", "-1"], "weight_decay is -1.0; expected at least 0."),
        ("train", ["--epochs", "inf"], "epochs is inf; expected a finite number."),
        ("train", ["--memory-budget", "inf"], "memory_budget is 'inf'; expected a size such as 24GB."),
        ("train", ["--out", ""], "out is ''; expected a path or name"),
        ("plan", ["--epochs", "inf"], "epochs is inf; expected a finite number."),
        ("eval", ["--compare", "constant velocity=run"], "the label 'constant velocity' is taken; choose another."),
        ("eval", ["--compare", "a=one", "--compare", "a=two"], "compare a=two: the label 'a' is taken"),
        ("eval", ["--compare", "run"], "expected LABEL=RUN"),
        ("eval", ["--checkpoint", "a", "--checkpoint=b", "--seed", "-1"], "given 2 times; the last counts: b."),
        ("check", ["--frames", "0"], "frames is 0; expected 1, 2, 3 or 4."),
    ],
)
def test_what_cannot_be_is_exit_2_and_touches_nothing(name, typed, message, tmp_path, monkeypatch, run_here):
    monkeypatch.chdir(tmp_path)
    refused = run_here(name, *REQUIRED[name], *typed, code=2)
    assert message in refused.stderr
    assert refused.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_help_shows_groups_defaults_and_what_is_required(run_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run_here("train", "--help").stdout
    for title in ("Data", "What is trained", "Optimizer", "Validation", "Run directory", "Memory and speed"):
        assert f"─ {title} ─" in text
    assert "[default: 8]" in text
    assert "[default: 0.9,0.999]" in text
    assert "[default: as many as fit]" in text
    assert "Directory of the run. [required]" in text
    assert "all|head|lora" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_can_be_read_at_80_columns(name, run_here, monkeypatch):
    """Nothing is cut, and no option leaves the texts of its group less than 30 characters."""
    monkeypatch.setenv("COLUMNS", "80")
    text = run_here(name, "--help").stdout
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    indents = [len(line) - len(line[1:].lstrip()) for line in text.splitlines() if line.startswith("│      ")]
    assert max(indents, default=0) <= 48  # of lines that go on


def test_switches_are_told_by_what_they_change(run_here):
    text = run_here("train", "--help").stdout
    assert "--resume" in text
    assert "--no-resume" not in text
    assert "--[no-]capture" in text
    assert parsed(TrainConfig, *TRAIN, "--steps", 3, "--no-resume", "--no-checkpointing")[0].checkpointing is False


def test_a_panel_of_no_field_is_refused():
    with pytest.raises(AssertionError):
        from_config(DemoConfig, panels={"Other": "sed"})


@pytest.mark.parametrize("arguments", [["info", ""], ["verify", ""], ["copy", "a", ""], ["doctor", "--store", ""]])
def test_an_empty_path_is_refused(arguments, run_here):
    assert "got ''; expected a path or name" in run_here(*arguments, code=2).stderr


def test_the_home_directory_is_found_without_a_shell(tmp_path, monkeypatch, run_here):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/nowhere" in run_here("info", "~/nowhere", code=2).stderr
    assert f"{tmp_path}/nowhere" in run_here("check", "folder:~/nowhere", code=2).stderr


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--lr", "abc", "lr is 'abc'; expected a number."),
        ("--lr", "inf", "lr is inf; expected a finite number."),
        ("--steps", "1.5", "steps is '1.5'; expected a whole number."),
        ("--steps", "1_0", "steps is '1_0'; expected a whole number."),
        ("--steps", "٣", "steps is '٣'; expected a whole number."),
        ("--lr", "1_0", "lr is '1_0'; expected a number."),
        ("--patience", "", "patience is ''; expected a whole number."),
    ],
)
def test_a_number_is_refused_in_the_words_of_a_file(option, text, expected, tmp_path):
    least = REQUIRED["train"][: None if option != "--steps" else -2]
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        parsed(TrainConfig, *least, option, text)
    value = text if option == "--lr" and text == "inf" else json.dumps(text)
    (tmp_path / "c.toml").write_text(f"{option[2:]} = {value}\n")
    with pytest.raises(UsageError, match=f"^{re.escape(expected)}$"):
        parsed(TrainConfig, *least, "--config", tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("inf", "min_age is inf; expected a finite number."),
        ("nan", "min_age is nan; expected a finite number."),
        ("-1", "min_age is -1.0; expected at least 0."),
        ("1_0", "min_age is '1_0'; expected a number."),
    ],
)
def test_the_age_of_what_clean_removes_is_refused_in_these_words_too(text, expected, tmp_path, run_here):
    assert expected in run_here("clean", tmp_path, "--min-age", text, code=2).stderr


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        (PlanConfig, ("--samples", 2, "--model", "owner/model"), "config.json of owner/model is not in the local hub"),
        (ExtractConfig, ("synthetic:2", "--model", "m", "--vlm", "owner/vlm", "--store", "s"), "of owner/vlm is not"),
        (ExtractConfig, ("hf:owner/data", "--model", "m", "--store", "s"), "hf:owner/data cannot be read: the hub"),
        (PrepareConfig, ("pai", "--out", "o"), "the hub cannot be reached"),
    ],
)
def test_what_the_hub_has_is_refused_before_anything_is_loaded_where_it_is_out_of_reach(
    kind, arguments, told, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(hub, "knock", lambda *_: "Network is unreachable")
    with pytest.raises(UsageError, match=rf"{told}.*Network is unreachable"):
        parsed(kind, *arguments)
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(hub, "knock", lambda *_: "")
    assert isinstance(parsed(kind, *arguments)[0], kind)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_calls_no_switch_a_bool(command, capsys):
    with pytest.raises(SystemExit):
        typer.main.get_command(app)([*command, "--help"])
    assert "<bool>" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "option", "typed", "expected"),
    [
        ("extract", "codec", "int", ["int4", "int5", "int8"]),
        ("extract", "route", "", ["none", "source"]),
        ("train", "trainable", "", ["all", "head", "lora"]),
        ("train", "trainable", "x", []),
        ("eval", "on_damage", "s", ["stop", "skip"]),
    ],
)
def test_completion_knows_the_words_that_a_value_may_be(command, option, typed, expected):
    known = typer.main.get_command(app).commands[command]
    context = known.make_context(command, [], resilient_parsing=True)
    (param,) = (param for param in known.params if param.name == option)
    assert sorted(item.value for item in param.shell_complete(context, typed)) == sorted(expected)

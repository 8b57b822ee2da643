"""Configs: every value is checked wherever it comes from; TOML there and back; what options are made of."""

import dataclasses
import math
import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import example, given
from hypothesis import strategies as st

from alpacache import EvalConfig, ExportConfig, ExtractConfig, PlanConfig, ProbeConfig, TrainConfig
from alpacache.config import field_docs, read_toml, to_toml
from alpacache.converters.config import ConvertConfig
from alpacache.demo.config import DemoConfig
from alpacache.driver.config import DriveConfig
from alpacache.errors import UsageError
from alpacache.sources.config import CheckConfig, PrepareConfig
from alpacache.training.config import weighted_stores

T0S = ("nan", "inf", "0", "-1", "1e300", "every:0", "every:inf", "every:1e-9", "every:", "soon")
TRAIN = {"stores": ("a", "b"), "model": "m", "out": 'quote"d', "epochs": 1.5, "betas": (0.9, 0.95), "causal": True}
EXTRACT = {"source": "s", "model": "m", "store": "c"}
EVAL = {"store": "s", "model": "m", "out": "o"}
LEAST = {
    TrainConfig: TRAIN | {"val": "v"},
    ExtractConfig: EXTRACT,
    EvalConfig: EVAL,
    ExportConfig: {"model": "m", "checkpoint": "c", "out": "o"},
    PlanConfig: {"samples": 10},
    ProbeConfig: {"store": "s"},
    PrepareConfig: {"source": "s", "out": "o"},
    CheckConfig: {"source": "s"},
    ConvertConfig: {"kind": "kitti", "input": "k", "out": "o"},
    DriveConfig: {"source": "s", "model": "m", "out": "o.mp4"},
    DemoConfig: {},
}
"""Every config, with the least it must be given."""


def read_back(config, file):
    file.write_bytes(to_toml(config).encode())
    return type(config)(**read_toml(file, type(config)))


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_toml_there_and_back(kind, tmp_path):
    config = kind(**LEAST[kind])
    assert read_back(config, tmp_path / "config.toml") == config


PATHS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0=~"), min_size=1)
LABELS = st.text().filter(str.isprintable)
NUMBERS = st.floats(1e-300, 1e6)


@given(
    out=PATHS,
    val=PATHS,
    stores=st.lists(PATHS, min_size=1),
    weight=NUMBERS,
    clip=NUMBERS,
    seed=st.integers(0, 2**63 - 1),
    draws=st.just("auto") | st.integers(1, 100),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
)
@example("r_😀", "\x7f", ["a\x7f\t\n\"'\\"], 1e16, 1.0, 0, 1, (0.0, 5e-324))
def test_any_training_is_read_back(tmp_path_factory, out, val, stores, weight, clip, seed, draws, betas):
    settings = {"val": val, "clip": clip, "seed": seed, "draws": draws, "betas": betas}
    config = TrainConfig(stores=(*stores, f"x={weight}"), model="m", out=out, epochs=1, **settings)
    assert read_back(config, tmp_path_factory.getbasetemp() / "any.toml") == config


@given(runs=st.lists(st.tuples(LABELS, PATHS)), layers=st.lists(st.integers(0, 99), min_size=1))
def test_any_table_and_list_is_read_back(tmp_path_factory, runs, layers):
    compare = {f"{number}.{label}": run for number, (label, run) in enumerate(runs)}
    for config in (EvalConfig(**EVAL, compare=compare), ProbeConfig(store="s", layers=layers)):
        assert read_back(config, tmp_path_factory.getbasetemp() / "table.toml") == config


def test_the_lowest_rate_is_the_end_of_a_low_one():
    config = TrainConfig(**TRAIN, lr=1e-7)
    assert (config.peak_lr, config.final_lr) == (1e-7, 1e-7)
    assert (TrainConfig(**TRAIN, lr=0.0).final_lr, TrainConfig(**TRAIN).final_lr) == (0.0, 1e-6)


def test_the_config_of_an_older_run_is_read(tmp_path):
    """As it was written before configs were checked by a library."""
    file = tmp_path / "config.toml"
    file.write_text(
        'stores = ["demo/train", "more=0.5"]\nmodel = "demo/Demo-R1"\nout = "run"\nsteps = 300\nbatch_size = 16\n'
        'draws = 4\nmicro_batch = 16\ntrainable = "all"\nlora_rank = 16\noptimizer = "auto"\nlr = 0.003\n'
        'min_lr = 1e-06\nwarmup = 20\nbetas = [0.9, 0.999]\nweight_decay = 0.0\nclip = 1.0\ntimes = "beta"\n'
        "causal = false\nseed = 0\nsave_every = 300\nkeep = 2\nval_every = 100\nval_samples = 64\n"
        'best_by = "loss"\nema_every = 100\non_damage = "stop"\ntrack = "tensorboard"\nbalance = "none"\n'
        'in_memory = true\ncapture = true\ncompile = true\ncheckpointing = false\nmemory_budget = "24GB"\n'
        'device = "cpu"\nresume = false\n'
    )
    config = TrainConfig(**read_toml(file, TrainConfig))
    assert (config.store_paths, config.store_weights) == (["demo/train", "more"], [1.0, 0.5])
    assert (config.betas, config.lr, config.budget_bytes) == ((0.9, 0.999), 0.003, int(23.5 * 2**30))


def test_dashes_are_underscores_and_unknown_keys_are_errors(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("batch-size = 3\n")
    assert read_toml(file, TrainConfig) == {"batch_size": 3}
    file.write_text("zzz = 3\n")
    with pytest.raises(UsageError, match=r"c\.toml: unknown key 'zzz'; known: balance, batch_size"):
        read_toml(file, TrainConfig)
    file.write_text("batchsize = 3\n")
    with pytest.raises(UsageError, match=r"unknown key 'batchsize'; did you mean 'batch_size'\?"):
        read_toml(file, TrainConfig)
    for content in (b"= 3\n", b'out = "\xff"\n'):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="not valid TOML"):
            read_toml(file, TrainConfig)
    with pytest.raises(UsageError, match="cannot be read"):
        read_toml(tmp_path / "none.toml", TrainConfig)


def test_a_key_in_both_forms_is_refused(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('batch_size = 2\n"batch-size" = 4\n')
    with pytest.raises(UsageError, match=r"c\.toml: 'batch_size' is given twice"):
        read_toml(file, TrainConfig)


def test_a_file_that_nests_deeply_or_is_none_is_refused(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("betas = " + 3000 * "[")
    with pytest.raises(UsageError, match="not valid TOML: it is nested too deeply"):
        read_toml(file, TrainConfig)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe cannot be read: it is a FIFO; expected a regular file"):
        read_toml(tmp_path / "pipe", TrainConfig)


def test_masked_texts_leave_toml_whole(tmp_path):
    config = TrainConfig(stores=("s",), model="m", val='MY_KEY="a', out='TOKEN="b"', steps=3)
    (tmp_path / "c.toml").write_text(to_toml(config, mask=True))
    read = read_toml(tmp_path / "c.toml", TrainConfig)
    assert (read["val"], read["out"]) == ('MY_KEY="***', 'TOKEN="***"')


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TrainConfig, {"draws": "1_0"}),
        (TrainConfig, {"betas": "0.9,0.9_5"}),
        (TrainConfig, {"stores": ("a=1_0", "b=2")}),
        (TrainConfig, {"memory_budget": "٢٤GB"}),
        (ExtractConfig, {"shard": "0/٣"}),
        (ExtractConfig, {"t0": "every:1_0"}),
    ],
)
def test_numbers_have_plain_digits(kind, values):
    with pytest.raises(UsageError):
        kind(**LEAST[kind] | values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            TrainConfig,
            {"steps": 3},
            "steps or epochs says how long to train, and both are given; expected one of the two.",
        ),
        (TrainConfig, {"batch_size": 0}, "batch_size is 0; expected at least 1."),
        (TrainConfig, {"batch_size": 2**31}, "batch_size is 2147483648; expected at most 65536."),
        (TrainConfig, {"epochs": None}, "how long to train, and neither is given; expected one of the two."),
        (TrainConfig, {"draws": "1" * 5000}, "(5002 characters); expected a whole number or 'auto'."),
        (TrainConfig, {"draws": 2000}, "draws is 2000; expected at most 1024 or 'auto'."),
        (ExtractConfig, {"writers": 2**31 - 1}, "writers is 2147483647; expected at most 256."),
        (ExtractConfig, {"workers": 2**31 - 1}, "workers is 2147483647; expected at most 256."),
        (PlanConfig, {"views": 2**31 - 1}, "views is 2147483647; expected at most 1024."),
        (PlanConfig, {"rollouts": 2**31 - 1}, "rollouts is 2147483647; expected at most 1024."),
        (PlanConfig, {"picture": "1080"}, "picture is '1080'; expected HEIGHTxWIDTH, as in 1080x1920."),
        (TrainConfig, {"micro_batch": 0}, "micro_batch is 0; expected at least 1."),
        (TrainConfig, {"patience": 0}, "patience is 0; expected at least 1."),
        (TrainConfig, {"betas": (1.0, 2.0)}, "betas is (1.0, 2.0); expected each below 1."),
        (TrainConfig, {"betas": (-0.1, 0.9)}, "betas is (-0.1, 0.9); expected each at least 0."),
        (TrainConfig, {"betas": (0.9,)}, "betas is (0.9,); expected two numbers, as in 0.9,0.999."),
        (TrainConfig, {"betas": (0.9, 0.9, 0.9)}, "betas is (0.9, 0.9, 0.9); expected two numbers, as in 0.9,0.999."),
        (TrainConfig, {"weight_decay": -1.0}, "weight_decay is -1.0; expected at least 0."),
        (TrainConfig, {"lora_rank": 8}, "lora_rank is 8; expected --trainable lora with it."),
        (TrainConfig, {"lora_alpha": 8.0}, "lora_alpha is 8.0; expected --trainable lora with it."),
        (PlanConfig, {"lora_rank": 8}, "lora_rank is 8; expected --trainable lora with it."),
        (EvalConfig, {"flow_steps": "0"}, "flow_steps is '0'; expected at least 1."),
        (EvalConfig, {"flow_steps": 0}, "flow_steps is 0; expected at least 1."),
        (EvalConfig, {"flow_steps": "10,0"}, "flow_steps is '10,0'; expected each at least 1."),
        (EvalConfig, {"flow_steps": True}, "flow_steps is true; expected whole numbers as in 10,4,2,1."),
        (EvalConfig, {"control": "neither"}, "control is 'neither'; expected shuffled, none or both."),
        (
            ConvertConfig,
            {"mount": "1,2"},
            "mount is '1,2'; expected three numbers (degrees: left, nose",
        ),
        (ConvertConfig, {"mount": "1,2,inf"}, "mount is '1,2,inf'; expected each a finite number."),
        (DriveConfig, {"route": ""}, "route is ''; expected none, source or a text for the prompt (it is empty)."),
        (DriveConfig, {"ema": True}, "ema is true; expected off, as no --checkpoint is given."),
        (TrainConfig, {"epochs": math.inf}, "epochs is inf; expected a finite number."),
        (TrainConfig, {"epochs": 1e300}, "epochs is 1e+300; expected at most 1000000."),
        (TrainConfig, {"steps": date(2026, 1, 1)}, "steps is 2026-01-01; expected a whole number."),
        *((ExtractConfig, {"t0": t0}, f"t0 is {t0!r}; expected 5.1 (seconds), every:2.0") for t0 in T0S),
        (TrainConfig, {"lr": math.nan}, "lr is nan; expected a finite number."),
        (TrainConfig, {"lr": True}, "lr is true; expected a number."),
        (TrainConfig, {"lr": -1.0}, "lr is -1.0; expected at least 0."),
        (TrainConfig, {"min_lr": 1.0}, "min_lr is 1.0; expected 0 to lr (0.0001)."),
        (TrainConfig, {"ema": 1.0}, "ema is 1.0; expected below 1."),
        (TrainConfig, {"seed": -1}, "seed is -1; expected at least 0."),
        (TrainConfig, {"memory_budget": "inf"}, "memory_budget is 'inf'; expected a size such as 24GB."),
        (TrainConfig, {"memory_budget": "nan"}, "memory_budget is 'nan'; expected a size such as 24GB."),
        (TrainConfig, {"memory_budget": "-24GB"}, "memory_budget is '-24GB'; expected a size such as 24GB."),
        (TrainConfig, {"memory_budget": "0.5GB"}, "memory_budget is '0.5GB'; expected a size such as 24GB."),
        (TrainConfig, {"memory_budget": 24}, "memory_budget is 24; expected text."),
        (TrainConfig, {"memory_budget": ["24GB"]}, "memory_budget is ['24GB']; expected text."),
        (TrainConfig, {"draws": 0}, "draws is 0; expected at least 1 or 'auto'."),
        (TrainConfig, {"draws": "many"}, "draws is 'many'; expected a whole number or 'auto'."),
        (TrainConfig, {"stores": ()}, "stores is (); expected at least 1 of them."),
        (TrainConfig, {"stores": "abc", "batch_size": 1}, "stores is 'abc'; expected a list."),
        (TrainConfig, {"stores": ("a=0",)}, "weight of store a is 0; expected a number above 0, as in PATH=0.5."),
        (TrainConfig, {"stores": ("a=inf",)}, "weight of store a is inf; expected a number above 0"),
        (TrainConfig, {"trainable": "none"}, "trainable is 'none'; expected 'all', 'head' or 'lora'."),
        (TrainConfig, {"batch_size": "3"}, "batch_size is '3'; expected a whole number."),
        (TrainConfig, {"causal": "yes"}, "causal is 'yes'; expected true or false."),
        (TrainConfig, {"out": ""}, "out is ''; expected a path or name in valid Unicode."),
        (TrainConfig, {"out": "a\0b"}, r"out is 'a\x00b'; expected a path or name in valid Unicode."),
        (TrainConfig, {"out": "\udcff"}, r"out is '\udcff'; expected a path or name in valid Unicode."),
        (TrainConfig, {"device": ""}, "device is ''; expected text."),
        (TrainConfig, {"split_by": []}, "split_by is []; expected text."),
        (TrainConfig, {"split_by": ["clip"]}, "split_by is ['clip']; expected text."),
        (TrainConfig, {"draws": ["auto"]}, "draws is ['auto']; expected a whole number or 'auto'."),
        (ExtractConfig, {"t0": {}}, "t0 is {}; expected text."),
        (TrainConfig, {"val": None, "patience": 3}, "patience is 3; expected a --val store with it."),
        (ExtractConfig, {"frames": 5}, "frames is 5; expected 1, 2, 3 or 4."),
        (ExtractConfig, {"shard": (2, 2)}, "shard is 2/2; expected I/N with 0 <= I < N, as in 0/4."),
        (ExtractConfig, {"shard": "2"}, "shard is '2'; expected I/N, as in 0/4."),
        (ExtractConfig, {"shard": "a/b"}, "shard is 'a/b'; expected I/N, as in 0/4."),
        (
            ExtractConfig,
            {"codec": "int3"},
            "codec is 'int3'; expected bf16 or fp8 or int8 or int5 or int4 or transform:RATE or auto:PERCENT%.",
        ),
        (ExtractConfig, {"seed": -1}, "seed is -1; expected at least 0."),
        (ExtractConfig, {"cameras": ()}, "cameras is (); expected names of cameras."),
        (ExtractConfig, {"cameras": "roof"}, "unknown camera 'roof'"),
        (ExtractConfig, {"deterministic": True, "batch_size": 2}, "batch_size is 2; expected 1, as the run is to be"),
        (ExtractConfig, {"deterministic": True, "compile": True}, "compile is True; expected off, as the run is to be"),
        (EvalConfig, {"paths": 0}, "paths is 0; expected at least 1."),
        (EvalConfig, {"seed": -1}, "seed is -1; expected at least 0."),
        (EvalConfig, {"compare": {"a": 1}}, "compare is {'a': 1}; expected text."),
        (
            EvalConfig,
            {"compare": "a"},
            "compare is 'a'; expected LABEL=RUN with a label of letters, digits, signs and spaces.",
        ),
        (EvalConfig, {"compare": {"a": ""}}, "compare is {'a': ''}; expected LABEL=RUN with"),
        (ProbeConfig, {"layers": ()}, "layers is empty; expected last, all or layer numbers counted from 0."),
        (ProbeConfig, {"layers": "first"}, "layers is 'first'; expected last, all or layer numbers as in 0,9."),
        (ProbeConfig, {"layers": "0,-1"}, "layers is '0,-1'; expected each at least 0."),
        (PlanConfig, {"epochs": math.inf}, "epochs is inf; expected a finite number."),
        (PlanConfig, {"picture": (0, 10)}, "picture is (0, 10); expected each at least 1."),
        (PrepareConfig, {"seed": -1}, "seed is -1; expected at least 0."),
        (PrepareConfig, {"model": "m"}, "model m is of use with --size processor only"),
        (DemoConfig, {"seed": -1}, "seed is -1; expected at least 0."),
    ],
)
def test_bad_values_name_themselves(kind, values, message):
    with pytest.raises(UsageError) as refused:
        kind(**LEAST[kind] | values)
    assert message in str(refused.value)


def numbers_of(hint):
    """Pairs of type and bounds of every number in a field's type."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        bounds = [note for note in notes if isinstance(note, Ge | Gt | Le | Lt)]
        yield from [(kind, bounds)] if kind in (int, float) else numbers_of(kind)
    elif hint in (int, float):
        yield hint, []
    elif get_origin(hint) is not Literal:
        for part in get_args(hint):
            yield from numbers_of(part)


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_every_number_has_bounds_which_hold(kind):
    numbers = 0
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for number, bounds in numbers_of(hint):
            numbers += 1
            assert any(isinstance(bound, Ge | Gt) for bound in bounds), f"{kind.__name__}.{name} has no least value"
            assert any(isinstance(bound, Le | Lt) for bound in bounds), f"{kind.__name__}.{name} has no greatest value"
            if get_origin(hint) is not Union and len(list(numbers_of(hint))) == 1:
                for bad in (-1, math.nan, math.inf, True) if number is float else (-1, 1.5, 10**400, True):
                    with pytest.raises(UsageError, match=f"^{name} is "):
                        kind(**LEAST[kind] | {name: bad})
    assert numbers or kind in (ExportConfig,)


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_no_text_but_valid_unicode_reaches_a_file(kind):
    """Arguments that are no UTF-8 become lone surrogates, which no TOML and no JSON can hold."""
    for field in dataclasses.fields(kind):
        with pytest.raises(UsageError) as refused:
            kind(**LEAST[kind] | {field.name: "\ud800"})
        assert not re.search("parse|Input|sys\\.|pydantic", str(refused.value)), field.name
    with pytest.raises(UsageError, match="LABEL=RUN"):
        EvalConfig(**EVAL, compare={"\ud800": "run"})


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_a_long_value_is_not_repeated_in_full(kind):
    said = {}
    for field in dataclasses.fields(kind):
        try:
            kind(**LEAST[kind] | {field.name: "x" * 5_000})
        except UsageError as error:
            said[field.name] = str(error)
    assert said
    assert {name: text for name, text in said.items() if len(text) > 1_500} == {}


def test_what_people_write_is_read_as_values(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = ExtractConfig(source="folder:~/drives", model="~/m", store=Path("c"), cameras="front_wide, rear_tele")
    assert (config.source, config.model, config.store) == ("folder:/home/me/drives", "/home/me/m", "c")
    assert config.cameras == ("camera_front_wide_120fov", "camera_rear_tele_30fov")
    assert ExtractConfig(**EXTRACT, shard="1/3", cameras=["rear_tele"]).shard == (1, 3)
    assert PlanConfig(samples=1, picture="720x1280").picture == (720, 1280)
    assert ProbeConfig(store="s", layers="0,9").layers == (0, 9)
    train = TrainConfig(**TRAIN | {"stores": ["~/a=0.5", "s3://b/~c"], "draws": "4", "betas": "0.5,0.25", "clip": 2})
    assert train.stores == ("/home/me/a=0.5", "s3://b/~c")
    assert (train.draws, train.betas, train.clip) == (4, (0.5, 0.25), 2.0)
    assert EvalConfig(**EVAL, compare=("a=~/one", "b=x=y")).compare == {"a": "/home/me/one", "b": "x=y"}


@pytest.mark.parametrize("written", ["~nobody-of-this-name/x", "folder:~nobody-of-this-name/x"])
def test_a_home_of_nobody_is_no_directory_of_that_name(written):
    with pytest.raises(UsageError, match=r"source is .*; expected the name of a user behind the ~, or \./~nob"):
        ExtractConfig(**EXTRACT | {"source": written})


@pytest.mark.parametrize("label", ["base", "trained", "constant velocity", "constant turn rate"])
def test_labels_of_tables_are_taken(label):
    for compare in ({label: "run"}, [f"{label}=run"]):
        with pytest.raises(UsageError, match=f"compare {label}=run: the label '{label}' is taken; choose another"):
            EvalConfig(**EVAL, compare=compare)


def test_a_label_is_given_once():
    with pytest.raises(UsageError, match="compare a=two: the label 'a' is taken"):
        EvalConfig(**EVAL, compare=("a=one", "a=two"))


@pytest.mark.parametrize(
    ("label", "other"),
    [("base ", "base"), ("Base", "base"), ("con  stant velocity", "constant velocity"), ("MY run", "My Run")],
)
def test_labels_that_look_alike_are_refused(label, other):
    with pytest.raises(UsageError, match=f"is taken.*{other}|{other}.*is taken"):
        EvalConfig(**EVAL, compare={"My Run": "one", label: "two"})


@pytest.mark.parametrize("label", [" ", "a\nb", "\x1b[2Jbase", "a\u202eb", "a\u200bb"])
def test_labels_that_do_not_show_are_refused(label):
    with pytest.raises(UsageError, match="expected LABEL=RUN with a label of letters"):
        EvalConfig(**EVAL, compare={label: "run"})


def test_labels_have_no_space_around_them():
    assert EvalConfig(**EVAL, compare={" mine ": "run"}).compare == {"mine": "run"}


def test_configs_cannot_change_and_take_no_other_names():
    config = TrainConfig(**TRAIN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(TypeError, match="nonsense"):
        TrainConfig(**TRAIN, nonsense=1)
    assert dataclasses.replace(config, seed=3).seed == 3


@pytest.mark.parametrize("kind", LEAST, ids=lambda kind: kind.__name__)
def test_every_field_has_a_docstring(kind):
    docs = field_docs(kind)
    assert [field.name for field in dataclasses.fields(kind) if not docs.get(field.name, "").strip()] == []


def test_weights_are_told_from_paths_with_an_equals_sign():
    given = ("a=0.5", "s3://bucket/a", "s3://bucket/day=7/a", "s3://bucket/day=7/a=2", "x=1/b")
    assert weighted_stores(given) == [
        ("a", 0.5),
        ("s3://bucket/a", 1),
        ("s3://bucket/day=7/a", 1),
        ("s3://bucket/day=7/a", 2.0),
        ("x=1/b", 1),
    ]

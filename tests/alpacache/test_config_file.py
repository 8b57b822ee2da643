"""Configs: checked values, TOML there and back."""

from typing import get_args

import pytest

from alpacache.config_file import make, read_toml, to_toml
from alpacache.errors import UsageError
from alpacache.evaluation.config import EvalConfig
from alpacache.extraction.config import ExtractConfig
from alpacache.training.config import TrainConfig, weighted_stores
from cache_store import CODECS, CodecName

TRAIN = {"stores": ("a", "b"), "model": "m", "out": 'quote"d', "epochs": 1.5, "betas": (0.9, 0.95), "causal": True}


def test_toml_there_and_back(tmp_path):
    config = TrainConfig(**TRAIN)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config))
    assert TrainConfig(**read_toml(file, TrainConfig)) == config


def test_dashes_are_underscores_and_unknown_keys_are_errors(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("batch-size = 3\n")
    assert read_toml(file, TrainConfig) == {"batch_size": 3}
    file.write_text("zzz = 3\n")
    with pytest.raises(UsageError, match=r"c\.toml: unknown key 'zzz'; known: balance, batch_size"):
        read_toml(file, TrainConfig)
    file.write_text("= 3\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        read_toml(file, TrainConfig)
    with pytest.raises(UsageError, match="cannot be read"):
        read_toml(tmp_path / "none.toml", TrainConfig)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, TRAIN | {"steps": 3}, "exactly one of the two"),
        (TrainConfig, TRAIN | {"batch_size": 0}, "batch_size is 0; expected at least 1"),
        (TrainConfig, TRAIN | {"min_lr": 1.0}, "min_lr is 1.0; expected 0 to lr"),
        (TrainConfig, TRAIN | {"stores": ()}, "at least one store"),
        (ExtractConfig, {"source": "s", "model": "m", "store": "c", "frames": 5}, "frames is 5; expected 1 to 4"),
        (ExtractConfig, {"source": "s", "model": "m", "store": "c", "shard": (2, 2)}, "expected I/N"),
        (
            ExtractConfig,
            {"source": "s", "model": "m", "store": "c", "codec": "int3"},
            "codec is 'int3'; expected",
        ),
        (EvalConfig, {"store": "s", "model": "m", "out": "o", "paths": 0}, "paths is 0"),
        (TrainConfig, TRAIN | {"nonsense": 1}, "nonsense"),
        (TrainConfig, TRAIN | {"trainable": "none"}, "trainable is 'none'; expected 'all' or 'head'"),
        (TrainConfig, TRAIN | {"batch_size": "3"}, "batch_size is '3'; expected int"),
        (TrainConfig, TRAIN | {"lr": True}, "lr is True; expected float"),
        (TrainConfig, TRAIN | {"betas": (0.9,)}, "betas is"),
        (TrainConfig, TRAIN | {"stores": "abc"}, "stores is 'abc'"),
    ],
)
def test_bad_values_name_themselves(kind, values, message):
    with pytest.raises(UsageError, match=message):
        make(kind, values)


def test_every_codec_can_be_asked_for():
    assert set(get_args(CodecName)) == {"bf16", *CODECS}


def test_weights_are_told_from_paths_with_an_equals_sign():
    given = ("a=0.5", "s3://bucket/a", "s3://bucket/day=7/a", "s3://bucket/day=7/a=2", "x=1/b")
    assert weighted_stores(given) == [
        ("a", 0.5),
        ("s3://bucket/a", 1),
        ("s3://bucket/day=7/a", 1),
        ("s3://bucket/day=7/a", 2.0),
        ("x=1/b", 1),
    ]

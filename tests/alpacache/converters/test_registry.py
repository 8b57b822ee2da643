"""The kinds, and what is said of wrong ones."""

from pathlib import Path

import pytest

from alpacache.config import field_docs
from alpacache.converters.config import ConvertConfig
from alpacache.converters.registry import KINDS, kind_named, list_input, open_drives
from alpacache.errors import UsageError


def test_the_option_names_every_kind():
    text = field_docs(ConvertConfig)["kind"]
    assert set(text.split("`")[1::2]) == set(KINDS)


def test_kinds_have_options_of_the_config():
    fields = set(ConvertConfig.__dataclass_fields__)
    assert {name for kind in KINDS.values() for name in kind.takes} <= fields


def test_wrong_kinds_places_and_options_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"'rosbag3' is no kind of recording; known: .*rosbag"):
        kind_named("rosbag3")
    with pytest.raises(UsageError, match=r"no-such-log does not exist; expected a run's folder"):
        open_drives(KINDS["carla"], Path("no-such-log"), {})
    with pytest.raises(UsageError, match=r"--pose is not for carla; its options: --axes\. Leave it out"):
        open_drives(KINDS["carla"], tmp_path, {"pose": "/odom"})
    with pytest.raises(UsageError, match="--list is not for carla"):
        list_input(KINDS["carla"], tmp_path)

"""The kinds, and what is said of wrong ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alpacache.config import field_docs
from alpacache.converters.config import ConvertConfig
from alpacache.converters.log_files import UnusableError, inside
from alpacache.converters.messages import time_ns
from alpacache.converters.registry import KINDS, kind_named, list_input, open_drives
from alpacache.errors import SourceError, UsageError


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


def test_a_number_that_no_time_can_be_is_told_whichever_kind_reads_it(tmp_path):
    line = '{"timestamp": 1e300, "steer": 0, "vehicle_x": 0, "vehicle_y": 0, "vehicle_yaw_deg": 0}'
    (tmp_path / "manifest.jsonl").write_text(line)
    with pytest.raises(SourceError, match=r"manifest\.jsonl holds no line with a timestamp"):
        list(open_drives(KINDS["carla"], tmp_path, {}))

    def drives(place):
        yield np.array([10**30], np.int64)

    with pytest.raises(SourceError, match=r"holds a number beyond what times can be .* leave that row out"):
        list(open_drives(replace(KINDS["carla"], drives=drives), tmp_path, {}))
    assert time_ns({"sec": 10**12, "nanosec": 0}) is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b", "\x1b[31m", "x" * 300, ""])
def test_a_log_names_no_file_outside_of_it_and_none_that_no_disk_takes(tmp_path, name):
    with pytest.raises(UnusableError, match="which is not within"):
        inside(tmp_path, name)

"""Sample ids, splits and cameras."""

import hashlib

import pytest

from alpacache.errors import UsageError
from alpacache.sample import CAMERAS, SampleRef, full_camera_name, sort_cameras, split_of


def test_ids_there_and_back_even_with_awkward_clip_names():
    for clip in ("a", "x@3#1", "2024/07/01 drive"):
        ref = SampleRef(clip_id=clip, t0_us=5_100_000, view=2)
        assert ref.sample_id == f"{clip}@5100000#2"
        assert SampleRef.parse(ref.sample_id) == ref
    with pytest.raises(UsageError, match="'clip' is not a sample id"):
        SampleRef.parse("clip")


def test_split_is_the_md5_rule():
    names = [f"clip-{number}" for number in range(2000)]
    train = [name for name in names if split_of(name) == "train"]
    assert train == [name for name in names if int(hashlib.md5(name.encode()).hexdigest(), 16) % 100 < 90]
    assert 0.88 < len(train) / len(names) < 0.92


def test_cameras_sort_by_index_and_have_short_names():
    assert sort_cameras([CAMERAS[6], CAMERAS[0], CAMERAS[6]]) == (CAMERAS[0], CAMERAS[6])
    assert [full_camera_name(name) for name in ("front_wide", "front_tele", CAMERAS[3])] == [
        CAMERAS[1],
        CAMERAS[6],
        CAMERAS[3],
    ]
    for bad in ("front", "roof"):
        with pytest.raises(UsageError, match=f"unknown camera '{bad}'"):
            full_camera_name(bad)
    with pytest.raises(UsageError, match="unknown camera"):
        sort_cameras([])

"""Sample ids, splits and cameras."""

import hashlib

import pytest

from alpacache.driving.cameras import CAMERAS, full_camera_name, sort_cameras
from alpacache.driving.sample import SampleRef, split_of
from alpacache.errors import UsageError
from cache_store.format.names import MAX_ID_BYTES, sample_key


def test_ids_there_and_back_even_with_awkward_clip_names():
    for clip in ("a", "x@3#1", "2024/07/01 drive"):
        ref = SampleRef(clip_id=clip, t0_us=5_100_000, view=2)
        assert ref.sample_id == f"{clip}@5100000#2"
        assert SampleRef.parse(ref.sample_id) == ref
    with pytest.raises(UsageError, match="'clip' is not a sample id"):
        SampleRef.parse("clip")


LONGEST = "c" * (MAX_ID_BYTES - len("@5#0"))


@pytest.mark.parametrize(
    ("sample_id", "says"),
    [
        ("a\nb@5#0", "is not a sample id"),
        ("a@5#0\n", "is not a sample id"),
        ("a\0@5#0", "is not a sample id"),
        ("\ud800@5#0", "is not a sample id"),
        ("@5#0", "is not a sample id"),
        ("a@-5#0", "is not a sample id"),
        ("a@\u0665#0", "is not a sample id"),
        (f"c{LONGEST}@5#0", r"takes 4097 bytes; the limit is 4096"),
        ("\u00e9" * 2047 + "@5#0", r"takes 4098 bytes; the limit is 4096"),
        ("a@" + "9" * 5000 + "#0", r"takes 5004 bytes"),
        (f"a@{2**62}#0", r"expected a t0 below 2\*\*62"),
        (f"a@5#{2**31}", r"a view below 2\*\*31"),
    ],
)
def test_ids_that_no_store_takes_are_refused_in_one_short_line(sample_id, says):
    with pytest.raises(UsageError, match=says) as error:
        SampleRef.parse(sample_id)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("sample_id", [f"{LONGEST}@5#0", f"a@{2**62 - 1}#{2**31 - 1}", "\u00e9\u2028b@5#0"])
def test_ids_at_the_limits_are_those_of_a_store(sample_id):
    assert SampleRef.parse(sample_id).sample_id == sample_id
    assert len(sample_key(sample_id)) <= 65


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

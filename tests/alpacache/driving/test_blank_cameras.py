"""Which cameras may be black: none that is given, and none that would push others out of their places."""

import pytest

from alpacache.driving.cameras import CAMERAS, SLOTS, camera_words, check_blank, check_places
from alpacache.errors import UsageError

LEFT, FRONT, RIGHT, TELE = SLOTS
REAR = CAMERAS[3]


def test_a_camera_is_recorded_or_black():
    check_blank([FRONT], [TELE, LEFT])
    with pytest.raises(UsageError, match=f"{TELE}: in --cameras and in --blank"):
        check_blank([FRONT, TELE], [LEFT, TELE])


@pytest.mark.parametrize(
    ("cameras", "blank"),
    [([LEFT, FRONT, RIGHT], [TELE]), ([FRONT], [LEFT]), ([FRONT], [TELE, RIGHT, LEFT]), ([FRONT], []), ([REAR], [])],
)
def test_places_that_are_kept(cameras, blank):
    check_places(cameras, blank)


@pytest.mark.parametrize(
    ("cameras", "blank", "said"),
    [
        ([FRONT], [TELE], f"{FRONT} would stand in the place of {LEFT}"),
        ([FRONT], [TELE], f"Pass --blank {LEFT},{RIGHT},{TELE}, or"),
        ([LEFT, FRONT], [TELE], f"{TELE} would stand in the place of {RIGHT}"),
        ([LEFT, FRONT, REAR], [TELE], f"{REAR} would stand in the place of {RIGHT}"),
        ([LEFT, FRONT, REAR], [TELE], f"Leave {REAR} out"),
        ([*SLOTS[:3], CAMERAS[5]], [TELE], f"{CAMERAS[5]} would stand in the place of {TELE}"),
    ],
)
def test_a_camera_in_the_place_of_another_is_named(cameras, blank, said):
    with pytest.raises(UsageError) as caught:
        check_places(cameras, blank)
    assert said in str(caught.value)


def test_more_cameras_than_places():
    with pytest.raises(UsageError, match="would stand in the place"):
        check_places(CAMERAS[:6], [TELE])


def test_words_of_a_store():
    assert camera_words({"cameras": [FRONT]}) == FRONT
    assert camera_words({"cameras": [LEFT, FRONT], "blank": [LEFT]}) == f"{FRONT}, black pictures for {LEFT}"
    assert camera_words({}) == ""
    assert (
        camera_words({"cameras": [FRONT], "changes": ["undistort", "crop"]}) == f"{FRONT}, changed by undistort, crop"
    )
    assert camera_words({"cameras": [FRONT], "changes": "crop"}) == FRONT  # not as `extract` writes it

"""A camera's files are found whatever their ending is, and taken only where it is clear which frame is which."""

import pytest

from alpacache.errors import BadClipError
from alpacache.sources.camera_files import find_film, find_pictures, picture_format

CAMERA = "camera_front_wide_120fov"


@pytest.fixture
def clip(tmp_path):
    """A clip's folder with hidden files of macOS in it."""
    (tmp_path / f"{CAMERA}.timestamps.parquet").touch()
    (tmp_path / f"._{CAMERA}.mp4").touch()
    (tmp_path / f"{CAMERA}_preview.mp4").touch()
    return tmp_path


def pictures(clip, *names):
    folder = clip / CAMERA
    folder.mkdir(exist_ok=True)
    for name in (*names, *(f"._{name}" for name in names), ".DS_Store", "Thumbs.db"):
        (folder / name).touch()
    return folder


def found(clip, *names):
    folder = pictures(clip, *names)
    assert find_film(clip, CAMERA, where="a: front") is None
    return find_pictures(folder, 3, where="a: front")


@pytest.mark.parametrize("ending", [".mp4", ".MP4", ".mov", ".MOV", ".m4v", ".mkv"])
def test_films(clip, ending):
    (clip / f"{CAMERA}{ending}").touch()
    (clip / CAMERA).mkdir()  # an empty folder says nothing
    assert find_film(clip, CAMERA, where="a: front").name == f"{CAMERA}{ending}"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["000000.jpg", "000001.jpg", "000002.jpg"], "JPEG"),
        (["0.JPG", "1.JPG", "2.JPG"], "JPEG"),
        (["0000000000.jpeg", "0000000001.jpeg", "0000000002.jpeg"], "JPEG"),
        (["000.PNG", "001.png", "002.png"], "PNG"),
    ],
)
def test_pictures(clip, names, kind):
    files = found(clip, *names)
    assert [files[number] for number in range(3)] == names
    assert {picture_format(file) for file in files.values()} == {kind}


def test_pictures_are_numbers_not_an_order_of_names(clip):
    """As names, 10 comes before 2."""
    files = find_pictures(pictures(clip, *(f"{number}.jpg" for number in range(12))), 12, where="a: front")
    assert [files[number] for number in (0, 2, 10)] == ["0.jpg", "2.jpg", "10.jpg"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["000001.jpg", "000002.jpg", "000003.jpg"],
            r"000000\.jpg is missing \(the first is 000001\.jpg\); number the",
        ),
        (
            ["000010.png", "000011.png", "000012.png"],
            r"000000\.png is missing \(the first is 000010\.png\); number the",
        ),
        (
            ["000000.jpg", "000001.jpg", "000003.jpg"],
            r"000002\.jpg is missing \(the first is 000000\.jpg\); number the",
        ),
        (["000000.jpg", "000001.jpg"], "2 images, but 3 timestamps"),
        (["000001.jpg", "000002.jpg"], r"2 images, but 3 timestamps.*; 000000\.jpg is missing \(the first is 000001"),
        (["000000.jpg", "000002.jpg"], r"2 images, but 3 timestamps.*; 000001\.jpg is missing"),
        (["000000.jpg", "000001.jpg", "000001.png"], r"000001\.jpg and 000001\.png are both there\. Which is it"),
        (
            ["frame_1.jpg", "frame_2.jpg", "frame_3.jpg"],
            r"frame_\d\.jpg is not a frame's number\. Name pictures 000000",
        ),
        (["000000.jpg", "000001.jpg", "²2.jpg"], "is not a frame's number"),
        (
            ["000000.webp", "000001.webp", "000002.webp"],
            r"no image that can be read, but 3 timestamps beside 3 files with",
        ),
        (
            ["000000.jpg", "000001.jpg", "000002.tif"],
            r"2 images, but 3 timestamps beside 1 files with \.db, 1 files with \.tif",
        ),
        ([], "no image that can be read, but 3 timestamps"),
    ],
)
def test_pictures_whose_frames_are_not_clear_are_named(clip, names, says):
    with pytest.raises(BadClipError, match=f"^a: front: .*{says}") as error:
        find_pictures(pictures(clip, *names), 3, where="a: front")
    assert error.value.kind == "wrong_shape"


def test_two_candidates_are_a_question(clip):
    pictures(clip, "000000.jpg")
    (clip / f"{CAMERA}.MP4").touch()
    with pytest.raises(
        BadClipError, match=rf"{CAMERA}\.MP4 and a folder {CAMERA}/ are both there\. Which is it"
    ) as error:
        find_film(clip, CAMERA, where="a: front")
    assert error.value.kind == "wrong_shape"
    (clip / f"{CAMERA}.mp4").touch()
    with pytest.raises(BadClipError, match=rf"{CAMERA}\.MP4 and {CAMERA}\.mp4 and a folder"):
        find_film(clip, CAMERA, where="a: front")


def test_what_is_there_instead_is_named(clip):
    with pytest.raises(BadClipError, match=rf"neither {CAMERA}\.mp4 nor a folder {CAMERA}/ exists\.$") as error:
        find_film(clip, CAMERA, where="a: front")
    assert error.value.kind == "missing_camera"
    (clip / f"{CAMERA}.avi").touch()
    with pytest.raises(BadClipError, match=rf"exists; {CAMERA}\.avi is there, but films as \.mp4"):
        find_film(clip, CAMERA, where="a: front")

"""Pictures are shown upright, and what is no picture of this kind goes nowhere."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from alpacache.errors import BadClipError
from alpacache.sources.image import read_image

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
SEEN = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.transpose(1, 0, 2),
    6: lambda shown: np.rot90(shown),
    7: lambda shown: shown[::-1, ::-1].transpose(1, 0, 2),
    8: lambda shown: np.rot90(shown, -1),
}
"""EXIF orientation -> what its camera stored of a scene."""


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("orientation", SEEN)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(SEEN[orientation](PIXELS)))
    file = encoded(stored, "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(file, "PNG", where="here"), PIXELS)
    shown = read_image(
        encoded(stored.resize((60, 40)[:: 1 if orientation < 5 else -1], 0), "JPEG", exif=exif, quality=95),
        "JPEG",
        where="here",
    )
    assert np.abs(shown.astype(int) - PIXELS.repeat(10, 0).repeat(10, 1)).mean() < 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0"]
)
def test_exif_that_says_nothing_turns_nothing(exif):
    shown = read_image(encoded(Image.fromarray(PIXELS), "PNG", exif=exif), "PNG", where="here")
    np.testing.assert_array_equal(shown, PIXELS)


def test_colours_are_those_of_the_picture_in_each_mode():
    for mode in ("RGBA", "P", "L"):
        image = Image.fromarray(PIXELS // 85 * 85).convert(mode)
        np.testing.assert_array_equal(
            read_image(encoded(image, "PNG"), "PNG", where="here"), np.asarray(image.convert("RGB"))
        )


def test_16_bit_grey_is_refused():
    image = Image.fromarray(np.full((4, 6), 40_000, np.uint16))
    with pytest.raises(BadClipError, match="here: a grey image of 16 bits; write 8 bits") as error:
        read_image(encoded(image, "PNG"), "PNG", where="here")
    assert error.value.kind == "wrong_shape"


def test_what_is_no_picture_is_told_the_same_each_time():
    """Pillow's own words name the place of the bytes in memory."""
    with pytest.raises(BadClipError) as error:
        read_image(io.BytesIO(b"\xff\xd8 nothing more"), "JPEG", where="here")
    assert str(error.value) == "here: no readable JPEG image (it is none)."


def test_each_kind_has_its_own_decoder():
    with pytest.raises(BadClipError, match=r"here: no readable JPEG image") as error:
        read_image(encoded(Image.fromarray(PIXELS), "PNG"), "JPEG", where="here")
    assert error.value.kind == "undecodable_video"


@pytest.mark.parametrize("side", [8_000, 65_000])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_picture_beyond_the_limit_is_refused_by_its_header(kind, side):
    data, size = bytearray(encoded(Image.fromarray(PIXELS), kind).getvalue()), 2 if kind == "JPEG" else 4
    at = data.index(b"\xff\xc0") + 5 if kind == "JPEG" else data.index(b"IHDR") + 4
    data[at : at + 2 * size] = side.to_bytes(size, "big") * 2
    if kind == "PNG":
        data[at + 13 : at + 17] = zlib.crc32(data[at - 4 : at + 13]).to_bytes(4, "big")
    with pytest.raises(BadClipError, match=r"here: .*50,000,000") as error:
        read_image(io.BytesIO(data), kind, where="here")
    assert error.value.kind == "wrong_shape"


def test_a_small_picture_is_enough(tmp_path):
    """A JPEG is then decoded at a part of its size, and turned as EXIF says."""
    shades = np.repeat(np.arange(0, 240, 15, dtype=np.uint8), 40)
    wide = Image.fromarray(np.broadcast_to(shades[None, :, None], (320, 640, 3)).copy())
    exif = Image.Exif()
    exif[0x0112] = 3
    for options, turn in (({}, 1), ({"exif": exif}, -1)):
        file = tmp_path / "wide.jpg"
        wide.save(file, quality=95, **options)
        for about_px, width in ((640, 640), (400, 640), (160, 160), (100, 80 * 2), (1, 80)):
            small = read_image(file, "JPEG", where="here", about_px=about_px)
            assert small.shape == (width // 2, width, 3)
            np.testing.assert_allclose(small[:, :: width // 16][5, ::turn, 1], np.arange(0, 240, 15), atol=16)
    assert read_image(encoded(wide, "PNG"), "PNG", where="here", about_px=1).shape == (320, 640, 3)


def noise(height=64, width=96):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


@pytest.mark.parametrize("about_px", [None, 24])
def test_a_png_that_is_damaged_is_refused(about_px):
    whole = encoded(noise(), "PNG").getvalue()
    for damaged in (whole[: len(whole) // 2], whole[:2000] + bytes(100) + whole[2100:]):
        with pytest.raises(BadClipError, match="here: no readable PNG image") as error:
            read_image(io.BytesIO(damaged), "PNG", where="here", about_px=about_px)
        assert error.value.kind == "undecodable_video"


@pytest.mark.parametrize("about_px", [None, 24])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": Image.Exif()}])
def test_a_jpeg_that_was_cut_off_is_refused_however_it_ends(about_px, options):
    thumbnail = encoded(noise(16, 16), "JPEG").getvalue()
    whole = encoded(noise(), "JPEG", comment=thumbnail, **options).getvalue()
    scan = whole.index(b"\xff\xda", whole.index(thumbnail) + len(thumbnail))
    half = whole[: (scan + len(whole)) // 2]
    ends = [b"", bytes(len(whole)), b"\xff\xd9"]
    for end in ends[: 2 if options.get("progressive") else 3]:  # a progressive one lacks detail, but no pixels
        with pytest.raises(BadClipError, match=r"here: no readable JPEG image .*(cut off|truncated)"):
            read_image(io.BytesIO(half + end), "JPEG", where="here", about_px=about_px)
    read_image(io.BytesIO(whole + bytes(999)), "JPEG", where="here", about_px=about_px)


def test_grey_pictures_and_grey_corners_are_whole():
    pixels = np.asarray(noise()).copy()
    pixels[32:, 48:] = 128
    for image in (Image.fromarray(pixels), Image.new("L", (16, 8), 128), Image.new("RGB", (2, 1), (128, 128, 128))):
        assert (read_image(encoded(image, "JPEG"), "JPEG", where="here")[-1, -1] == 128).all()

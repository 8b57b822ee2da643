"""Chosen frames of a video are those of decoding all of it, whatever lies between them."""

import numpy as np
import pytest

from alpacache.errors import BadClipError
from alpacache.sources.video import WantedFrames, read_mp4

av = pytest.importorskip("av")

COUNT = 50
HEIGHT, WIDTH = 64, 96
CODECS = {
    "frames that no other needs": ("libx264", {"g": "20"}),
    "no such frames": ("libx264", {"g": "20", "bf": "0"}),
    "many of them": ("libx264", {"g": "20", "bf": "5", "b-pyramid": "strict"}),
    "shown before the key frame that they follow": ("libx264", {"x264-params": "open-gop=1:keyint=15:bframes=3"}),
    "H.265": ("libx265", {"x265-params": "keyint=20:log-level=error"}),
    "MPEG-4": ("mpeg4", {"g": "12", "bf": "2"}),
    "AV1": ("libsvtav1", {"preset": "12"}),
}


def pictures() -> np.ndarray:
    """`[COUNT, HEIGHT, WIDTH, 3]`: a bright square over a slowly moving ramp."""
    x, y = np.arange(WIDTH), np.arange(HEIGHT)[:, None]
    images = np.stack([(x + 2 * y + number) % 256 for number in range(COUNT)])[..., None].repeat(3, -1)
    for number, image in enumerate(images):
        image[20:40, number : number + 20] = 255
    return images.astype(np.uint8)


@pytest.fixture(scope="module", params=CODECS)
def video(request, tmp_path_factory):
    """A file and all of its frames."""
    codec, options = CODECS[request.param]
    file = tmp_path_factory.mktemp("video") / "film.mp4"
    try:
        with av.open(str(file), "w") as container:
            stream = container.add_stream(codec, rate=30, options=options)
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for image in pictures():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg cannot encode it: {error}")
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == COUNT
    return file, np.stack(frames).transpose(0, 3, 1, 2)


def test_chosen_frames_are_those_of_the_whole(video):
    file, frames = video
    for first in range(COUNT - 9):
        chosen = [first, first + 3, first + 6, first + 9]
        assert np.array_equal(read_mp4(file, chosen, count=COUNT, where="here"), frames[chosen]), first


@pytest.mark.parametrize("video", ["frames that no other needs", "H.265"], indirect=True)
def test_frames_that_nobody_needs_are_not_decoded(video):
    file, _ = video
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        decoded = list(WantedFrames(container, stream, lambda time: False).decode())
    assert 0 < len(decoded) < 0.8 * COUNT


h264 = pytest.mark.parametrize("video", ["no such frames"], indirect=True)


def edited(file, out, old, new):
    """A copy in which the last `old` is `new`, as long."""
    head, found, tail = file.read_bytes().rpartition(old)
    assert found
    out.write_bytes(head + new + tail)
    return out


@h264
def test_names_in_another_encoding_do_not_matter(video, tmp_path):
    file, frames = video
    dashcam = edited(file, tmp_path / "dashcam.mp4", b"VideoHandler", b"\x83r\x83f\x83I\xff\xfe\xe9dle")
    assert np.array_equal(read_mp4(dashcam, [3, 6], count=COUNT, where="here"), frames[[3, 6]])


@h264
def test_an_unknown_codec_is_a_bad_clip(video, tmp_path):
    odd = edited(video[0], tmp_path / "odd.mp4", b"avc1", b"zzzz")
    with pytest.raises(BadClipError, match=r"here: odd\.mp4: its codec is unknown to FFmpeg; encode it again") as error:
        read_mp4(odd, [3], count=COUNT, where="here")
    assert error.value.kind == "undecodable_video"


@h264
def test_values_that_pyav_refuses_are_a_bad_clip(video, monkeypatch):
    def refuse(self):
        raise ValueError("conversion to numpy array with format `odd` is not yet supported")

    monkeypatch.setattr(WantedFrames, "decode", refuse)
    with pytest.raises(BadClipError, match=r"film\.mp4 cannot be decoded \(conversion to numpy") as error:
        read_mp4(video[0], [3], count=COUNT, where="here")
    assert error.value.kind == "undecodable_video"


@h264
def test_a_wrong_count_keeps_its_own_reason(video):
    with pytest.raises(BadClipError, match=f"holds {COUNT} frames, its timestamps name {COUNT - 1}") as error:
        read_mp4(video[0], [3], count=COUNT - 1, where="here")
    assert error.value.kind == "wrong_shape"

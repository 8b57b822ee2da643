"""Chosen frames of a video are those of decoding all of it, whatever lies between them and however it was muxed."""

import io
from contextlib import closing

import numpy as np
import pytest

from alpacache.errors import BadClipError
from alpacache.sources.film_index import index_film, open_film
from alpacache.sources.video import FilmReading, needed_frames

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


def film(
    codec="libx264", options=None, *, muxer="mp4", mux_options=None, pts=None, images=None, streams=1, **stream_options
):
    """An encoded film; `pts` are the times of its frames in thirtieths of a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=muxer, options=mux_options or {}) as container:
        added = [container.add_stream(codec, rate=30, options=options or {"g": "20"}) for _ in range(streams)]
        for stream in added:
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
            for name, value in stream_options.items():
                setattr(stream.codec_context, name, value)
        for number, image in enumerate(pictures() if images is None else images):
            frame = image if isinstance(image, av.VideoFrame) else av.VideoFrame.from_ndarray(image)
            frame.pts = number if pts is None else pts[number]
            for stream in added:
                container.mux(stream.encode(frame))
        for stream in added:
            container.mux(stream.encode())
    return file.getvalue()


def whole(data):
    """All frames `[N, 3, H, W]`, decoded from the start."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module", params=CODECS)
def video(request, tmp_path_factory):
    """A file and all of its frames."""
    file = tmp_path_factory.mktemp("video") / "film.mp4"
    try:
        file.write_bytes(film(*CODECS[request.param]))
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg cannot encode it: {error}")
    frames = whole(file.read_bytes())
    assert len(frames) == COUNT
    return file, frames


STAMPS = np.arange(COUNT) * 100_000


def read(file, indices, stamps=STAMPS):
    """From a path, or from the bytes of a film."""
    with closing(FilmReading(file, [indices], stamps, name=getattr(file, "name", "film.mp4"), where="here")) as reading:
        return reading.read(0)


def assert_frames(data, wanted, stamps=STAMPS):
    """All frames of a film, read four at a time, are the wanted ones."""
    for first in range(0, len(wanted) - 3, 3):
        chosen = list(range(first, first + 4))
        assert np.array_equal(read(data, chosen, stamps), wanted[chosen]), first


def refusal(data, indices=(3,), stamps=STAMPS):
    with pytest.raises(BadClipError) as error:
        read(data, list(indices), stamps)
    return error.value.kind, str(error.value)


def test_small_frames_are_those_of_the_whole_made_small(video):
    file, frames = video
    width, height = frames.shape[3], frames.shape[2]
    for about_px, part in ((width, 1), (width // 2 + 1, 1), (width // 2, 2), (width // 3, 3), (1, width)):
        with closing(FilmReading(file, [[2, 5]], STAMPS, name="film", where="here", about_px=about_px)) as reading:
            small = reading.read(0)
        assert small.shape == (2, 3, max(1, height // part), width // part)
        if part in (1, 2):
            means = frames[[2, 5]].reshape(2, 3, height // part, part, width // part, part).mean(axis=(3, 5))
            assert np.abs(small - means).mean() < (1e-9 if part == 1 else 3)


@pytest.mark.system
def test_chosen_frames_are_those_of_the_whole(video):
    file, frames = video
    for first in range(COUNT - 9):
        chosen = [first, first + 3, first + 6, first + 9]
        assert np.array_equal(read(file, chosen), frames[chosen]), first


@pytest.mark.parametrize("video", ["frames that no other needs", "H.265"], indirect=True)
def test_frames_that_nobody_needs_are_not_decoded(video):
    file, _ = video
    with av.open(str(file)) as container:
        decoded = list(needed_frames(container, container.streams.video[0], frozenset()))
    assert 0 < len(decoded) < 0.8 * COUNT


def test_a_sound_film_is_decoded_once(video, monkeypatch):
    """More passes would be right as well, but slow."""
    passes = []
    monkeypatch.setattr("alpacache.sources.video.needed_frames", lambda *args: passes.append(1) or needed_frames(*args))
    read(video[0], [40, 43])
    assert passes == [1]


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
    assert np.array_equal(read(dashcam, [3, 6]), frames[[3, 6]])


@h264
def test_an_unknown_codec_is_a_bad_clip(video, tmp_path):
    odd = edited(video[0], tmp_path / "odd.mp4", b"avc1", b"zzzz")
    with pytest.raises(BadClipError, match=r"here: odd\.mp4: its codec is unknown to FFmpeg; encode it again") as error:
        read(odd, [3])
    assert error.value.kind == "undecodable_video"


@h264
def test_values_that_pyav_refuses_are_a_bad_clip(video, monkeypatch):
    def refuse(*args):
        raise ValueError("conversion to numpy array with format `odd` is not yet supported")

    monkeypatch.setattr("alpacache.sources.video.needed_frames", refuse)
    with pytest.raises(BadClipError, match=r"film\.mp4 cannot be decoded \(conversion to numpy") as error:
        read(video[0], [3])
    assert error.value.kind == "undecodable_video"


@h264
def test_a_wrong_count_keeps_its_own_reason(video):
    with pytest.raises(BadClipError, match=f"holds {COUNT} frames, its timestamps name {COUNT - 1}") as error:
        read(video[0], [3], STAMPS[:-1])
    assert error.value.kind == "wrong_shape"


@pytest.mark.parametrize(
    ("muxer", "mux_options"),
    [
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", {}),
        ("matroska", {}),
        ("mp4", {"video_track_timescale": "1000"}),
    ],
)
def test_containers_that_say_when_frames_are_shown(muxer, mux_options):
    data = film(muxer=muxer, mux_options=mux_options)
    assert_frames(data, whole(data))


@pytest.mark.parametrize(
    ("codec", "muxer", "named"),
    [
        ("libx264", "mpegts", "MPEG-TS"),
        ("libx264", "avi", "AVI"),
        ("mpeg4", "avi", "AVI"),
        ("mpeg2video", "mpeg", "MPEG-PS"),
        ("libx264", "h264", "a raw stream without container"),
        ("libx264", "flv", "FLV"),
    ],
)
def test_other_containers_are_named(codec, muxer, named):
    kind, said = refusal(film(codec, muxer=muxer))
    assert kind == "undecodable_video"
    assert said.startswith(f"here: film.mp4 is {named}; MP4, MOV and Matroska are read. Write it anew, such as: ffmpeg")


def test_a_playlist_names_no_other_file(tmp_path):
    """FFmpeg would follow it to any file that the user may read."""
    (tmp_path / "secret.mp4").write_bytes(film())
    for text in ("#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile secret.mp4\n"):
        (tmp_path / "film.mp4").write_text(text)
        kind, said = refusal(tmp_path / "film.mp4")
        assert kind == "undecodable_video"
        assert "is a playlist; MP4, MOV" in said


def test_frames_that_an_edit_list_hides_do_not_count():
    """As `ffmpeg -ss 1.05 -c copy` leaves it: the frames from the last key frame on are there, but not shown."""
    data, file, hidden = film(), io.BytesIO(), 7
    options = {"avoid_negative_ts": "disabled"}
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format="mp4", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (
                    round(time - hidden / 30 / packet.time_base) for time in (packet.pts, packet.dts)
                )
                packet.stream = stream
                target.mux(packet)
    trimmed, shown = file.getvalue(), whole(data)[hidden:]
    assert len(whole(trimmed)) == COUNT - hidden
    assert_frames(trimmed, shown, STAMPS[hidden:])
    kind, said = refusal(trimmed)
    assert kind == "undecodable_video"
    assert "holds 43 frames (its edit list hides 7 more), its timestamps name 50" in said


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_a_film_without_a_table_of_key_frames(codec):
    """Then every frame is said to be a key frame."""
    options = {"x265-params": "keyint=20:log-level=error"} if codec == "libx265" else {"g": "20"}
    data = film(codec, options).replace(b"stss", b"free")
    assert_frames(data, whole(data))


def test_intra_refresh():
    """Pictures are whole only some frames after a point from which a decoder may begin."""
    data = film(options={"x264-params": "intra-refresh=1:keyint=15:bframes=0"})
    assert_frames(data, whole(data))


def test_times_of_a_film_need_not_be_even_nor_begin_at_zero():
    pts = np.cumsum(np.random.default_rng(0).choice([1, 2, 3], COUNT)) + 100
    pts[-1] += 90  # a long last frame
    data = film(pts=pts.tolist())
    stamps = pts * 33_333
    assert_frames(data, whole(data), stamps)
    jitter = np.random.default_rng(1).integers(-15_000, 15_000, COUNT)
    assert_frames(data, whole(data), stamps + jitter)


@pytest.mark.parametrize("lost_by", ["film", "timestamps"])
def test_a_frame_that_only_one_clock_has_lost_is_named(lost_by):
    """As many frames as timestamps, since the film also has one more at its end."""
    pts = np.arange(COUNT) + (np.arange(COUNT) >= 20)
    even = np.arange(COUNT)
    film_pts, stamps = (pts, even) if lost_by == "film" else (np.where(even == 40, even + 0.4, even), pts)
    data = film(pts=(film_pts * 10).round().astype(int).tolist())
    kind, said = refusal(data, stamps=stamps * 100_000)
    assert kind == "wrong_shape"
    times = "0.667 s in the film, 0.100 s" if lost_by == "film" else "0.333 s in the film, 0.200 s"
    assert f"from frame 19 to 20 it takes {times} in its timestamps; they are not of one recording" in said


@pytest.mark.parametrize("lost", [[1], [2], [4], [8], [30], [1, 2, 3], [COUNT - 3], [COUNT - 2], [COUNT - 1]], ids=str)
def test_a_frame_lost_near_an_end_is_found_as_elsewhere(lost):
    pts = np.delete(np.arange(COUNT + len(lost)), lost) * 3
    kind, said = refusal(film(pts=pts.tolist()))
    assert kind == "wrong_shape"
    took = f"from frame {lost[0] - 1} to {lost[0]} it takes {0.1 * (1 + len(lost)):.3f} s in the film, 0.100 s in its"
    assert took in said


@pytest.mark.parametrize("late", [0, 1, COUNT - 2, COUNT - 1])
def test_a_first_or_last_frame_somewhat_off_is_not_taken_for_a_lost_one(late):
    """Half an interval; and 0.9 of one where all frames are off by 0.2."""
    early = -1 if late < 2 else 1
    for off, others in ((5, 0), (7, 2)):
        pts = np.arange(1, COUNT + 1) * 10 + np.where(np.arange(COUNT) % 2, others, -others)
        pts[late] += early * off
        data = film(pts=pts.tolist())
        assert np.array_equal(read(data, [3]), whole(data)[[3]])


def test_two_frames_at_one_time_are_refused():
    file = io.BytesIO()
    with av.open(io.BytesIO(film(options={"bf": "0"}))) as source, av.open(file, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.time_base /= 50  # two thirds of Matroska's milliseconds a frame
                packet.stream = stream
                target.mux(packet)
    kind, said = refusal(file.getvalue())
    assert kind == "wrong_shape"
    assert "shows frames 1 and 2 at one time; encode it again." in said


def test_films_of_two_cameras_in_one_file_are_refused():
    assert refusal(film(streams=2)) == ("wrong_shape", "here: film.mp4 holds 2 video streams; keep one.")


MATRICES = {
    (1, 0, 0, 1),
    (-1, 0, 0, -1),
    (0, 1, -1, 0),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
}


@pytest.fixture(scope="module")
def plain():
    return film()


def with_matrix(data, a, b, c, d):
    """The film, with this upper left part of the display matrix in its track header."""
    one = [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    matrix = [round(65536 * number) for number in (a, b, 0, c, d, 0)] + one[6:]
    before, _, after = data.rpartition(np.array(one, ">i4").tobytes())
    return before + np.array(matrix, ">i4").tobytes() + after


@pytest.mark.parametrize("matrix", sorted(MATRICES))
def test_the_display_matrix_is_applied(plain, matrix):
    """Turned by quarters, mirrored, and both: each pixel (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    stored = whole(plain)[12]
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    shown = np.zeros((3, to_y.max() + 1, to_x.max() + 1), np.uint8)
    shown[:, to_y, to_x] = stored
    np.testing.assert_array_equal(read(with_matrix(plain, *matrix), [12])[0], shown)


def test_a_film_shown_askew_is_refused(plain):
    kind, said = refusal(with_matrix(plain, 0.8, 0.6, -0.6, 0.8))
    assert kind == "wrong_shape"
    assert "film.mp4 is to be shown turned by -36 degrees or scaled; encode it as it is to be seen." in said


def damaged(data, frame):
    """The film with zeros in most of the packet at this place in the file."""
    with av.open(io.BytesIO(data)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][frame]
        first, after = packet.pos + packet.size // 10, packet.pos + packet.size
    return data[:first] + bytes(after - first) + data[after:]


def scenery():
    """Pictures that take many bytes, moving, so that later ones are predicted from earlier ones."""
    wide = np.random.default_rng(0).integers(0, 256, (HEIGHT // 4, WIDTH, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return [np.ascontiguousarray(wide[:, 3 * number : 3 * number + WIDTH]) for number in range(COUNT)]


@pytest.mark.parametrize("key", [20, 26])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_damage_reaches_all_frames_that_depend_on_it_and_no_others(codec, key):
    data = film(
        codec,
        {"g": "20", "bf": "0", "x264-params": "scenecut=0"} if codec == "libx264" else {"g": "20"},
        images=scenery(),
    )
    broken, sound = damaged(data, key), whole(data)
    for first in (0, 16, 40, 46):
        assert np.array_equal(read(broken, [first, first + 3]), sound[[first, first + 3]])
    if key == 26:
        assert np.array_equal(read(broken, [21, 24]), sound[[21, 24]])
    for chosen in ([key], [key + 1, key + 4], [39], [18, 30]):
        kind, said = refusal(broken, chosen)
        assert kind == "undecodable_video"
        assert said == (
            f"here: film.mp4: frame {chosen[0]} or one that it is predicted from is damaged. Copy the film again, or "
            "leave this part out."
        )


def test_damage_in_a_later_frame_reaches_those_predicted_from_it():
    """Frames between others are predicted from the one after them too, which is decoded first and shown later."""
    data = film(options={"g": "20", "x264-params": "bframes=3:b-adapt=0:scenecut=0:weightp=0"}, images=scenery())
    with av.open(io.BytesIO(data)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.size]
    later = order.index(sorted(order)[24])  # predicted from 20, as 21 to 23 are from both
    broken, sound = damaged(data, later), whole(data)
    assert np.array_equal(read(broken, [19, 20]), sound[[19, 20]])
    for frame in (21, 22, 23, 24, 25):
        assert refusal(broken, [frame])[0] == "undecodable_video", frame


def outcomes(data, samples, *, together):
    """What each sample gets, pixels or a reason, read with the others or alone."""
    found = []
    runs = [samples] if together else [[each] for each in samples]
    for run in runs:
        with closing(FilmReading(data, run, STAMPS, name="film.mp4", where="here")) as reading:
            for number in range(len(run)):
                try:
                    found.append(reading.read(number).tobytes())
                except BadClipError as error:
                    found.append((error.kind, str(error)))
    return found


RAGGED = [[0, 0, 1, 2], [0, 3, 6, 9], [1, 4, 7, 10], [11, 12, 13, 14], [12, 15, 18, 21], [17, 19, 20, 23], [30, 31]]
RAGGED += [[30, 31], [31, 34, 37, 40], [33, 36, 39, 42], [45, 46, 47, 48], [46, 47, 48, 49]]
"""Frames of samples in the order of their times: overlapping, equal, apart, of several lengths, first and last."""


@pytest.mark.system
def test_samples_read_in_one_pass_are_those_read_alone(video):
    file, frames = video
    with closing(FilmReading(file, RAGGED, STAMPS, name="film.mp4", where="here")) as reading:
        for number, chosen in enumerate(RAGGED):
            assert np.array_equal(reading.read(number), frames[chosen]), chosen
    with closing(FilmReading(file, RAGGED, STAMPS, name="film.mp4", where="here")) as reading:
        for number in (1, 4, 5, 9):  # others were refused for another reason
            assert np.array_equal(reading.read(number), frames[RAGGED[number]]), number


@pytest.mark.system
@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({"x264-params": "intra-refresh=1:keyint=15:bframes=0"}, b"free"),
        ({"g": "20"}, b"stss"),
        ({"g": "250", "x264-params": "scenecut=0"}, b"free"),
    ],
    ids=["intra refresh", "no table of key frames", "one key frame"],
)
def test_one_pass_through_films_without_key_frames(options, cut):
    data = film(options=options).replace(cut, b"free")
    sound = whole(data)
    assert outcomes(data, RAGGED, together=True) == [sound[chosen].tobytes() for chosen in RAGGED]


def in_both_forms(data, folder):
    """A film's bytes, and a file of them."""
    (folder / "film.mp4").write_bytes(data)
    return data, folder / "film.mp4"


REFRESHED = {"x264-params": "intra-refresh=1:keyint=20:bframes=2:b-adapt=0:b-pyramid=none"}
"""A film whose key frames but the first lack most of their picture; two of three frames no other is predicted from."""


def test_passes_from_two_places_do_not_move_each_other(tmp_path):
    """Each sample behind the first key frame is looked for there, and then read from the film's start."""
    noise = np.random.default_rng(0).integers(0, 40, (COUNT, HEIGHT, WIDTH, 3), np.uint8)
    options = {"x264-params": "intra-refresh=1:keyint=20:bframes=0", "crf": "10"}
    data = film(options=options, images=[*(np.stack(scenery()) // 2 + noise)])
    assert len(data) > 100_000  # FFmpeg reads 32 KiB at once
    sound, samples = whole(data), [[*range(first, first + 4)] for first in range(COUNT - 3)]
    for file in in_both_forms(data, tmp_path):
        assert outcomes(file, samples, together=True) == [sound[chosen].tobytes() for chosen in samples]
        packets = [container.demux(video=0) for container in (open_film(file), open_film(file))]
        assert all(bytes(first) == bytes(second) for first, second in zip(*packets, strict=True))


def test_damage_on_the_way_from_the_start_costs_one_sample(tmp_path):
    """Each sample behind it is read alone from then on, however many there are."""
    data = damaged(film(options=REFRESHED, images=scenery()), 29)  # no other frame is predicted from it
    samples = [[first, first + 1] for first in range(0, COUNT - 1, 3)]
    for file in in_both_forms(data, tmp_path):
        found = outcomes(file, samples, together=True)
        assert [number for number, each in enumerate(found) if isinstance(each, tuple)] == [9]
        assert found == outcomes(file, samples, together=False)


@pytest.mark.system
@pytest.mark.parametrize("options", [{"g": "20"}, {"g": "250", "x264-params": "scenecut=0"}], ids=str)
def test_one_pass_decodes_each_frame_once(options, monkeypatch):
    data, decoded = film(options=options), []

    def counted(*args):
        for frame in needed_frames(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("alpacache.sources.video.needed_frames", counted)
    samples = [[first, first + 1, first + 2, first + 3] for first in range(1, COUNT - 4)]
    alone = outcomes(data, samples, together=False)
    cost = len(decoded)
    decoded.clear()
    assert outcomes(data, samples, together=True) == alone
    assert len(decoded) <= COUNT < cost / 5


@pytest.mark.parametrize(
    ("codec", "options", "closed", "samples"),
    [
        ("libx264", {"g": "20"}, [0, 20, 40], 4),
        ("libx264", {"x264-params": "open-gop=1:keyint=15:bframes=3"}, [0], 1),
        ("libx265", {"x265-params": "keyint=20:open-gop=0:scenecut=0:log-level=error"}, [0, 20, 40], 4),
        ("libx265", {"x265-params": "keyint=20:open-gop=1:scenecut=0:log-level=error"}, [0], 2),
        ("mpeg4", {"g": "12", "bf": "2"}, [], 1),
    ],
)
def test_a_pass_goes_on_behind_key_frames_that_nothing_is_predicted_across(codec, options, closed, samples):
    with av.open(io.BytesIO(film(codec, options))) as container:
        stream = container.streams.video[0]
        index = index_film(container, stream, STAMPS, where="here")
    assert sorted(map(index.times.index, index.closed)) == closed
    assert len(index.keys) > 1
    wanted = [[index.times[frame + each] for each in range(4)] for frame in (8, 18, 20, 30, 45)]
    assert [*index.together(wanted, from_start=False)] == wanted[:samples]  # none reaches the key frame before 45


def test_few_decoded_pictures_are_kept():
    samples = [[first, first + 3, first + 6, first + 9] for first in range(0, COUNT - 9, 2)]
    with closing(FilmReading(film(options={"g": "250"}), samples, STAMPS, name="", where="")) as reading:
        for number in range(len(samples)):
            reading.read(number)
            assert all(len(begun._kept) <= 10 for begun in reading._passes.values())
        assert not any(begun._kept for begun in reading._passes.values())


@pytest.mark.ci
@pytest.mark.parametrize("broken", range(0, COUNT, 3))
@pytest.mark.parametrize(
    "options",
    [
        {"g": "20", "x264-params": "bframes=3:b-adapt=0:scenecut=0:weightp=0"},
        {"g": "250", "x264-params": "bframes=2:b-adapt=0:scenecut=0:b-pyramid=none"},
        REFRESHED,
    ],
    ids=["g20", "g250", "intra refresh"],
)
def test_a_damaged_frame_costs_the_samples_that_it_costs_alone(options, broken, tmp_path):
    data = damaged(film(options=options, images=scenery()), broken)
    alone = outcomes(data, RAGGED, together=False)
    for file in in_both_forms(data, tmp_path):
        for some in (RAGGED, RAGGED[1::2], RAGGED[3:7]):
            assert outcomes(file, some, together=True) == [alone[RAGGED.index(each)] for each in some]


@pytest.mark.system
def test_damage_behind_the_last_wanted_frame_is_not_met():
    """The decoder holds frames back, but is asked for those that it has before it gets the damaged one."""
    clean = film(options={"g": "250", "x264-params": "bframes=2:b-adapt=0:scenecut=0:weightp=0"}, images=scenery())
    with av.open(io.BytesIO(clean)) as container:
        order = [packet.pts for packet in container.demux(video=0) if packet.size]
    sound, times = whole(clean), sorted(order)
    for broken in range(6, 20):
        data = damaged(clean, broken)
        before = [frame for frame in range(COUNT) if order.index(times[frame]) < broken]
        for frame in before:
            assert np.array_equal(read(data, [frame]), sound[[frame]]), (broken, frame)


LUMA = {"ITU601": (0.299, 0.114), "ITU709": (0.2126, 0.0722)}
"""Shares of red and blue in the luma of each standard."""


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("standard", LUMA)
def test_colours_are_converted_as_the_film_says(standard, full_range):
    red, blue = LUMA[standard]
    scale, offset = (255.0, 0.0) if full_range else (219.0, 16.0)
    wanted = np.array([[200, 60, 40], [30, 140, 60], [50, 90, 220], [128, 128, 128], [240, 235, 90]])
    for rgb in wanted:
        r, g, b = rgb / 255
        luma = red * r + (1 - red - blue) * g + blue * b
        chroma = ((b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red))
        planes = [luma * scale + offset, *(value * (255.0 if full_range else 224.0) + 128 for value in chroma)]
        rows = [
            np.full((HEIGHT // 2 ** (n > 0), WIDTH // 2 ** (n > 0)), round(value), np.uint8)
            for n, value in enumerate(planes)
        ]
        frame = av.VideoFrame.from_ndarray(
            np.concatenate([plane.ravel() for plane in rows]).reshape(-1, WIDTH), format="yuv420p"
        )
        matrix = {"colorspace": 1 if standard == "ITU709" else 6, "color_range": 2 if full_range else 1}
        frame.colorspace, frame.color_range = matrix.values()
        data = film(options={"qp": "0"}, images=[frame] * 3, **matrix)
        shown = read(data, [1], STAMPS[:3])[0]
        assert np.abs(shown.transpose(1, 2, 0) - rgb).max() <= 3, (rgb, shown[:, 0, 0])

"""The folder that drives become: what is copied, how a drive is cut, going on, the report."""

import errno
import json
from dataclasses import replace

import av
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.checks.source import check_source
from alpacache.converters.clips import estimated_mount, settle
from alpacache.converters.drive import Arrays, Dropped, Film, LoggedDrive, Packets, Pictures, increasing
from alpacache.converters.writer import convert, plain_name
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.errors import BadClipError, DataError, InterruptedRunError, SourceError, UsageError
from alpacache.sources.folder import FolderSource

pytestmark = pytest.mark.system  # whole conversions

SETTINGS = {"kind": "test", "input": "here"}


def pictures(curved):
    return Pictures(times_us=curved.track.timestamps_us, read=lambda begin, end: iter(curved.jpegs[begin:end]))


@pytest.fixture
def drive(curved):
    return LoggedDrive(name="a", cameras={FRONT_CAMERA: pictures(curved)}, track=curved.track, point="rear axle")


def write(drives, out, **options):
    return convert(drives, out, name="test", settings={**SETTINGS, **options}, **options)


def film(curved, path, *, codec="libx264", options=None, rate=20, format_name="mp4"):
    options = {"preset": "ultrafast", "crf": "15", "g": "20"} if options is None else options
    with av.open(str(path), "w", format=format_name) as movie:
        stream = movie.add_stream(codec, rate=rate, width=256, height=128, pix_fmt="yuv420p", options=options)
        for frame in curved.frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
            movie.mux(stream.encode(image))
        movie.mux(stream.encode(None))
    return path


def packets_of(path):
    with av.open(str(path)) as movie:
        return [bytes(packet) for packet in movie.demux(movie.streams.video[0]) if packet.size]


def nearest(picture, frames):
    return int(np.argmin([np.abs(picture.astype(float) - frame).mean() for frame in frames]))


def test_pictures_are_copied_byte_for_byte_and_the_result_passes_check(drive, curved, tmp_path):
    routed = replace(drive, routes=[(curved.track.timestamps_us[0], "Turn left"), (9_000_000, "")])
    report = write([routed], tmp_path / "out")
    clip = tmp_path / "out/clips/a"
    assert [file.read_bytes() for file in sorted((clip / FRONT_CAMERA).iterdir())] == curved.jpegs
    source = FolderSource(tmp_path / "out")
    found = source.track("a")
    assert (found.timestamps_us == curved.track.timestamps_us).all()
    assert (found.xyz == curved.track.xyz).all()
    assert np.abs(found.quaternion_xyzw - curved.track.quaternion_xyzw).max() < 1e-12
    assert source.route_times_us("a").tolist() == [curved.track.timestamps_us[0], 9_000_000]
    checked = check_source(source, t0="every:2.0")
    assert checked.ok
    assert checked.refused == ()
    assert report.clips[0]["cameras"] == {FRONT_CAMERA: {"frames": 400, "written": "copied", "formats": [".jpg"]}}
    assert not (tmp_path / "out/clips/.writing").exists()
    record = json.loads((clip / "provenance.json").read_text())
    assert record["pose"]["point"] == "rear axle"


def test_a_drive_is_cut_and_nothing_is_lost_at_its_end(drive, curved, tmp_path):
    write([drive], tmp_path / "out", clip_seconds=10.0)  # the poses reach over 19.95 s
    source = FolderSource(tmp_path / "out")
    assert list(source.clip_ids) == ["a-000", "a-001"]
    times = [source.frame_times_us(clip, FRONT_CAMERA).tolist() for clip in source.clip_ids]
    assert times[0] + times[1] == curved.track.timestamps_us.tolist()
    assert times[0][-1] == times[0][0] + 9_950_000
    assert source.track("a-000").timestamps_us[-1] == times[1][0]  # a pose beyond the end, so that it is covered
    write([drive], tmp_path / "whole", clip_seconds=15.0)
    assert list(FolderSource(tmp_path / "whole").clip_ids) == ["a-000"]  # a rest of 5 s stays with the clip before it


def test_a_route_holds_on_in_the_next_piece(drive, tmp_path):
    begin = int(drive.track.timestamps_us[0])
    routed = replace(drive, routes=[(begin + 1_000_000, "Turn left")])
    write([routed], tmp_path / "out", clip_seconds=10.0)
    source = FolderSource(tmp_path / "out")
    assert source.route_times_us("a-000").tolist() == [begin + 1_000_000]
    assert source.route_times_us("a-001").tolist() == [begin + 10_000_000]


def test_an_offset_and_a_mount_are_taken_out(drive):
    """A camera ahead of the axle, turned: its poses are what the rig's give through both; settling undoes it."""
    offset, mount = (-1.5, 0.2, -1.3), (0.88, 3.8, -0.5)
    truth = Rotation.from_quat(drive.track.quaternion_xyzw)
    seen = replace(
        drive.track,
        xyz=drive.track.xyz - truth.apply(offset),
        quaternion_xyzw=(truth * Rotation.from_euler("ZYX", mount, degrees=True)).as_quat(),
    )
    settled = settle(replace(drive, track=seen, point="camera"), offset_m=offset, mount_deg=mount).track
    assert np.abs(settled.xyz - drive.track.xyz).max() < 1e-9
    turned = Rotation.from_quat(settled.quaternion_xyzw) * truth.inv()
    assert turned.magnitude().max() < 1e-9
    # The presets of the kind do the same, and an option takes their place.
    preset = replace(drive, track=seen, origin_offset_m=offset, mount_deg=mount)
    assert np.abs(settle(preset, offset_m=None, mount_deg=None).track.xyz - drive.track.xyz).max() < 1e-9
    assert np.abs(settle(preset, offset_m=(0, 0, 0), mount_deg=None).track.xyz - seen.xyz).max() == 0


def test_a_mount_is_estimated_on_straights():
    """30 s at 15 m/s, half of it straight: a camera that looks 0.88 degrees left and 3.8 down."""
    times = np.arange(600) * 50_000
    yaw = np.concatenate([np.full(300, 0.3), 0.3 + 0.15 * np.arange(300) * 0.05])
    velocity = 15 * np.stack([np.cos(yaw), np.sin(yaw), np.zeros(600)], axis=1)
    xyz = np.cumsum(velocity * 0.05, axis=0)
    rotation = Rotation.from_euler("Z", yaw[:, None]) * Rotation.from_euler("ZYX", (0.88, 3.8, 0), degrees=True)
    track = Track(timestamps_us=times, xyz=xyz, quaternion_xyzw=rotation.as_quat())
    (yaw_deg, pitch_deg, roll_deg), on_s = estimated_mount(track, where="a")
    assert yaw_deg == pytest.approx(0.88, abs=0.01)
    assert pitch_deg == pytest.approx(3.8, abs=0.01)
    assert roll_deg == 0
    assert on_s == pytest.approx(14, abs=1)
    slow = replace(track, xyz=xyz / 4)
    with pytest.raises(BadClipError, match=r"a: 0\.0 s of straight driving above 8 m/s"):
        estimated_mount(slow, where="a")


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", None),
        ("libx264", {"preset": "medium", "crf": "15", "g": "24", "bf": "3", "b-pyramid": "normal"}),
        pytest.param(
            "libx265",
            {"preset": "ultrafast", "crf": "12", "x265-params": "bframes=0:keyint=20:log-level=none"},
            marks=pytest.mark.ci,
        ),
    ],
)
def test_films_are_cut_packet_by_packet(curved, drive, tmp_path, codec, options):
    path = film(curved, tmp_path / "film.mp4", codec=codec, options=options)
    filmed = replace(drive, cameras={FRONT_CAMERA: Film(path=path, times_us=curved.track.timestamps_us)})
    report = write([filmed], tmp_path / "out", clip_seconds=9.3)
    assert {clip["cameras"][FRONT_CAMERA]["written"] for clip in report.clips} == {"packets copied"}
    source, original = FolderSource(tmp_path / "out"), packets_of(path)
    shown = set()
    for clip in source.clip_ids:
        assert set(packets_of(tmp_path / f"out/clips/{clip}/{FRONT_CAMERA}.mp4")) <= set(original)
        times = source.frame_times_us(clip, FRONT_CAMERA)
        shown |= set(times.tolist())
        for at in (0, 1, 57, len(times) - 1):
            (picture,) = source.film(clip, FRONT_CAMERA, times[[at]])
            number = int(np.searchsorted(curved.track.timestamps_us, times[at]))
            first = max(0, number - 3)
            assert first + nearest(picture, curved.frames[first : number + 4]) == number
    assert shown == set(curved.track.timestamps_us.tolist())


def test_a_part_of_a_joined_film_without_a_key_frame_is_decoded(curved, drive, tmp_path):
    path = film(curved, tmp_path / "film.mp4", options={"preset": "ultrafast", "crf": "10", "g": "400"})
    times = curved.track.timestamps_us[130:]
    part = replace(drive, cameras={FRONT_CAMERA: Film(path=path, times_us=times, first=130)})
    report = write([part], tmp_path / "out")
    camera = report.clips[0]["cameras"][FRONT_CAMERA]
    assert (camera["written"], camera["frames"]) == ("decoded and encoded", 270)
    (picture,) = FolderSource(tmp_path / "out").film("a", FRONT_CAMERA, times[:1])
    assert nearest(picture, curved.frames[120:140]) == 10


@pytest.mark.parametrize(
    ("codec", "encoder", "options"),
    [
        ("h264", "libx264", {"preset": "ultrafast", "g": "20", "bf": "0"}),
        pytest.param(
            "av1",
            "libsvtav1",
            {"preset": "12", "g": "20", "svtav1-params": "pred-struct=1"},
            marks=pytest.mark.ci,
        ),
    ],
)
def test_packets_become_a_film(curved, drive, tmp_path, codec, encoder, options):
    path = film(
        curved, tmp_path / "film", codec=encoder, options=options, format_name="ivf" if codec == "av1" else codec
    )
    packets = packets_of(path)
    assert len(packets) == 400
    stream = Packets(times_us=curved.track.timestamps_us, codec=codec, read=lambda: iter(packets))
    report = write([replace(drive, cameras={FRONT_CAMERA: stream})], tmp_path / "out", clip_seconds=10.0)
    assert [clip["cameras"][FRONT_CAMERA]["written"] for clip in report.clips] == ["packets copied"] * 2
    source = FolderSource(tmp_path / "out")
    (picture,) = source.film("a-001", FRONT_CAMERA, curved.track.timestamps_us[[333]])
    assert nearest(picture, curved.frames[330:337]) == 3


def test_changes_of_pictures_are_named_in_the_index(drive, tmp_path):
    convert([drive], tmp_path / "out", name="test", settings=SETTINGS, changes=["undistort", "crop"])
    assert FolderSource(tmp_path / "out").changes == ("undistort", "crop")
    convert([drive], tmp_path / "plain", name="test", settings=SETTINGS)
    assert "changes" not in json.loads((tmp_path / "plain/dataset.json").read_text())


def test_the_report_tells_how_well_poses_are_known_and_where_they_stood(drive, tmp_path):
    said = replace(drive, facts={"uncertainty": "0.2 m", "clock": "UTC"}, told=("uncertainty", "film"))
    (clip,) = write([said], tmp_path / "out", offset_m=(-1.0, 0.0, 0.0)).clips
    assert clip["told"] == {"uncertainty": "0.2 m"}
    assert clip["pose"]["origin_offset_m"] == [-1.0, 0.0, 0.0]
    (kept,) = write([said], tmp_path / "out", offset_m=(-1.0, 0.0, 0.0)).clips
    assert kept == json.loads(json.dumps(clip))


def test_arrays_are_encoded(curved, drive, tmp_path):
    rgb = [np.ascontiguousarray(frame.transpose(1, 2, 0)) for frame in curved.frames]
    raw = Arrays(times_us=curved.track.timestamps_us, read=lambda begin, end: iter(rgb[begin:end]))
    report = write([replace(drive, cameras={FRONT_CAMERA: raw})], tmp_path / "out")
    assert report.clips[0]["cameras"][FRONT_CAMERA]["written"] == "encoded"
    (picture,) = FolderSource(tmp_path / "out").film("a", FRONT_CAMERA, curved.track.timestamps_us[[7]])
    assert nearest(picture, curved.frames[:20]) == 7


def test_a_stopped_command_goes_on_with_the_clips_it_has(drive, curved, tmp_path):
    out, asked = tmp_path / "out", []

    def stop():
        asked.append(1)
        return len(asked) > 250

    with pytest.raises(InterruptedRunError, match="same command again"):
        convert([drive], out, name="test", settings=SETTINGS, clip_seconds=10.0, is_stopped=stop)
    assert [path.name for path in (out / "clips").iterdir()] == ["a-000"]
    assert not (out / "dataset.json").exists()
    first = (out / "clips/a-000/egomotion.parquet").stat().st_mtime_ns
    (out / "clips/.writing/a-001").mkdir(parents=True)  # as a kill leaves it
    report = convert([drive], out, name="test", settings=SETTINGS, clip_seconds=10.0)
    assert report.kept == 1
    assert (out / "clips/a-000/egomotion.parquet").stat().st_mtime_ns == first
    assert list(FolderSource(out).clip_ids) == ["a-000", "a-001"]
    assert convert([drive], out, name="test", settings=SETTINGS, clip_seconds=10.0).kept == 2
    with pytest.raises(UsageError, match='was begun with input "here", and this command has "there"'):
        convert([drive], out, name="test", settings={**SETTINGS, "input": "there"})
    record = out / "clips/a-000/provenance.json"
    for damaged in (record.read_text()[:50], "{}", '{"clip": {"name": "a-000"}}', "[" * 5000):
        record.write_text(damaged)
        with pytest.raises(DataError, match=r"a-000/provenance\.json is damaged .* Remove that clip's folder"):
            convert([drive], out, name="test", settings=SETTINGS, clip_seconds=10.0)


def test_a_full_disk_is_told_and_drops_nothing(drive, curved, tmp_path, monkeypatch):
    """Also where it is met while a film is read."""
    made = film(curved, tmp_path / "a.mp4", options={"preset": "ultrafast", "g": "20", "bf": "0"})
    filmed = replace(drive, cameras={FRONT_CAMERA: Film(path=made, times_us=curved.track.timestamps_us)})
    opened = av.open

    class Full:
        def __init__(self, place):
            self.place = place

        def __enter__(self):
            raise av.error.OSError(errno.ENOSPC, "No space left on device", self.place)

        def __exit__(self, *error):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(av, "open", lambda file, *a, **k: Full(file) if a[:1] == ("w",) else opened(file, *a, **k))
        with pytest.raises(OSError, match="No space left on device") as told:
            write([drive, replace(filmed, name="b")], tmp_path / "out")
    assert told.value.errno == errno.ENOSPC
    assert str(tmp_path / "out") in str(told.value.filename)
    assert not (tmp_path / "out/clips/.writing").exists()
    with monkeypatch.context() as patch:
        patch.setattr("alpacache.converters.writer._begin", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "")))
        with pytest.raises(OSError, match=str(tmp_path / "out")):
            write([drive], tmp_path / "out")
    assert len(write([drive, replace(filmed, name="b")], tmp_path / "other").clips) == 2


def test_a_folder_of_something_else_stays_as_it_is(drive, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("all of it")
    with pytest.raises(UsageError, match=r"holds thesis\.tex and is not of this command"):
        write([drive], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/.convert.json.new").write_text("{")  # a kill at the very beginning
    assert len(write([drive], tmp_path / "begun").clips) == 1


def test_what_is_dropped_is_said(drive, curved, tmp_path):
    early = curved.track.timestamps_us[:100]
    short = replace(drive, name="short", cameras={FRONT_CAMERA: replace(pictures(curved), times_us=early)})
    odd = replace(drive, name="odd", cameras={FRONT_CAMERA: replace(pictures(curved), read=lambda a, b: iter([b"BM"]))})
    lost = Dropped(what="poses", count=3, reason="no fix")
    report = write([short, Dropped(what="drives", count=1, reason="empty"), odd, drive, drive], tmp_path / "out")
    assert [drop.reason for drop in report.dropped] == [
        "short: poses and cameras cover 5.0 s together; a sample takes 8.1 s",
        "empty",
        f"odd: {FRONT_CAMERA}: a picture begins with 424d; JPEG and PNG are read",
        "a: a is the name of two drives; rename one of them",
    ]
    report = write([replace(drive, dropped=[lost])], tmp_path / "other")
    assert report.dropped == (lost,)
    assert json.loads((tmp_path / "other/convert.json").read_text())["dropped"][0]["count"] == 3
    with pytest.raises(SourceError, match="nothing could be converted: short: poses and cameras cover"):
        write([short], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_names_from_a_log_stay_inside():
    assert plain_name("../../etc/passwd") == "etc_passwd"
    assert plain_name("b0c9|2018-08-02--08-34-47/40") == "b0c9_2018-08-02--08-34-47_40"
    assert plain_name("..") == "drive"
    assert len(plain_name("a" * 500)) == 120


def test_rows_are_put_in_the_order_of_time():
    assert increasing(np.array([5, 3, 3, 9, 5])).tolist() == [1, 0, 3]
    assert increasing(np.array([], np.int64)).tolist() == []
    assert increasing(np.array([-5, 0])).tolist() == [0, 1]

import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alpacache.checks.recordings import read_recording
from alpacache.driving.poses import EgoPoses
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, SourceError
from alpacache.sources import folder as folder_module
from alpacache.sources.folder import FolderSource
from alpacache.sources.recording import sample_of
from alpacache.sources.selection import select
from alpacache.sources.source import RecordedSource, picture_changes

FRONT, LEFT = "camera_front_wide_120fov", "camera_cross_left_120fov"
T0 = 5_100_000


def load(root, clip="a", *, t0=T0, cameras=(FRONT,), frames=4):
    return FolderSource(root).load(SampleRef(clip_id=clip, t0_us=t0), cameras=cameras, frames=frames)


@pytest.mark.parametrize("clip", ["a", "b"])
def test_frames_are_those_at_or_before_each_time(folder, clip):
    sample = load(folder, clip, t0=T0 + 99_999)
    assert sample.frame_timestamps_us.tolist() == [[4_800_000, 4_900_000, 5_000_000, 5_100_000]]
    assert sample.frames.shape == (1, 4, 3, 32, 64)
    assert sample.frames.dtype == np.uint8
    shown = sample.frames.mean(axis=(0, 2, 3, 4))
    np.testing.assert_allclose(shown, [20 + 3 * i for i in (48, 49, 50, 51)], atol=1.25)


def test_frames_lie_as_decoded_and_one_cameras_are_not_copied(folder):
    for clip in ("a", "b"):
        assert load(folder, clip).frames.transpose(0, 1, 3, 4, 2).flags.c_contiguous
    images = [np.full((2, 4, 6, 3), shade, np.uint8).transpose(0, 3, 1, 2) for shade in (10, 20)]
    ref, poses = SampleRef(clip_id="a", t0_us=T0), EgoPoses(*np.zeros((4, 1), np.float32))
    shots = {camera: (frames, np.arange(2)) for camera, frames in zip((FRONT, LEFT), images, strict=True)}
    assert np.shares_memory(sample_of(ref, poses, {FRONT: shots[FRONT]}, None).frames, images[0])
    np.testing.assert_array_equal(sample_of(ref, poses, shots, None).frames[:, 1, 2, 3, 5], [10, 20])


@pytest.mark.parametrize("t0", [2_000_000, 5_550_000])
def test_mp4_seeks_to_any_frame(folder, t0):
    sample = load(folder, "b", t0=t0, frames=2)
    index = t0 // 100_000
    np.testing.assert_allclose(sample.frames.mean(axis=(0, 2, 3, 4)), [20 + 3 * (index - 1), 20 + 3 * index], atol=1.25)


def test_poses_are_the_circle(folder):
    sample = load(folder)
    yaw = 0.2 * 0.1 * np.arange(1, 65)
    np.testing.assert_allclose(sample.future_xyz[:, 1], (1 - np.cos(yaw)) / 0.02, atol=1e-4)
    np.testing.assert_allclose(sample.future_rot[:, 1, 0], np.sin(yaw), atol=1e-5)
    assert sample.history_xyz.dtype == np.float32


def test_tables_that_are_kept_are_read_again_once_their_file_changes(folder, monkeypatch):
    source, files = FolderSource(folder), []
    read = folder_module.read_columns

    def noted(file, names, *, where):
        files.append(file)
        return read(file, names, where=where)

    monkeypatch.setattr(folder_module, "read_columns", noted)
    first = source.track("a")
    assert source.track("a").xyz.tolist() == first.xyz.tolist()
    assert len(files) == 1
    columns = {name: column.to_numpy() for name, column in zip(*table_of(folder), strict=True)}
    pq.write_table(pa.table(columns | {"x": columns["x"] + 7.0}), folder / "clips/a/egomotion.parquet")
    assert source.track("a").xyz[0, 0] == pytest.approx(first.xyz[0, 0] + 7.0)
    assert not source.frame_times_us("a", FRONT).flags.writeable
    assert len(files) == 3


def table_of(folder):
    table = pq.read_table(folder / "clips/a/egomotion.parquet")
    return table.column_names, table.columns


def test_cameras_come_in_index_order_with_their_calibration(folder):
    sample = load(folder, cameras=(FRONT, LEFT))
    assert sample.cameras == (LEFT, FRONT)
    assert sample.frames.shape == (2, 4, 3, 32, 64)
    assert sample.calibration == {FRONT: {"fx": 1.5}}


def test_times_are_what_poses_and_cameras_share(folder):
    assert FolderSource(folder).times_us("a") == (0, 12_000_000)
    pq.write_table(
        pq.read_table(folder / f"clips/a/{LEFT}.timestamps.parquet").slice(3, 90),
        folder / f"clips/a/{LEFT}.timestamps.parquet",
    )
    assert FolderSource(folder).times_us("a") == (300_000, 9_200_000)
    assert FolderSource(folder, cameras=[FRONT]).times_us("a") == (0, 12_000_000)


def test_threads_load_the_same(folder, in_threads):
    source = FolderSource(folder)

    def work(number):
        ref = SampleRef(clip_id="ab"[number % 2], t0_us=T0)
        return source.load(ref, cameras=[FRONT], frames=2).frames

    results = in_threads(work, 8)
    for number in range(2, 8):
        np.testing.assert_array_equal(results[number], results[number % 2])


def edit(file, **columns):
    old = pq.read_table(file)
    for name, values in columns.items():
        old = old.set_column(old.column_names.index(name), name, [values])
    pq.write_table(old, file)


def column(file, name):
    return pq.read_table(file).column(name).to_numpy().copy()


def break_clip(folder, how):
    clip = folder / "clips/a"
    poses, stamps = clip / "egomotion.parquet", clip / f"{FRONT}.timestamps.parquet"
    if how == "no camera":
        stamps.unlink()
    elif how == "no images":
        shutil.rmtree(clip / FRONT)
    elif how == "no poses":
        poses.unlink()
    elif how == "no clip":
        shutil.rmtree(clip)
    elif how == "short poses":
        pq.write_table(pq.read_table(poses).slice(0, 200), poses)
    elif how == "short video":
        pq.write_table(pq.read_table(stamps).slice(0, 50), stamps)
        for image in sorted((clip / FRONT).iterdir())[50:]:
            image.unlink()
    elif how == "nan":
        x = column(poses, "x")
        x[100] = np.nan
        edit(poses, x=x)
    elif how == "jump":
        x = column(poses, "x")
        x[120:] += 40
        edit(poses, x=x)
    elif how == "time order":
        times = column(stamps, "timestamp")
        times[30], times[31] = times[31], times[30]
        edit(stamps, timestamp=times)
    elif how == "image count":
        (clip / FRONT / "000120.jpg").unlink()
    elif how == "image size":
        Image.new("RGB", (32, 32)).save(clip / FRONT / "000050.jpg")
    elif how == "camera size":
        for image in (clip / LEFT).iterdir():
            Image.new("RGB", (32, 32)).save(image)
    elif how == "columns":
        pq.write_table(pq.read_table(poses).drop_columns(["qw"]), poses)
    elif how == "truncated image":
        image = clip / FRONT / "000051.jpg"
        image.write_bytes(image.read_bytes()[:300])
    elif how == "not an image":
        (clip / FRONT / "000051.jpg").write_bytes(b"GIF89a")
    elif how == "not parquet":
        poses.write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("no camera", "missing_camera", "leave it out with --cameras"),
        ("no images", "missing_camera", "neither camera_front_wide_120fov.mp4 nor a folder"),
        ("no poses", "missing_poses", "egomotion.parquet does not exist"),
        ("no clip", "missing_poses", "does not exist"),
        ("short poses", "short_clip", "poses cover 0.000 s to 9.950 s"),
        ("short video", "short_clip", "frames cover 0.000 s to 4.900 s"),
        ("nan", "not_finite", "1 of 241 poses"),
        ("jump", "pose_jump", "the vehicle moves"),
        ("time order", "time_order", "increase strictly"),
        ("image count", "wrong_shape", "120 images, but 121 timestamps"),
        ("image size", "wrong_shape", "different sizes"),
        ("camera size", "wrong_shape", "cameras of different sizes"),
        ("columns", "wrong_shape", "lacks the columns qw"),
        ("truncated image", "undecodable_video", "000051.jpg: no readable JPEG"),
        ("not an image", "undecodable_video", "no readable JPEG"),
        ("not parquet", "wrong_shape", "not a readable parquet"),
    ],
)
def test_each_bad_clip_has_its_reason(folder, how, kind, says):
    break_clip(folder, how)
    with pytest.raises(BadClipError, match=says) as error:
        load(folder, cameras=(FRONT, LEFT))
    assert error.value.kind == kind
    assert str(error.value).startswith("a")
    load(folder, "b")


@pytest.mark.parametrize("keep", [0, 40, 900, 0.5, 0.8])
def test_a_truncated_video_is_refused(folder, keep):
    movie = folder / f"clips/b/{FRONT}.mp4"
    data = movie.read_bytes()
    movie.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(BadClipError) as error:
        load(folder, "b")
    assert error.value.kind == "undecodable_video"


def test_a_video_of_fewer_frames_than_timestamps_is_refused(folder):
    file = folder / f"clips/b/{FRONT}.timestamps.parquet"
    pq.write_table(pq.read_table(file).slice(0, 100), file)
    with pytest.raises(BadClipError, match="holds 121 frames, its timestamps name 100") as error:
        load(folder, "b")
    assert error.value.kind == "wrong_shape"


@pytest.mark.parametrize("name", ["../a", "/etc", "a/b", "..", ".", "", "a\\b", "a\n", 7, "a" * 256])
def test_clip_names_cannot_leave_the_folder(folder, name):
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(index | {"clips": [name]}))
    with pytest.raises(SourceError, match="one path component"):
        FolderSource(folder)


def test_a_clip_may_be_named_by_its_time(folder):
    name = "2018-08-02T10:00:00"
    (folder / "clips/a").rename(folder / "clips" / name)
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(index | {"clips": [name]}))
    assert [ref.sample_id for ref in select(FolderSource(folder))[0]] == [f"{name}@{T0}#0"]
    assert load(folder, name).ref.clip_id == name


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"cameras": ["../x"]}, "unknown camera"),
        ({"clips": ["a", "a"]}, "listed twice"),
        ({"clips": []}, "at least one"),
        ({"cameras": "front"}, "at least one"),
    ],
)
def test_bad_index_is_refused(folder, index, says):
    old = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(old | index))
    with pytest.raises(SourceError, match=says):
        FolderSource(folder)


def test_index_must_be_json(folder):
    (folder / "dataset.json").write_bytes(pickle.dumps({"name": "x"}))
    with pytest.raises(SourceError, match="not a dataset index"):
        FolderSource(folder)
    with pytest.raises(SourceError, match="does not exist"):
        FolderSource(folder / "nowhere")


@pytest.mark.parametrize(
    "target", ["clips/a", f"clips/a/{FRONT}", f"clips/a/{FRONT}/000051.jpg", f"clips/b/{FRONT}.mp4"]
)
def test_links_out_of_the_folder_are_refused(folder, tmp_path, target):
    inside, outside = folder / target, tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(BadClipError, match="links out of") as error:
        load(folder, target.split("/")[1])
    assert error.value.kind == "unsafe_path"


@pytest.mark.parametrize(
    "target", ["clips/a", "clips/a/egomotion.parquet", f"clips/a/{FRONT}", f"clips/a/{FRONT}/000051.jpg"]
)
def test_links_that_run_in_a_circle_are_their_clips_fault(folder, target):
    inside = folder / target
    inside.rename(folder / "aside")
    inside.symlink_to(inside.name)
    with pytest.raises(BadClipError):
        load(folder, "a")
    load(folder, "b")


def test_decompression_bombs_are_refused(folder):
    Image.new("L", (16_000, 4_000)).save(folder / f"clips/a/{FRONT}/000051.jpg")
    with pytest.raises(BadClipError, match="16000 x 4000 pixels") as error:
        load(folder)
    assert error.value.kind == "wrong_shape"


@pytest.mark.parametrize(
    "file", [f"b/{FRONT}.mp4", f"a/{FRONT}/000051.jpg", "a/egomotion.parquet", f"a/{FRONT}.timestamps.parquet"]
)
def test_a_fifo_in_place_of_a_file_is_refused_and_not_waited_for(folder, file):
    (folder / "clips" / file).unlink()
    os.mkfifo(folder / "clips" / file)
    with pytest.raises(BadClipError, match=f"{file.rpartition('/')[2]} cannot be read: it is a FIFO") as error:
        load(folder, file[0])
    assert error.value.kind == "unsafe_path"


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (f'{{"{FRONT}": {{"fx": NaN}}}}', "wrong_shape", "calibration.json is not readable JSON .NaN is no JSON"),
        (f'{{"{FRONT}": {{"fx": 1e999}}}}', "wrong_shape", "1e999 is beyond the range"),
        (f'{{"{FRONT}": {{"fx": 1{"0" * 400}}}}}', "wrong_shape", "beyond the range"),
        (f'{{"{FRONT}": [1, 2]}}', "wrong_shape", "one for each camera"),
        ("[" * 100_000, "wrong_shape", "nested too deeply"),
        ('{"a": {"b": "' + "a" * 2**20 + '"}}', "unsafe_path", "at most 1,048,576 are read"),
    ],
    ids=["NaN", "infinite", "long", "no object", "deep", "large"],
)
def test_a_calibration_that_no_reader_should_meet_is_refused(folder, text, kind, says):
    (folder / "clips/a/calibration.json").write_text(text)
    with pytest.raises(BadClipError, match=f"^a: calibration.json .*{says}" if "most" in says else says) as error:
        load(folder)
    assert error.value.kind == kind
    load(folder, "b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "expected a JSON object with name, cameras and clips"),
        ('{"name": "x"}', "dataset.json lacks cameras and clips"),
        ('{"name": "\\ud800", "cameras": [], "clips": []}', r'dataset.json: name is "\\ud800"; expected text in valid'),
        ('{"name": null, "cameras": [], "clips": []}', "name is null; expected text"),
        ('{"name": "x", "cameras": [["front"]], "clips": ["a"]}', "unknown camera"),
    ],
)
def test_an_index_of_another_form_is_refused_in_words(folder, text, says):
    (folder / "dataset.json").write_text(text)
    with pytest.raises(SourceError, match=says) as refused:
        FolderSource(folder)
    assert not any(word in str(refused.value) for word in ("NoneType", "indices", "KeyError", "'cameras'"))


@pytest.mark.parametrize(
    "name", ["dataset.json", "clips/a/egomotion.parquet", f"clips/a/{FRONT}/000051.jpg", f"clips/b/{FRONT}.mp4"]
)
def test_a_pointer_of_git_lfs_is_called_one(folder, name):
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n")
    with pytest.raises((SourceError, BadClipError), match="git lfs pull"):
        load(folder, name[6] if name[0] == "c" else "a")


def test_a_calibration_that_is_a_pointer_of_git_lfs(folder):
    (folder / "clips/a/calibration.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BadClipError, match="git lfs pull"):
        load(folder)


@pytest.mark.parametrize("content", ["fifo", "[" * 100_000, '{"name": NaN}'])
def test_an_index_that_cannot_be_read(folder, content):
    (folder / "dataset.json").unlink()
    os.mkfifo(folder / "dataset.json") if content == "fifo" else (folder / "dataset.json").write_text(content)
    with pytest.raises(SourceError, match="it is a FIFO" if content == "fifo" else "not a dataset index"):
        FolderSource(folder)


def test_unknown_clip(folder):
    with pytest.raises(BadClipError, match="not in"):
        load(folder, "zzz")


@pytest.mark.parametrize("how", ["time order", "nan", "no poses"])
def test_selection_sees_the_same_reason_as_loading(folder, how):
    break_clip(folder, how)
    refs, rejected = select(FolderSource(folder))
    with pytest.raises(BadClipError) as error:
        load(folder)
    assert [ref.clip_id for ref in refs] == ["b"]
    assert [(clip, reason.kind) for clip, reason in rejected] == [("a", error.value.kind)]


def test_whole_recordings_are_what_the_files_say(folder):
    source = FolderSource(folder)
    assert isinstance(source, RecordedSource)
    recording = read_recording(source, "a", [FRONT, "camera_rear_tele_30fov"])
    assert recording.track.timestamps_us[[0, -1]].tolist() == [0, 12_000_000]
    assert recording.frame_times_us[FRONT].tolist() == list(range(0, 12_000_001, 100_000))
    assert "does not exist" in recording.missing["camera_rear_tele_30fov"]
    shown = source.film("a", FRONT, np.array([150_000, 2_000_000])).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(shown, [20 + 3 * 1, 20 + 3 * 20], atol=1.25)


def test_changes_of_pictures_are_a_few_words_and_older_indices_have_none(folder):
    assert FolderSource(folder).changes == ()
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(index | {"changes": ["undistort", "crop"]}))
    assert picture_changes(FolderSource(folder)) == ("undistort", "crop")
    for wrong in ("crop", ["crop"] * 9, ["a\nb"], [""], [1], {"crop": True}, ["x" * 81]):
        (folder / "dataset.json").write_text(json.dumps(index | {"changes": wrong}))
        with pytest.raises(SourceError, match=r"dataset\.json: changes is .*; expected a list of a few words"):
            FolderSource(folder)

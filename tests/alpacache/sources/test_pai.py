"""The PhysicalAI-AV reader against the devkit used directly, and on each way a tree can be broken."""

import builtins
import io
import json
import os
import shutil
import types
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alpacache.checks.recordings import read_recording
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.sources.pai import PhysicalAiSource, open_tree
from alpacache.sources.pai_cache import LinkedCache, explain_hub_error
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource
from benchmarks.pai_tree import write_tree

av = pytest.importorskip("av")
physical_ai_av = pytest.importorskip("physical_ai_av")

FRONT, LEFT = "camera_front_wide_120fov", "camera_cross_left_120fov"
T0 = 5_100_000
DRIVES = SyntheticSource(3, seed=6, mix={"early_curve": 1}, size=(64, 32))
CLIPS = DRIVES.clip_ids


@pytest.fixture(scope="session")
def pristine_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("pai")
    write_tree(root, source=DRIVES, cameras=[FRONT, LEFT])
    return root


@pytest.fixture
def tree(pristine_tree, tmp_path):
    return shutil.copytree(pristine_tree, tmp_path / "tree")


def load(source, clip=CLIPS[0], *, t0=T0, cameras=(FRONT,), frames=4):
    return source.load(SampleRef(clip_id=clip, t0_us=t0), cameras=cameras, frames=frames)


@pytest.mark.system
@pytest.mark.parametrize("t0", [T0, 2_345_678])
def test_values_are_those_of_the_devkit(pristine_tree, t0):
    """History, future, frames and ego frame computed here from the devkit's own calls, as the public loader does."""
    cache = LinkedCache(pristine_tree)
    devkit = physical_ai_av.PhysicalAIAVDatasetInterface(
        revision=cache.revision, cache_dir=cache.directory, token=False
    )
    poses = devkit.get_clip_feature(CLIPS[1], "egomotion")
    steps = np.arange(1, 65) * 100_000
    past, coming = poses(t0 + (np.arange(16) - 15) * 100_000).pose, poses(t0 + steps).pose
    origin = past[-1]
    reader = devkit.get_clip_feature(CLIPS[1], LEFT)
    images, taken = reader.decode_images_from_timestamps(t0 + np.array([-300_000, -200_000, -100_000, 0]))
    reader.close()

    sample = load(open_tree(pristine_tree), CLIPS[1], t0=t0, cameras=(FRONT, LEFT))
    assert sample.cameras == (LEFT, FRONT)
    np.testing.assert_array_equal(sample.frames[0], images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(sample.frame_timestamps_us[0], taken)
    undo = origin.rotation.inv()
    for xyz, rot, pose in (
        (sample.history_xyz, sample.history_rot, past),
        (sample.future_xyz, sample.future_rot, coming),
    ):
        np.testing.assert_allclose(xyz, undo.apply(pose.translation - origin.translation), atol=1e-5)
        np.testing.assert_allclose(rot, (undo * pose.rotation).as_matrix(), atol=1e-6)
        assert xyz.dtype == rot.dtype == np.float32
    cache.close()


def remuxed(film, *, lost=False, timescale=None):
    """The film with another unit of time, or without the frame before the second key frame: no other needs it."""
    out, options = io.BytesIO(), {"video_track_timescale": str(timescale)} if timescale else {}
    with av.open(io.BytesIO(film)) as source, av.open(out, "w", format="mp4", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        if lost:
            del packets[next(number for number, packet in enumerate(packets) if number and packet.is_keyframe) - 1]
        for packet in packets:
            packet.stream = stream
            target.mux(packet)
    return out.getvalue()


def rewrite_film(tree, change):
    archive = tree / f"camera/{FRONT}/{FRONT}.chunk_0000.zip"
    rewrite(archive, lambda name, data: change(data) if name == f"{CLIPS[0]}.{FRONT}.mp4" else data)


@pytest.mark.parametrize(
    "change",
    [
        lambda film: remuxed(film, timescale=1000),
        lambda film: remuxed(film, timescale=90_000),
        lambda film: film.replace(b"VideoHandler", b"\xff\xfeVideoHandl"[:12]),
    ],
    ids=["milliseconds", "90 kHz", "names in another encoding"],
)
def test_frames_are_the_same_however_the_film_was_muxed(pristine_tree, tree, change):
    """The devkit's own reader is off by a frame where the interval of frames is not a whole number of units."""
    rewrite_film(tree, change)
    for t0 in (2_000_000, T0):
        np.testing.assert_array_equal(load(open_tree(tree), t0=t0).frames, load(open_tree(pristine_tree), t0=t0).frames)


def test_a_frame_that_film_and_times_both_lack_moves_no_other(pristine_tree, tree):
    with zipfile.ZipFile(tree / f"camera/{FRONT}/{FRONT}.chunk_0000.zip") as archive:
        film = archive.read(f"{CLIPS[0]}.{FRONT}.mp4")
    with av.open(io.BytesIO(film)) as before, av.open(io.BytesIO(remuxed(film, lost=True))) as after:
        old, new = ({p.pts * p.time_base for p in opened.demux(video=0) if p.size} for opened in (before, after))
    (missing,) = old - new
    lost = sorted(old).index(missing)

    def change(name, data):
        if not name.startswith(CLIPS[0]):
            return data
        return (
            remuxed(data, lost=True) if name.endswith("mp4") else edit_table(data, lambda table: table.drop(index=lost))
        )

    rewrite(tree / f"camera/{FRONT}/{FRONT}.chunk_0000.zip", change)
    np.testing.assert_array_equal(load(open_tree(tree)).frames, load(open_tree(pristine_tree)).frames)


def test_the_tree_shows_the_drives_it_was_made_of(pristine_tree):
    """The generated drive, through H.264 and the devkit's spline; the tree's clock starts 0.1 s after the drive's."""
    sample = load(open_tree(pristine_tree))
    want = DRIVES.load(SampleRef(clip_id=CLIPS[0], t0_us=T0 + 100_000), cameras=[FRONT], frames=1)
    np.testing.assert_allclose(sample.future_xyz, want.future_xyz, atol=1e-4)
    shown = DRIVES.film(CLIPS[0], FRONT, sample.frame_timestamps_us[0] + 100_000).astype(float)
    assert np.abs(sample.frames[0] - shown).mean() < 6
    lens = sample.calibration[FRONT]
    assert lens["model"] == "ftheta"
    np.testing.assert_allclose(lens["rotation"], DRIVES.calibration(CLIPS[0], FRONT)["rotation"], atol=1e-9)
    assert lens["fw_poly"][1] == pytest.approx(1 / lens["bw_poly"][1])


def test_whole_recordings_are_what_samples_are_cut_from(pristine_tree):
    source = open_tree(pristine_tree)
    recording = read_recording(source, CLIPS[0], [FRONT, "camera_rear_tele_30fov"])
    np.testing.assert_allclose(recording.track.xyz[0, 2], 0.0, atol=1e-3)
    assert list(recording.frame_times_us) == [FRONT]
    assert list(recording.missing) == ["camera_rear_tele_30fov"]
    sample = load(source)
    np.testing.assert_array_equal(source.film(CLIPS[0], FRONT, sample.frame_timestamps_us[0]), sample.frames[0])
    with pytest.raises(BadClipError, match="not a clip"):
        source.track("nobody")


def test_times_clips_and_events(pristine_tree):
    source = open_source(f"pai:{pristine_tree}", cameras=[FRONT])
    assert list(source.clip_ids) == list(CLIPS)
    first, last = source.times_us(CLIPS[0])
    assert 0 <= first < 40
    assert 11_900_000 <= last < 11_900_040
    refs, rejected = select(source)
    assert [ref.t0_us for ref in refs] == [T0] * 3
    assert rejected == []
    refs, _ = select(source, t0="events")
    assert [ref.t0_us for ref in refs] == [3_000_000] * 3


def test_truncated_events_name_the_file(tree):
    events = tree / "reasoning/ood_reasoning.parquet"
    events.write_bytes(events.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"ood_reasoning\.parquet is not a readable parquet file .* copy it again"):
        select(open_source(f"pai:{tree}", cameras=[FRONT]), t0="events")


def test_threads_load_the_same(pristine_tree, in_threads):
    source = open_tree(pristine_tree)
    results = in_threads(lambda number: load(source, CLIPS[number % 3]).frames, 6)
    for number in range(3):
        np.testing.assert_array_equal(results[number], results[number + 3])


def test_streaming_takes_the_same_path(pristine_tree):
    """What the hub source does, with everything already in the cache."""
    cache = LinkedCache(pristine_tree)
    devkit = physical_ai_av.PhysicalAIAVDatasetInterface(
        revision=cache.revision, cache_dir=cache.directory, token=False
    )
    streamed = load(PhysicalAiSource(devkit, name="pai", cameras=[FRONT], files=None))
    np.testing.assert_array_equal(streamed.frames, load(open_tree(pristine_tree)).frames)


def test_older_trees_lack_splits_and_feature_presence(tree):
    shutil.rmtree(tree / "splits")
    (tree / "metadata/feature_presence.parquet").rename(tree / "metadata/sensor_presence.parquet")
    np.testing.assert_array_equal(load(open_tree(tree)).frames, load(open_tree(tree)).frames)
    assert not (tree / "splits").exists()


def test_partial_trees_hold_the_clips_of_the_chunks_that_are_there(tree):
    (tree / f"camera/{FRONT}/{FRONT}.chunk_0001.zip").unlink()
    (tree / f"camera/{LEFT}/{LEFT}.chunk_0001.zip").unlink()
    assert list(open_tree(tree).clip_ids) == list(CLIPS[:2])
    (tree / "labels/egomotion/egomotion.chunk_0000.zip").unlink()
    with pytest.raises(SourceError, match="no clip with poses and a camera"):
        open_tree(tree)


def test_without_calibration(tree):
    shutil.rmtree(tree / "calibration")
    assert load(open_tree(tree)).calibration is None


@pytest.mark.parametrize("feature", ["camera_intrinsics", "sensor_extrinsics"])
def test_damaged_calibration_is_a_bad_clip_of_its_chunk(tree, feature):
    file = tree / f"calibration/{feature}/{feature}.chunk_0000.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    source = open_tree(tree)
    with pytest.raises(
        BadClipError, match=f"^{CLIPS[0]}: {feature}.chunk_0000.parquet is not a readable .*; copy it"
    ) as error:
        load(source)
    assert error.value.kind == "wrong_shape"
    assert load(source, CLIPS[2]).calibration is not None


def test_a_lens_without_numbers_is_a_bad_clip(tree):
    file = tree / "calibration/camera_intrinsics/camera_intrinsics.chunk_0000.parquet"
    table = pd.read_parquet(file)
    table.assign(width=np.nan).to_parquet(file)
    with pytest.raises(BadClipError, match=f"{CLIPS[0]}: camera_intrinsics cannot be decoded by the devkit .*NaN"):
        load(open_tree(tree))


def test_a_lens_whose_centre_is_no_number_is_a_bad_clip(tree):
    file = tree / "calibration/camera_intrinsics/camera_intrinsics.chunk_0000.parquet"
    pd.read_parquet(file).assign(cx=np.nan).to_parquet(file)
    with pytest.raises(BadClipError, match=f"^{CLIPS[0]}: camera_intrinsics .*not JSON compliant"):
        load(open_tree(tree))


def test_invalid_clips_are_left_out(tree):
    index = pd.read_parquet(tree / "clip_index.parquet")
    index.loc[CLIPS[1], "clip_is_valid"] = False
    index.to_parquet(tree / "clip_index.parquet")
    assert list(open_tree(tree).clip_ids) == [CLIPS[0], CLIPS[2]]


def change_table(tree, name, change):
    file = tree / f"{name}.parquet"
    change(pd.read_parquet(file)).to_parquet(file)


def put(column, value, clip=1):
    """A change that gives one clip another value in a column of any type."""

    def change(table):
        values = table[column].astype(object)
        values.iloc[clip] = value
        return table.assign(**{column: pd.array(values, dtype="Float64" if column == "chunk" else object)})

    return change


def doubled(table):
    return pd.concat([table, table.iloc[[1]]])


INDEX, PRESENCE, SPLITS = "clip_index", "metadata/feature_presence", "splits/default"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (INDEX, doubled, "clip_index.parquet lists it 2 times"),
        (INDEX, put("chunk", None), "gives no chunk for it"),
        (INDEX, put("chunk", 0.5), "gives no chunk for it"),
        (INDEX, put("clip_is_valid", None), "does not say whether it is valid"),
        (PRESENCE, put("egomotion", None), "does not say whether it has egomotion"),
        (PRESENCE, lambda table: table.drop(index=CLIPS[1]), "feature_presence.parquet has no row for it"),
        (PRESENCE, lambda table: doubled(table).assign(egomotion=[True, True, True, False]), "not alike"),
    ],
    ids=["doubled", "no chunk", "half a chunk", "validity", "presence", "no presence", "two presences"],
)
def test_a_clip_that_the_metadata_is_wrong_about_is_named_and_the_others_are_read(tree, name, change, says):
    change_table(tree, name, change)
    source = open_tree(tree, cameras=[FRONT])
    refs, rejected = select(source)
    assert [ref.clip_id for ref in refs] == [CLIPS[0], CLIPS[2]]
    ((clip, error),) = rejected
    assert (clip, error.kind) == (CLIPS[1], "missing_clip")
    assert str(error).startswith(f"{CLIPS[1]}: ")
    assert says in str(error)
    assert load(source).frames.shape[1] == 4
    assert sorted(select(source, seed=1)[0], key=lambda ref: ref.clip_id) == refs
    with pytest.raises(BadClipError, match=says):
        read_recording(source, CLIPS[1], [FRONT])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (PRESENCE, doubled),
        (PRESENCE, put("camera_intrinsics", None)),
        (SPLITS, doubled),
        (SPLITS, lambda table: pd.concat([table, pd.DataFrame({"split": ["val"]}, index=["another"])])),
        (SPLITS, lambda table: table.iloc[:1]),
        (INDEX, lambda table: pd.concat([table, pd.DataFrame({"chunk": [0]}, index=[None])])),
        (INDEX, lambda table: table.reset_index()),
        (INDEX, lambda table: table.assign(chunk=table["chunk"].astype(float))),
        ("metadata/data_collection", doubled),
    ],
)
def test_metadata_that_can_be_put_in_order_costs_no_clip(tree, name, change):
    change_table(tree, name, change)
    source = open_tree(tree, cameras=[FRONT])
    assert [ref.clip_id for ref in select(source)[0]] == list(CLIPS)
    np.testing.assert_array_equal(load(source, CLIPS[1]).future_xyz[0, 2], 0)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (INDEX, lambda table: table.rename(columns={"chunk": "part"}), "lacks the column chunk; it has part, split"),
        (INDEX, lambda table: table.reset_index().rename(columns={"clip_id": "uuid"}), "lacks the column clip_id"),
        (SPLITS, lambda table: table.rename(columns={"split": "set"}), "default.parquet lacks the column split"),
        ("metadata/data_collection", None, "not a readable parquet file"),
    ],
)
def test_tables_that_are_no_metadata_are_named(tree, name, change, says):
    if change is None:
        (tree / f"{name}.parquet").write_bytes(b"PAR1")
    else:
        change_table(tree, name, change)
    with pytest.raises(SourceError, match=says):
        open_tree(tree)


@pytest.mark.parametrize("text", ["", "feature\n", "feature,directory,chunk_path\na,b,\n", "\0"])
def test_a_list_of_features_that_is_none_is_one_line(tree, text):
    (tree / "features.csv").write_text(text)
    with pytest.raises(SourceError, match=r"^pai:") as error:
        open_tree(tree)
    assert "\n" not in str(error.value)


def test_a_feature_without_a_place_is_one_line(tree):
    features = pd.read_csv(tree / "features.csv", index_col="feature")
    features.assign(chunk_path=None).to_csv(tree / "features.csv")
    with pytest.raises(SourceError, match=r"^pai:.*the devkit cannot read its metadata"):
        open_tree(tree)


def test_a_name_that_would_fill_memory_is_refused(tree):
    text = (tree / "features.csv").read_text()
    assert "{chunk_id:04d}" in text
    (tree / "features.csv").write_text(text.replace("{chunk_id:04d}", "{chunk_id:0999999999d}"))
    with pytest.raises(SourceError, match=r"features.csv holds '\{chunk_id:0999999999', no name of a file"):
        open_tree(tree)


def test_a_tree_of_links_that_run_in_a_circle_is_no_directory(tmp_path):
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(SourceError, match="no such directory"):
        open_tree(tmp_path / "round")


def test_an_invalid_clip_may_lack_the_rest(tree):
    change_table(tree, INDEX, lambda table: table.assign(clip_is_valid=[True, False, True]))
    change_table(tree, PRESENCE, lambda table: table.drop(index=CLIPS[1]))
    assert list(open_tree(tree).clip_ids) == [CLIPS[0], CLIPS[2]]


@pytest.mark.parametrize("name", ["features.csv", "metadata/data_collection.parquet", "clip_index.parquet"])
def test_a_fifo_among_the_metadata_is_not_waited_for(tree, name):
    (tree / name).unlink()
    os.mkfifo(tree / name)
    with pytest.raises(SourceError, match=f"{name}"):
        open_tree(tree)


def test_events_without_a_time_are_left_out_and_a_clip_that_has_no_other_is_named(tree):
    events = [
        [{"event_start_timestamp": None}, {"event_start_timestamp": 4_000_000.0}, {"coc": "x"}, 7],
        [{"event_start_timestamp": None, "coc": "x"}],
        [],
    ]
    change_table(tree, "reasoning/ood_reasoning", lambda table: table.assign(events=list(map(json.dumps, events))))
    refs, rejected = select(open_tree(tree, cameras=[FRONT]), t0="events")
    assert [ref.sample_id for ref in refs] == [f"{CLIPS[0]}@4000000#0"]
    ((clip, error),) = rejected
    assert (clip, error.kind) == (CLIPS[1], "wrong_shape")
    assert "none of its 1 events has an event_start_timestamp" in str(error)


def test_events_that_are_no_json_are_their_clips_fault(tree):
    change_table(tree, "reasoning/ood_reasoning", put("events", "[{"))
    refs, ((clip, error),) = select(open_tree(tree, cameras=[FRONT]), t0="events")
    assert [ref.clip_id for ref in refs] == [CLIPS[0], CLIPS[2]]
    assert clip == CLIPS[1]
    assert "is no list of events" in str(error)
    change_table(tree, "reasoning/ood_reasoning", lambda table: table.rename(columns={"events": "moments"}))
    with pytest.raises(SourceError, match="lacks the column events; it has split, moments"):
        select(open_tree(tree, cameras=[FRONT]), t0="events")


def test_a_table_in_an_archive_that_unfolds_to_gigabytes_is_its_clips_fault(tree, monkeypatch):
    def repeat(name, data):
        if not name.startswith(CLIPS[0]):
            return data
        table = pq.read_table(io.BytesIO(data))
        text = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), pa.array(["A" * 100_000]))
        buffer = io.BytesIO()
        pq.write_table(table.append_column("note", text), buffer, compression="zstd", store_schema=False)
        assert len(buffer.getvalue()) < 100_000
        return buffer.getvalue()

    rewrite(tree / "labels/egomotion/egomotion.chunk_0000.zip", repeat)
    monkeypatch.setattr("alpacache.sources.table.MAX_DECODED_BYTES", 2**20)
    source = open_tree(tree, cameras=[FRONT])
    with pytest.raises(BadClipError, match=f"^{CLIPS[0]}: egomotion unfolds to more than") as error:
        load(source)
    assert error.value.kind == "unsafe_size"
    load(source, CLIPS[1])


@pytest.mark.parametrize("name", ["features.csv", "clip_index.parquet", "metadata/feature_presence.parquet"])
def test_missing_metadata_names_file_and_command(tree, name):
    (tree / name).unlink()
    with pytest.raises(SourceError, match=rf"lacks {name}; run: hf download nvidia/\S+ {name} --repo-type dataset"):
        open_tree(tree)


def test_no_such_tree(tmp_path):
    with pytest.raises(SourceError, match="no such directory"):
        open_source(f"pai:{tmp_path / 'none'}")


def test_links_are_removed_and_the_tree_stays(tree):
    cache = LinkedCache(tree)
    cache.close()
    assert (tree / "features.csv").exists()
    assert not (tree / cache.directory).exists()


def rewrite(archive, change):
    """Change the members of a zip: name -> bytes, None to drop."""
    with zipfile.ZipFile(archive) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in members.items():
            changed = change(name, data)
            if changed is not None:
                new.writestr(name, changed)


def edit_table(data, change):
    table = pd.read_parquet(io.BytesIO(data))
    buffer = io.BytesIO()
    change(table).to_parquet(buffer)
    return buffer.getvalue()


def set_at(name, row, value):
    def change(table):
        column = table[name].to_numpy().copy()
        column[row] = value(column) if callable(value) else value
        return table.assign(**{name: column})

    return change


def break_tree(tree, how):
    """Break the first clip only."""
    video = tree / f"camera/{FRONT}/{FRONT}.chunk_0000.zip"
    poses = tree / "labels/egomotion/egomotion.chunk_0000.zip"
    tables = {
        "nan": set_at("x", 50, np.nan),
        "pose order": set_at("timestamp", 50, 0),
        "jump": set_at("x", slice(110, None), lambda column: column[110:] + 50),
        "norm": set_at("qw", 50, 0.0),
        "short poses": lambda table: table.iloc[:150],
        "columns": lambda table: table.drop(columns="qz"),
    }
    stamps = {"frame order": set_at("timestamp", 20, 0), "short video": lambda table: table.iloc[:40]}

    def change_poses(name, data):
        return edit_table(data, tables[how]) if name.startswith(CLIPS[0]) else data

    def change_video(name, data):
        if not name.startswith(CLIPS[0]):
            return data
        if how in stamps:
            return edit_table(data, stamps[how]) if name.endswith("parquet") else data
        if how == "no member" or name.endswith("parquet"):
            return None if how == "no member" else data
        if how == "codec":
            return b"zzzz".join(data.rsplit(b"avc1", 1))
        if how == "lost frame":
            return remuxed(data, lost=True)
        return {"truncated": data[: len(data) // 2], "garbage": b"garbage" * 99, "empty": b""}[how]

    if how in tables:
        rewrite(poses, change_poses)
    elif how == "presence":
        file = tree / "metadata/feature_presence.parquet"
        presence = pd.read_parquet(file)
        presence.loc[CLIPS[0], FRONT] = False
        presence.to_parquet(file)
    elif how == "no archive":
        video.unlink()
    elif how == "torn archive":
        video.write_bytes(video.read_bytes()[:-200])
    else:
        rewrite(video, change_video)


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("presence", "missing_camera", "the dataset has none for this clip"),
        ("no member", "missing_camera", "the dataset has none"),
        ("no archive", "missing_camera", "hf download nvidia/PhysicalAI-Autonomous-Vehicles camera/camera_front_wide"),
        ("torn archive", "wrong_shape", "not a zip file"),
        ("truncated", "undecodable_video", "cannot be decoded"),
        ("garbage", "undecodable_video", "cannot be decoded"),
        ("empty", "undecodable_video", "cannot be decoded"),
        ("codec", "undecodable_video", "its codec is unknown to FFmpeg"),
        ("lost frame", "undecodable_video", "holds 119 frames, its timestamps name 120"),
        ("nan", "not_finite", "1 of 245 poses hold NaN"),
        ("pose order", "time_order", "in row 50"),
        ("frame order", "time_order", "in row 20"),
        ("jump", "pose_jump", "the vehicle moves"),
        ("short poses", "short_clip", "poses cover"),
        ("short video", "short_clip", "frames cover"),
        ("columns", "wrong_shape", "qz"),
    ],
)
def test_each_bad_clip_has_its_reason(tree, how, kind, says):
    break_tree(tree, how)
    source = open_tree(tree, cameras=[FRONT])
    with pytest.raises(BadClipError, match=says) as error:
        load(source)
    assert error.value.kind == kind
    assert str(error.value).startswith(CLIPS[0])
    if how not in ("no archive", "torn archive"):
        load(source, CLIPS[1])


def test_unknown_clips_and_cameras(pristine_tree):
    source = open_tree(pristine_tree)
    with pytest.raises(BadClipError, match="not a clip of"):
        load(source, "nobody")
    with pytest.raises(BadClipError, match="no such feature; leave it out"):
        load(source, cameras=["camera_front_tele_30fov"])


def hub_error(kind, status):
    import huggingface_hub.errors

    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(huggingface_hub.errors, kind)("401 Client Error", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (lambda: hub_error("GatedRepoError", 403), "accept its terms at .* then run: hf auth login"),
        (lambda: hub_error("RepositoryNotFoundError", 401), "then run: hf auth login"),
        (lambda: hub_error("HfHubHTTPError", 401), "then run: hf auth login"),
        (lambda: hub_error("HfHubHTTPError", 503), "hub cannot be reached; .* hf download nvidia"),
        (lambda: ConnectionError("no route"), "hub cannot be reached"),
    ],
)
def test_a_hub_that_refuses_is_a_source_error_with_the_command(monkeypatch, error, says):
    import huggingface_hub

    from alpacache.sources import retry

    monkeypatch.setattr(retry, "_sleep", lambda _: None)

    def refuse(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", refuse)
    with pytest.raises(SourceError, match=says):
        open_source("pai")


def test_offline_says_so():
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert "HF_HUB_OFFLINE is set; unset it" in str(explain_hub_error(OfflineModeIsEnabled("offline")))


def test_without_the_devkit(monkeypatch, pristine_tree):
    imported = builtins.__import__

    def fail(name, *arguments, **options):
        if name == "physical_ai_av":
            raise ImportError("No module named 'physical_ai_av'")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    for spec in ("pai", f"pai:{pristine_tree}"):
        with pytest.raises(UsageError, match=r"pip install 'alpacache\[pai\]'"):
            open_source(spec)

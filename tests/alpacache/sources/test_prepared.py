import io
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets, load_from_disk
from PIL import Image as Picture

from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, DataError, InterruptedRunError, SourceError, UsageError
from alpacache.sources.folder import FolderSource
from alpacache.sources.prepared_rows import PictureFit
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.source import picture_changes
from alpacache.sources.synthetic import SyntheticSource
from cache_store.storage import local_files

FRONT, LEFT = "camera_front_wide_120fov", "camera_cross_left_120fov"
DRIVES = SyntheticSource(5, size=(64, 32), cameras=[FRONT, LEFT])


def refs_of(source, **options):
    return select(source, **options)[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "drives"
    report = prepare(DRIVES, refs_of(DRIVES, t0="every:6"), out, cameras=[FRONT, LEFT], frames=2)
    assert report.samples == 10
    assert report.rejected == ()
    return out


@pytest.mark.parametrize("spec", ["{}", "hf:{}"])
def test_samples_come_back_bit_for_bit(prepared, spec, assert_same):
    source = open_source(spec.format(prepared))
    refs = refs_of(source)
    assert refs == refs_of(DRIVES, t0="every:6")
    for ref in refs[:3]:
        want = DRIVES.load(ref, cameras=[FRONT, LEFT], frames=2)
        assert_same(source.load(ref, cameras=[FRONT, LEFT], frames=2), want)


def test_fewer_cameras_and_frames(prepared, assert_same):
    source = open_source(str(prepared))
    ref = refs_of(source)[0]
    assert_same(source.load(ref, cameras=[FRONT], frames=1), DRIVES.load(ref, cameras=[FRONT], frames=1))
    with pytest.raises(UsageError, match="prepared with 2 frames"):
        source.load(ref, cameras=[FRONT], frames=4)
    with pytest.raises(BadClipError, match="prepared without camera_front_tele") as error:
        source.load(ref, cameras=["camera_front_tele_30fov"], frames=1)
    assert error.value.kind == "missing_camera"
    with pytest.raises(BadClipError, match="fixed moments"):
        source.load(SampleRef(clip_id=ref.clip_id, t0_us=1), cameras=[FRONT], frames=1)


def test_it_is_an_ordinary_dataset(prepared):
    rows = load_from_disk(str(prepared))
    assert len(rows) == 10
    assert rows[0]["sample_id"] == "synthetic-0-000000@6000000#0"
    assert np.shape(rows[0]["future_rot"]) == (64, 3, 3)
    assert rows[0]["frames"][0][0]["bytes"][:4] == b"\x89PNG"
    assert "synthetic:5" in rows.info.description
    assert not list(prepared.parent.glob("*.partial"))


def test_moments_are_fixed_and_split_still_works(prepared):
    source = open_source(str(prepared))
    assert source.times_us("synthetic-0-000000") == (4_500_000, 18_400_000)
    assert len(refs_of(source, samples=3)) == 3
    with pytest.raises(UsageError, match="fixed when it was prepared"):
        select(source, t0="every:2")


def test_bad_samples_are_reported_and_left_out(folder, tmp_path):
    (folder / f"clips/a/{FRONT}/000051.jpg").write_bytes(b"x")
    source = FolderSource(folder)
    report = prepare(source, refs_of(source), tmp_path / "out", cameras=[FRONT], frames=1)
    assert report.samples == 1
    assert [(sample, kind) for sample, kind, _ in report.rejected] == [("a@5100000#0", "undecodable_video")]
    assert [ref.clip_id for ref in refs_of(open_source(str(tmp_path / "out")))] == ["b"]
    (folder / f"clips/b/{FRONT}.mp4").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"none of 2 samples can be used\. The first reason: a: camera_front_wide"):
        prepare(source, refs_of(source), tmp_path / "none", cameras=[FRONT], frames=1)


def test_a_source_that_vanishes_costs_no_sample(folder, tmp_path):
    """`a` is written, then the folder is unmounted: `b` is not to blame."""
    source, out, away = FolderSource(folder), tmp_path / "out", tmp_path / "away"
    options = {"cameras": [FRONT], "frames": 1, "spec": f"folder:{folder}"}
    with pytest.raises(DataError, match=r"was there when the run began and is not any more .*bring the source back"):
        prepare(source, refs_of(source), out, **options, on_sample=lambda ref: folder.rename(away))
    assert not out.exists()
    assert [file.name for file in (tmp_path / "out.partial").glob("shard-*.json")] == []
    away.rename(folder)
    report = prepare(source, refs_of(source), out, **options)
    assert (report.samples, report.rejected) == (2, ())


def test_bad_samples_do_not_open_the_source_again(folder, tmp_path, monkeypatch):
    (folder / f"clips/a/{FRONT}/000051.jpg").write_bytes(b"x")
    source = FolderSource(folder)
    monkeypatch.setattr(FolderSource, "__init__", lambda *_, **__: pytest.fail("the source was opened again"))
    report = prepare(source, refs_of(source), tmp_path / "out", cameras=[FRONT], frames=1, spec=f"folder:{folder}")
    assert (report.samples, [name for name, _, _ in report.rejected]) == (1, ["a@5100000#0"])


def test_clips_refused_while_the_source_vanished_are_not_noted(folder, tmp_path):
    source = FolderSource(folder)
    refs, unusable = refs_of(source), [("c", BadClipError("missing_poses", "c: no poses."))]
    options = {"cameras": [FRONT], "frames": 1, "unusable": unusable, "spec": f"folder:{folder}"}
    folder.rename(tmp_path / "away")
    with pytest.raises(DataError, match="is not any more"):
        prepare(source, refs, tmp_path / "out", **options)
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "away").rename(folder)
    assert prepare(source, refs, tmp_path / "out", **options).rejected == (("c", "missing_poses", "c: no poses."),)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, assert_same):
    monkeypatch.setattr("alpacache.sources.prepared_writer.SHARD_SAMPLES", 2)
    refs, seen = refs_of(DRIVES), []

    def stop_after_three(ref):
        seen.append(ref.clip_id)
        if len(seen) == 3:
            raise InterruptedRunError("stop")

    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError):
        prepare(DRIVES, refs, out, cameras=[FRONT], frames=1, on_sample=stop_after_three)
    assert not out.exists()
    with pytest.raises(UsageError, match="other settings"):
        prepare(DRIVES, refs, out, cameras=[FRONT], frames=2)
    again = []
    assert prepare(DRIVES, refs, out, cameras=[FRONT], frames=1, on_sample=again.append).samples == 5
    assert [ref.clip_id[-1] for ref in again] == ["2", "3", "4"]
    source = open_source(str(out))
    assert refs_of(source) == refs
    for ref in refs:
        assert_same(source.load(ref, cameras=[FRONT], frames=1), DRIVES.load(ref, cameras=[FRONT], frames=1))
    with pytest.raises(UsageError, match="already exists"):
        prepare(DRIVES, refs, out, cameras=[FRONT], frames=2)


def test_the_same_call_again_finds_its_finished_output_and_removes_what_a_kill_left(tmp_path):
    refs, out = refs_of(DRIVES), tmp_path / "out"
    first = prepare(DRIVES, refs, out, cameras=[FRONT], frames=1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "out.partial/done").mkdir(parents=True)
    again = prepare(DRIVES, refs, out, cameras=[FRONT], frames=1)
    assert (first.existed, again.existed, again.samples) == (False, True, 5)
    assert (again.rejected, again.provenance) == (first.rejected, first.provenance)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for changed in ({"refs": refs[1:]}, {"frames": 2}, {"settings": {"seed": 1}}):
        with pytest.raises(UsageError, match="already exists"):
            prepare(DRIVES, out=out, **{"refs": refs, "cameras": [FRONT], "frames": 1} | changed)


def test_one_process_at_a_time(tmp_path):
    refs, out, met = refs_of(DRIVES), tmp_path / "out", []

    def another(ref):
        with pytest.raises(UsageError, match=r"another prepare is at work in .*out\.partial; wait") as error:
            prepare(DRIVES, refs, out, cameras=[FRONT], frames=1)
        met.append(error)

    assert prepare(DRIVES, refs, out, cameras=[FRONT], frames=1, on_sample=another).samples == 5
    assert len(met) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stop_in_second_shard(out, monkeypatch):
    """Leaves shard 0, of 2 samples, done."""
    monkeypatch.setattr("alpacache.sources.prepared_writer.SHARD_SAMPLES", 2)
    seen = []

    def stop(ref):
        seen.append(ref)
        if len(seen) == 3:
            raise InterruptedRunError("stop")

    with pytest.raises(InterruptedRunError):
        prepare(DRIVES, refs_of(DRIVES), out, cameras=[FRONT], frames=1, on_sample=stop)
    return out.with_name("out.partial")


def lose_a_row(partial):
    import pyarrow as pa

    with pa.OSFile(str(partial / "shard-000000.arrow")) as file:
        table = pa.ipc.open_stream(file).read_all().slice(0, 1)
    with pa.ipc.new_stream(str(partial / "shard-000000.arrow"), table.schema) as writer:
        writer.write_table(table)


def cut_short(partial):
    arrow = partial / "shard-000000.arrow"
    arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_row,
        cut_short,
        lambda partial: (partial / "shard-000000.arrow").write_bytes(b""),
        lambda partial: (partial / "shard-000000.arrow").unlink(),
        lambda partial: (partial / "shard-000000.json").write_text(""),
        lambda partial: (partial / "shard-000000.json").write_text("[]"),
    ],
    ids=["fewer rows", "half a file", "empty file", "no file", "empty report", "report without a count"],
)
def test_a_damaged_shard_is_made_again(tmp_path, monkeypatch, damage, assert_same):
    partial = stop_in_second_shard(tmp_path / "out", monkeypatch)
    assert json.loads((partial / "shard-000000.json").read_text()) == {"rows": 2, "rejected": []}
    damage(partial)
    again = []
    prepare(DRIVES, refs_of(DRIVES), tmp_path / "out", cameras=[FRONT], frames=1, on_sample=again.append)
    assert again == refs_of(DRIVES)
    source = open_source(str(tmp_path / "out"))
    for ref in refs_of(DRIVES):
        assert_same(source.load(ref, cameras=[FRONT], frames=1), DRIVES.load(ref, cameras=[FRONT], frames=1))


def test_shards_of_another_size_are_made_again(tmp_path, monkeypatch):
    """As of another version: their rows are neither lost nor written twice."""
    stop_in_second_shard(tmp_path / "out", monkeypatch)
    monkeypatch.setattr("alpacache.sources.prepared_writer.SHARD_SAMPLES", 5)
    assert prepare(DRIVES, refs_of(DRIVES), tmp_path / "out", cameras=[FRONT], frames=1).samples == 5
    assert refs_of(open_source(str(tmp_path / "out"))) == refs_of(DRIVES)


def test_rows_are_on_the_medium_before_their_report_and_all_before_the_name(tmp_path, monkeypatch):
    flushed, flush = [], local_files.flush

    def note(path):
        flush(path)
        reports = len(list(tmp_path.glob("out.partial/shard-*.json")))
        flushed.append((path.name, reports, (tmp_path / "out").exists()))

    monkeypatch.setattr(local_files, "flush", note)
    monkeypatch.setattr("alpacache.sources.prepared_writer.flush", note)
    prepare(DRIVES, refs_of(DRIVES), tmp_path / "out", cameras=[FRONT], frames=1)
    names = [".plan.json.new", "out.partial", "shard-000000.arrow", ".shard-000000.json.new"]
    assert flushed[:4] == [(name, 0, False) for name in names]
    files = {"data-00000-of-00001.arrow", "state.json", "dataset_info.json", "provenance.json", "README.md", "done"}
    assert {name for name, reports, there in flushed if reports and not there} == files | {"out.partial"}
    assert flushed[-1] == (tmp_path.name, 1, True)


def broken_copy(prepared, out, change):
    rows = [dict(row) for row in load_from_disk(str(prepared))][:1]
    change(rows[0])
    Dataset.from_list(rows, features=load_from_disk(str(prepared)).features).save_to_disk(str(out))
    return open_source(str(out))


def png_of(width, height):
    """The head of a picture that was never allocated."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


def jpeg():
    buffer = io.BytesIO()
    Picture.new("RGB", (64, 32)).save(buffer, format="JPEG")
    return buffer.getvalue()


def moved(name, change):
    """Change one of a row's lists as an array."""

    def apply(row):
        values = np.array(row[name])
        change(values)
        row[name] = values.tolist()

    return apply


def in_the_world(row):
    for name in ("history_xyz", "future_xyz"):
        moved(name, lambda xyz: np.add(xyz, [1000.0, 20.0, 0.0], out=xyz))(row)


def turned_by_a_quarter(row):
    quarter = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    for name in ("history_rot", "future_rot"):
        moved(name, lambda rot: np.copyto(rot, quarter @ rot))(row)


def driving_back(row):
    """The future in reverse order, as seen from its end."""
    moved("future_xyz", lambda xyz: np.copyto(xyz, xyz[::-1] - xyz[-1]))(row)


def of_another(row):
    """The future of a sample that is 5 m/s faster."""
    ahead = np.arange(1, 65) * 0.5
    moved("future_xyz", lambda xyz: np.add(xyz[:, 0], ahead, out=xyz[:, 0]))(row)


def shifted(us, camera=slice(None), frame=slice(None)):
    return moved("frame_timestamps_us", lambda stamps: np.add.at(stamps, (camera, frame), us))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (moved("future_xyz", lambda xyz: xyz.__setitem__((3, 1), np.nan)), "not_finite", "future_xyz hold NaN"),
        (moved("history_rot", lambda rot: rot.__setitem__((0, 0, 0), np.inf)), "not_finite", "history_rot hold"),
        (in_the_world, "wrong_frame", r"history ends at \(1e\+03, 20, 0\) m"),
        (turned_by_a_quarter, "wrong_frame", "turned"),
        (moved("future_rot", lambda rot: np.multiply(rot, 2, out=rot)), "pose_jump", "no rotations"),
        (moved("future_rot", lambda rot: np.negative(rot[5], out=rot[5])), "pose_jump", "no rotations"),
        (moved("future_xyz", lambda xyz: np.add(xyz[30:], 40, out=xyz[30:])), "pose_jump", "the vehicle moves"),
        (lambda row: row.update(history_xyz=np.transpose(row["history_xyz"]).tolist()), "wrong_shape", "shape"),
        (lambda row: row.update(history_xyz=[list(np.ravel(row["history_xyz"]))]), "wrong_shape", "shape"),
        (lambda row: row.update(future_xyz=row["future_xyz"][:60]), "wrong_shape", r"\(60, 3\); expected \(64, 3\)"),
        (
            driving_back,
            "pose_jump",
            "velocity changes by .* m/s within 0.1 s at t0, .* future is not that of this history",
        ),
        (of_another, "pose_jump", r"velocity changes by [45]\.\d m/s within 0.1 s at t0"),
        (
            lambda row: row.update(t0_us=row["t0_us"] + 100_000),
            "time_order",
            "row's t0_us is 6100000, its id says 6000000",
        ),
        (shifted(-5_000_000), "time_order", "pictures end -5.000 s from t0"),
        (shifted(200_000), "time_order", "pictures end 0.200"),
        (shifted(150_000, camera=1, frame=0), "time_order", "in order"),
        (lambda row: row.update(frame_timestamps_us=[[0, 0], [0, 0]]), "time_order", "pictures end"),
        (lambda row: row["frame_timestamps_us"][1].pop(), "wrong_shape", r"\[2, 2\] pictures and \[2, 1\] frame times"),
        (lambda row: row["frames"].pop(), "wrong_shape", "is damaged"),
        (lambda row: row["frames"].pop(0), "wrong_shape", "is damaged"),
        (lambda row: row.update(cameras=[FRONT, FRONT]), "wrong_shape", "1 different"),
        (lambda row: row.update(calibration='{"a": {"fx": NaN}}'), "wrong_shape", "NaN is no JSON"),
        (lambda row: row.update(calibration="[]"), "wrong_shape", "must hold an object"),
    ],
)
def test_rows_of_others_are_checked_as_recordings_are(prepared, tmp_path, change, kind, says):
    source = broken_copy(prepared, tmp_path / "broken", change)
    (ref,) = source.sample_refs
    with pytest.raises(BadClipError, match=f"^{ref.sample_id}: .*{says}") as error:
        source.load(ref, cameras=[FRONT], frames=2)
    assert error.value.kind == kind


def test_rows_of_half_precision_and_of_frames_that_repeat_are_sound(prepared, tmp_path):
    def rounded(row):
        for name in ("history_xyz", "future_xyz", "history_rot", "future_rot"):
            row[name] = np.array(row[name]).astype(np.float16).tolist()
        row["frame_timestamps_us"] = [[stamps[-1] - 100_000] * len(stamps) for stamps in row["frame_timestamps_us"]]

    source = broken_copy(prepared, tmp_path / "rounded", rounded)
    assert source.load(source.sample_refs[0], cameras=[FRONT], frames=2).frames.shape[1] == 2
    assert source.poses(source.sample_refs[0]).future_xyz.shape == (64, 3)


def test_an_id_that_stands_twice_is_refused_and_the_others_are_read(prepared, tmp_path):
    rows = load_from_disk(str(prepared))
    rows.select([0, 1, 0, 2]).save_to_disk(str(tmp_path / "doubled"))
    source = open_source(str(tmp_path / "doubled"))
    first, *others = source.sample_refs
    assert [ref.sample_id for ref in source.sample_refs] == rows["sample_id"][:3]
    for read in (source.poses, lambda ref: source.load(ref, cameras=[FRONT], frames=1)):
        with pytest.raises(BadClipError, match=f"^{first.sample_id}: several rows"):
            read(first)
        assert [read(ref) is not None for ref in others] == [True, True]


@pytest.mark.parametrize("name", ["clip", None, "a@-1#0", "a\n@1#0"])
def test_an_id_that_is_none_is_named(prepared, tmp_path, name):
    with pytest.raises(SourceError, match=f"hf:broken: {str(name)[:1]!r}?.* is not a sample id" if name else "'None'"):
        broken_copy(prepared, tmp_path / "broken", lambda row: row.update(sample_id=name))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda row: row["frames"][0][1].update(bytes=jpeg()), "undecodable_video"),
        (lambda row: row["frames"][0][1].update(bytes=png_of(8000, 8000)), "wrong_shape"),
        (lambda row: row["frames"][0][1].update(bytes=png_of(60_000, 60_000)), "wrong_shape"),
        (lambda row: row["frames"][0][0].update(bytes=None, path="/etc/passwd"), "undecodable_video"),
        (lambda row: row["frames"][0][1].update(bytes=b"BM1234"), "undecodable_video"),
        (lambda row: row.update(history_xyz=row["history_xyz"][:7]), "wrong_shape"),
        (lambda row: row.update(calibration="{"), "wrong_shape"),
        (lambda row: row.update(frames=[]), "wrong_shape"),
    ],
)
def test_damaged_rows_are_bad_clips(prepared, tmp_path, change, kind):
    source = broken_copy(prepared, tmp_path / "broken", change)
    with pytest.raises(BadClipError) as error:
        source.load(source.sample_refs[0], cameras=[FRONT, LEFT], frames=2)
    assert error.value.kind == kind


def test_changes_of_pictures_come_along(folder, tmp_path):
    """From a folder to a prepared dataset, saved or as a hub has it; mixed ones are refused."""
    refs = refs_of(FolderSource(folder))
    prepare(FolderSource(folder), refs, tmp_path / "plain", cameras=[FRONT], frames=1)
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(index | {"changes": ["crop"]}))
    report = prepare(FolderSource(folder), refs, tmp_path / "cropped", cameras=[FRONT], frames=1)
    assert report.provenance["settings"]["changes"] == ["crop"]
    plain, cropped = (load_from_disk(str(tmp_path / name)) for name in ("plain", "cropped"))
    assert "changes" not in plain.column_names
    (tmp_path / "hub").mkdir()
    cropped.to_parquet(str(tmp_path / "hub/a.parquet"))
    for place in ("cropped", "hub"):
        assert picture_changes(open_source(f"hf:{tmp_path / place}")) == ("crop",)
    assert picture_changes(open_source(f"hf:{tmp_path / 'plain'}")) == ()
    other = cropped.map(lambda row: row | {"sample_id": f"x{row['sample_id']}", "changes": []})
    concatenate_datasets([cropped, other]).to_parquet(str(tmp_path / "hub/a.parquet"))
    with pytest.raises(SourceError, match="pictures that were changed and others"):
        open_source(f"hf:{tmp_path / 'hub'}")


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_fifo_in_a_prepared_directory_is_refused_and_not_waited_for(prepared, tmp_path, name):
    place = shutil.copytree(prepared, tmp_path / "copy")
    (place / name).unlink()
    os.mkfifo(place / name)
    with pytest.raises(SourceError, match=f"{name} cannot be read: it is a FIFO"):
        open_source(f"hf:{place}")


def test_other_datasets_and_outside_files_are_refused(prepared, tmp_path):
    Dataset.from_dict({"x": [1]}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(SourceError, match="lacks the columns sample_id"):
        open_source(str(tmp_path / "other"))
    state = json.loads((tmp_path / "other/state.json").read_text())
    state["_data_files"] = [{"filename": "../../secret.arrow"}]
    (tmp_path / "other/state.json").write_text(json.dumps(state))
    with pytest.raises(SourceError, match="outside its directory"):
        open_source(str(tmp_path / "other"))
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(f"hf:{tmp_path}")


def test_files_outside_of_a_dataset_of_several_splits_are_refused(prepared, tmp_path):
    rows = load_from_disk(str(prepared))
    inside = tmp_path / "inside"
    DatasetDict({"train": rows.select(range(6)), "val": rows.select(range(6, 10))}).save_to_disk(str(inside))
    assert len(open_source(f"hf:{inside}").sample_refs) == 10
    (tmp_path / "outside").mkdir()
    (inside / "train/data-00000-of-00001.arrow").rename(tmp_path / "outside/data.arrow")
    state = json.loads((inside / "train/state.json").read_text())
    for file in ("../../outside/data.arrow", str(tmp_path / "outside/data.arrow")):
        state["_data_files"] = [{"filename": file}]
        (inside / "train/state.json").write_text(json.dumps(state))
        with pytest.raises(SourceError, match=r"train/state\.json names a file outside its directory"):
            open_source(f"hf:{inside}")
    (inside / "train").rename(tmp_path / "train")
    (inside / "train").symlink_to(tmp_path / "train")
    with pytest.raises(SourceError, match="outside its directory"):
        open_source(f"hf:{inside}")


@pytest.mark.parametrize("split", ["../train", "/train", "..", "", "a/b", "a::b", 3])
def test_splits_have_plain_names(prepared, tmp_path, split):
    DatasetDict({"train": load_from_disk(str(prepared))}).save_to_disk(str(tmp_path / "inside"))
    (tmp_path / "inside/dataset_dict.json").write_text(json.dumps({"splits": [split]}))
    with pytest.raises(SourceError, match=r"dataset_dict\.json names a split .* expected a plain name"):
        open_source(f"hf:{tmp_path / 'inside'}")


POINTER = {"bytes": Value("binary"), "path": Value("string")}
"""What a picture is stored as."""


def save_pointing(rows, out, **columns):
    """As a stranger may: `columns` by name and type, to be decoded from the path that each row names."""
    for column, kind in columns.items():
        pointers = [_pointers(kind, out.parent / "absent.png")] * len(rows)
        rows = rows.remove_columns([column] if column in rows.column_names else [])
        rows = rows.add_column(column, pointers, feature=_stored(kind))
    rows.save_to_disk(str(out))
    file = out / "dataset_info.json"
    info = json.loads(file.read_text())
    info["features"] |= Features(columns).to_dict()
    file.write_text(json.dumps(info))
    assert load_from_disk(str(out)).features["frames"] == columns.get("frames", rows.features["frames"])


def _pointers(kind, file):
    return 2 * [_pointers(kind.feature, file)] if isinstance(kind, List) else {"bytes": None, "path": str(file)}


def _stored(kind):
    return List(_stored(kind.feature)) if isinstance(kind, List) else POINTER


def test_columns_of_others_are_not_read(prepared, tmp_path, assert_same):
    """One of pictures would be decoded, from any path or address that it names."""
    save_pointing(load_from_disk(str(prepared)), tmp_path / "out", extra=Image())
    source = open_source(str(tmp_path / "out"))
    ref = source.sample_refs[0]
    assert_same(source.load(ref, cameras=[FRONT], frames=1), DRIVES.load(ref, cameras=[FRONT], frames=1))


@pytest.mark.parametrize("column", ["sample_id", "calibration"])
def test_our_columns_as_pictures_are_refused(prepared, tmp_path, column):
    save_pointing(load_from_disk(str(prepared)), tmp_path / "out", **{column: Image()})
    with pytest.raises(SourceError, match=rf"column {column} is of type Image\("):
        open_source(str(tmp_path / "out"))


@pytest.mark.parametrize("decode", [True, False])
def test_a_picture_that_names_a_file_is_never_opened(prepared, tmp_path, decode):
    save_pointing(load_from_disk(str(prepared)), tmp_path / "out", frames=List(List(Image(decode=decode))))
    Picture.new("RGB", (64, 32)).save(tmp_path / "absent.png")
    source = open_source(str(tmp_path / "out"))
    with pytest.raises(BadClipError, match="not embedded"):
        source.load(source.sample_refs[0], cameras=[FRONT, LEFT], frames=2)


def test_what_was_asked_for_and_found_is_recorded(folder, tmp_path):
    (folder / f"clips/a/{FRONT}/000051.jpg").write_bytes(b"x")
    source = FolderSource(folder)
    unusable = [("short", BadClipError("short_clip", "too short"))]
    settings = {"split": "all", "t0": "5.1", "seed": 7, "quota": None}
    report = prepare(
        source, refs_of(source), tmp_path / "out", cameras=[FRONT], frames=1, unusable=unusable, settings=settings
    )
    assert [name for name, _, _ in report.rejected] == ["short", "a@5100000#0"]
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record == report.provenance
    assert record["source"] == "folder:circles"
    assert record["settings"] == settings | {"cameras": [FRONT], "frames": 1, "fit": None}
    assert record["left_out"] == {"short_clip": 1, "undecodable_video": 1}
    assert (record["samples"], record["clips"]) == (1, 1)
    row = load_from_disk(str(tmp_path / "out"))[0]
    assert (row["source"], row["recorded_size"], row["pixel_deviation"]) == ("folder:circles", [32, 64], [0.0, 0.0])
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\npretty_name: 1 driving samples")
    assert str(tmp_path) not in card


def test_a_resumed_run_writes_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("alpacache.sources.prepared_writer.SHARD_SAMPLES", 2)

    def stop(ref):
        raise InterruptedRunError("stop")

    prepare(DRIVES, refs_of(DRIVES), tmp_path / "once", cameras=[FRONT], frames=1)
    with pytest.raises(InterruptedRunError):
        prepare(DRIVES, refs_of(DRIVES), tmp_path / "twice", cameras=[FRONT], frames=1, on_sample=stop)
    prepare(DRIVES, refs_of(DRIVES), tmp_path / "twice", cameras=[FRONT], frames=1)
    for name in ("README.md", "provenance.json", "data-00000-of-00001.arrow"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


LARGE = SyntheticSource(2, seed=1, size=(576, 320))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    from alpacache.alpamayo import Checkpoint
    from alpacache.alpamayo.inputs import InputBuilder
    from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint

    return InputBuilder(Checkpoint(str(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "Tiny-R1"))))


def pixels_off(builder, source, again, ref):
    """|difference| of what the VLM sees of the source and of the prepared dataset."""
    direct, stored = (
        builder.build(each.load(ref, cameras=[FRONT], frames=2)).pixel_values.double() for each in (source, again)
    )
    assert direct.shape == stored.shape
    return (direct - stored).abs()


def test_pictures_at_original_size_give_the_vlm_exactly_the_same_pixels(builder, tmp_path):
    refs = refs_of(LARGE)
    prepare(LARGE, refs, tmp_path / "out", cameras=[FRONT], frames=2)
    again = open_source(str(tmp_path / "out"))
    for ref in refs:
        assert pixels_off(builder, LARGE, again, ref).max() == 0


def test_pictures_at_processor_size_deviate_by_what_is_recorded(tmp_path):
    """Limits of 144 x 256 or so from 320 x 576, by a builder with the same limits."""
    from alpacache.alpamayo.inputs import to_patches
    from alpacache.driving.picture_size import fit_size

    limits = {"patch": 16, "merge": 2, "min_pixels": 30_000, "max_pixels": 50_000}
    refs = refs_of(LARGE)
    report = prepare(LARGE, refs, tmp_path / "out", cameras=[FRONT], frames=2, fit=PictureFit(**limits))
    again = open_source(str(tmp_path / "out"))
    largest, means = 0.0, []
    for ref in refs:
        direct, stored = (each.load(ref, cameras=[FRONT], frames=2) for each in (LARGE, again))
        fitted = fit_size(320, 576, factor=32, min_pixels=30_000, max_pixels=50_000)
        assert stored.frames.shape == (1, 2, 3, *fitted)
        assert fitted != (320, 576)
        assert stored.calibration == direct.calibration
        np.testing.assert_array_equal(stored.future_xyz, direct.future_xyz)
        (a, grid), (b, same) = (to_patches(each.frames[0], temporal=2, **limits) for each in (direct, stored))
        assert (grid == same).all()
        off = (a.double() - b.double()).abs()
        inside = (a > -1) & (a < 1)
        assert 0 < off[inside].max() <= 1 / 255 + 1e-6
        largest, means = max(largest, off.max().item()), [*means, off.mean().item()]
    stated = report.provenance["pixel_deviation"]
    assert stated["max"] == pytest.approx(largest, abs=1e-6)
    assert stated["mean"] == pytest.approx(np.mean(means), abs=1e-6)
    assert 0 < stated["mean"] < 1 / 255
    assert report.provenance["recorded_sizes"] == [[320, 576]]
    assert f"by at most {stated['max']:.4f}, {stated['mean']:.5f} on average" in (
        tmp_path / "out/README.md"
    ).read_text().replace("\n", " ")


def test_a_size_that_would_be_resized_again_is_refused(tmp_path):
    fit = PictureFit(patch=16, merge=2, min_pixels=32_768, max_pixels=32_768)
    with pytest.raises(SourceError, match=r"would be resized again after .* Prepare it at its original size"):
        prepare(LARGE, refs_of(LARGE), tmp_path / "out", cameras=[FRONT], frames=1, fit=fit)

import json

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from alpacache.errors import BadClipError, InterruptedRunError, SourceError, UsageError
from alpacache.sample import SampleRef
from alpacache.selection import select
from alpacache.sources import open_source
from alpacache.sources.folder import FolderSource
from alpacache.sources.prepared import prepare
from alpacache.sources.prepared_rows import PictureFit
from alpacache.sources.synthetic import SyntheticSource

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


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, assert_same):
    monkeypatch.setattr("alpacache.sources.prepared.SHARD_SAMPLES", 2)
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
        prepare(DRIVES, refs, out, cameras=[FRONT], frames=1)


def broken_copy(prepared, out, change):
    rows = [dict(row) for row in load_from_disk(str(prepared))][:1]
    change(rows[0])
    Dataset.from_list(rows, features=load_from_disk(str(prepared)).features).save_to_disk(str(out))
    return open_source(str(out))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
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
    monkeypatch.setattr("alpacache.sources.prepared.SHARD_SAMPLES", 2)

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
    from alpacache.alpamayo.images import fit_size, to_patches

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

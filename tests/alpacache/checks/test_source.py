"""Planted faults are found and named, and what is sound is not accused beside them."""

import json
import os
import re
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from alpacache.checks.motion import judge_axes, judge_rotations, judge_speed, motion_of
from alpacache.checks.pictures import Turn, alike, judge_mirrored
from alpacache.checks.recordings import check_poses
from alpacache.checks.source import MEANINGS, check_source
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import Track
from alpacache.errors import SourceError, UsageError
from alpacache.sources.folder import FolderSource
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource

pytestmark = pytest.mark.system

CLIPS = 6
POSES = ("x", "y", "z", "qx", "qy", "qz", "qw")


@pytest.fixture(scope="session")
def sound_folder(tmp_path_factory):
    """Generated drives with curves, each in a world that is turned by another angle; frames at 10 Hz."""
    root = tmp_path_factory.mktemp("recorded")
    source = SyntheticSource(CLIPS, seed=4, mix={"early_curve": 0.5, "late_curve": 0.5})
    for clip_number, clip_id in enumerate(source.clip_ids):
        clip = root / "clips" / clip_id
        (clip / FRONT_CAMERA).mkdir(parents=True)
        track = source.track(clip_id)
        world = Rotation.from_euler("z", 1.1 * clip_number)
        turned = (world * Rotation.from_quat(track.quaternion_xyzw)).as_quat()
        values = np.concatenate([world.apply(track.xyz), turned], axis=1)
        write(clip / "egomotion.parquet", timestamp=track.timestamps_us, **dict(zip(POSES, values.T, strict=True)))
        stamps = track.timestamps_us[::2]
        write(clip / f"{FRONT_CAMERA}.timestamps.parquet", timestamp=stamps)
        for number, frame in enumerate(source.film(clip_id, FRONT_CAMERA, stamps)):
            Image.fromarray(frame.transpose(1, 2, 0)).save(clip / FRONT_CAMERA / f"{number:06d}.jpg", quality=90)
    index = {"name": "recorded", "cameras": [FRONT_CAMERA], "clips": list(source.clip_ids)}
    (root / "dataset.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def recorded(tmp_path, sound_folder):
    """Hard links: a test replaces files, never writes into them."""
    return shutil.copytree(sound_folder, tmp_path / "recorded", copy_function=os.link)


def write(file, **columns):
    file.unlink(missing_ok=True)
    pq.write_table(pa.table(columns), file)


def clips_of(root):
    return sorted((root / "clips").iterdir())


def change_poses(root, change, clips=slice(None)):
    """`change` gets the columns as arrays by name and changes them in place."""
    for clip in clips_of(root)[clips]:
        table = pq.read_table(clip / "egomotion.parquet")
        columns = {name: table.column(name).to_numpy().copy() for name in table.column_names}
        change(columns)
        write(clip / "egomotion.parquet", **columns)


def change_pictures(root, change):
    for file in root.rglob("*.jpg"):
        with Image.open(file) as image:
            changed = change(image.convert("RGB"))
        file.unlink()
        changed.save(file, quality=90)


def checked(root, **arguments):
    """The report, and name -> check for what is not ok, apart from samples being refused for it."""
    report = check_source(FolderSource(root), **arguments)
    assert [check.name for check in report.checks] == list(MEANINGS)
    bad = {check.name: check for check in report.checks if check.status != "ok"}
    assert bad.pop("samples", None) is None or report.refused
    return report, bad


def test_generated_drives_are_fine():
    report = check_source(open_source("synthetic:12"))
    assert [(check.name, check.status) for check in report.checks] == [(name, "ok") for name in MEANINGS]
    assert (report.ok, report.samples, report.refused) == (True, 12, ())
    assert report.clip_counts == {"ok": 12, "warn": 0, "fail": 0}
    assert report.strata["all"] == 12
    assert report.strata["straight"] + report.strata["gentle"] + report.strata["sharp"] == 12
    assert 5 < report.speeds_mps["median"] < report.speeds_mps["max"] < 21
    mirrored = next(check.found for check in report.checks if check.name == "mirrored")
    agreeing, moments = (int(word) for word in mirrored.split() if word.isdigit())
    assert moments >= 40
    assert agreeing >= 0.95 * moments


@pytest.mark.ci
def test_a_sound_folder_is_fine(recorded):
    report, bad = checked(recorded, t0="every:3.0")
    assert not bad
    assert report.samples == 4 * CLIPS
    assert all(check.status == "ok" and not check.remedy for clip in report.clips for check in clip.checks)


def test_poor_localisation_is_no_fault():
    """Ten centimetres and half a degree of noise at 20 Hz, in a world whose z is not up, seen from the front axle."""
    rng, source = np.random.default_rng(0), SyntheticSource(12)
    world, motions = Rotation.random(random_state=3), []
    for clip_id in source.clip_ids:
        track = source.track(clip_id)
        rot = Rotation.from_quat(track.quaternion_xyzw)
        xyz = track.xyz + rot.apply([2.8, 0, 0]) + rng.normal(0, 0.1, track.xyz.shape)
        rot = world * rot * Rotation.from_euler("zyx", rng.normal(0, 0.01, xyz.shape))
        noisy = Track(timestamps_us=track.timestamps_us, xyz=world.apply(xyz), quaternion_xyzw=rot.as_quat())
        rotations = judge_rotations(noisy)
        motions.append(motion_of(rotations.track))
        checks = [rotations.check, check_poses(noisy), judge_axes(motions[-1:]), judge_speed(motions[-1:])]
        assert [check.status for check in checks] == ["ok"] * 4, checks
    assert judge_axes(motions).status == judge_speed(motions).status == "ok"


def scaled(columns, factor):
    for name in "xyz":
        columns[name] *= factor


@pytest.mark.ci
@pytest.mark.parametrize(("factor", "said"), [(3.6, "3.6 times too large: km/h"), (100.0, "100 times too large: cent")])
def test_wrong_scales_are_named(recorded, factor, said):
    change_poses(recorded, lambda columns: scaled(columns, factor))
    report, bad = checked(recorded)
    assert {"speed"} <= set(bad) <= {"speed", "targets"}
    assert bad["speed"].status == "fail"
    assert said in bad["speed"].remedy
    assert not report.ok


def flip(columns, *names):
    for name in names:
        columns[name] *= -1


def swap(columns):
    columns["x"], columns["y"] = columns["y"].copy(), columns["x"].copy()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda columns: flip(columns, "y"), "mirrored: .*y axis of positions is flipped, or rotations lead from"),
        (lambda columns: flip(columns, "qx", "qy", "qz"), "mirrored: .*rotations lead from world to vehicle"),
        (lambda columns: flip(columns, "x"), "mirrored: .*x axis of positions"),
        (swap, "mirrored: .*swapped"),
        (lambda columns: flip(columns, "x", "y"), r"along its own -x, not \+x: 180 degrees"),
        (lambda columns: (swap(columns), flip(columns, "x")), r"along its own \+y, not \+x: 90 degrees"),
    ],
    ids=["y flipped", "inverse rotations", "x flipped", "x and y swapped", "half a turn", "quarter turn"],
)
def test_wrong_axes_are_named(recorded, change, said):
    change_poses(recorded, change)
    _, bad = checked(recorded)
    assert bad["axes"].status == "fail"
    assert re.search(said, bad["axes"].found), bad["axes"].found
    assert bad["axes"].remedy
    assert set(bad) <= {"axes", "mirrored"}  # inverse rotations turn against the pictures as well


def test_camera_axes_in_place_of_the_vehicles_are_named(recorded):
    camera = Rotation.from_matrix([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])

    def change(columns):
        names = POSES[3:]
        turned = Rotation.from_quat(np.stack([columns[name] for name in names], axis=1)) * camera
        columns.update(zip(names, turned.as_quat().T, strict=True))

    change_poses(recorded, change)
    _, bad = checked(recorded)
    assert "+z, not +x" in bad["axes"].found
    assert "camera" in bad["axes"].remedy


def test_scalar_first_quaternions_are_named(recorded):
    def change(columns):
        x, y, z, w = (columns[name].copy() for name in POSES[3:])
        columns.update(qx=w, qy=x, qz=y, qw=z)

    change_poses(recorded, change)
    _, bad = checked(recorded)
    assert set(bad) == {"rotations"}
    assert bad["rotations"].status == "fail"
    assert "hold w, x, y, z" in bad["rotations"].found
    assert "scalar last" in bad["rotations"].remedy


def test_quaternions_of_another_length_are_named(recorded):
    change_poses(recorded, lambda columns: columns.update(qw=2.0 * columns["qw"]))
    report, bad = checked(recorded)
    assert "length 2" in bad["rotations"].found
    assert {refusal.kind for refusal in report.refused} == {"pose_jump"}
    assert len(report.refused) == CLIPS


def test_mirrored_pictures_are_named(recorded):
    change_pictures(recorded, lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    _, bad = checked(recorded)
    assert set(bad) == {"mirrored"}
    assert bad["mirrored"].status == "fail"
    assert "unreadable" in bad["mirrored"].remedy


def test_left_handed_poses_contradict_the_pictures(recorded):
    """Positions and rotations mirrored alike agree with each other; only the pictures tell."""
    change_poses(recorded, lambda columns: flip(columns, "y", "qx", "qz"))
    _, bad = checked(recorded)
    assert set(bad) == {"mirrored"}
    assert bad["mirrored"].status == "fail"


def test_too_few_turns_are_no_verdict():
    source = SyntheticSource(3, mix={"straight": 1.0})
    check = next(check for check in check_source(source, samples=1).checks if check.name == "mirrored")
    assert check.status == "ok"
    assert "not enough turns" in check.found


@pytest.mark.parametrize(("unit", "factor"), [("milliseconds", 1e-3), ("nanoseconds", 1e3), ("seconds", 1e-6)])
def test_other_units_of_time_are_named(recorded, unit, factor):
    change_poses(recorded, lambda columns: columns.update(timestamp=(columns["timestamp"] * factor).astype(np.int64)))
    for file in recorded.rglob(f"{FRONT_CAMERA}.timestamps.parquet"):
        stamps = pq.read_table(file).column("timestamp").to_numpy()
        write(file, timestamp=(stamps * factor).astype(np.int64))
    report, bad = checked(recorded)
    assert bad["times"].status == "fail"
    assert f"timestamps of poses are in {unit}" in bad["times"].found
    assert len(report.refused) == CLIPS
    if unit != "seconds":  # whole seconds have lost the rest
        assert set(bad) == {"times"}


def test_clocks_of_their_own_are_named(recorded):
    change_poses(recorded, lambda columns: columns.update(timestamp=columns["timestamp"] + 1_700_000_000_000_000))
    report, bad = checked(recorded)
    assert bad["frames"].status == "fail"
    assert "one clock" in bad["frames"].remedy
    assert {refusal.kind for refusal in report.refused} == {"short_clip"}


def keep_frames(clip, kept):
    """Leave the frames of these numbers, with their times."""
    stamps = pq.read_table(clip / f"{FRONT_CAMERA}.timestamps.parquet").column("timestamp").to_numpy()
    write(clip / f"{FRONT_CAMERA}.timestamps.parquet", timestamp=stamps[kept])
    files = sorted((clip / FRONT_CAMERA).iterdir())
    for number in set(range(len(stamps))) - set(kept.tolist()):
        files[number].unlink()
    for number, place in enumerate(kept):
        files[place].rename(clip / FRONT_CAMERA / f"{number:06d}.jpg")


def test_dropped_frames_are_named(recorded):
    clip = clips_of(recorded)[0]
    keep_frames(clip, np.r_[0:120, 126:201])
    report, bad = checked(recorded)
    assert set(bad) == {"frames"}
    assert bad["frames"].status == "warn"  # one clip of six
    assert f"1 of {CLIPS} clips, such as {clip.name}" in bad["frames"].found
    assert "6 frames missing, the longest gap 0.70 s" in bad["frames"].found
    assert report.ok
    assert report.clip_counts == {"ok": CLIPS - 1, "warn": 1, "fail": 0}


def test_a_slow_camera_is_named(recorded):
    for clip in clips_of(recorded):
        keep_frames(clip, np.arange(0, 201, 2))
    report, bad = checked(recorded)
    assert set(bad) == {"frames"}
    assert bad["frames"].status == "warn"
    assert "5 Hz; camera_front_wide_120fov: fewer than 10 frames a second" in bad["frames"].found
    assert "record at 10 Hz or more" in bad["frames"].remedy
    assert (report.ok, report.clip_counts["warn"]) == (True, CLIPS)


def test_times_of_arrival_are_named(recorded):
    for clip in clips_of(recorded):
        file = clip / f"{FRONT_CAMERA}.timestamps.parquet"
        stamps = pq.read_table(file).column("timestamp").to_numpy()
        write(file, timestamp=stamps + np.where(np.arange(len(stamps)) % 2, 40_000, 0))
    _, bad = checked(recorded)
    assert set(bad) == {"frames"}
    assert "intervals vary by 40 %" in bad["frames"].found
    assert "not those of arrival" in bad["frames"].remedy


@pytest.mark.parametrize(("row", "refused"), [(140, 1), (350, 0)], ids=["within a sample", "beyond all samples"])
def test_a_jump_is_named(recorded, row, refused):
    def jump(columns):
        columns["y"][row:] += 12.0

    change_poses(recorded, jump, slice(2, 3))
    report, bad = checked(recorded)
    assert set(bad) == {"poses"}
    assert f"1 jump, the first at {(row - 1) * 0.05:.2f} s" in bad["poses"].found
    assert [refusal.kind for refusal in report.refused] == ["pose_jump"] * refused


def test_a_gap_a_slow_rate_and_nan_are_named(recorded):
    def cut(columns):
        kept = np.r_[0:300, 340 : len(columns["x"])]
        columns.update({name: values[kept] for name, values in columns.items()})

    def thin(columns):
        columns.update({name: values[::5] for name, values in columns.items()})

    def break_one(columns):
        columns["x"][390] = np.nan

    for number, change in enumerate((cut, thin, break_one)):
        change_poses(recorded, change, slice(number, number + 1))
    report, bad = checked(recorded)
    assert set(bad) == {"poses", "rotations"}
    found = [{check.name: check for check in clip.checks} for clip in report.clips]
    by_id = {clip.clip_id: checks for clip, checks in zip(report.clips, found, strict=True)}
    cut_one, thinned, broken = (by_id[clip.name] for clip in clips_of(recorded)[:3])
    assert "longest gap 2.05 s; 1 gap above 1 s" in cut_one["poses"].found
    assert "fewer than 10 poses a second" in thinned["poses"].found
    assert "1 of 401 poses hold NaN" in broken["rotations"].found
    assert [refusal.kind for refusal in report.refused] == ["not_finite"]


@pytest.mark.filterwarnings("error")
def test_positions_that_overflow_are_named_and_no_speed_is_infinite(recorded):
    change_poses(recorded, lambda columns: columns.update(x=columns["x"] * 1e300), slice(0, 1))
    report, bad = checked(recorded)
    assert "poses hold NaN, infinity or values beyond 1e+12" in bad["rotations"].found
    assert "inf m" not in "".join(check.found for clip in report.clips for check in clip.checks)
    assert [refusal.kind for refusal in report.refused] == ["not_finite"]


def test_a_source_of_which_nothing_can_be_used_fails_and_nothing_is_said_to_be_ok(recorded):
    change_poses(recorded, lambda columns: columns.update(timestamp=columns["timestamp"] / 1e6))
    report = check_source(FolderSource(recorded))
    first, *others = report.checks
    assert (first.name, first.status, first.found) == ("samples", "fail", f"0 usable, {CLIPS} refused (wrong_shape)")
    assert "column timestamp is double" in first.remedy
    assert not report.ok
    assert [check.name for check in others if check.is_judged] == ["clip ids"]
    assert report.clip_counts == {"ok": 0, "warn": 0, "fail": 0}


def test_a_source_that_gives_no_moment_fails(recorded):
    source = FolderSource(recorded)
    source.event_times_us = lambda clip_id: ()
    report = check_source(source, t0="events")
    assert (report.checks[0].status, report.checks[0].found) == ("fail", "none was selected")
    assert not report.ok


def test_some_refusals_are_a_warning_by_kind(recorded):
    for clip in clips_of(recorded)[:2]:
        (clip / "egomotion.parquet").unlink()
    clip = clips_of(recorded)[2]
    (clip / f"{FRONT_CAMERA}.timestamps.parquet").unlink()
    report = check_source(FolderSource(recorded))
    samples = report.checks[0]
    assert samples.status == "warn"
    assert samples.found == f"{CLIPS - 3} usable, 2 refused (missing_poses), 1 refused (missing_camera)"
    assert report.ok


def test_a_source_whose_vehicle_never_moves_fails(recorded):
    def stand(columns):
        for name in POSES:
            columns[name][:] = columns[name][0]

    change_poses(recorded, stand, slice(CLIPS - 1))
    report, bad = checked(recorded)
    assert bad["standing"].status == "warn"  # one clip moves
    assert report.ok
    change_poses(recorded, stand)
    report, bad = checked(recorded)
    assert bad["standing"].status == "fail"
    assert f"stands in all {CLIPS} samples" in bad["standing"].found
    assert not report.ok


def test_a_missing_camera_is_named(recorded):
    clip = clips_of(recorded)[1]
    (clip / f"{FRONT_CAMERA}.timestamps.parquet").unlink()
    report, bad = checked(recorded)
    assert set(bad) == {"frames"}
    assert f"no {FRONT_CAMERA}" in bad["frames"].found
    assert [refusal.kind for refusal in report.refused] == ["missing_camera"]


def test_standing_and_copied_clips_and_odd_pictures_are_named(recorded):
    clips = clips_of(recorded)
    change_poses(recorded, lambda columns: scaled(columns, 1e-3), slice(0, 1))
    (clips[3] / "egomotion.parquet").unlink()
    os.link(clips[2] / "egomotion.parquet", clips[3] / "egomotion.parquet")
    change_pictures(clips[4], lambda image: image.resize((320, 160)))
    report, bad = checked(recorded)
    assert {"standing", "clip ids", "pictures"} <= set(bad) <= {"standing", "clip ids", "pictures", "speed", "mirrored"}
    assert f"{clips[2].name} and {clips[3].name}" in bad["clip ids"].found
    assert bad["pictures"].found == "256 x 128, 320 x 160"
    assert clips[4].name in bad["pictures"].remedy
    assert report.ok


def test_blank_pictures_are_named(recorded):
    change_pictures(clips_of(recorded)[4], lambda image: Image.new("RGB", image.size, "#404040"))
    _, bad = checked(recorded)
    assert set(bad) == {"pictures"}
    share = re.search(
        r"(\d+) of (\d+) pictures \(\d+ %\) show one colour only, such as in (\S+)$", bad["pictures"].found
    )
    assert share[3] == clips_of(recorded)[4].name
    assert CLIPS * int(share[1]) == int(share[2])  # all of one clip


def test_single_blank_pictures_are_named(recorded):
    for clip in clips_of(recorded):
        for file in sorted((clip / FRONT_CAMERA).glob("*.jpg"))[::3]:
            file.unlink()
            Image.new("RGB", (256, 128)).save(file)
    report, bad = checked(recorded, samples=3)
    assert set(bad) == {"pictures"}
    share = re.search(r"(\d+) of (\d+) pictures \(\d+ %\) show one colour only", bad["pictures"].found)
    assert int(share[1]) / int(share[2]) == pytest.approx(1 / 3, abs=0.1)
    assert report.ok


@pytest.mark.system
def test_frozen_and_doubled_pictures_are_named(recorded):
    for clip in clips_of(recorded):
        files = sorted((clip / FRONT_CAMERA).glob("*.jpg"))
        for number, file in enumerate(files):
            shown = files[number - number % 2] if clip in clips_of(recorded)[:3] else files[min(number, 20)]
            if shown != file:
                file.unlink()
                os.link(shown, file)
    report, bad = checked(recorded)
    assert list(bad) == ["repeats"]
    share = re.match(r"(\d+) of (\d+) pictures \(\d+ %\) repeat the one before; at", bad["repeats"].found)
    assert 0.7 < int(share[1]) / int(share[2]) < 0.8  # half of one half, and all of the other
    assert "The camera stood still while the vehicle drove" in bad["repeats"].remedy
    assert report.ok


def test_swapped_colours_are_named(recorded):
    change_pictures(recorded, lambda image: Image.merge("RGB", image.split()[::-1]))
    _, bad = checked(recorded, t0="every:3.0")
    assert list(bad) == ["colours"]
    assert re.match(r"red and blue look swapped in 2\d of 30 pictures", bad["colours"].found)


def test_a_prepared_dataset_is_judged_by_its_samples(tmp_path):
    source = SyntheticSource(8, mix={"early_curve": 1.0})
    refs, _ = select(source, t0="every:1.5")
    prepare(source, refs, tmp_path / "rows", cameras=[FRONT_CAMERA], frames=4)
    report = check_source(open_source(str(tmp_path / "rows")))
    assert report.samples == len(refs)
    assert {check.name for check in report.checks if check.status != "ok"} == set()
    assert "moves along its own +x" in next(check.found for check in report.checks if check.name == "axes")
    assert "pictures and poses turn the same way" in next(c.found for c in report.checks if c.name == "mirrored")


def test_clips_stay_in_order_however_long_each_takes():
    class Uneven(SyntheticSource):
        def load(self, ref, *, cameras, frames):
            time.sleep(0.3 if ref.clip_id == self.clip_ids[0] else 0.0)
            return super().load(ref, cameras=cameras, frames=frames)

    source, done = Uneven(5, size=(64, 32)), []
    report = check_source(source, on_progress=lambda progress: done.append(progress.done))
    assert [clip.clip_id for clip in report.clips] == list(source.clip_ids)
    assert [sample.ref.clip_id for sample in report.shown] == list(source.clip_ids)
    assert done == [1, 2, 3, 4, 5]


def test_samples_and_split_are_those_of_extract(recorded):
    report, _ = checked(recorded, samples=2)
    assert [clip.clip_id for clip in report.clips] == [clip.name for clip in clips_of(recorded)[:2]]
    with pytest.raises(UsageError, match="split"):
        checked(recorded, split="test")
    with pytest.raises(SourceError, match=r"dataset\.json"):
        FolderSource(recorded / "clips")


def test_clips_that_are_compared_in_full_do_not_outvote_the_others():
    turns = [Turn(clip_id, True) for clip_id in "abc" for _ in range(50)]
    others = [Turn(f"{number}", number >= 12) for number in range(29)]
    kept = alike(turns, clips=32)
    assert [turn.clip_id for turn in kept] == [*"aaaabbbbcccc"]
    check = judge_mirrored([*others, *kept])
    assert (check.status, check.found) == ("warn", "pictures and poses turn the same way at 29 of 41 moments")
    assert len(alike(turns[:50], clips=1)) == 50

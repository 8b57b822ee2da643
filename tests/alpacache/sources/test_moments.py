"""Clips and moments that a person names, and each clip's sharpest curve."""

import re

import numpy as np
import pandas as pd
import pytest

from alpacache.driving.poses import Track
from alpacache.driving.strata import classify
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.config import CheckConfig
from alpacache.sources.moments import sharpest_us
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select

SECOND = 1_000_000


class Clips:
    name = "clips"

    def __init__(self, *clip_ids, last_s=20):
        self.clip_ids, self.last_s = clip_ids, last_s

    def times_us(self, clip_id):
        return 0, self.last_s * SECOND


def ids(refs):
    return [ref.sample_id for ref in refs]


def bend(at_s, *, seconds=60.0, speed_mps=8.0, stop_s=(0.0, 0.0)):
    """A track at 20 Hz that is straight but for a bend of 2 s, and stands for a while with a heading that wanders."""
    times = np.arange(0, seconds, 0.05)
    speed = np.where((times >= stop_s[0]) & (times < stop_s[1]), 0.0, speed_mps)
    yaw = np.deg2rad(20) * np.clip(times - at_s, 0, 2) + np.where(
        speed == 0, 0.03 * np.sin(2 * np.pi * (times - stop_s[0]) / 5), 0
    )
    steps = 0.05 * speed[:, None] * np.stack([np.cos(yaw), np.sin(yaw), 0 * yaw], axis=1)
    quaternions = np.stack([0 * yaw, 0 * yaw, np.sin(yaw / 2), np.cos(yaw / 2)], axis=1)
    return Track(
        timestamps_us=np.round(times * SECOND).astype(np.int64),
        xyz=np.cumsum(steps, axis=0),
        quaternion_xyzw=quaternions,
    )


RASTER = range(1_700_000, 53_500_000, 100_000)


def test_the_sharpest_moment_has_the_curve_in_the_middle_of_what_is_ahead():
    assert sharpest_us(bend(30.0), RASTER, where="x") == 27_300_000  # its first second is as sharp as all of it
    assert sharpest_us(bend(30.0, stop_s=(10.0, 20.0)), RASTER, where="x") == 27_300_000  # a standing car has none
    assert sharpest_us(bend(3.0), RASTER, where="x") == RASTER[0]
    assert sharpest_us(bend(57.5), RASTER, where="x") == RASTER[-1]
    broken = bend(30.0)
    broken.xyz[400:] += 50.0
    with pytest.raises(BadClipError, match=r"the vehicle moves .* choose a t0 away from it"):
        sharpest_us(broken, RASTER, where="x")


def test_no_moment_of_a_clip_has_more_curvature_ahead_than_the_sharpest():
    source = open_source("synthetic:3")
    refs, rejected = select(source, t0="sharpest")
    assert rejected == []
    assert [ref.clip_id for ref in refs] == list(source.clip_ids)
    for ref in refs:
        every, _ = select(source, clips=[ref.clip_id], t0="every:0.5")
        assert len(every) > 10

        def largest(one):
            sample = source.load(one, cameras=source.cameras, frames=1)
            poses = sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot
            return classify(*poses).largest_curvature_pm

        assert largest(ref) >= 0.999 * max(map(largest, every))


@pytest.mark.parametrize("name", ["moments.csv", "moments.parquet", "samples.parquet", "moments.txt"])
def test_moments_of_a_file_are_tried_all(tmp_path, name):
    file, moments = tmp_path / name, [("b", 9_000_000), ("a", 500_000), ("b", 5_100_000), ("b", 5_100_000)]
    names = [f"{clip}@{t0}#1" for clip, t0 in moments]
    frame = pd.DataFrame(moments, columns=["clip_id", "t0_us"])
    if name == "moments.csv":
        frame.to_csv(file, index=False)
    elif name == "moments.txt":
        file.write_text("\n".join(names))
    elif name == "samples.parquet":
        pd.DataFrame({"sample_id": names, "clip_id": "of eval"}).to_parquet(file)
    else:
        frame.to_parquet(file)
    refs, rejected = select(Clips("a", "b", "c"), t0=str(file))
    assert rejected == []
    assert ids(refs) == ["a@500000#0", "b@5100000#0", "b@9000000#0"]  # what a recording lacks is told when it is read


def test_clips_are_named_by_ids_patterns_and_files(tmp_path):
    source = Clips("drive-a", "drive-b", "walk-a", "drive-c")
    (tmp_path / "clips.txt").write_text("walk-a\n\ndrive-[bc]\n")
    (tmp_path / "clips.csv").write_text("clip_id,other\ndrive-c,1\n")

    def chosen(*clips):
        return [ref.clip_id for ref in select(source, clips=clips)[0]]

    assert chosen(str(tmp_path / "clips.txt")) == ["drive-b", "walk-a", "drive-c"]
    assert chosen(str(tmp_path / "clips.csv"), "drive-a") == ["drive-a", "drive-c"]
    assert chosen("*-a") == ["drive-a", "walk-a"]
    with pytest.raises(UsageError, match=r"--clips x: 1 of 1 names fit no clip of clips: x\."):
        chosen("drive-a", "x")
    with pytest.raises(UsageError, match=r"clips\.csv cannot be read \(No such file"):
        chosen(str(tmp_path / "gone" / "clips.csv"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("clip_id,t0_us\na,1\nx,1\ny,1\n", "2 of 3 clips are none of clips: x, y."),
        (
            "clip_id,t0_us\na,5.1\na,-3\na,now\na,5100000.0\n",
            "3 of 4 moments cannot be used, 5.1, -3, now; expected",
        ),
        ("clip_id,t0\na,5.1\n", "expected a column sample_id, or the columns clip_id and t0_us"),
        ("clip_id,t0_us\n", "names nothing"),
        ("sample_id\na@1#0\nabc\nb\n", "2 of 3 names are no sample ids, abc, b; expected CLIP@T0_US#VIEW"),
    ],
)
def test_files_of_moments_that_make_no_sense_are_refused(tmp_path, rows, message):
    file = tmp_path / "moments.csv"
    file.write_text(rows)
    with pytest.raises(UsageError, match=re.escape(message)):
        select(Clips("a", "b"), t0=str(file))


def test_settings_know_the_words():
    assert CheckConfig(source="synthetic:2", t0="sharpest").t0 == "sharpest"
    assert CheckConfig(source="synthetic:2", t0="m.parquet", clips=["a", "b*"]).clips == ("a", "b*")
    with pytest.raises(UsageError, match=r"t0 is 'blunt'; expected .* sharpest, or a file of moments"):
        CheckConfig(source="synthetic:2", t0="blunt")
    with pytest.raises(UsageError, match="no recordings to look for curves in"):
        select(Clips("a"), t0="sharpest")

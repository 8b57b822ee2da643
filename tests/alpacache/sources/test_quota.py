import dataclasses

import numpy as np
import pytest

from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.strata import classify
from alpacache.errors import UsageError
from alpacache.sources.prepared import open_prepared
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.selection import Quota, parse_quota, select
from alpacache.sources.synthetic import SyntheticSource

DRIVES = SyntheticSource(40, seed=2, size=(64, 32))
WANTED = {"straight": 4, "gentle": 3, "sharp": 2}


def turn(ref, source=DRIVES):
    sample = source.load(ref, cameras=[FRONT_CAMERA], frames=1)
    return classify(sample.history_xyz, sample.history_rot, sample.future_xyz, sample.future_rot).turn


def counts(refs):
    turns = [turn(ref) for ref in refs]
    return {name: turns.count(name) for name in WANTED}


@pytest.mark.parametrize("options", [{}, {"seed": 5}, {"seed": 5, "t0": "every:3"}, {"split": "train"}])
def test_a_quota_takes_so_many_of_each_turn(options):
    refs, rejected = select(DRIVES, quota=WANTED, **options)
    assert (counts(refs), rejected) == (WANTED, [])
    everything = select(DRIVES, **options)[0]
    assert refs == [ref for ref in everything if ref in refs]


def test_it_is_the_first_of_each_turn_and_turns_without_a_number_are_left_out():
    everything, _ = select(DRIVES)
    sharp = [ref for ref in everything if turn(ref) == "sharp"]
    assert select(DRIVES, quota={"sharp": 2})[0] == sharp[:2]
    assert select(DRIVES, quota={"sharp": 1000})[0] == sharp


def test_no_clip_is_looked_at_beyond_and_none_in_its_pictures(monkeypatch):
    asked = []
    track = DRIVES.track
    monkeypatch.setattr(DRIVES, "track", lambda clip_id: asked.append(clip_id) or track(clip_id))
    monkeypatch.setattr(DRIVES, "load", None)
    refs, _ = select(DRIVES, quota={"straight": 1}, t0="every:3")
    assert set(asked) == set(DRIVES.clip_ids[: len(set(asked))])
    assert asked[-1] == refs[-1].clip_id
    assert len(asked) < len(DRIVES.clip_ids)


def test_a_prepared_dataset_gives_the_same_choice(tmp_path):
    refs, _ = select(DRIVES)
    prepare(DRIVES, refs, tmp_path / "all", cameras=[FRONT_CAMERA], frames=1)
    again = open_prepared(str(tmp_path / "all"))
    for ref in refs[:3]:
        poses, sample = again.poses(ref), DRIVES.load(ref, cameras=[FRONT_CAMERA], frames=1)
        for name, values in poses._asdict().items():
            np.testing.assert_array_equal(values, getattr(sample, name))
    assert select(again, quota=WANTED)[0] == select(DRIVES, quota=WANTED)[0]
    assert select(again, quota=WANTED, seed=1)[0] == select(DRIVES, quota=WANTED, seed=1)[0]


def test_a_moment_that_cannot_be_judged_is_left_out_with_its_reason(monkeypatch):
    track = DRIVES.track

    def jump(clip_id):
        found = track(clip_id)
        xyz = found.xyz.copy()
        xyz[200:] += 90.0 * (clip_id == DRIVES.clip_ids[0])
        return dataclasses.replace(found, xyz=xyz)

    monkeypatch.setattr(DRIVES, "track", jump)
    refs, rejected = select(DRIVES, quota={"straight": 30}, t0="every:4")
    assert [(name, error.kind) for name, error in rejected] == [
        (f"{DRIVES.clip_ids[0]}@{t0}#0", "pose_jump") for t0 in (4_000_000, 8_000_000)
    ]
    assert len(refs) == 30


def test_text_and_its_mistakes():
    assert parse_quota("straight=200, sharp=10") == {"straight": 200, "sharp": 10}
    counts = ("", "=0", "=-1", "=x", "=²", f"={10**20}", "=1,sharp=2", "=1,")
    for text in ("", "left=3", *(f"sharp{count}" for count in counts)):
        with pytest.raises(UsageError, match="expected such as straight=200,gentle=100,sharp=100"):
            parse_quota(text)


def test_senseless_quotas_are_usage_errors():
    with pytest.raises(UsageError, match="leave samples out"):
        select(DRIVES, quota=WANTED, samples=3)
    with pytest.raises(UsageError, match="quota left=3"):
        Quota(DRIVES, {"left": 3})
    with pytest.raises(UsageError, match="poses can be read"):
        select(type("Blind", (), {"name": "blind", "clip_ids": ["a"]})(), quota=WANTED)

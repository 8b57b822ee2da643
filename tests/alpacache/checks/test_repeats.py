"""Pictures that stand still while the vehicle drives are found, also after lossy coding; what moves is not accused."""

import dataclasses

import numpy as np
import pytest

from alpacache.checks.film import look_at_film
from alpacache.checks.glimpses import glimpses_of_sample
from alpacache.checks.motion import motion_of
from alpacache.checks.repeats import Moment, judge_repeats, moments_of
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.sample import SampleRef
from alpacache.sources.synthetic import SyntheticSource
from benchmarks.pai_tree import encode_h264

SOURCE = SyntheticSource(3, seed=2)
CLIP = SOURCE.clip_ids[0]


@pytest.fixture(scope="module")
def sample():
    return SOURCE.load(SampleRef(clip_id=CLIP, t0_us=5_100_000), cameras=[FRONT_CAMERA], frames=4)


def repeats_of_sample(sample):
    return [moment for glimpse in glimpses_of_sample(sample) for moment in moments_of(glimpse)]


def repeats_of_clip(source, clip, motion, *, clips):
    glimpses = look_at_film(source, clip, motion, number=0, clips=clips).glimpses
    return [moment for glimpse in glimpses for moment in moments_of(glimpse)]


def moment(clip, pairs, repeats, *, is_run=False):
    return Moment(clip, pairs, repeats, is_run)


def shows(sample, order):
    """The sample with its pictures in this order."""
    return dataclasses.replace(sample, frames=sample.frames[:, order])


def coded(frames, crf):
    """Frames `[N, 3, H, W]` through H.264."""
    import io

    import av

    with av.open(io.BytesIO(encode_h264(frames, 10, crf))) as film:
        return np.stack([frame.to_ndarray(format="rgb24").transpose(2, 0, 1) for frame in film.decode(video=0)])


@pytest.mark.parametrize(
    ("order", "repeats"), [((0, 1, 2, 3), 0), ((0, 0, 1, 1), 2), ((0, 1, 1, 2), 1), ((2, 2, 2, 2), 3)]
)
def test_pairs_of_a_sample(sample, order, repeats):
    assert repeats_of_sample(shows(sample, order)) == [moment(CLIP, 3, repeats)]


@pytest.mark.parametrize("crf", [12, 23, 28])
def test_repeats_are_found_after_lossy_coding(sample, crf):
    twice = coded(sample.frames[0].repeat(2, axis=0), crf)
    for first, repeats in ((0, 2), (1, 1)):
        seen = dataclasses.replace(sample, frames=twice[None, first : first + 4])
        assert repeats_of_sample(seen) == [moment(CLIP, 3, repeats)]
    assert repeats_of_sample(dataclasses.replace(sample, frames=coded(sample.frames[0], crf)[None])) == [
        moment(CLIP, 3, 0)
    ]


def test_what_may_stand_still_is_no_pair(sample):
    frozen = shows(sample, (0, 0, 0, 0))
    standing = dataclasses.replace(frozen, history_xyz=sample.history_xyz * 0.1)
    assert repeats_of_sample(standing) == []
    slow_camera = sample.frame_timestamps_us.copy()
    slow_camera[:, 1] = slow_camera[:, 0]  # the camera had no newer frame
    assert repeats_of_sample(dataclasses.replace(frozen, frame_timestamps_us=slow_camera)) == [moment(CLIP, 2, 2)]
    assert repeats_of_sample(dataclasses.replace(sample, frames=np.full_like(sample.frames, 40))) == []


class Doubled:
    """Each `every`th frame shows what the one before shows."""

    def __init__(self, every):
        self._every = every

    def frame_times_us(self, clip_id, camera):
        return SOURCE.frame_times_us(clip_id, camera)[::2]

    def film(self, clip_id, camera, times_us):
        frames = times_us // 100_000
        return SOURCE.film(clip_id, camera, (frames - (frames % self._every == 0)) * 100_000)


@pytest.mark.system
@pytest.mark.parametrize(("every", "share"), [(2, 0.5), (10, 0.1)])
def test_a_film_is_looked_at_frame_by_frame(every, share):
    """Of frames that come twice, samples in step with them see nothing."""
    motion = motion_of(SOURCE.track(CLIP))
    seen = repeats_of_clip(Doubled(every), CLIP, motion, clips=1)
    assert len(seen) == 8
    assert [one.pairs for one in seen] == [11] * 8
    assert sum(one.repeats for one in seen) == pytest.approx(88 * share, abs=4)
    check = judge_repeats([*seen, *[moment(CLIP, 3, 0)] * 200])
    assert check.status == "warn"
    assert ("of 88 pictures" if every == 10 else "of 688 pictures") in check.found


@pytest.mark.system
def test_the_more_clips_the_less_film():
    motion = motion_of(SOURCE.track(CLIP))
    assert [one.repeats for one in repeats_of_clip(SOURCE, CLIP, motion, clips=8)] == [0]
    assert [one.pairs for one in repeats_of_clip(SOURCE, CLIP, motion, clips=24)] == [3]
    read = [len(look_at_film(Doubled(2), CLIP, motion, number=number, clips=500).glimpses) for number in range(500)]
    assert sum(read) == 32


def test_a_short_run_is_read_with_a_pair_of_frames_in_a_turn(drive, panorama):
    town, read = panorama({"town": drive()}), []

    class Counted:
        track, frame_times_us = town.track, town.frame_times_us

        def film(self, clip_id, camera, times_us):
            read.append(times_us)
            return town.film(clip_id, camera, times_us)

    motion = motion_of(town.track("town"))
    seen = [look_at_film(Counted(), "town", motion, number=number, clips=100) for number in range(100)]
    assert [len(times) for times in read] == [3] * 32
    assert sum(len(one.glimpses) for one in seen) == 32
    turns = [turn for one in seen for turn in one.turns]
    assert len(turns) >= 25
    assert all(turn.agrees for turn in turns)
    assert len({int(times[0]) for times in read}) > 20  # all over the turns


def test_verdicts():
    assert judge_repeats([]).found == "not judged: no two pictures between which the vehicle moved 0.3 m"
    accident = judge_repeats([moment("a", 3, 0)] * 30 + [moment("b", 3, 1)])
    assert (accident.status, accident.found) == ("ok", "1 of 93 pictures (1 %) repeat the one before")
    frozen = judge_repeats([moment("a", 3, 0)] * 3 + [moment("b", 3, 3)])
    assert frozen.status == "warn"
    assert frozen.found == "3 of 12 pictures (25 %) repeat the one before; at 1 of 4 moments (25 %) all do"
    assert frozen.remedy == "The camera stood still while the vehicle drove, such as in b: cut these parts out."
    doubled = judge_repeats([moment("a", 3, 1), moment("c", 3, 2)])
    assert (doubled.status, doubled.found) == ("warn", "3 of 6 pictures (50 %) repeat the one before")
    assert doubled.remedy.startswith("Frames are there twice, such as in a: keep one of each")

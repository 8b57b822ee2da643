"""Futures of other samples are told from those that go on as the history ends, also where positions are noisy."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from alpacache.checks.seams import bends_at_t0, is_torn, judge_bends, judge_seams
from alpacache.checks.source import check_source
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.poses import history_and_future, seam_of
from alpacache.driving.sample import SampleRef
from alpacache.driving.strata import heading


def paths(track):
    begins = track.timestamps_us[0] + np.arange(2_000_000, 53_000_000, 1_500_000)
    return [history_and_future(track, int(t0_us)) for t0_us in begins]


@pytest.mark.parametrize("noise_m", [0.0, 0.03, 0.1])
def test_one_drive_goes_on_at_t0(drive, noise_m):
    track = drive()
    track.xyz[:, :2] += np.random.default_rng(1).normal(0, noise_m, (len(track.xyz), 2))
    seams = [seam_of(path.history_xyz, path.future_xyz) for path in paths(track)]
    assert len(seams) == 34
    assert not any(map(is_torn, seams))
    assert judge_seams({"town": seams}) is None


def test_futures_of_others_are_told_with_the_number(drive):
    whole = paths(drive())
    own = [seam_of(path.history_xyz, path.future_xyz) for path in whole]
    mixed = [
        seam_of(path.history_xyz, other.future_xyz) for path, other in zip(whole, whole[7:] + whole[:7], strict=True)
    ]
    assert np.mean([is_torn(seam) for seam in mixed]) > 0.7
    check = judge_seams({"town": mixed})
    assert check.status == "fail"
    count = sum(map(is_torn, mixed))
    assert check.found.startswith(f"in {count} of 34 samples velocity changes at t0 as nowhere around")
    torn = next(seam for seam in mixed if is_torn(seam))
    assert judge_seams({"a": own, "b": [torn]}).status == "warn"


@pytest.mark.parametrize("noise_rad", [0.0, 0.003])
def test_mirrored_futures_are_told_where_the_vehicle_turns(drive, noise_rad):
    whole, noise = paths(drive()), np.random.default_rng(2).normal(0, noise_rad, (34, 80))
    mirror = np.diag([1.0, -1.0, 1.0]).astype(np.float32)
    own, mirrored, turns = [], [], []
    for path, errors in zip(whole, noise, strict=True):
        shaken = Rotation.from_euler("z", errors[:, None]).as_matrix()
        history, future = shaken[:16] @ path.history_rot, shaken[16:] @ path.future_rot
        own.append(bends_at_t0(history, future))
        mirrored.append(bends_at_t0(history, mirror @ future @ mirror))
        turns.append(abs(heading(path.history_rot[5:6])[0]) > 0.1)
    assert sum(turns) >= 8
    assert sum(own) == 0
    assert np.mean(np.array(mirrored)[turns]) > 0.6
    assert judge_bends({"town": own}) is None
    check = judge_bends({"a": own, "b": mirrored})
    assert check.status == "warn"
    assert (
        check.found == f"in {sum(mirrored)} of 68 samples the yaw rate changes at t0 as nowhere after it, such as in b"
    )
    assert judge_bends({"a": own, "b": [True]}) is None


def test_check_names_torn_rows(drive, panorama):
    town = panorama({"town": drive()})
    begin = int(town.track("town").timestamps_us[0])
    refs = [SampleRef(clip_id="town", t0_us=begin + seconds * 1_000_000) for seconds in (5, 16, 28, 36, 44)]
    samples = [town.load(ref, cameras=[FRONT_CAMERA], frames=4) for ref in refs]

    class Rows:
        name, clip_ids, sample_refs, turned = "rows", ["town"], refs, 0

        def times_us(self, clip_id):
            return town.times_us(clip_id)

        def expect(self, refs):
            pass

        def poses(self, ref):
            raise NotImplementedError

        def load(self, ref, *, cameras, frames):
            place = refs.index(ref)
            other = samples[(place + self.turned) % len(refs)]
            return replace(samples[place], future_xyz=other.future_xyz, future_rot=other.future_rot)

    def judged():
        return next(check for check in check_source(Rows()).checks if check.name == "poses")

    assert judged().status == "ok"
    Rows.turned = 1
    assert judged().status == "warn"
    assert "velocity changes at t0" in judged().found

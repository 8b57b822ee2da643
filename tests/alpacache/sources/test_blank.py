"""Black pictures keep the places of absent cameras."""

import numpy as np

from alpacache.driving.cameras import SLOTS
from alpacache.driving.sample import SampleRef
from alpacache.sources.blank import with_blank
from alpacache.sources.registry import open_source
from alpacache.sources.views import one_pass

REF = SampleRef(clip_id="synthetic-0-000001", t0_us=5_100_000)


def test_recorded_pictures_stay_as_they_are_and_the_others_are_black():
    sample = open_source("synthetic:2").load(REF, cameras=SLOTS[1:3], frames=2)
    shown = with_blank(sample, [SLOTS[3], SLOTS[0]])
    assert (shown.cameras, shown.blank) == (SLOTS, (SLOTS[0], SLOTS[3]))
    assert np.array_equal(shown.frames[1:3], sample.frames)
    assert shown.frames.shape[0] == 4
    assert shown.frames.dtype == np.uint8
    assert not shown.frames[[0, 3]].any()
    assert np.array_equal(shown.frame_timestamps_us[1:3], sample.frame_timestamps_us)
    assert shown.frame_timestamps_us[3].tolist() == [5_000_000, 5_100_000]
    assert with_blank(sample, ()) is sample


def test_black_stays_black_in_every_view():
    ref = SampleRef(clip_id=REF.clip_id, t0_us=REF.t0_us, view=1)
    with one_pass(open_source("synthetic:2"), [ref], cameras=SLOTS[1:2], frames=1, seed=0) as load:
        seen = load(ref)
    assert not with_blank(seen, [SLOTS[0]]).frames[0].any()

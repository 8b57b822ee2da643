"""Pictures in reverse order, in the order of text and in none are named, and drives as they are pass."""

from dataclasses import replace

import numpy as np
import pytest

from alpacache.checks.flow import flow_of
from alpacache.checks.glimpses import Glimpse
from alpacache.checks.order import likenesses
from alpacache.checks.source import check_source

pytestmark = pytest.mark.system  # films of whole drives


def checks_of(source):
    return {check.name: check for check in check_source(source, t0="every:5").checks}


class Reordered:
    """A source whose `order[i]`th picture is shown as its `i`th."""

    def __init__(self, source, order):
        self._source, self._order = source, order
        self.name, self.clip_ids = source.name, source.clip_ids
        self.track, self.times_us, self.frame_times_us = source.track, source.times_us, source.frame_times_us

    def film(self, clip_id, camera, times_us):
        stamps = self.frame_times_us(clip_id, camera)
        return self._source.film(clip_id, camera, stamps[self._order[np.searchsorted(stamps, times_us)]])

    def load(self, ref, *, cameras, frames):
        sample = self._source.load(ref, cameras=cameras, frames=frames)
        shown = [self.film(ref.clip_id, camera, sample.frame_timestamps_us[0]) for camera in cameras]
        return replace(sample, frames=np.stack(shown))


@pytest.fixture
def town(drive, panorama):
    return panorama({"town": drive()})


def test_a_drive_as_it_is(town):
    checks = checks_of(town)
    assert {name for name, check in checks.items() if check.status != "ok"} == set()
    assert checks["order"].found.startswith("0 of ")
    moments = checks["order"].found.split("comes nearer at ")[1].split()
    assert int(moments[0]) == int(moments[2]) >= 40


def test_pictures_in_reverse_order_of_time(town):
    checks = checks_of(Reordered(town, np.arange(600)[::-1]))
    assert checks["order"].status == "fail"
    assert "the road goes away" in checks["order"].found
    assert "reverse order of time" in checks["order"].remedy
    assert not any(checks[name].is_judged for name in ("mirrored", "clocks", "scale"))


def test_one_clip_in_reverse_order_is_named(town):
    reverse = Reordered(town, np.arange(600)[::-1])
    clips = {f"{number}": reverse if number == 4 else town for number in range(6)}

    class Several:
        name, clip_ids = "several", list(clips)

        def track(self, clip_id):
            return town.track("town")

        def times_us(self, clip_id):
            return town.times_us("town")

        def frame_times_us(self, clip_id, camera):
            return town.frame_times_us("town", camera)

        def film(self, clip_id, camera, times_us):
            return clips[clip_id].film("town", camera, times_us)

        def load(self, ref, **named):
            sample = clips[ref.clip_id].load(replace(ref, clip_id="town"), **named)
            return replace(sample, ref=ref)

    checks = {check.name: check for check in check_source(Several(), t0="every:8").checks}
    assert checks["order"].status == "warn"
    assert checks["order"].found.endswith("moments, such as in 4")


@pytest.mark.parametrize("first", [0, 1])
def test_pictures_in_the_order_of_text(town, first):
    order = np.array(sorted(range(first, first + 600), key=str)) - first
    checks = checks_of(Reordered(town, order))
    assert checks["order"].status == "fail"
    assert "in the order of their former names as text, 10 before 2, such as in town" in checks["order"].found
    assert not checks["mirrored"].is_judged


def test_pictures_in_no_order(town):
    checks = checks_of(Reordered(town, np.random.default_rng(0).permutation(600)))
    assert checks["order"].status == "warn"
    assert "do not follow the one before" in checks["order"].found


def test_a_vehicle_that_reverses(drive, panorama):
    """It drives the way that it came; its pictures are those of a drive that runs backwards, and rightly so."""
    track = drive()
    back = replace(track, xyz=track.xyz[::-1].copy(), quaternion_xyzw=track.quaternion_xyzw[::-1].copy())
    source = Reordered(panorama({"town": track}), np.arange(600)[::-1])
    source.track = lambda clip_id: back
    checks = checks_of(source)
    assert checks["axes"].status == "fail"  # all of it in reverse
    assert checks["order"].status == "ok"


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (12, 16), (20, 160)])
def test_tiny_pictures_are_not_judged(size):
    rng = np.random.default_rng(0)
    glimpse = Glimpse(
        clip_id="a",
        pictures=rng.integers(0, 255, (12, *size), np.uint8),
        stamps_us=np.arange(12) * 100_000,
        way_m=np.arange(12) * 1.0,
        heading_rad=np.zeros(12),
        camera="front",
        is_run=True,
        newest=np.zeros((*size, 3), np.uint8),
    )
    assert flow_of([glimpse]) is None
    assert len(likenesses(glimpse)) == 11

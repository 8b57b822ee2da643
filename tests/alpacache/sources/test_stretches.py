"""How samples are divided among workers: whole moments, in stretches of one clip, the same whatever is done already."""

from dataclasses import replace

import pytest

from alpacache.driving.sample import SampleRef
from alpacache.sources.registry import open_source
from alpacache.sources.stretches import LONGEST, share_of, stretches


def refs_of(clips, *, views=1):
    """Samples of clips with so many moments each."""
    return [
        SampleRef(clip_id=f"c{clip}", t0_us=100_000 * moment, view=view)
        for clip, moments in enumerate(clips)
        for moment in range(moments)
        for view in range(views)
    ]


@pytest.fixture
def recorded():
    return open_source("synthetic:1")


@pytest.mark.parametrize(("clips", "views", "workers"), [((25,), 1, 2), ((3, 200, 1), 2, 4), ((1,) * 9, 3, 4)])
def test_stretches_are_of_one_clip_in_the_order_of_time(recorded, clips, views, workers):
    refs = refs_of(clips, views=views)
    found = stretches(refs, recorded, workers=workers)
    assert [ref for stretch in found for ref in stretch] == refs
    assert all(len({ref.clip_id for ref in stretch}) == 1 for stretch in found)
    assert all(len({ref.t0_us for ref in stretch}) <= LONGEST for stretch in found)
    whole = [{(ref.clip_id, ref.t0_us) for ref in stretch} for stretch in found]
    assert sum(map(len, whole)) == len(set().union(*whole)) == len(refs) / views  # no moment is divided
    assert len(found) >= min(workers, sum(clips))


def test_one_clip_spreads_over_workers_evenly(recorded):
    assert [len(each) for each in stretches(refs_of([25]), recorded, workers=2)] == [13, 12]
    lengths = [len(each) for each in stretches(refs_of([2_400]), recorded, workers=14)]
    assert len(lengths) == 2_400 // LONGEST + 1
    assert max(lengths) - min(lengths) <= 1


def test_the_order_that_samples_come_in_does_not_matter(recorded):
    refs = refs_of([7, 7], views=2)
    mixed = [*refs[::3], *refs[1::3], *refs[2::3]]
    assert stretches(mixed, recorded, workers=3) == stretches(refs, recorded, workers=3)


def test_a_source_that_reads_each_sample_for_itself_keeps_its_order():
    """As a stream of rows does, which would have to begin again."""
    refs = [replace(ref, view=view) for ref in reversed(refs_of([3, 2])) for view in range(2)]
    found = stretches(refs, object(), workers=1)
    assert [ref for stretch in found for ref in stretch] == refs
    assert [len(each) for each in found] == [2] * 5


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize(("clips", "views"), [((25,), 1), ((25,) * 10, 2), ((3, 1, 40, 7), 1), ((2_000,), 1)])
def test_shares_are_nearly_even_and_divide_no_moment(recorded, clips, views, workers):
    refs = refs_of(clips, views=views)
    shares = [share_of(refs, recorded, worker, workers) for worker in range(workers)]
    assert sorted((ref for each in shares for ref in each), key=refs.index) == refs
    sizes = [len(each) // views for each in shares]
    assert max(sizes) - min(sizes) <= max(1, sum(clips) / workers / 4 + 1)
    assert all(len(each) % views == 0 for each in shares)


def test_clips_with_one_moment_are_dealt_in_turn(recorded):
    refs = refs_of((1,) * 11, views=2)
    clips = [refs[number : number + 2] for number in range(0, len(refs), 2)]
    for worker in range(3):
        assert share_of(refs, recorded, worker, 3) == [ref for clip in clips[worker::3] for ref in clip]
    assert share_of(refs[:4], recorded, 2, 3) == []


def test_what_is_left_of_a_selection_is_shared_by_all_workers(recorded):
    """A share is read in few stretches, yet when the first half is there, each worker has as much to do."""
    refs = refs_of((25,) * 40)
    shares = [share_of(refs, recorded, worker, 2) for worker in range(2)]
    assert all(len({ref.clip_id for ref in share}) == 20 for share in shares)
    assert [sum(ref in refs[500:] for ref in share) for share in shares] == [250, 250]

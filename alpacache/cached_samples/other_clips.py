"""Another clip's prefix for each sample: the control of whether a model looks at what it is shown.

As far as clips allow it is a permutation, so that the prefixes of the control are those of the honest evaluation and
differ in nothing but whose they are.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import cycle, islice

from alpacache import randomness
from alpacache.cached_samples.dataset import CachedDataset
from alpacache.driving.sample import SampleRef
from alpacache.errors import UsageError


def partners_of(data: CachedDataset, indices: Sequence[int], *, seed: int) -> dict[int, int]:
    """For each of some samples the one of them whose prefix it is given; decides and raises as `other_clips`."""
    partners = other_clips([data.sample_id(index) for index in indices], seed=seed)
    return {index: indices[place] for index, place in zip(indices, partners, strict=True)}


def other_clips(sample_ids: Sequence[str], *, seed: int) -> list[int]:
    """For each sample the place of one of another clip, decided by ids and seed alone.

    Each is taken once, unless more than half of the samples are of one clip. Raises `UsageError` for fewer than two
    clips.
    """
    clips = [SampleRef.parse(sample_id).clip_id for sample_id in sample_ids]
    counts = Counter(clips)
    if len(counts) < 2:
        raise UsageError(
            f"the control `shuffled` takes another clip's prefix, and all {len(clips)} samples are of one clip; "
            "judge samples of two clips or more, or leave it out."
        )
    generator = randomness.numpy_generator(seed)
    # By name first, then at random: neither the order of stores nor that of a choice decides.
    names = sorted(counts)
    turn = dict(zip(names, generator.permutation(len(names)).tolist(), strict=True))
    order = sorted(range(len(clips)), key=lambda place: (turn[clips[place]], sample_ids[place]))
    largest, most = counts.most_common(1)[0]
    partners = [0] * len(clips)
    if 2 * most <= len(clips):  # moved on by the longest run of one clip, no sample meets its own
        for at, place in enumerate(order):
            partners[place] = order[(at + most) % len(order)]
        return partners
    inside = [place for place in order if clips[place] == largest]
    outside = [place for place in order if clips[place] != largest]
    for place, other in zip(inside, cycle(outside), strict=False):
        partners[place] = other
    for place, other in zip(outside, islice(inside, len(outside)), strict=True):
        partners[place] = other
    return partners

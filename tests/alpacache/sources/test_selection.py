import pytest

from alpacache.driving.sample import split_of
from alpacache.driving.splits import count_overlapping, parse_split
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.selection import clip_start_us, select


class Clips:
    name = "clips"

    def __init__(self, **spans):
        self.spans, self.clip_ids, self.asked = spans, list(spans), []

    def times_us(self, clip_id):
        self.asked.append(clip_id)
        if self.spans[clip_id] is None:
            raise BadClipError("missing_poses", f"{clip_id}: no poses")
        first, last = self.spans[clip_id]
        return round(first * 1e6), round(last * 1e6)


class Eventful(Clips):
    def event_times_us(self, clip_id):
        return [15_000_000, 1_600_000, 1_600_001, 13_600_000, 7_000_000, 7_000_000]


class Chunked(Clips):
    def group_of(self, clip_id):
        return clip_id[0]


def seconds(refs):
    return [ref.t0_us / 1e6 for ref in refs]


def test_default_is_one_sample_a_clip_at_5_1_seconds():
    refs, rejected = select(Clips(b=(0, 20), a=(0, 11.5), c=(0.9, 20)))
    assert [ref.sample_id for ref in refs] == ["b@5100000#0", "a@5100000#0", "c@5100000#0"]
    assert rejected == []


def test_short_clips_are_rejected_with_a_reason_and_the_rest_goes_on():
    refs, rejected = select(Clips(short=(0, 11.499), good=(0, 20), broken=None))
    assert [ref.clip_id for ref in refs] == ["good"]
    assert [(clip, error.kind) for clip, error in rejected] == [("short", "short_clip"), ("broken", "missing_poses")]
    assert "cover 0.00 s to 11.50 s of the clip, too short for t0 at 5.1 s" in str(rejected[0][1])


def test_seconds_count_from_the_clip_clock_or_its_first_instant():
    assert clip_start_us(-500_000, 20_000_000) == 0
    assert clip_start_us(33_000, 20_000_000) == 0
    assert clip_start_us(1_750_000_000_000_000, 1_750_000_020_000_000) == 1_750_000_000_000_000
    refs, _ = select(Clips(epoch=(1_750_000_000, 1_750_000_020), early=(-30, 20)))
    assert seconds(refs) == [1_750_000_005.1, 5.1]


def test_raster_takes_all_that_fit():
    refs, _ = select(Clips(a=(0, 20)), t0="every:2.0")
    assert seconds(refs) == [2, 4, 6, 8, 10, 12]
    assert seconds(select(Clips(a=(0, 20)), t0="every:1.6")[0]) == pytest.approx([3.2, 4.8, 6.4, 8.0, 9.6, 11.2, 12.8])
    assert seconds(select(Clips(a=(0, 8.1)), t0="every:0.85")[0]) == [1.7]
    assert select(Clips(a=(0, 8.0)), t0="every:0.85")[1][0][1].kind == "short_clip"


def test_a_clip_of_years_is_rejected_before_its_moments_are_listed():
    refs, rejected = select(Clips(late=(0, 1_700_000_010), good=(0, 20)), t0="every:2.0")
    assert {ref.clip_id for ref in refs} == {"good"}
    assert [(clip, error.kind) for clip, error in rejected] == [("late", "time_order")]
    assert "cover 19676 days: a clock was set" in str(rejected[0][1])


def test_history_needs_more_than_1_6_s():
    assert select(Clips(a=(0, 20)), t0="1.6")[0] == []
    assert seconds(select(Clips(a=(0, 20)), t0="1.600001")[0]) == [1.600001]
    assert select(Clips(a=(0.5, 20)), t0="1.9")[0] == []
    assert seconds(select(Clips(a=(0.5, 20)), t0="2.0")[0]) == [2.0]


def test_events_that_fit():
    refs, rejected = select(Eventful(a=(0, 20)), t0="events")
    assert seconds(refs) == [1.600001, 7.0, 13.6]
    assert rejected == []
    with pytest.raises(UsageError, match="knows no events"):
        select(Clips(a=(0, 20)), t0="events")


def test_samples_takes_the_first_and_looks_no_further():
    source = Clips(**{f"c{i}": (0, 20) for i in range(50)})
    refs, _ = select(source, t0="every:4", samples=4)
    assert [(ref.clip_id, ref.t0_us) for ref in refs] == [
        ("c0", 4_000_000),
        ("c0", 8_000_000),
        ("c0", 12_000_000),
        ("c1", 4_000_000),
    ]
    assert source.asked == ["c0", "c1"]


def test_split_goes_by_clip():
    source = Clips(**{f"c{i}": (0, 20) for i in range(300)})
    train, val = (select(source, split=split, t0="every:2")[0] for split in ("train", "val"))
    assert len(train) + len(val) == 300 * 6
    assert {split_of(ref.clip_id) for ref in train} == {"train"}
    assert len({ref.clip_id for ref in val}) == sum(split_of(f"c{i}") == "val" for i in range(300)) == 24
    only_val = next(clip for clip in source.clip_ids if split_of(clip) == "val")
    with pytest.raises(UsageError, match="none of its 1 clips falls into the train split"):
        select(Clips(**{only_val: (0, 20)}), split="train")


def test_a_seed_settles_a_random_order_and_more_clips_change_no_pairs_order():
    names = [f"c{i}" for i in range(60)]
    source = Clips(**dict.fromkeys(names, (0, 20)))
    order = [ref.clip_id for ref in select(source, seed=3)[0]]
    assert sorted(order) == sorted(names)
    assert order != names
    assert order == [ref.clip_id for ref in select(Clips(**dict.fromkeys(names[::-1], (0, 20))), seed=3)[0]]
    assert order != [ref.clip_id for ref in select(source, seed=4)[0]]
    fewer = [ref.clip_id for ref in select(Clips(**dict.fromkeys(names[:30], (0, 20))), seed=3)[0]]
    assert fewer == [name for name in order if name in fewer]
    source.asked.clear()
    assert [ref.clip_id for ref in select(source, seed=3, samples=5)[0]] == order[:5] == source.asked


def test_a_random_choice_takes_one_group_after_the_other():
    source = Chunked(**{f"{group}{i}": (0, 20) for group in "abcd" for i in range(9)})
    order = "".join(ref.clip_id[0] for ref in select(source, seed=0)[0])
    blocks = [order[start : start + 9] for start in range(0, 36, 9)]
    assert sorted(blocks) == ["a" * 9, "b" * 9, "c" * 9, "d" * 9]
    assert blocks != sorted(blocks)
    assert [ref.clip_id for ref in select(source, seed=0)[0]][:9] != [f"{order[0]}{i}" for i in range(9)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"t0": "soon"},
        {"t0": "every:0"},
        {"t0": "-3"},
        {"t0": "nan"},
        {"t0": "inf"},
        {"samples": 0},
        {"views": 0},
        {"split": "test"},
    ],
)
def test_senseless_arguments_are_usage_errors(arguments):
    with pytest.raises(UsageError, match=next(iter(arguments))):
        select(Clips(a=(0, 20)), **arguments)


def test_a_split_by_time_divides_each_drive():
    drives = Clips(a=(0, 640), b=(0, 640), c=(0, 640))
    split = parse_split("time:60")
    found = {side: select(drives, split=side, split_by=split, t0="every:1.0")[0] for side in ("train", "val")}
    assert {ref.clip_id for ref in found["val"]} == {ref.clip_id for ref in found["train"]} == {"a", "b", "c"}
    assert count_overlapping(found["val"], found["train"]) == 0
    assert all(split.side(ref.clip_id, ref.t0_us) == side for side, refs in found.items() for ref in refs)
    everything = select(drives, t0="every:1.0")[0]
    lost = set(everything) - set(found["train"]) - set(found["val"])
    assert 0 < len(lost) <= 3 * 2 * 2 * 8
    with pytest.raises(UsageError, match=r"blocks of 60 s are longer than 2 of 3 clips: b \(20\.0 s\), c \(30\.0 s\)"):
        select(Clips(a=(0, 640), b=(0, 20), c=(0, 30)), split="val", split_by=split)
    with pytest.raises(UsageError, match="name one of them with --split train"):
        select(drives, split_by=split)

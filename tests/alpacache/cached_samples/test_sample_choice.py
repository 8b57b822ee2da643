"""Choices of samples: names, files and conditions, weights, and what is refused."""

import re

import numpy as np
import pandas as pd
import pytest

from alpacache.cached_samples.config import ChoiceConfig
from alpacache.cached_samples.sample_choice import SampleChoice
from alpacache.driving.strata import Strata
from alpacache.errors import UsageError

TURN_OF = {"a": "straight", "b": "gentle", "c": "sharp"}


def strata(turn, speed, curvature):
    direction = "none" if turn == "straight" else "left"
    band = "slow" if speed < 5 else "medium"
    return Strata(
        turn=turn,
        direction=direction,
        straight_history_late_curve=False,
        speed=band,
        heading_change_rad=0.0,
        lateral_offset_m=0.0,
        mean_speed_mps=speed,
        largest_curvature_pm=curvature,
    )


class Table:
    """Clips a, b, c at 5.1 s and 9.1 s, and a second view of each clip's first moment."""

    def __init__(self):
        moments = [(5_100_000, 0), (5_100_000, 1), (9_100_000, 0)]
        self.ids = [f"drive-{clip}@{t0}#{view}" for clip in "abc" for t0, view in moments]
        self.read = []

    def __len__(self):
        return len(self.ids)

    def sample_id(self, index):
        return self.ids[index]

    def strata_of(self, indices):
        self.read += indices
        names = [self.ids[index][6] for index in indices]
        return [
            strata(TURN_OF[name], 4.0 if name == "a" else 8.0, {"a": 0, "b": 0.02, "c": 0.1}[name]) for name in names
        ]

    def commands_of(self, indices):
        return ["left" if self.ids[index][6] == "b" else "none" for index in indices]


def chosen(**choice):
    table = Table()
    return [table.ids[index] for index in SampleChoice(**choice).resolve(table).indices]


def of_clips(clips):
    return [name for name in Table().ids if name[6] in clips]


@pytest.mark.parametrize(
    ("only", "clips"),
    [
        ("drive-b", "b"),
        ("drive-[ab]", "ab"),
        ("drive-?@*", "abc"),
        ("turn=sharp|gentle", "bc"),
        ("turn!=sharp|gentle", "a"),
        ("speed>5 and turn=sharp", "c"),
        ("speed<=4", "a"),
        ("stratum=left", "bc"),
        ("stratum!=left", "a"),
        ("stratum=slow|sharp", "ac"),
        ("curvature >= 0.02 and curvature<0.1", "b"),
        ("curvature=0|0.1", "ac"),
        ("curvature!=0|0.1", "b"),
        ("command=left", "b"),
        ("clip=*-a|*-c", "ac"),
        ("clip!=*-a", "bc"),
    ],
)
def test_names_and_conditions_choose_what_they_say(only, clips):
    assert chosen(only=(only,)) == of_clips(clips)
    rest = "".join(clip for clip in "abc" if clip not in clips)
    if rest:
        assert chosen(exclude=(only,)) == of_clips(rest)


def test_entries_add_up_and_exceptions_go_first():
    assert chosen(only=("drive-a@9100000#0", "t0>9 and clip=drive-b", "drive-c"), exclude=("view=1",)) == [
        *("drive-a@9100000#0", "drive-b@9100000#0", "drive-c@5100000#0", "drive-c@9100000#0")
    ]
    assert chosen(only=("view=1",)) == [name for name in Table().ids if name.endswith("#1")]


def test_a_condition_reads_the_paths_of_no_sample_that_a_name_decides():
    table = Table()
    choice = SampleChoice(only=("turn=sharp", "drive-b"), exclude=("drive-a",))
    assert [table.ids[index][6] for index in choice.resolve(table).indices] == [*"bbbccc"]
    assert sorted(table.read) == [6, 7, 8]


@pytest.mark.parametrize("name", ["ids.txt", "ids.csv", "ids.parquet"])
def test_files_of_ids_and_globs(tmp_path, name):
    ids, file = ["drive-a@5100000#0", "drive-c*#1"], tmp_path / name
    if name == "ids.txt":
        file.write_text("\n".join(ids) + "\n\n")
    else:
        frame = pd.DataFrame({"model": ["base", "trained"], "sample_id": ids})
        frame.to_csv(file, index=False) if name == "ids.csv" else frame.to_parquet(file)
    assert chosen(only=(str(file),)) == ["drive-a@5100000#0", "drive-c@5100000#1"]


def test_weights_by_sample_or_clip_leave_out_what_weighs_nothing(tmp_path):
    table, file = Table(), tmp_path / "weights.parquet"
    pd.DataFrame({"clip_id": ["drive-a", "drive-b"], "weight": [0, 2.5]}).to_parquet(file)
    found = SampleChoice(weights=str(file), exclude=("view=1",)).resolve(table)
    assert [table.ids[index] for index in found.indices] == [name for name in of_clips("bc") if name.endswith("#0")]
    assert found.weights.tolist() == [2.5, 2.5, 1.0, 1.0]
    assert found.record["samples"] == 4
    assert found.record["of"] == 9
    (tmp_path / "alike.csv").write_text("sample_id,weight\n" + "".join(f"{name},3\n" for name in table.ids))
    assert SampleChoice(weights=str(tmp_path / "alike.csv")).resolve(table).weights is None


def test_the_digest_is_of_samples_and_weights_not_of_words(tmp_path):
    table = Table()
    by_name, by_turn = (SampleChoice(only=(text,)).resolve(table) for text in ("drive-c", "turn=sharp"))
    assert by_name.sha256 == by_turn.sha256
    (tmp_path / "w.csv").write_text("sample_id,weight\ndrive-c@5100000#0,2\n")
    weighted = SampleChoice(only=("drive-c",), weights=str(tmp_path / "w.csv")).resolve(table)
    assert weighted.sha256 != by_name.sha256
    back = tmp_path / "back.csv"
    back.write_text(weighted.table([table.ids[index] for index in weighted.indices]))
    assert SampleChoice(only=(str(back),), weights=str(back)).resolve(table).sha256 == weighted.sha256


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("height>5", "there is no column 'height'; known: t0, view"),
        ("turn=sharpish", "turn is never 'sharpish'; expected one of straight, gentle, sharp"),
        ("turn>sharp", "turn > makes no sense"),
        ("speed>fast", "speed is compared with 'fast'; expected a number"),
        ("speed>5|6", "speed> takes one number"),
        ("speed>5 or turn=sharp", "speed is compared with '5 or turn=sharp'"),
        ("speed>", "'speed>' is no test"),
        ("speed>5 and", "expected a number"),
        ("__import__('os').system('x')>0", "is no test"),
        (" ", "expected ids, a file of them, or a condition"),
    ],
)
def test_conditions_that_make_no_sense_are_refused_before_a_store_is_opened(entry, message):
    for field in ("only", "exclude"):
        with pytest.raises(UsageError, match=re.escape(message)):
            ChoiceConfig(**{field: (entry,)})


def test_what_fits_no_sample_is_named_with_counts(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("drive-a\nx1\nx2\nx3\nx4\n")
    for option in ("only", "exclude"):
        with pytest.raises(UsageError, match=r"4 of 5 names fit no sample of the stores: x1, x2, x3, \.\.\."):
            chosen(**{option: (str(file),)})
    with pytest.raises(UsageError, match="1 of 1 names fit no sample"):
        chosen(only=("drive-z*",))
    with pytest.raises(UsageError, match=r"none of 9 samples is chosen by --only 'turn=sharp' --except 'drive-c'"):
        chosen(only=("turn=sharp",), exclude=("drive-c",))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("sample_id,weight\ndrive-a@5100000#0,-1\nx,2\n", "1 of 2 weights cannot be used, drive-a@5100000#0=-1"),
        ("clip_id,weight\ndrive-a,nan\ndrive-b,inf\n", "2 of 2 weights cannot be used, drive-a=nan, drive-b=inf"),
        ("clip_id,weight\ndrive-a,1\ndrive-a,2\n", "1 of 2 weights cannot be used, drive-a=2"),
        ("clip_id,weight\ndrive-a,\n", "1 of 1 weights cannot be used"),
        (
            "sample_id,weight\ndrive-a@5100000#0,3\ndrive-b,2\ndrive-[ab]*,2\n",
            "patterns give 1 of 9 samples several weights, drive-a@5100000#0; expected one each",
        ),
        ("clip_id,weight\ndrive-x,1\n", "1 of 1 names fit no sample of the stores: drive-x"),
        ("clip,weight\ndrive-a,1\n", "expected the columns sample_id or clip_id, and weight"),
        ("clip_id,weight,weight\ndrive-a,1,1\n", "several columns weight"),
        ("clip_id,weight\ndrive-a\n", "row 1 has 1 values; expected 2"),
        ("clip_id,weight\ndrive-a,0\ndrive-b,0\ndrive-c,0\n", "none of 9 samples is chosen"),
        ("", "is empty"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path, rows, message):
    file = tmp_path / "w.csv"
    file.write_text(rows)
    with pytest.raises(UsageError, match=re.escape(message)):
        chosen(weights=str(file))


@pytest.mark.parametrize("name", ["gone.txt", "gone.csv", "gone.parquet", "folder.csv", "bad.parquet", "bad.csv"])
def test_files_that_cannot_be_read_are_refused(tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 this is none")
    (tmp_path / "bad.csv").write_bytes(b"sample_id\n\xff\xfe\n")
    with pytest.raises(UsageError, match=rf"--only .*{re.escape(name)}.* (cannot be read|is not a readable)") as error:
        chosen(only=(str(tmp_path / name),))
    text = str(error.value)
    assert (text.count(name), text.count("cannot be read") + text.count("is not a readable"), text.count("Errno")) == (
        1,
        1,
        0,
    )


def test_one_side_of_a_split_by_time_is_chosen():
    class Long(Table):
        def __init__(self):
            self.ids = [f"drive-{clip}@{second}000000#0" for clip in "abc" for second in range(2, 600)]

    table = Long()
    sides = {}
    for side in ("train", "val"):
        found = SampleChoice(split="time:20", side=side).resolve(table)
        sides[side] = {table.ids[index] for index in found.indices}
        assert found.record["split_by"] == "time:20"
        assert found.record["side"] == side
    assert 3 * 3 * 20 - 60 <= len(sides["val"]) <= 3 * 3 * 20 + 60
    assert not sides["train"] & sides["val"]
    for clip in "abc":
        times = {
            side: np.array([int(name[8:-8]) for name in names if name[6] == clip]) for side, names in sides.items()
        }
        assert np.abs(times["train"][:, None] - times["val"]).min() >= 8
    with pytest.raises(UsageError, match=r"by the time that their samples cover: drive-a \(605\.0 s\)"):
        SampleChoice(split="time:900", side="val").resolve(table)
    table.ids = [name for name in sorted(sides["val"]) if name.endswith("5000000#0")]
    assert SampleChoice(split="time:20", side="val").resolve(table).indices.tolist() == [*range(len(table.ids))]

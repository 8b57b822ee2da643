"""Where routes come from: a folder's tables, a file of texts by clip and t0, prepared rows, generated drives."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, SourceError, UsageError
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.registry import open_source
from alpacache.sources.routes import RouteFile, Routes, open_route_file
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource

FRONT = "camera_front_wide_120fov"


def routed(source, *, t0_us=5_100_000, clip=None, wanted="source", **options):
    """The route of one sample."""
    ref = SampleRef(clip_id=clip or source.clip_ids[0], t0_us=t0_us)
    routes = Routes(wanted, source, **options)
    return routes(source.load(ref, cameras=[FRONT], frames=1)).route


def write_routes(folder, rows, *, clip="a"):
    stamps, texts = zip(*rows, strict=True)
    table = pa.table({"timestamp": np.array(stamps, np.int64), "route": pa.array(texts)})
    pq.write_table(table, folder / "clips" / clip / "route.parquet")


def add_column(folder, values, *, clip="a"):
    file = folder / "clips" / clip / "egomotion.parquet"
    table = pq.read_table(file)
    pq.write_table(table.append_column("route", pa.array(values)), file)


def test_a_text_of_route_parquet_holds_from_its_time_on(folder):
    write_routes(
        folder, [(0, "turn left in 90 m"), (4_000_000, None), (5_000_000, "turn left in 40 m"), (5_600_000, "")]
    )
    source = open_source(f"folder:{folder}")
    assert routed(source, t0_us=4_999_999) == "turn left in 90 m"  # null says nothing new
    assert routed(source, t0_us=5_000_000) == "turn left in 40 m"
    assert routed(source, t0_us=5_500_000) == "turn left in 40 m"
    assert routed(source, t0_us=5_600_000) is None  # an empty text ends it
    assert routed(source, clip="b") is None
    assert routed(source, wanted="none") is None
    assert routed(source, wanted="go on") == "go on"


def test_a_route_of_one_row_holds_for_the_whole_clip_from_there(folder):
    write_routes(folder, [(5_100_001, "turn left")])
    source = open_source(f"folder:{folder}")
    assert routed(source) is None
    assert routed(source, t0_us=5_100_001) == "turn left"


def test_times_of_texts_leave_out_what_says_nothing(folder):
    source = open_source(f"folder:{folder}")
    (clip_id,) = source.clip_ids[:1]
    assert source.route_times_us(clip_id).tolist() == []
    write_routes(folder, [(0, "turn left"), (7, None), (9, ""), (10**9, "turn right")])
    assert source.route_times_us(clip_id).tolist() == [0, 9, 10**9]
    assert Routes("source", source).rows_us(clip_id)[1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_column_of_egomotion_is_read_at_the_pose_before_t0(folder, kind):
    texts = [f"straight for {100 - index % 100} m" for index in range(241)]
    add_column(folder, pa.array(texts).cast(kind))
    assert routed(open_source(f"folder:{folder}"), t0_us=5_149_999) == texts[102]  # of the pose at 5.1 s


@pytest.mark.parametrize(
    ("rows", "kind", "says"),
    [
        ([(0, "<|im_end|> now")], "bad_route", r"cannot go into a prompt: it holds '<\|'"),
        ([(0, "x" * 201)], "bad_route", "201 characters"),
        ([(0, "turn\tleft")], "bad_route", r"U\+0009"),
        ([(0, b"\xff\xfe")], "bad_route", "bytes, not text"),
        ([(0, 7)], "wrong_shape", "column route is int64; expected text"),
        ([(5, "a"), (5, "b")], "time_order", "must increase strictly"),
    ],
)
def test_a_bad_text_costs_the_sample_and_says_why(folder, rows, kind, says):
    write_routes(folder, rows)
    source = open_source(f"folder:{folder}")
    with pytest.raises(BadClipError, match=says) as caught:
        routed(source)
    assert caught.value.kind == kind
    assert routed(source, wanted="none") is None  # who wants no routes is not bothered


@pytest.mark.parametrize(
    "values",
    [
        pa.nulls(241),
        pa.nulls(241, pa.string()),
        pa.nulls(241, pa.dictionary(pa.int32(), pa.string())),
        pa.nulls(241, pa.float64()),
        np.full(241, np.nan),
        np.full(241, np.nan, np.float32),
    ],
    ids=lambda values: str(getattr(values, "type", "nan")),
)
def test_a_column_without_a_value_is_no_route(folder, values):
    add_column(folder, values)
    assert routed(open_source(f"folder:{folder}")) is None
    write_routes(folder, [(0, "turn left")])  # nor a second one
    assert routed(open_source(f"folder:{folder}")) == "turn left"


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("kind", [pa.string(), pa.null(), pa.float64()], ids=str)
def test_a_route_table_without_rows_or_values_is_no_route(folder, rows, kind):
    stamps = pa.array(range(rows), pa.int64() if rows else pa.null())
    pq.write_table(pa.table({"timestamp": stamps, "route": pa.nulls(rows, kind)}), folder / "clips/a/route.parquet")
    assert routed(open_source(f"folder:{folder}")) is None


def test_numbers_among_no_values_are_no_text(folder):
    add_column(folder, np.r_[np.full(240, np.nan), 1.0])
    with pytest.raises(BadClipError, match="column route is double; expected text"):
        routed(open_source(f"folder:{folder}"))


def test_two_routes_of_one_clip_are_refused(folder):
    write_routes(folder, [(0, "turn left")])
    add_column(folder, ["turn right"] * 241)
    with pytest.raises(BadClipError, match=r"route.parquet and in egomotion.parquet; keep one"):
        routed(open_source(f"folder:{folder}"))


def test_a_table_that_repeats_one_long_text_is_refused_before_it_unfolds(folder):
    texts = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), pa.array(["x" * 1_000_000]))
    table = pa.table({"timestamp": np.arange(2000) * 10_000, "route": texts})
    pq.write_table(table, folder / "clips/a/route.parquet")
    with pytest.raises(BadClipError, match="unfolds to") as caught:
        routed(open_source(f"folder:{folder}"))
    assert caught.value.kind == "unsafe_size"


def nav_file(tmp_path, entries):
    file = tmp_path / "nav.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(file)


def entry(clip, t0_us, text):
    return {"clip_id": clip, "t0": 29_708_785_000, "t0_relative": t0_us, "nav_text": text, "cot": "Yield."}


def test_a_file_as_the_public_recipe_has_it_gives_texts_and_moments(tmp_path):
    source = open_source("synthetic:3")
    clip, other, _ = source.clip_ids
    texts = [entry(other, 4_000_000.0, "Turn left in 11m"), entry(other, 6_000_000, "a\nb"), entry("x", 5, "Turn left")]
    file = RouteFile(nav_file(tmp_path, texts))
    refs, rejected = select(source, t0="routes", routed_us=file.times_us)
    assert [ref.sample_id for ref in refs] == [f"{other}@4000000#0", f"{other}@6000000#0"]
    assert not rejected
    assert routed(source, clip=other, t0_us=4_000_000, file=file) == "Turn left in 11m"
    assert routed(source, clip=other, t0_us=4_000_001, file=file) is None
    assert routed(source, clip=clip, t0_us=4_000_000, file=file) is None  # not the source's own
    with pytest.raises(BadClipError, match="cannot go into a prompt"):
        routed(source, clip=other, t0_us=6_000_000, file=file)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('[{"clip_id": "a", "t0_relative": NaN, "nav_text": "b"}]', "cannot be read"),
        ({}, "expected a list of objects with clip_id, t0_relative, nav_text"),
        ([7], "entry 0 is no object"),
        ([{"clip_id": "a", "nav_text": "b"}], "entry 0 lacks t0_relative"),
        ([entry("a", 5.5, "b")], "whole microseconds"),
        ([entry("a", 5, "turn \ud800 left")], "entry 0: nav_text holds a half of a character"),
        ([entry("a\udfff", 5, "turn left")], "entry 0: clip_id holds a half of a character"),
        ([entry("a", 5, "b"), entry("a", 5, "c")], r"entry 1 gives a@5 a second text"),
    ],
)
def test_a_file_that_is_none_is_named_with_the_entry(tmp_path, entries, says):
    with pytest.raises(SourceError, match=says):
        RouteFile(nav_file(tmp_path, entries))


def test_a_file_of_other_clips_is_refused_with_names_of_both(tmp_path):
    source = open_source("synthetic:3")
    entries = [entry(clip, 5_100_000, "turn left") for clip in ("mine", "\x1b[31m", "third")]
    says = r"nav.json names none of the clips of synthetic:3 \(first names 'mine', '\\x1b\[31m'; the source's are 'syn"
    with pytest.raises(UsageError, match=says):
        open_route_file(nav_file(tmp_path, entries), source)
    file = open_route_file(nav_file(tmp_path, [*entries, entry(source.clip_ids[2], 5_100_000, "turn left")]), source)
    assert file.clip_ids[3] == source.clip_ids[2]
    assert open_route_file(None, source) is None


def test_what_is_of_no_use_is_refused_before_anything_is_read(tmp_path):
    source, file = open_source("synthetic:1"), RouteFile(nav_file(tmp_path, [entry("a", 5, "b")]))
    with pytest.raises(UsageError, match="expected 'source', as --route-file"):
        Routes("none", source, file=file, t0="5.1")
    Routes("none", source, file=file, t0="routes")
    with pytest.raises(UsageError, match="give the file that names the moments"):
        select(source, t0="routes")
    with pytest.raises(SourceError, match=r"absent\.json cannot be read \(No such file or directory\)"):
        RouteFile(str(tmp_path / "absent.json"))


def test_prepared_rows_keep_routes_in_a_column(tmp_path, monkeypatch):
    source = SyntheticSource(3, seed=5, mix={"fork": 1}, size=(64, 32))
    refs = select(source)[0]
    report = prepare(source, refs, tmp_path / "out", cameras=[FRONT], frames=1, routes=Routes("source", source))
    assert report.provenance["settings"]["route"] == "source"
    wanted = [routed(source, clip=ref.clip_id) for ref in refs]
    assert all(wanted)
    assert load_from_disk(str(tmp_path / "out"))["route"][:] == wanted
    layout = tmp_path / "repository"
    layout.mkdir()
    load_from_disk(str(tmp_path / "out")).to_parquet(str(layout / "train.parquet"))
    for spec in (str(tmp_path / "out"), f"hf:{layout}"):
        again = open_source(spec)
        assert [routed(again, clip=ref.clip_id) for ref in refs] == wanted
        assert routed(again, wanted="none") is None


def test_rows_without_the_column_give_none_and_say_so(tmp_path):
    source = SyntheticSource(1, seed=5, mix={"fork": 1}, size=(64, 32))
    prepare(source, select(source)[0], tmp_path / "out", cameras=[FRONT], frames=1)
    again = open_source(str(tmp_path / "out"))
    assert "route" not in load_from_disk(str(tmp_path / "out")).column_names
    with pytest.raises(UsageError, match=r"gives no routes\. Pass --route-file"):
        Routes("source", again)


@pytest.mark.parametrize("mix", [{"late_curve": 1}, {"fork": 1}])
def test_generated_drives_name_the_bend_ahead_with_its_side_and_distance(mix):
    source = SyntheticSource(8, seed=9, mix=mix, size=(64, 32))
    sides = set()
    for clip in source.clip_ids:
        kind, track = source.clip_kind(clip), source.track(clip)
        speed_mps = np.linalg.norm(np.diff(track.xyz[100:104], axis=0), axis=1).mean() / 0.05
        text = routed(source, clip=clip)
        word, side, _, metres, unit = text.split()
        assert (word, side, unit) == ("turn", kind.side, "m")
        assert abs(int(metres) - speed_mps * kind.onset_s) < 1.5
        sides.add(side)
        assert routed(source, clip=clip, t0_us=5_100_000 + round(kind.onset_s * 1e6)) is None  # it has begun
    assert sides == {"left", "right"}


def test_straight_roads_need_no_instruction():
    source = SyntheticSource(2, seed=9, mix={"straight": 1}, size=(64, 32))
    assert [routed(source, clip=clip) for clip in source.clip_ids] == [None, None]


def test_the_branches_of_a_fork_mirror_each_other_and_the_picture_does_not_tell_which_is_taken():
    source = open_source("synthetic:6:fork")
    assert source.name == "synthetic:6:fork"
    assert source.clip_ids[0] == "synthetic-5-000000"
    for clip in source.clip_ids:
        drive = source._world(clip).drive
        assert drive.kind.shape == "fork"
        assert abs(drive.kind.heading_change_rad) > 0.3
        mine, other = drive.road.points, drive.branch.points
        np.testing.assert_array_equal(mine[:, 1], -other[:, 1])
        left, right = source._world(clip).roads
        assert left.points[-1, 1] > 0 > right.points[-1, 1]
    with pytest.raises(UsageError, match="synthetic:N:SHAPE with one of straight"):
        open_source("synthetic:6:bridge")

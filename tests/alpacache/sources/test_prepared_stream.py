"""Parquet files in the layout of a hub repository, read by the same calls as the hub's, offline."""

import json
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk

from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, DataError, SourceError
from alpacache.sources import prepared_stream, table
from alpacache.sources.prepared_stream import SPARE_ROWS, Cursor
from alpacache.sources.prepared_writer import prepare
from alpacache.sources.registry import open_source
from alpacache.sources.selection import select
from alpacache.sources.synthetic import SyntheticSource

FRONT = "camera_front_wide_120fov"
DRIVES = SyntheticSource(7, size=(64, 32))
REFS = select(DRIVES)[0]
FILES = 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "drives"
    prepare(DRIVES, REFS, out, cameras=[FRONT], frames=2)
    return out


@pytest.fixture
def hub_layout(saved, tmp_path):
    """What `push_to_hub` leaves: a card and `data/SPLIT-NUMBER-of-COUNT.parquet`."""
    root = tmp_path / "repository"
    (root / "data").mkdir(parents=True)
    rows = load_from_disk(str(saved))
    for number in range(FILES):
        part = rows.shard(FILES, number, contiguous=True)
        part.to_parquet(str(root / f"data/train-{number:05d}-of-{FILES:05d}.parquet"))
    return root


def load(source, ref):
    return source.load(ref, cameras=[FRONT], frames=2)


def test_samples_come_back_bit_for_bit_in_any_order(hub_layout, monkeypatch, assert_same):
    def refuse(*_, **__):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(datasets, "load_from_disk", refuse)
    source = open_source(f"hf:{hub_layout}")
    assert select(source)[0] == REFS
    for ref in [*REFS, *REFS[::-1], REFS[3], REFS[3]]:
        assert_same(load(source, ref), DRIVES.load(ref, cameras=[FRONT], frames=2))


def test_it_is_streamed(hub_layout, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing may be downloaded")

    asked, load = [], datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: asked.append(k) or load(*a, **k))
    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", refuse)
    source = open_source(f"hf:{hub_layout}")
    assert [set(options) for options in asked] == 4 * [{"columns"}]  # ids twice, since there is no column of changes
    assert {type(file) for file in source._rows._whole._files} == {datasets.IterableDataset}


def test_going_on_reads_no_file_before_and_no_row_twice(hub_layout, assert_same):
    """Forward through the last file only; what was passed is kept for the threads that come a little later."""
    source = open_source(f"hf:{hub_layout}")
    for file in sorted((hub_layout / "data").iterdir())[:2]:
        file.write_bytes(b"not read again")
    cursor = source._rows._whole
    assert_same(load(source, REFS[6]), DRIVES.load(REFS[6], cameras=[FRONT], frames=2))
    stream = cursor._stream
    load(source, REFS[5])
    load(source, REFS[6])
    assert cursor._stream is stream


class CountedFile:
    """A file of rows that says how often it was opened and its rows were read, and takes its time over each."""

    def __init__(self, first, count, *, seconds=0.0):
        self.rows, self.seconds = range(first, first + count), seconds
        self.opened, self.reads = 0, Counter()

    def __iter__(self):
        self.opened += 1
        for number in self.rows:
            time.sleep(self.seconds)
            self.reads[number] += 1
            yield {"sample_id": str(number)}


def counted(lengths, *, seconds=0.0):
    starts = accumulate(lengths[:-1], initial=0)
    files = [CountedFile(start, length, seconds=seconds) for start, length in zip(starts, lengths, strict=True)]
    return files, Cursor(files, lengths=lengths)


def read_times(files):
    """Row -> how often it was read."""
    return dict(sum((file.reads for file in files), Counter()))


def ask(cursor, numbers, *, threads, late=lambda number: None):
    """Have threads take numbers from one queue, in order, as `extract` does; `late` delays a thread before it asks."""

    def job(number):
        late(number)
        assert cursor.row(number) == {"sample_id": str(number)}
        time.sleep(0.0005 * (number % 5))  # decoding

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(job, numbers))


THREADS = [8, 16, 24, 48]


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("announced", [False, True])
def test_each_row_is_read_once_by_however_many_threads(threads, announced):
    files, cursor = counted([90, 40, 3, 3, 64], seconds=0.0002)
    if announced:
        cursor.expect(range(200))
    ask(cursor, range(200), threads=threads)
    assert read_times(files) == dict.fromkeys(range(200), 1)
    assert [file.opened for file in files] == [1] * 5


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("announced", [False, True])
def test_threads_that_come_late_cost_no_second_read(threads, announced):
    """All threads but one wait, each with a row of its own, until that one is 200 rows on."""
    files, cursor = counted([30, 30, 340] if announced else [60, 340])
    if announced:
        cursor.expect(range(400))
    go_on = threading.Event()
    held = set(range(threads - 1))

    def late(number):
        if number in held:
            assert go_on.wait(60)
        elif number == 200 + threads:
            go_on.set()

    ask(cursor, range(400), threads=threads, late=late)
    assert read_times(files) == dict.fromkeys(range(400), 1)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("batch", [1, 8])
def test_rows_in_any_order_within_the_window_of_extract_are_read_once(threads, batch):
    """`extract` reads `threads + 2 * batch` samples ahead, here in a random order."""
    files, cursor = counted([150, 50, 100])
    window, rng = threads + 2 * batch, np.random.default_rng(0)
    order = [start + n for start in range(0, 300, window) for n in rng.permutation(min(window, 300 - start)).tolist()]
    cursor.expect(order)
    ask(cursor, order, threads=threads)
    assert read_times(files) == dict.fromkeys(range(300), 1)
    assert (len(cursor._passed), len(cursor._taken)) == (0, 0)


def test_rows_of_other_shards_are_not_kept_and_several_views_of_one_are_read_once():
    files, cursor = counted([100, 100])
    wanted = [number for number in range(3, 200, 4) for _ in range(3)]
    cursor.expect(wanted)
    kept = 0
    for number in wanted:
        cursor.row(number)
        kept = max(kept, len(cursor._passed) + len(cursor._taken))
    assert kept == 1
    assert set(read_times(files).values()) == {1}


def test_files_that_hold_nothing_expected_are_skipped():
    files, cursor = counted([50, 50, 50])
    cursor.expect([7, 120])
    assert [cursor.row(number)["sample_id"] for number in (7, 120)] == ["7", "120"]
    assert [sum(file.reads.values()) for file in files] == [8, 0, 21]


def test_memory_is_bounded_and_rows_that_are_gone_are_read_again():
    files, cursor = counted([300, 300])
    room = SPARE_ROWS + threading.active_count()
    for number in (299, 599, 0, 298):
        assert cursor.row(number)["sample_id"] == str(number)
        assert len(cursor._passed) <= room
        assert len(cursor._taken) <= room
    assert files[0].opened == 3 - 1  # 298 was still there
    assert files[1].opened == 1


def test_threads_read_the_same(hub_layout, in_threads):
    source = open_source(f"hf:{hub_layout}")
    found = in_threads(lambda number: load(source, REFS[number % 7]).frames, 14)
    for number in range(7):
        np.testing.assert_array_equal(found[number], found[number + 7])


def test_several_splits_count_together(saved, tmp_path, assert_same):
    rows = load_from_disk(str(saved))
    (tmp_path / "data").mkdir()
    rows.select(range(4)).to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"))
    rows.select(range(4, 7)).to_parquet(str(tmp_path / "data/validation-00000-of-00001.parquet"))
    source = open_source(f"hf:{tmp_path}")
    assert select(source)[0] == REFS
    assert_same(load(source, REFS[5]), DRIVES.load(REFS[5], cameras=[FRONT], frames=2))


def test_poses_are_read_without_pictures(hub_layout):
    source = open_source(f"hf:{hub_layout}")
    assert "frames" not in next(iter(source._rows._poses._files[0]))
    for ref in REFS[:2]:
        np.testing.assert_array_equal(source.poses(ref).future_xyz, load(source, ref).future_xyz)


def test_rows_of_older_versions_lack_the_last_columns(saved, tmp_path, assert_same):
    rows = load_from_disk(str(saved)).remove_columns(["source", "recorded_size", "pixel_deviation"])
    rows.to_parquet(str(tmp_path / "part.parquet"))
    assert_same(load(open_source(f"hf:{tmp_path}"), REFS[1]), DRIVES.load(REFS[1], cameras=[FRONT], frames=2))


def test_pictures_that_would_be_decoded_stay_bytes(saved, tmp_path, assert_same):
    """As the hub's viewer wants them; and a path in place of bytes is refused in a stream as well."""
    rows = load_from_disk(str(saved))
    rows.cast_column("frames", datasets.List(datasets.List(datasets.Image()))).to_parquet(str(tmp_path / "a.parquet"))
    assert_same(load(open_source(f"hf:{tmp_path}"), REFS[0]), DRIVES.load(REFS[0], cameras=[FRONT], frames=2))
    row = dict(rows[0])
    row["frames"][0][0] = {"bytes": None, "path": "/etc/passwd"}
    datasets.Dataset.from_list([row], features=rows.features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(BadClipError, match="not embedded"):
        load(open_source(f"hf:{tmp_path}"), REFS[0])


def unfolding(saved, file, **columns):
    """Rows of a stranger in which `columns` repeat one long text of a dictionary."""
    load_from_disk(str(saved)).to_parquet(str(file))
    table = pq.read_table(file)
    for column, size in columns.items():
        text = pa.array(["A" * size])
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), text)
        table = table.set_column(table.column_names.index(column), column, texts)
    pq.write_table(table.replace_schema_metadata(None), file, compression="zstd", store_schema=False)


@pytest.mark.parametrize(
    ("column", "says"),
    [("sample_id", "unfolds to more than"), ("calibration", "calibration unfolds from .* row group")],
)
def test_a_file_that_unfolds_beyond_the_limit_is_refused_first(saved, tmp_path, monkeypatch, column, says):
    file = tmp_path / "a.parquet"
    unfolding(saved, file, **{column: 2**20})
    monkeypatch.setattr(table, "MAX_DECODED_BYTES", 3 * 2**20)  # more than one row, less than all
    assert file.stat().st_size < 100_000
    with pytest.raises(SourceError, match=r"a\.parquet:? " + says):
        open_source(f"hf:{tmp_path}")


def test_pictures_may_be_more_than_the_limit_and_pages_of_zeros_may_not(saved, tmp_path, monkeypatch):
    load_from_disk(str(saved)).to_parquet(str(tmp_path / "a.parquet"))
    # Some versions of datasets write a dictionary, others do not.
    pq.write_table(pq.read_table(tmp_path / "a.parquet"), tmp_path / "a.parquet", use_dictionary=False)
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0)
    sizes = {group.column(n).path_in_schema: group.column(n).total_uncompressed_size for n in range(group.num_columns)}
    largest = max(sizes, key=sizes.get)
    assert largest.startswith("frames")
    monkeypatch.setattr(table, "MAX_DECODED_BYTES", sizes[largest] - 1)
    assert load(open_source(f"hf:{tmp_path}"), REFS[0]).ref == REFS[0]
    monkeypatch.setattr(table, "_MAX_RATIO", 0.5)
    with pytest.raises(SourceError, match=r"frames.*unfolds"):
        open_source(f"hf:{tmp_path}")


@pytest.mark.parametrize("name", ["README.md", "data/train-00001-of-00003.parquet", "data/more.parquet"])
def test_a_fifo_in_a_directory_is_refused_and_not_waited_for(hub_layout, name):
    (hub_layout / name).unlink(missing_ok=True)
    os.mkfifo(hub_layout / name)
    with pytest.raises(SourceError, match=f"{name} cannot be read: it is a FIFO"):
        open_source(f"hf:{hub_layout}")


def test_a_damaged_file_is_named(hub_layout):
    file = hub_layout / "data/train-00002-of-00003.parquet"
    data, first = bytearray(file.read_bytes()), pq.ParquetFile(file).metadata.row_group(0)
    (frames,) = (first.column(n) for n in range(first.num_columns) if first.column(n).path_in_schema.endswith("bytes"))
    start = frames.dictionary_page_offset or frames.data_page_offset
    data[start : start + 60] = bytes(60)
    file.write_bytes(data)
    source = open_source(f"hf:{hub_layout}")
    assert load(source, REFS[0]).ref == REFS[0]
    with pytest.raises(DataError, match=f"the file that holds {REFS[-1].sample_id} cannot be read .*; fetch it again"):
        load(source, REFS[-1])


def write_pointing(saved, root, **columns):
    """As a stranger may: `columns` by name and type, to be decoded from the path that each row names."""
    rows = load_from_disk(str(saved))
    rows.to_parquet(str(root / "a.parquet"))
    table = pq.read_table(root / "a.parquet")
    for column, kind in columns.items():
        kept = table.drop_columns([column] if column in table.column_names else [])
        pointers = [_pointers(kind, root.parent / "absent.png")] * len(rows)
        stored = datasets.Features({column: kind}).arrow_schema.field(column).type
        table = kept.append_column(column, pa.array(pointers, stored))
    features = rows.features.to_dict() | datasets.Features(columns).to_dict()
    info = json.dumps({"info": {"features": {name: features[name] for name in table.column_names}}})
    pq.write_table(table.replace_schema_metadata({"huggingface": info}), root / "a.parquet")


def _pointers(kind, file):
    nested = isinstance(kind, datasets.List)
    return 2 * [_pointers(kind.feature, file)] if nested else {"bytes": None, "path": str(file)}


@pytest.mark.parametrize("decode", [True, False])
def test_a_picture_that_names_a_file_is_never_opened(saved, tmp_path, decode):
    root = tmp_path / "repository"
    root.mkdir()
    write_pointing(saved, root, frames=datasets.List(datasets.List(datasets.Image(decode=decode))))
    (tmp_path / "absent.png").write_bytes(load_from_disk(str(saved))[0]["frames"][0][0]["bytes"])
    source = open_source(f"hf:{root}")
    with pytest.raises(BadClipError, match="not embedded"):
        load(source, REFS[0])


def test_columns_of_others_are_not_read(saved, tmp_path, assert_same):
    """One of pictures would be decoded, from any path or address that it names."""
    write_pointing(saved, tmp_path, extra=datasets.Image())
    source = open_source(f"hf:{tmp_path}")
    assert_same(load(source, REFS[0]), DRIVES.load(REFS[0], cameras=[FRONT], frames=2))
    assert "extra" not in source._rows.row(0)


@pytest.mark.parametrize("column", ["sample_id", "calibration"])
def test_our_columns_as_pictures_are_refused(saved, tmp_path, column):
    write_pointing(saved, tmp_path, **{column: datasets.Image()})
    with pytest.raises(SourceError, match=rf"column {column} is of type Image\("):
        open_source(f"hf:{tmp_path}")


@pytest.mark.parametrize("place", ["../outside/a.parquet", "{}/outside/a.parquet"])
def test_a_card_that_names_files_elsewhere_is_refused(saved, tmp_path, place):
    (tmp_path / "outside").mkdir()
    load_from_disk(str(saved)).to_parquet(str(tmp_path / "outside/a.parquet"))
    (tmp_path / "repository").mkdir()
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {place.format(tmp_path)}\n---\n"
    (tmp_path / "repository/README.md").write_text(card)
    with pytest.raises(SourceError, match=r"its README.md names a file outside of it: .*a\.parquet"):
        open_source(f"hf:{tmp_path / 'repository'}")


def test_a_card_may_name_files_of_its_directory(hub_layout, tmp_path, monkeypatch):
    """By whatever link or relative path the directory is called."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: data/train-00001-of-00003.parquet\n---\n"
    (hub_layout / "README.md").write_text(card)
    (tmp_path / "link").symlink_to(hub_layout)
    monkeypatch.chdir(tmp_path)
    for place in (hub_layout, "link", "./repository/../repository"):
        assert open_source(f"hf:{place}").sample_refs == REFS[3:5]


def test_a_repository_on_the_hub_may_name_files_of_the_hub_only():
    prepared_stream._refuse_outside_files(["hf://datasets/who/what@0123/data/a.parquet"], "who/what")
    for file in ("/etc/a.parquet", "https://example.org/a.parquet"):
        with pytest.raises(SourceError, match="outside of it"):
            prepared_stream._refuse_outside_files([file], "who/what")


def test_a_repository_that_changes_meanwhile_is_said(hub_layout, saved):
    source = open_source(f"hf:{hub_layout}")
    first = sorted((hub_layout / "data").iterdir())[0]
    load_from_disk(str(saved)).select([1, 0, 2]).to_parquet(str(first))
    with pytest.raises(DataError, match="has changed since it was opened"):
        load(source, REFS[0])
    source = open_source(f"hf:{hub_layout}")
    load_from_disk(str(saved)).select([1]).to_parquet(str(first))
    with pytest.raises(DataError, match="a file ended after 1 rows"):
        load(source, REFS[2])


def test_a_stream_that_breaks_off_names_sample_and_remedy_and_goes_on(hub_layout, monkeypatch, assert_same):
    source = open_source(f"hf:{hub_layout}")
    cursor = source._rows._whole
    whole = cursor._files[0]

    def broken():
        yield from ()
        raise ConnectionResetError("peer is gone")

    cursor._files[0] = type("Broken", (), {"__iter__": lambda self: broken()})()
    with pytest.raises(DataError, match=r"streaming synthetic-0-000000@5100000#0 failed .*peer is gone.* goes on"):
        load(source, REFS[0])
    cursor._files[0] = whole
    assert_same(load(source, REFS[0]), DRIVES.load(REFS[0], cameras=[FRONT], frames=2))


def test_what_is_no_prepared_dataset_is_refused(tmp_path, saved):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"sample_id": "a@1#0"}) + "\n")
    with pytest.raises(SourceError, match=r"cannot be read .* expected a directory that"):
        open_source(f"hf:{tmp_path}")
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('code of a dataset was run')")
    with pytest.raises(SourceError, match="scripts are no longer supported"):
        open_source(f"hf:{tmp_path}")
    (tmp_path / f"{tmp_path.name}.py").unlink()
    table = pq.read_table(next(iter(_parquet(saved, tmp_path / "whole"))))
    pq.write_table(table.drop_columns(["frames", "future_rot"]), tmp_path / "rows.parquet")
    with pytest.raises(SourceError, match="lacks the columns frames, future_rot"):
        open_source(f"hf:{tmp_path}")


def _parquet(saved, root):
    root.mkdir()
    load_from_disk(str(saved)).to_parquet(str(root / "x.parquet"))
    return root.iterdir()


def test_a_sample_that_is_not_there(hub_layout):
    with pytest.raises(BadClipError, match="fixed moments"):
        load(open_source(f"hf:{hub_layout}"), SampleRef(clip_id="nobody", t0_us=1))


def test_a_repository_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def refuse(place, **_):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{place}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(SourceError, match=r"hf auth login.* hf download who/what --repo-type dataset --local-dir DIR"):
        open_source("hf:who/what")
    with pytest.raises(SourceError, match="there is no such directory"):
        open_source("hf:/nowhere/at/all")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"HF_HUB_OFFLINE is set: unset it, or .*hf download who/what"):
        open_source("hf:who/what")


def test_a_time_that_contradicts_the_id_is_refused(saved, tmp_path):
    rows = load_from_disk(str(saved))
    late = rows.map(lambda row: {"t0_us": row["t0_us"] + 100_000 * (row["sample_id"] == rows[0]["sample_id"])})
    late.to_parquet(str(tmp_path / "a.parquet"))
    source = open_source(f"hf:{tmp_path}")
    with pytest.raises(BadClipError, match=r"the row's t0_us is .*, its id says") as error:
        load(source, source.sample_refs[0])
    assert error.value.kind == "time_order"
    assert load(source, source.sample_refs[1]).ref == source.sample_refs[1]

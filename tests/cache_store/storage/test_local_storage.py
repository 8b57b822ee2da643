"""Reading from a folder: exact sizes, in blocks, never through a link."""

import os

import numpy as np
import pytest

from cache_store import FormatError
from cache_store.storage import local_storage
from cache_store.storage.local_storage import LocalStorage


def test_a_document_above_its_limit_is_refused_also_if_it_grows_while_it_is_read(store, monkeypatch) -> None:
    (store / "index").write_bytes(b"12345678")
    storage = LocalStorage(store)
    assert storage.read_document("index", 8) == b"12345678"
    with pytest.raises(FormatError, match="has 8 bytes; a document of a store has at most 7"):
        storage.read_document("index", 7)
    status = os.fstat

    def then_it_grows(descriptor):
        before = status(descriptor)
        with (store / "index").open("ab") as file:
            file.write(b"9")
        return before

    monkeypatch.setattr(os, "fstat", then_it_grows)
    with pytest.raises(FormatError, match="has 9 bytes; a document of a store has at most 8"):
        storage.read_document("index", 8)


@pytest.mark.parametrize("target_bytes", [0, 1, 9, 10, 25])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_target_gets_the_beginning_and_the_caller_the_rest(tmp_path, monkeypatch, target_bytes, in_blocks) -> None:
    monkeypatch.setattr(local_storage, "BLOCK_BYTES", 4)
    data = np.arange(25, dtype=np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    target, blocks = np.zeros(target_bytes, np.uint8), []
    on_block = (lambda block: blocks.append(bytes(block))) if in_blocks else None
    rest = LocalStorage(tmp_path).read_into("file", 25, target, on_block)
    assert target.tolist() + rest.tolist() == data.tolist()
    assert [len(block) for block in blocks] == [4] * (in_blocks * target_bytes // 4) + [target_bytes % 4] * (
        in_blocks and target_bytes % 4 > 0
    )
    assert b"".join(blocks) == (target.tobytes() if in_blocks else b"")


@pytest.mark.parametrize("size", [24, 26])
def test_another_size_is_returned_and_nothing_read(tmp_path, size) -> None:
    (tmp_path / "file").write_bytes(bytes(range(1, 26)))
    target = np.zeros(10, np.uint8)
    assert LocalStorage(tmp_path).read_into("file", size, target) == 25
    assert not target.any()


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_file_that_is_cut_while_it_is_read_is_as_long_as_what_came(tmp_path, monkeypatch, in_blocks) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(25))
    status = os.fstat

    def then_it_is_cut(descriptor):
        before = status(descriptor)
        os.truncate(path, 17)
        return before

    monkeypatch.setattr(os, "fstat", then_it_is_cut)
    on_block = (lambda block: None) if in_blocks else None
    assert LocalStorage(tmp_path).read_into("file", 25, np.zeros(20, np.uint8), on_block) == 17


def test_a_name_that_leads_through_a_link_is_refused_unless_its_folders_were_checked(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("real")
    storage, target = LocalStorage(tmp_path), np.zeros(3, np.uint8)
    with pytest.raises(FormatError, match=r"link is not a real folder"):
        storage.read_into("link/file", 3, target)
    assert storage.read_into("real/file", 3, target, parents_checked=True).size == 0
    assert target.tobytes() == b"abc"

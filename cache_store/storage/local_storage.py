"""A store in a folder of a local or network file system: `local_files`, with the root bound."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_store.storage import local_files

STAGING = "staging"
"""Where files lie that have no name yet."""


class LocalStorage:
    """`storage.Storage` below a folder. Holds nothing open; can be pickled."""

    threads = 1

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = root

    def where(self, relative: str) -> str:
        return str(self.root / relative)

    def exists(self, relative: str) -> bool:
        return local_files.exists(self.root / relative)

    def names(self, folder: str, *, flat: bool = False) -> Iterator[str]:
        if folder:
            yield from local_files.names(self.root, folder)
        elif self.root.is_dir():
            yield from (entry.name for entry in self.root.iterdir())

    def size_bytes(self, relative: str) -> int:
        return local_files.size_bytes(self.root, relative)

    def read_document(self, relative: str, limit_bytes: int) -> bytes:
        return local_files.read_document(self.root, relative, limit_bytes)

    def read_exactly(self, relative: str, size: int) -> NDArray[np.uint8] | int:
        return local_files.read_exactly(self.root, relative, size)

    def read_into(
        self,
        relative: str,
        size: int,
        buffers: Callable[[], Sequence[NDArray[np.uint8]]],
        *,
        block_bytes: int,
        on_block: Callable[[int, int, int], None] | None = None,
        parents_checked: bool = False,
    ) -> int:
        return local_files.read_into(
            self.root,
            relative,
            size,
            buffers,
            block_bytes=block_bytes,
            on_block=on_block,
            parents_checked=parents_checked,
        )

    def check_parents(self, relative: str) -> None:
        local_files.check_parents(self.root, relative)

    def make_folders(self, folders: Iterable[str]) -> None:
        paths = [self.root / folder for folder in folders]
        for path in paths:
            local_files.make_folders(path)
        parents = dict.fromkeys(path.parent for path in paths)
        # Also names that a racing writer has made but not yet forced to the medium.
        for path in dict.fromkeys([*parents, *(path.parent for path in parents)]):
            local_files.sync_folder(path)

    def check_exclusive(self) -> None:
        pass  # whether there are hard links is found out by the first

    def write_group(self, folder: str, files: Sequence[tuple[str, Iterable[Any]]]) -> None:
        path = self.root / folder
        local_files.make_folder(path)
        try:
            arrays = dict.fromkeys((path / name).parent for name, _ in files if "/" in name)
            for array in arrays:
                local_files.make_folder(array)
            local_files.write_new(*((path / name, parts) for name, parts in files))
            for made in (*arrays, path, path.parent):
                local_files.sync_folder(made)
        except BaseException:
            local_files.remove_tree(path)  # nothing refers to it yet; a full disk needs the room
            raise

    def put_if_absent(self, relative: str, data: bytes) -> bool:
        return local_files.put_if_absent(self.root / STAGING, self.root / relative, data)

    def put(self, relative: str, parts: Sequence[Any]) -> None:
        local_files.replace(self.root / STAGING, self.root / relative, parts)

    def delete(self, relatives: Iterable[str]) -> None:
        paths = [self.root / relative for relative in relatives]
        for path in paths:
            local_files.remove_file(path)
        for folder in dict.fromkeys(path.parent for path in paths):
            local_files.sync_folder(folder)

    def delete_tree(self, folder: str) -> None:
        local_files.remove_tree(self.root / folder)

    def extent(self, relative: str) -> tuple[int, float]:
        size, changed = 0, 0.0
        pending = [self.root / relative]
        while pending:
            item = pending.pop()
            try:
                status = item.lstat()
                if item.is_dir() and not item.is_symlink():
                    pending += list(item.iterdir())
                else:
                    size += status.st_size
            except FileNotFoundError:  # its writer is at work
                return size, time.time()
            changed = max(changed, status.st_mtime, status.st_ctime if item.is_file() else 0.0)
        return size, changed

    def set_aside(self, folder: str, aside: str) -> bool:
        try:
            (self.root / folder).rename(self.root / aside)
        except FileNotFoundError:
            return False
        return True

    def put_back(self, folder: str, aside: str) -> None:
        if local_files.exists(self.root / aside):
            (self.root / aside).rename(self.root / folder)
            local_files.sync_folder((self.root / folder).parent)

    def drop(self, folder: str, aside: str) -> None:
        local_files.remove_tree(self.root / aside)

    def folder_time_ns(self, folder: str) -> int:
        return (self.root / folder).stat().st_mtime_ns

    def clock_ns(self) -> int:
        probe = self.root / STAGING / secrets.token_hex(16)
        try:
            local_files.write_new((probe, [b""]))
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink(missing_ok=True)

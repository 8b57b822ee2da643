"""Homes of the frozen VLM's weights while they are not on the GPU: RAM, or the checkpoint's own files.

A *unit* is a part of the model whose weights come and go together: a text layer, or the vision tower. Its name is the
beginning of its tensors' names, as in `language_model.layers.7.`. Both homes give a unit's tensors in page-locked RAM,
where the GPU can fetch them by itself.
"""

import errno
import hashlib
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.foreign_files import TensorInfo
from alpacache.errors import CheckpointError
from alpacache.gpu.host_memory import Bytes, page_aligned, page_lock, page_rounded, page_unlock
from alpacache.gpu.shared_memory import SharedBytes, can_share

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Types of weights by safetensors' names."""
SLOTS = 2
"""Layers on the GPU: one computes, one arrives."""
STAGES = 2
"""Units that are read ahead of the one in use."""
_READERS = 4
_PIECE_BYTES = 2**24
"""Read at a time by one thread."""
_GAP_BYTES = 2**20
"""Tensors of a file that lie no further apart are read in one go."""


class WeightHome(Protocol):
    """Gives units in a fixed order, over and over."""

    def next_unit(self) -> Mapping[str, Tensor]:
        """Tensors of the next unit on the host, by the names behind the unit's; good until `given_back`."""

    def given_back(self, copied: "torch.cuda.Event | None") -> None:
        """The unit's tensors may be overwritten, after the event if there is one."""

    def close(self) -> None:
        """Give the memory back; nothing may be copying from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitFiles:
    """Tensors of a unit and where they lie."""

    tensors: Mapping[str, TensorInfo]
    """Tensors by the part of their names behind the unit's."""
    paths: Mapping[str, Path]
    """Paths by the name of the shard."""

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


def unit_files(home: Checkpoint, prefix: str, units: Sequence[str]) -> list[UnitFiles]:
    """Find the tensors of these units, whose names stand behind `prefix`, by the shards' headers."""
    infos = home.infos(home.with_prefix(*(prefix + unit for unit in units)))
    paths = {shard: home.file(shard) for shard in {info.shard for info in infos.values()}}
    found = []
    for unit in units:
        begin = prefix + unit
        tensors = {name.removeprefix(begin): info for name, info in infos.items() if name.startswith(begin)}
        found.append(UnitFiles(tensors=tensors, paths=paths))
    return found


class RamHome:
    """Units in page-locked RAM, read once; by one of the processes that share them, where several do."""

    def __init__(self, units: Sequence[UnitFiles], *, dtype: torch.dtype, cuda: bool, share: bool = False) -> None:
        """`share`: with the other processes of this launch on this machine that read the same units."""
        self._units: list[dict[str, Tensor]] = []
        self._next, self._cuda = 0, cuda
        self._flats: list[Bytes] = []
        self._shared: SharedBytes | None = None
        places = [_places(unit, dtype) for unit in units]
        ends = list(itertools.accumulate(page_rounded(size) for _, size in places))

        def hold(memory: Bytes) -> None:
            for unit, (offsets, _), (begin, end) in zip(units, places, itertools.pairwise([0, *ends]), strict=True):
                flat = memory[begin:end]
                if cuda:
                    page_lock(flat)
                self._flats.append(flat)
                self._units.append(
                    {name: _view(flat, at, dtype, unit.tensors[name].shape) for name, at in offsets.items()}
                )

        def fill(memory: Bytes) -> None:
            hold(memory)
            reader = _Reader()
            try:
                for unit, held in zip(units, self._units, strict=True):
                    for name, tensor in reader.read(unit, page_aligned(reader.stage_bytes(unit))).items():
                        held[name].copy_(tensor)
            finally:
                reader.close()

        try:
            if share and can_share():
                self._shared = SharedBytes(_name(units, dtype), ends[-1], fill)
                if not self._shared.filled_here:
                    hold(self._shared.bytes)
            else:
                fill(page_aligned(ends[-1]))
        except BaseException:
            self.close()
            raise

    def next_unit(self) -> Mapping[str, Tensor]:
        self._next += 1
        return self._units[(self._next - 1) % len(self._units)]

    def given_back(self, copied: "torch.cuda.Event | None") -> None:
        """Nothing to do: the tensors stay."""

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()
        for flat in self._flats if self._cuda else ():
            page_unlock(flat)
        self._flats.clear()


def _name(units: Sequence[UnitFiles], dtype: torch.dtype) -> str:
    """Tell these units of this launch from all others: processes of one launch have one parent."""
    digest = hashlib.sha256(f"{os.getppid()} {dtype}".encode())
    for unit in units:
        for name, info in sorted(unit.tensors.items()):
            file = unit.paths[info.shard].stat()
            digest.update(f"{name} {info.offset} {file.st_dev} {file.st_ino} {file.st_mtime_ns}\n".encode())
    return f"alpacache-weights-{digest.hexdigest()[:32]}"


class FilesHome:
    """Units read from the checkpoint's files each time, `STAGES` ahead, past the page cache."""

    def __init__(self, units: Sequence[UnitFiles], *, cuda: bool) -> None:
        self._units, self._cuda = units, cuda
        self._reader = _Reader()
        size = max(map(self._reader.stage_bytes, units))
        self._stages = [page_aligned(size) for _ in range(STAGES)]
        for stage in self._stages if cuda else ():
            page_lock(stage)
        self._pool = ThreadPoolExecutor(1, "weights")
        self._begun: list[Future[dict[str, Tensor]]] = []
        self._asked = 0
        for _ in range(STAGES):
            self._read_ahead(None)

    def _read_ahead(self, copied: "torch.cuda.Event | None") -> None:
        unit, stage = self._units[self._asked % len(self._units)], self._stages[self._asked % STAGES]
        self._asked += 1

        def read() -> dict[str, Tensor]:
            if copied is not None:
                copied.synchronize()
            return self._reader.read(unit, stage)

        self._begun.append(self._pool.submit(read))

    def next_unit(self) -> Mapping[str, Tensor]:
        return self._begun[0].result()

    def given_back(self, copied: "torch.cuda.Event | None") -> None:
        del self._begun[0]
        self._read_ahead(copied)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()
        for stage in self._stages if self._cuda else ():
            page_unlock(stage)


class _Reader:
    """Reads units from files with several threads, past the page cache where the file system lets it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_READERS, "read-weights")
        self._opened = ExitStack()
        self._files: dict[Path, tuple[int, bool]] = {}

    def stage_bytes(self, unit: UnitFiles) -> int:
        """Room that `read` needs."""
        return sum(page_rounded(end - begin) for _, begin, end in _runs(unit))

    def read(self, unit: UnitFiles, stage: Bytes) -> dict[str, Tensor]:
        """The unit's tensors as views of `stage`, in the type they are stored in."""
        pieces: list[Future[None]] = []
        at, starts, runs = 0, {}, _runs(unit)
        for shard, begin, end in runs:
            path = unit.paths[shard]
            for first in range(begin, end, _PIECE_BYTES):
                wanted = min(_PIECE_BYTES, end - first)
                place = stage[at + first - begin :][: page_rounded(wanted)]
                pieces.append(self._pool.submit(self._read_piece, path, first, wanted, place))
            starts[shard, begin] = at
            at += page_rounded(end - begin)
        for piece in pieces:
            piece.result()
        found = {}
        for name, info in unit.tensors.items():
            (begin,) = (b for shard, b, e in runs if shard == info.shard and b <= info.offset < e)
            where = starts[info.shard, begin] + info.offset - begin
            found[name] = _view(stage, where, DTYPES[info.dtype], info.shape)
        return found

    def _read_piece(self, path: Path, first: int, wanted: int, place: Bytes) -> None:
        """Read so many bytes of a file, and what else is in their last page, if the file has it."""
        file, direct = self._open(path)
        done = 0
        try:
            while done < wanted:
                got = os.preadv(file, [place[done:].data], first + done)
                if not got:
                    raise OSError(errno.EIO, "the file has become shorter")
                done += got
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, first, wanted, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error

    def _open(self, path: Path) -> tuple[int, bool]:
        """Descriptor of a file, and whether it reads past the page cache."""
        if path not in self._files:
            direct = getattr(os, "O_DIRECT", 0)
            try:
                file = os.open(path, os.O_RDONLY | direct)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
                file, direct = os.open(path, os.O_RDONLY), 0
            self._opened.callback(os.close, file)
            self._files[path] = file, bool(direct)
        return self._files[path]

    def close(self) -> None:
        self._pool.shutdown()
        self._opened.close()


def _runs(unit: UnitFiles) -> list[tuple[str, int, int]]:
    """Stretches that hold the unit's tensors: shard, first byte, from the beginning of a page, and end."""
    runs: list[tuple[str, int, int]] = []
    for info in sorted(unit.tensors.values(), key=lambda one: (one.shard, one.offset)):
        begin = info.offset - info.offset % PAGESIZE
        end = info.offset + info.nbytes
        if runs and runs[-1][0] == info.shard and begin - runs[-1][2] <= _GAP_BYTES:
            runs[-1] = (info.shard, runs[-1][1], max(end, runs[-1][2]))
        else:
            runs.append((info.shard, begin, end))
    return runs


def _places(unit: UnitFiles, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Offset of each tensor among a unit's bytes in `dtype`, and their number."""
    places, end = {}, 0
    for name, info in sorted(unit.tensors.items()):
        places[name] = end
        end += math.prod(info.shape) * dtype.itemsize
        end += -end % 16
    return places, end


def _view(flat: Bytes, at: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor that lies in these bytes; a copy where it begins between two elements."""
    part = flat[at : at + math.prod(shape) * dtype.itemsize]
    if part.ctypes.data % dtype.itemsize:
        part = part.copy()
    return torch.from_numpy(part).view(dtype).view(shape)


class EmbeddingRows:
    """The embedding table where it lies in the checkpoint: only rows that are asked for are read."""

    def __init__(self, home: Checkpoint, name: str, *, dtype: torch.dtype) -> None:
        info = home.infos(home.with_prefix(name))[name]
        self._dtype = dtype
        table: Any = np.memmap(home.file(info.shard), np.uint8, "c", info.offset, (info.nbytes,))
        self._table = _view(table, 0, DTYPES[info.dtype], info.shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `[N, C]` of token ids `[N]` on the CPU, in the VLM's type."""
        return self._table[ids].to(self._dtype)

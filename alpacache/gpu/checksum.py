"""CRC-32C of many chunks in the rows of a batch on the GPU, so that reading threads need not touch the bytes.

`train` on 4 cameras in int8, batch 8, from the page cache went from 91 to 123 samples a second (H100, 16 cores,
docs/decisions/0011). The kernels check 1.86 GB in 0.86 ms, 0.56 of a copy's time
(benchmarks/results/gpu_checksum_nvidia-h100-80gb-hbm3_2026-11-25.md).

A CRC is linear over GF(2) (R. N. Williams, "A Painless Guide to CRC Error Detection Algorithms", 1993; M. Kounavis and
F. Berry, "Novel Table Lookup-Based Algorithms for High-Performance CRC Generation", 2008): without initial value and
final inversion it is `M(x) * x^32 mod P(x)` of the message polynomial M. Zeros before a message do not change that,
zeros behind it multiply by a power of x, and the two constants add a value that depends on the size alone. So kernels
compute this linear part of chunks rounded outwards to whole lines, and the host converts the expected checksums.

Tables or shifts cost 30 instructions a word and more. They are not needed, because squaring is a ring homomorphism:
P(x)^n = P(x^n) for every power of two n. Hence P(z), z = x^(32 S), is a multiple of P(x), and in a message of rows of S
words a word may be divided by P(z) with its whole column as coefficients: a step is a plain xor of earlier words of the
same column, without a shift or a table (the sparser multiples of P that software without carry-less multiplication
uses: S. Russell, "Chorba: A novel CRC32 implementation", 2024). What is left of any message are as many rows as the
polynomial has degrees. They are a message with the same checksum, are folded once more with narrower rows, and end as
32 x 32 words, every bit of which is multiplied by its own power of x.
"""

# Compile-time constants of kernels are in capitals, and Triton knows no `(*words, word)`.
# ruff: noqa: N803, RUF005

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cache_store.checksum import POLYNOMIAL

LINE_BYTES = 128
"""Chunks are rounded outwards to lines, so that a warp's loads are whole ones."""
LAGS = (4, 5, 6, 7, 9, 10, 12, 13, 14, 18, 19, 21, 22, 23, 24, 26, 32)
"""The terms of P: how many rows back the words lie that are xored. That takes 9.9 instructions a word where the plain
count is 9.0, one of them the load. The multiple of P with 10 terms takes 6.5 and is no faster, because memory is the
bound."""
_REGISTERS = 96
"""Registers of a thread: as few as suffice, to leave room for other work; the compiler would take up to 246."""
_NARROW = 32
"""Words in a row of the second folding."""
_LAST = 32 * _NARROW
"""Words that the second folding leaves."""


@triton.jit
def _divided(  # type: ignore[no-untyped-def]
    state, at, bounds, first,
    LAGS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The last `ROWS` digits of the quotient after one more tile, which begins `at` and at word `first` of its item.

    `MASKED`: bytes outside of the two `bounds` count as zero, and words without a byte inside are not read. Bounds are
    loaded here, because values computed before the loop over tiles would fill registers.
    """
    lane = tl.arange(0, LANES)
    if MASKED:
        low, high = tl.load(bounds).to(tl.int32), tl.load(bounds + 1).to(tl.int32)
        begin, end = low // 4 - first, (high - 1) // 4 - first
        ones = tl.full([], 0xFFFFFFFF, tl.uint32)
        front, back = ones << ((low & 3) * 8).to(tl.uint32), ones >> ((-high & 3) * 8).to(tl.uint32)
    for row in tl.static_range(ROWS):
        if MASKED:
            word = tl.load(at + row * LANES + lane, mask=(lane >= begin) & (lane <= end), other=0)
            word &= tl.where(lane == begin, front, ones) & tl.where(lane == end, back, ones)
            begin, end = begin - LANES, end - LANES
        else:
            word = tl.load(at + row * LANES + lane, eviction_policy="evict_first")
        for tap in tl.static_range(len(LAGS) - 1, -1, -1):  # the youngest last, because its load is still under way
            word ^= state[ROWS - LAGS[tap]]
        state = state[1:] + (word,)
    return state


@triton.jit
def fold(  # type: ignore[no-untyped-def]
    data,  # uint8 [rows, row_bytes]
    row_bytes,  # int: stride of a row
    items,  # int64 [items, 5], as `ChunkTable.items`
    firsts,  # int64 [programs + 1]: program p takes the items from firsts[p] up to firsts[p + 1]
    out,  # int32 [items, ROWS, LANES]
    LAGS: tl.constexpr,  # terms of the polynomial
    ROWS: tl.constexpr,  # rows of a tile: the largest lag
    LANES: tl.constexpr,  # words of a row, one for each thread
):
    """Fold each item, a stretch of `[ROWS, LANES]` tiles, into one tile with the same linear checksum."""
    lane = tl.arange(0, LANES)
    for item in range(tl.load(firsts + tl.program_id(0)), tl.load(firsts + tl.program_id(0) + 1)):
        fields = items + item * 5
        begin = tl.multiple_of(tl.load(fields) * row_bytes + tl.load(fields + 1), 128)
        low, high = tl.load(fields + 2).to(tl.int32), tl.load(fields + 3).to(tl.int32)
        tiles = tl.load(fields + 4).to(tl.int32)
        at = (data + begin).to(tl.pointer_type(tl.uint32))
        state = ()
        for _ in tl.static_range(ROWS):
            state = state + (tl.zeros([LANES], tl.uint32),)  # type: ignore[assignment]
        for tile in range(tiles):
            first = tile * (ROWS * LANES)
            if (first * 4 < low) | ((first + ROWS * LANES) * 4 > high):
                state = _divided(state, at + first, fields + 2, first, LAGS, ROWS, LANES, True)
            else:
                state = _divided(state, at + first, fields + 2, first, LAGS, ROWS, LANES, False)
        target = out + item * (ROWS * LANES) + lane
        for row in tl.static_range(ROWS):
            word = state[row]  # type: ignore[var-annotated]
            for tap in tl.static_range(len(LAGS)):  # the last rows are not divided: undo their effect on each other
                if LAGS[tap] <= row:
                    word = word ^ state[row - LAGS[tap]]
            tl.store(target + row * LANES, word)


@triton.jit
def _times(a, b):  # type: ignore[no-untyped-def]
    """Product of two polynomials modulo P."""
    product = tl.full([], 0, tl.uint32)
    for degree in range(32):
        product ^= tl.where(((a >> (31 - degree)) & 1) != 0, b, 0)
        b = (b >> 1) ^ tl.where((b & 1) != 0, 0x82F63B78, 0).to(tl.uint32)
    return product


@triton.jit
def compare(  # type: ignore[no-untyped-def]
    words,  # int32 [items, WORDS]: what the second folding left of each item
    powers,  # int32 [32, WORDS]: what each bit of these words is worth
    chunks,  # int64 [chunks, 4], as `ChunkTable.chunks`
    shifts,  # int64 [items], as `ChunkTable.shifts`
    flags,  # int32 [rows]
    WORDS: tl.constexpr,
):
    """Set the flag of a chunk's row unless the chunk's items together have its expected checksum."""
    fields = chunks + tl.program_id(0) * 4
    checksum = tl.full([], 0, tl.uint32)
    for item in range(tl.load(fields + 2), tl.load(fields + 3)):
        place = tl.arange(0, WORDS)
        word = tl.load(words + item * WORDS + place)
        sums = tl.zeros([WORDS], tl.uint32)
        for bit in range(32):
            power = tl.load(powers + bit * WORDS + place)
            sums ^= tl.where(((word >> bit) & 1) != 0, power, 0)
        checksum = _times(checksum, tl.load(shifts + item).to(tl.uint32)) ^ tl.xor_sum(sums, 0)
    if checksum != tl.load(fields + 1).to(tl.uint32):
        tl.atomic_or(flags + tl.load(fields), 1)


def expected_linear(crcs: NDArray[Any], sizes: NDArray[Any], paddings: NDArray[Any]) -> NDArray[np.uint32]:
    """Linear parts of messages with these CRC-32Cs and sizes in bytes, each followed by so many zero bytes.

    The initial value is worth as much as ones that the message shifts through.
    """
    ones = np.full(len(sizes), 0xFFFFFFFF, np.uint32)
    return _shifted(crcs.astype(np.uint32) ^ ones ^ _shifted(ones, sizes), paddings)


def _shifted(values: NDArray[np.uint32], sizes: NDArray[Any]) -> NDArray[np.uint32]:
    """Values times x^(8 size) modulo P, by the binary digits of the size."""
    for digit in range(int(sizes.max(initial=0)).bit_length()):
        values = np.where(sizes >> digit & 1, _times_table(values, _shift_tables(digit)), values)
    return values


def _times_table(values: NDArray[np.uint32], table: NDArray[np.uint32]) -> NDArray[np.uint32]:
    moved: NDArray[np.uint32] = np.bitwise_xor.reduce([table[byte][values >> (8 * byte) & 255] for byte in range(4)])
    return moved


@lru_cache(maxsize=64)
def _shift_tables(digit: int) -> NDArray[np.uint32]:
    """`[4, 256]`: for each byte of a value its product with x^(8 * 2^digit)."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for _ in range(2 if digit else 8):
        bits = _times_table(bits, _shift_tables(digit - 1)) if digit else _times_x(bits)
    tables = np.zeros((4, 256), np.uint32)
    for bit in range(8):
        tables[:, np.arange(256) >> bit & 1 == 1] ^= bits[bit::8, None]
    return tables


def _times_x(values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return values >> np.uint32(1) ^ np.where(values & 1, np.uint32(POLYNOMIAL), np.uint32(0))


@lru_cache(maxsize=8)
def _powers(device: torch.device) -> Tensor:
    """`[32, 1024]` int32: the power of x that each bit of the last words stands for.

    The first bit of a message is bit 0 of its first word; its last bit stands for x^32.
    """
    worth = np.full(32 * _LAST, POLYNOMIAL, np.uint32)
    for place in reversed(range(len(worth) - 1)):
        worth[place] = _times_x(worth[place + 1])
    return torch.from_numpy(np.ascontiguousarray(worth.reshape(_LAST, 32).T).view(np.int32)).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """Places of a batch's chunks, their expected checksums, and how their tiles are divided among programs."""

    chunks: Tensor
    """`[chunks, 4]` int64: row, expected linear part, first item and end of its items."""
    items: Tensor
    """`[chunks + programs, 5]` int64 for the first folding, each a stretch of one chunk: row; byte of the row where its
    first tile begins (below 0 in front of the row, where nothing is read); first byte and end of the chunk, counted
    from there; tiles. Unused ones at the end have no tiles."""
    firsts: Tensor
    """`[programs + 1]` int64: the first item of each program, and the end."""
    shifts: Tensor
    """`[chunks + programs]` int64: the factor that an item multiplies the checksum of those before it by."""
    left_items: Tensor
    """`[chunks + programs, 5]` int64 for the second folding: what the first one leaves of each item."""
    left_firsts: Tensor
    """`[chunks + programs + 1]` int64: each item has its own program."""
    powers: Tensor
    lanes: int
    shape: tuple[int, int]
    """Rows, and bytes of a row, that the kernels read at most."""

    @classmethod
    def build(cls, chunks: ArrayLike, *, device: torch.device, programs: int | None = None, lanes: int = 128) -> Self:
        """Make the table from each chunk's row, first byte there, size and CRC-32C, by one copy to the device.

        `programs` share the tiles evenly. The default is one for each multiprocessor: fewer leave more of the GPU to
        other work, and more end sooner each and make way. Each has one thread a lane, 32 to 256. Tensors have the same
        shapes for the same number of chunks, so that a captured graph may be given new ones with `copy_`.
        """
        if programs is None:
            programs = torch.cuda.get_device_properties(device).multi_processor_count
        if lanes not in (32, 64, 128, 256) or programs < 1:
            raise ValueError(f"got {lanes} lanes, {programs} programs; expected 32, 64, 128 or 256, and 1 or more.")
        row, start, size, crc = np.asarray(chunks, np.int64).T
        if min(row.min(), start.min(), size.min()) < 0 or size.max() > 2**31 - 2**20:
            raise ValueError("rows, starts and sizes are not negative, and a chunk has less than 2 GiB - 1 MiB.")
        end = start + size
        tile_bytes = 4 * lanes * max(LAGS)
        items, bounds, firsts = _stretches(row, start, end, tile_bytes, programs)
        items = np.pad(items, ((0, len(row) + programs - len(items)), (0, 0)))
        # The second folding takes each tile that the first one leaves as several narrow ones.
        tiles = -(-tile_bytes // (4 * _LAST))
        front = 4 * _LAST * tiles - tile_bytes
        left = np.tile([[-front], [front], [front + tile_bytes], [tiles]], len(items))
        expected = expected_linear(crc, size, -end % LINE_BYTES).astype(np.int64)
        parts = {
            "chunks": np.column_stack([row, expected, bounds[:-1], bounds[1:]]),
            "items": items,
            "firsts": firsts,
            "shifts": _shifted(np.full(len(items), 1 << 31, np.uint32), items[:, 4] * tile_bytes).astype(np.int64),
            "left_items": np.column_stack([np.arange(len(items)), *left]),
            "left_firsts": np.minimum(np.arange(len(items) + 1), firsts[-1]),
        }
        tensors, powers = _on_device(parts, device), _powers(device)
        return cls(**tensors, powers=powers, lanes=lanes, shape=(int(row.max()) + 1, int(end.max())))

    @property
    def scratch_words(self) -> int:
        """Words of 4 bytes that `check_rows` writes in between."""
        return len(self.items) * (max(LAGS) * self.lanes + _LAST)


def check_rows(data: Tensor, table: ChunkTable, flags: Tensor, scratch: Tensor | None = None) -> None:
    """Enqueue the check of a batch's chunks on the current stream: three launches, which a graph may capture.

    Args:
        data: `[rows, row_bytes]` uint8, each row at a multiple of 256 bytes.
        flags: `[rows]` int32; bit 0 is set for damaged rows, and nothing else changes.
        scratch: int32, `[scratch_words]` or more.
    """
    if data.dtype != torch.uint8 or data.stride(0) % 256 or data.stride(1) != 1 or data.data_ptr() % 16:
        raise ValueError(f"data are {data.dtype} with strides {data.stride()}; expected rows of bytes, 256-aligned.")
    if data.shape[0] < table.shape[0] or data.shape[1] < table.shape[1]:
        raise ValueError(f"data have shape {list(data.shape)}; the table's chunks lie in {list(table.shape)}.")
    if flags.dtype != torch.int32 or flags.shape != data.shape[:1]:
        raise ValueError(f"flags are {flags.dtype} {list(flags.shape)}; expected int32 {[len(data)]}.")
    rows, slots = max(LAGS), len(table.items)
    if scratch is None:
        scratch = data.new_empty(table.scratch_words, dtype=torch.int32)
    left, last = scratch[: table.scratch_words].split([slots * rows * table.lanes, slots * _LAST])  # type: ignore[no-untyped-call]
    fold[(len(table.firsts) - 1,)](
        data, data.stride(0), table.items, table.firsts, left,
        LAGS=LAGS, ROWS=rows, LANES=table.lanes, num_warps=table.lanes // 32, num_stages=1, maxnreg=_REGISTERS,
    )  # fmt: skip
    fold[(slots,)](
        left.view(torch.uint8), 4 * rows * table.lanes, table.left_items, table.left_firsts, last,
        LAGS=LAGS, ROWS=rows, LANES=_NARROW, num_warps=1, num_stages=1, maxnreg=_REGISTERS,
    )  # fmt: skip
    compare[(len(table.chunks),)](
        last, table.powers, table.chunks, table.shifts, flags, WORDS=_LAST, num_warps=4, num_stages=1
    )


def _stretches(
    row: NDArray[np.int64], start: NDArray[np.int64], end: NDArray[np.int64], tile_bytes: int, programs: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Items, and the first item of each chunk and of each program (with an end); programs get equally many tiles.

    Tiles of a chunk are counted from the end of its last line, so that its first one is the one that is not full.
    """
    stop = end + -end % LINE_BYTES
    ends = np.cumsum(-((start - stop) // tile_bytes))  # rounded up
    starts = np.concatenate([[0], ends])
    shares = np.arange(programs + 1) * starts[-1] // programs
    cuts = np.unique(np.concatenate([starts, shares]))
    chunk = np.searchsorted(ends, cuts[:-1], side="right")
    tiles = np.diff(cuts)
    begin = stop[chunk] - (ends[chunk] - cuts[:-1]) * tile_bytes
    low = np.maximum(start[chunk] - begin, 0)
    high = np.minimum(end[chunk] - begin, tiles * tile_bytes)
    items = np.column_stack([row[chunk], begin, low, high, tiles])
    return items, np.searchsorted(cuts[:-1], starts), np.searchsorted(cuts[:-1], shares)


def _on_device(parts: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Copies as int64, by one transfer; each begins at a multiple of 16 bytes.

    For a pointer that does not, Triton compiles the kernel once more, which took 22 s in the middle of a run
    (docs/decisions/0011).
    """
    padded = [np.pad(part.ravel(), (0, part.size % 2)) for part in parts.values()]
    host = torch.from_numpy(np.concatenate(padded).astype(np.int64))
    whole = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
    pieces = whole.split([*map(len, padded)])  # type: ignore[no-untyped-call]
    named = zip(parts.items(), pieces, strict=True)
    return {name: piece[: part.size].view(part.shape) for (name, part), piece in named}

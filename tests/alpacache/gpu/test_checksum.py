"""CRC-32C on the GPU against google_crc32c: interpreted on the CPU, run where one is.

`python test_gpu_checksum.py cpu|cuda` is what the tests run: Triton decides at its import whether it
interprets, so this is a process of its own.
"""

import os
import subprocess
import sys
from itertools import pairwise

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="triton is not installed; CPU-only installs do not need it")

from alpacache.gpu.checksum import (  # noqa: E402
    LAGS,
    ChunkTable,
    check_rows,
    expected_linear,
)


def crc(data):
    return google_crc32c.value(bytes(data))


def linear(data):
    """By definition: what differs from the checksum of as many zeros."""
    return crc(data) ^ crc(bytes(len(data)))


def expected(crc32c, size, end_padding):
    return int(expected_linear(np.array([crc32c]), np.array([size]), np.array([end_padding]))[0])


@given(st.binary(max_size=300), st.integers(0, 300))
def test_expected_linear(data, padding):
    assert expected(crc(data), len(data), padding) == linear(data + bytes(padding))


@given(st.binary(max_size=300), st.integers(0, 10**6), st.integers(0, 2**40))
def test_padding_may_be_part_of_the_message(data, zeros, padding):
    longer = data + bytes(zeros)
    assert expected(crc(longer), len(longer), padding) == expected(crc(data), len(data), zeros + padding)


def test_check_value():
    assert expected(0xE3069283, 9, 0) == linear(b"123456789") == 1491335712


def test_lags_are_the_polynomial():
    """Modulo P its terms add up to nothing; degrees count in bits here."""
    powers, value = [], 1
    for _ in range(max(LAGS) + 1):
        powers.append(value)
        value = value << 1 ^ (0x11EDC6F41 if value >> 31 else 0)
    degree = max(LAGS)
    assert np.bitwise_xor.reduce([powers[degree], *(powers[degree - lag] for lag in LAGS)]) == 0


@pytest.mark.parametrize("programs", [1, 5, 300])
def test_every_byte_is_in_one_item(programs):
    rng = np.random.default_rng(programs)
    sizes = [0, 1, 70_001, *rng.integers(1, 50_000, 20).tolist()]
    starts = np.concatenate([[3], 3 + np.cumsum(np.array(sizes[:-1]) + 1)]).tolist()
    chunks = [(0, start, size, 0) for start, size in zip(starts, sizes, strict=True)]
    table = ChunkTable.build(chunks, device=torch.device("cpu"), programs=programs, lanes=32)
    assert table.items.shape == (len(sizes) + programs, 5)
    tile_bytes = 4 * 32 * max(LAGS)
    for start, size, (_, _, first, end) in zip(starts, sizes, table.chunks.tolist(), strict=True):
        covered = start
        for _, begin, low, high, tiles in table.items[first:end].tolist():
            assert begin + low == covered
            assert begin % 128 == 0
            assert 0 <= low <= high <= tiles * tile_bytes
            assert size == 0 or low < high
            covered = begin + high
        assert covered == start + size
    firsts = table.firsts.tolist()
    shares = [int(table.items[a:b, 4].sum()) for a, b in pairwise(firsts)]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == table.items[:, 4].sum()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_table_begins_where_triton_compiles_for(count):
    """At a multiple of 16 bytes; elsewhere another kernel would be compiled in the middle of a run."""
    table = ChunkTable.build([(0, 5, 100, 0)] * count, device=torch.device("cpu"), programs=4)
    for tensor in (table.chunks, table.items, table.firsts, table.shifts, table.left_items, table.left_firsts):
        assert tensor.data_ptr() % 16 == 0
        assert tensor.is_contiguous()
    assert table.chunks[:, 0].tolist() == [0] * count
    assert len(table.left_firsts) == len(table.items) + 1


def test_what_does_not_fit_is_refused():
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="48 lanes"):
        ChunkTable.build([(0, 0, 1, 0)], device=cpu, programs=1, lanes=48)
    with pytest.raises(ValueError, match="are not negative"):
        ChunkTable.build([(0, -1, 1, 0)], device=cpu, programs=1)
    table = ChunkTable.build([(1, 200, 57, 0)], device=cpu, programs=1)
    with pytest.raises(ValueError, match=r"shape \[2, 256\]; the table's chunks lie in \[2, 257\]"):
        check_rows(torch.zeros(2, 256, dtype=torch.uint8), table, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="256-aligned"):
        check_rows(torch.zeros(2, 300, dtype=torch.uint8), table, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"expected int32 \[2\]"):
        check_rows(torch.zeros(2, 512, dtype=torch.uint8), table, torch.zeros(3, dtype=torch.int32))


def run(device):
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    done = subprocess.run([sys.executable, __file__, device], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.ci
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run the kernels on")
def test_interpreted_kernels_find_what_google_crc32c_finds():
    run("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_find_what_google_crc32c_finds():
    run("cuda")


def laid_out(rng, sizes):
    """A row of random bytes that ends with the last chunk, and the chunks' starts: odd gaps, none in front."""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += size + int(rng.integers(0, 6))
    end = starts[-1] + sizes[-1]
    return rng.integers(0, 256, end, dtype=np.uint8), starts


def flags_of(device, content, chunks, **options):
    """What `check_rows` says of rows of these bytes, in memory that goes on behind them."""
    length = content.shape[1]
    memory = torch.full((len(content), length + -length % 256), 255, dtype=torch.uint8, device=device)
    data = memory[:, :length]
    data.copy_(torch.from_numpy(content))
    flags = torch.full((len(content),), 4, dtype=torch.int32, device=device)
    check_rows(data, ChunkTable.build(chunks, device=torch.device(device), **options), flags)
    return [flag ^ 4 for flag in flags.tolist()]


def check_sizes(device, rng, **options):
    """Chunks of many sizes have the checksums that they have, and the largest is damaged where it is."""
    sizes = [1, 3, 4, 0, 5, 128, 4095, 4096 + 7, 70_001, 2]
    row, starts = laid_out(rng, sizes)
    content = np.stack([row, row])
    chunks = [
        (place, start, size, crc(row[start : start + size]))
        for place in range(2)
        for start, size in zip(starts, sizes, strict=True)
        if place == 0 or size > 5000
    ]
    content[1, starts[8] + 35_000] ^= 16
    assert flags_of(device, content, chunks, programs=4, **options) == [0, 1]


def check_flips(device, rng, **options):
    """A flipped bit is found in its row and no other; bytes between chunks do not matter, a wrong expectation does."""
    sizes = [5, 4103]
    row, starts = laid_out(rng, sizes)
    row = np.concatenate([rng.integers(0, 256, 3, dtype=np.uint8), row, rng.integers(0, 256, 9, dtype=np.uint8)])
    starts = [start + 3 for start in starts]
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    places = [starts[0], ends[0] - 1, starts[1], starts[1] + 2051, ends[1] - 1]
    content = np.stack([row] * (len(places) + 3))
    for number, place in enumerate(places):
        content[number, place] ^= 1 << int(rng.integers(0, 8))
    is_neighbour = np.ones(len(row), bool)
    for start, end in zip(starts, ends, strict=True):
        is_neighbour[start:end] = False
    content[-2, is_neighbour] ^= 255
    chunks = [
        (place, start, end - start, crc(row[start:end]) ^ (place == len(content) - 1))
        for place in range(len(content))
        for start, end in zip(starts, ends, strict=True)
    ]
    assert flags_of(device, content, chunks, programs=3, **options) == [1] * len(places) + [0, 0, 1]


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    for count in (64,) if sys.argv[1] == "cpu" else (32, 64, 128, 256):
        check_sizes(sys.argv[1], generator, lanes=count)
        check_flips(sys.argv[1], generator, lanes=count)

"""CRC-32C of a batch's chunks on the GPU: how fast, and what it costs a matmul beside it.

Rows of 36 chunks at odd places, as many bytes as a batch of bf16 and of int8 prefixes; before anything is timed, flags
agree with google_crc32c, and a flipped bit is found. `per_sm` are programs a multiprocessor: below 1 most have none.
`over_copy` is the time over that of copying the same bytes within device memory, which also writes them.
`matmul_slowdown` is the time of bf16 products of 2048 x 2048 on a stream of high priority while checks follow each
other without a pause on one of low priority, over their time alone; a check that has a pause of nine times its length
costs a tenth of the excess. `--quick` is tiny and, without CUDA, interpreted; it times nothing that means anything.
"""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import torch
from benchmark_report import arguments, finish, hardware_name
from torch import Tensor

if TYPE_CHECKING:
    from alpacache.gpu.checksum import ChunkTable

CHUNKS = 36
SHAPES = ((8, 232_000_000), (16, 69_000_000))
QUICK_SHAPES = ((2, 70_000),)
LANES = (64, 128)
PER_SM = (0.25, 0.5, 1.0, 4.0)
PRODUCTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Bytes of a batch and its chunks."""

    data: Tensor
    row: list[int]
    start: list[int]
    size: list[int]
    crc32c: list[int]

    @property
    def size_gb(self) -> float:
        return sum(self.size) / 1e9

    def table(self, **options: Any) -> "ChunkTable":
        from alpacache.gpu.checksum import ChunkTable

        chunks = list(zip(self.row, self.start, self.size, self.crc32c, strict=True))
        return ChunkTable.build(chunks, device=self.data.device, **options)


def make_rows(count: int, row_bytes: int, chunks: int, device: torch.device) -> Rows:
    """Random bytes, the same in every row but for its first; chunks begin and end at odd places."""
    generator = torch.Generator(device).manual_seed(0)
    stride = row_bytes + -row_bytes % 256
    one = torch.randint(0, 256, (stride,), dtype=torch.uint8, device=device, generator=generator)
    data = one.repeat(count, 1)
    data[:, 0] = torch.arange(count, dtype=torch.uint8, device=device)
    host = one.cpu().numpy()
    step = row_bytes // chunks
    places = [(step * chunk + chunk % 5 * (chunk > 0), step - 4 - chunk % 3) for chunk in range(chunks)]
    later = [google_crc32c.value(host[start : start + size].tobytes()) for start, size in places[1:]]
    crcs = []
    for row in range(count):
        host[0] = row
        crcs += [google_crc32c.value(host[: places[0][1]].tobytes()), *later]
    return Rows(
        data=data,
        row=[row for row in range(count) for _ in places],
        start=[start for start, _ in places] * count,
        size=[size for _, size in places] * count,
        crc32c=crcs,
    )


def verify(rows: Rows, table: "ChunkTable") -> None:
    """Intact rows have no flag; a flipped bit in the last byte of the last chunk gives one to its row alone."""
    from alpacache.gpu.checksum import check_rows

    flags = torch.zeros(len(rows.data), dtype=torch.int32, device=rows.data.device)
    check_rows(rows.data, table, flags)
    if flags.any():
        raise SystemExit(f"intact rows are flagged: {flags.tolist()}; {table.variant}, {table.lanes} lanes.")
    last = rows.data[-1, rows.start[-1] + rows.size[-1] - 1 :][:1]
    last ^= 1
    check_rows(rows.data, table, flags)
    last ^= 1
    expected = [0] * (len(flags) - 1) + [1]
    if flags.tolist() != expected:
        raise SystemExit(f"flags are {flags.tolist()}, expected {expected}; {table.variant}, {table.lanes} lanes.")


def captured(work: Callable[[], Any], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """Work as a graph whose kernels have the priority of the stream."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, times: int = 7) -> float:
    """Median, on its stream."""
    found = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record()
            graph.replay()
            end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


class Neighbour:
    """Products on a stream of high priority, as training would be."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1)
        one, other = (torch.randn(2048, 2048, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(one)

        def products() -> None:
            for _ in range(PRODUCTS):
                torch.matmul(one, other, out=out)

        self.graph = captured(products, self.stream)
        self._tensors = one, other, out

    def slowdown(self, check: torch.cuda.CUDAGraph, check_ms: float, low: torch.cuda.Stream) -> float | None:
        """Time of the products among checks that outlast them, over their time alone; None if none outlast them."""
        alone = replay_ms(self.graph, self.stream)
        checks = int(6 * alone / check_ms) + 4
        for _ in range(5):
            torch.cuda.synchronize()
            with torch.cuda.stream(low):
                for _ in range(checks):
                    check.replay()
            together = replay_ms(self.graph, self.stream, times=3)
            checks_outlast = not low.query()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            if checks_outlast:
                return together / alone
            checks *= 2
        return None


def measure(rows: Rows, lanes: int, per_sm: float, neighbour: Neighbour) -> dict[str, Any]:
    """One row of the report, without the baseline."""
    from alpacache.gpu.checksum import check_rows

    device = rows.data.device
    programs = max(1, round(per_sm * torch.cuda.get_device_properties(device).multi_processor_count))
    table = rows.table(programs=programs, lanes=lanes)
    verify(rows, table)
    flags = torch.zeros(len(rows.data), dtype=torch.int32, device=device)
    low = torch.cuda.Stream(device, priority=0)
    graph = captured(lambda: check_rows(rows.data, table, flags), low)
    ms = replay_ms(graph, low)
    slowdown = neighbour.slowdown(graph, ms, low)
    if flags.any():
        raise SystemExit(f"rows are flagged beside other work: {flags.tolist()}; {lanes} lanes.")
    row = {"what": "check", "lanes": lanes, "per_sm": per_sm, "rows": len(rows.data)}
    return row | {"gb": rows.size_gb, "ms": ms, "gb_s": rows.size_gb / ms * 1e3, "matmul_slowdown": slowdown}


def measure_all(device: torch.device, shapes: tuple[tuple[int, int], ...]) -> Iterator[dict[str, Any]]:
    neighbour = Neighbour(device)
    for count, row_bytes in shapes:
        rows = make_rows(count, row_bytes, CHUNKS, device)
        other = torch.empty_like(rows.data)
        stream = torch.cuda.Stream(device)
        copy_ms = replay_ms(captured(lambda to=other, data=rows.data: to.copy_(data), stream), stream)
        del other
        base = {"rows": count, "gb": rows.size_gb, "over_copy": 1.0}
        yield base | {"what": "copy", "ms": copy_ms, "gb_s": rows.size_gb / copy_ms * 1e3}
        for lanes in LANES:
            for per_sm in PER_SM:
                row = measure(rows, lanes, per_sm, neighbour)
                yield row | {"over_copy": row["ms"] / copy_ms}


def interpret() -> Iterator[dict[str, Any]]:
    """The same flags from interpreted kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    rows = make_rows(2, 12_000, 3, torch.device("cpu"))
    started = time.perf_counter()
    verify(rows, rows.table(programs=2, lanes=32))
    ms = (time.perf_counter() - started) * 1e3
    yield {"what": "check", "lanes": 32, "rows": 2, "gb": rows.size_gb, "ms": ms}


def main() -> None:
    options = arguments(__doc__).parse_args()
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("the kernels need Triton; install triton, as `pip install -e .[dev]` does on Linux.")
    cuda = torch.cuda.is_available()
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick interprets the kernels on the CPU.")
    shapes = QUICK_SHAPES if options.quick else SHAPES
    rows = list(measure_all(torch.device("cuda"), shapes) if cuda else interpret())
    finish("gpu_checksum", rows, options, hardware=torch.cuda.get_device_name() if cuda else hardware_name())


if __name__ == "__main__":
    main()

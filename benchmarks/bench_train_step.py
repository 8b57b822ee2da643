"""One training step of the expert at full size, random weights, prefixes on the device: our attention beside stock.

A step is forward, backward and a fused AdamW in bf16, as `train` runs it on a GPU today. `captured` replays forward,
backward and optimizer as one CUDA graph, which `train` does not do yet. Each row says its speed over stock attention
(`sdpa`: concatenated cache, repeated draws, expanded heads) in the same run. `--quick` runs a small expert on the CPU.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmark_report import arguments, finish, hardware_name
from full_size import HEAD_DIM, KV_HEADS, random_expert

from alpacache import flow_matching
from alpacache.alpamayo.expert import ActionExpert
from alpacache.alpamayo.packed_prefix import PackedPrefixes, PrefixLayout


def random_prefixes(expert: ActionExpert, batch: int, shortest: int, longest: int) -> PackedPrefixes:
    """Distinct lengths between the two, the last one the longest."""
    lengths = torch.linspace(shortest, longest, batch, device=expert.device).long()
    layout = PrefixLayout(
        layers=len(expert.expert.layers), kv_heads=KV_HEADS, head_dim=HEAD_DIM, codec=None, dtype=expert.dtype
    )
    data = torch.empty(batch, layout.row_bytes(longest), dtype=torch.uint8, device=expert.device)
    data.view(expert.dtype).normal_()
    return PackedPrefixes(
        layout=layout,
        data=data,
        rows=torch.arange(batch, device=expert.device),
        lengths=lengths,
        starts=lengths - 50,
        longest=longest,
        dtype=expert.dtype,
    )


def make_step(expert: ActionExpert, prefixes: PackedPrefixes, draws: int, *, graph: bool) -> Callable[[], Any]:
    device, batch = expert.device, len(prefixes.lengths)
    action, noise = (torch.randn(batch, draws, 64, 2, device=device) for _ in range(2))
    t = torch.rand(batch, draws, device=device)
    for parameter in expert.parameters():
        parameter.grad = None
    optimizer = torch.optim.AdamW(expert.parameters(), lr=1e-5, fused=device.type == "cuda", capturable=graph)

    def step() -> None:
        velocity = expert.velocity(flow_matching.interpolate(action, noise, t), t, prefixes)
        flow_matching.loss(velocity, action, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if not graph:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def measure(expert: ActionExpert, prefixes: PackedPrefixes, draws: int, way: str) -> dict[str, Any]:
    cuda = expert.device.type == "cuda"
    expert.expert.config._attn_implementation = "sdpa" if way == "sdpa" else "prefix"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make_step(expert, prefixes, draws, graph=way == "captured")
    times = []
    for _ in range(3 if not cuda else 10):
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {
        "step_ms": statistics.median(times[2:]) * 1e3,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
    }


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    cuda = torch.cuda.is_available() and not options.quick
    if not cuda and not options.quick:
        raise SystemExit("a full run needs a CUDA device; --quick runs a small expert on the CPU.")
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    expert = random_expert(device, dtype, small=not cuda).train()
    # cameras, batch, draws, shortest and longest prefix
    cases = [(4, 1, 1, 3050, 3050), (4, 8, 1, 2900, 3050), (1, 16, 1, 840, 880), (1, 16, 4, 840, 880)]
    rows = []
    for cameras, batch, draws, shortest, longest in cases if cuda else [(1, 2, 2, 80, 88)]:
        prefixes = random_prefixes(expert, batch, shortest, longest)
        base = None
        for way in ("sdpa", "prefix", "captured") if cuda else ("sdpa", "prefix"):
            row: dict[str, Any] = {"cameras": cameras, "codec": "bf16", "batch": batch, "draws": draws}
            row |= {"optimizer": "adamw", "attention": way}
            try:
                row |= measure(expert, prefixes, draws, way)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            else:
                base = row["step_ms"] if way == "sdpa" else base
                row |= {"samples_s": batch / row["step_ms"] * 1e3, "draws_s": batch * draws / row["step_ms"] * 1e3}
                row["over_stock"] = base / row["step_ms"] if base else None
            rows.append(row)
        del prefixes
    hardware = torch.cuda.get_device_name() if cuda else hardware_name()
    finish("train_step", rows, options, hardware=hardware)


if __name__ == "__main__":
    main()

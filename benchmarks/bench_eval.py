"""Evaluation end to end: `alpacache.evaluate` from a store, beside the public evaluation with the VLM in the loop.

Full size, random weights, 6 paths and 10 flow steps, files in the page cache. A cached row is one call of `evaluate` in
a process of its own; its rate is that of the batches after the first two, by the times at which they were done.
`public` is the public evaluation's shape, one sample at a time: prefill, reasoning of so many tokens or none, the cache
repeated for each path, and in each step the expert over it by stock attention, every kernel launched. Its prompt is
computed once, where the public sampler repeats it for each path, and its reasoning never waits to see whether it ended.
`over_public` is the ratio to no reasoning, `over_public_reasoning` to the other. `--quick` runs a small expert on the
CPU.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import full_size
import torch
from bench_train_e2e import MODEL, hardware, isolated, one_line, prepare_medium
from benchmark_report import arguments, finish
from torch import Tensor
from transformers import Cache, Qwen3VLForConditionalGeneration

from alpacache import flow_matching
from alpacache.alpamayo import ActionExpert, load_expert
from alpacache.alpamayo.backbone import cache_argument
from alpacache.evaluation.config import EvalConfig
from alpacache.evaluation.evaluate import evaluate
from alpacache.progress import Progress

PATHS, FLOW_STEPS = 6, 10
REASONING_TOKENS = 20
SETTLE = 2
"""Batches before the first that counts: warm-up, capture, and what was read ahead meanwhile."""
KEYS = (
    *("case", "cameras", "codec", "batch", "paths", "flow_steps", "captured", "reasoning_tokens"),
    *("samples_s", "ms_sample", "peak_gib", "over_public", "over_public_reasoning", "samples", "note"),
)
"""Of a row, in the table's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A cached row: what `evaluate` is asked for."""

    cameras: int
    codec: str
    batch: int
    captured: bool

    @property
    def about(self) -> dict[str, Any]:
        return {
            **{"case": "cached", "cameras": self.cameras, "codec": self.codec, "batch": self.batch},
            **{"paths": PATHS, "flow_steps": FLOW_STEPS, "captured": self.captured},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What differs between a full and a quick run."""

    small: bool
    batches: dict[int, int]
    """Cameras -> samples at once."""
    measured: int
    """Batches that count."""
    rounds: int
    """Samples of the public evaluation, the first of which does not count if there are more."""

    def cases(self, cameras: int, codec: str) -> list[Case]:
        ways = (False,) if self.small else (True, False)
        return [Case(cameras=cameras, codec=codec, batch=self.batches[cameras], captured=way) for way in ways]

    def lengths(self, cameras: int) -> tuple[int, int]:
        """Shortest and longest prefix."""
        return (72, 80) if self.small else full_size.PREFIX_TOKENS[cameras]


FULL = Plan(small=False, batches={4: 8, 1: 16}, measured=4, rounds=4)
QUICK = Plan(small=True, batches={1: 2}, measured=2, rounds=1)


def run_case(case: Case, plan: Plan, work: Path) -> dict[str, Any]:
    """The case's row; a failure is a note in it."""
    cuda, done = torch.cuda.is_available(), list[tuple[int, float]]()
    config = EvalConfig(
        store=str(work / "store"),
        model=str(work / MODEL),
        out=str(work / "out"),
        paths=PATHS,
        flow_steps=FLOW_STEPS,
        batch_size=case.batch,
        device="cuda" if cuda else "cpu",
        capture=case.captured,
    )

    def note(progress: Progress) -> None:
        done.append((progress.done, time.perf_counter()))

    try:
        evaluate(config, on_progress=note)
    except Exception as error:
        return case.about | {"note": one_line(error)}
    finally:
        shutil.rmtree(work / "out", ignore_errors=True)
    (before, started), (after, ended) = done[SETTLE - 1], done[-1]
    peak = torch.cuda.max_memory_reserved() / 2**30 if cuda else None
    return case.about | rates(after - before, ended - started) | {"peak_gib": peak}


def rates(samples: int, seconds: float) -> dict[str, Any]:
    return {"samples_s": samples / seconds, "ms_sample": seconds / samples * 1e3, "samples": samples}


def public_rows(plan: Plan, cameras: list[int], work: Path) -> list[dict[str, Any]]:
    """The public evaluation, without and with reasoning."""
    where = full_size.device()
    vlm = full_size.random_vlm(work / MODEL, where)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    expert = load_expert(str(work / MODEL), dtype=dtype, device=where, attention="sdpa").eval()
    rows = []
    for count in cameras:
        for tokens in (0, REASONING_TOKENS):
            if where.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            sample_paths, seconds = public_evaluation(vlm, expert, cameras=count, tokens=tokens), []
            for _ in range(plan.rounds):
                started = time.perf_counter()
                sample_paths()  # ends on the host
                seconds.append(time.perf_counter() - started)
            counted = seconds[1:] or seconds
            rows.append(
                {
                    **{"case": "public", "cameras": count, "batch": 1, "paths": PATHS, "flow_steps": FLOW_STEPS},
                    **{"captured": False, "reasoning_tokens": tokens},
                    **rates(len(counted), sum(counted)),
                    "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if where.type == "cuda" else None,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def public_evaluation(
    vlm: Qwen3VLForConditionalGeneration, expert: ActionExpert, *, cameras: int, tokens: int
) -> Callable[[], Tensor]:
    """Paths of one sample, `[6, 64, 3]` (m), from its pictures: what the public evaluation does for each."""
    generator = torch.Generator(expert.device).manual_seed(3)
    inputs, start = full_size.prompt(vlm, cameras=cameras, batch=1, generator=generator)
    noise = torch.randn(PATHS, full_size.FUTURE_STEPS, 2, generator=generator, device=expert.device)
    history = torch.zeros(full_size.HISTORY_STEPS, 3)
    history[:, 0] = torch.arange(-full_size.HISTORY_STEPS + 1, 1)  # 10 m/s straight ahead
    rot = torch.eye(3).expand(full_size.HISTORY_STEPS, 3, 3)

    @torch.no_grad()
    def sample_paths() -> Tensor:
        cache, logits = public_prefill(vlm, inputs, paths=PATHS)
        for place in range(tokens):
            token = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            positions = torch.full((3, PATHS, 1), start + place, device=token.device)
            output = vlm(input_ids=token, position_ids=positions, use_cache=True, **{cache_argument(vlm): cache})
            logits = output.logits[:, -1]
        length = inputs["input_ids"].shape[1] + tokens
        velocity = stock_velocity(expert, cache, length=length, start=start + tokens, paths=PATHS)
        action = flow_matching.sample(velocity, noise, steps=FLOW_STEPS)
        return expert.action_space.to_path(action.cpu(), history, rot)[0]

    return sample_paths


@torch.no_grad()
def public_prefill(vlm: Qwen3VLForConditionalGeneration, inputs: dict[str, Any], *, paths: int) -> tuple[Cache, Tensor]:
    """The VLM's cache of one prompt, repeated for each path, and the logits `[paths, vocabulary]` of what follows."""
    output = vlm(**inputs, use_cache=True, logits_to_keep=1)
    cache: Cache = getattr(output, cache_argument(vlm))
    cache.batch_repeat_interleave(paths)
    return cache, output.logits[:, -1].expand(paths, -1)


def stock_velocity(
    expert: ActionExpert, cache: Cache, *, length: int, start: int, paths: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The expert on the VLM's own cache of so many tokens a row, cut back to them after each step."""
    tokens, where = full_size.FUTURE_STEPS, expert.device
    positions = (torch.arange(tokens, device=where) + start).expand(3, paths, -1)
    mask = torch.zeros(paths, 1, tokens, length + tokens, device=where, dtype=expert.dtype)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=expert.dtype == torch.bfloat16):
            output = expert.expert(
                inputs_embeds=expert.action_in_proj(x, t),
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                **{cache_argument(expert.expert): cache},
            )
            result: Tensor = expert.action_out_proj(output.last_hidden_state)
        for layer in cache.layers:  # `crop` takes another number in every other version
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return result

    return velocity


def over_public(row: dict[str, Any], public: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples a second over those of the public evaluation on the same cameras, without and with reasoning."""
    if "samples_s" not in row:
        return row
    same = {other["reasoning_tokens"]: other["samples_s"] for other in public if other["cameras"] == row["cameras"]}
    return row | {
        "over_public": row["samples_s"] / same[0],
        "over_public_reasoning": row["samples_s"] / same[REASONING_TOKENS],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, help="checkpoint and store; by default a temporary directory")
    parser.add_argument("--codecs", nargs="+", default=["int8", "bf16"], choices=["int8", "bf16"])
    options = parser.parse_args()
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("a full run needs a CUDA device; --quick runs a small expert on the CPU.")
    plan = QUICK if options.quick else FULL
    root = options.work or Path(tempfile.mkdtemp())
    work = root / ("quick" if options.quick else "full")
    call: Callable[..., Any] = (lambda function, *given: function(*given)) if options.quick else isolated
    try:
        call(prepare, plan, work)
        rows = list(public := call(public_rows, plan, list(plan.batches), work))
        for cameras in plan.batches:
            for codec in options.codecs:
                call(make_store, plan, work, cameras, codec)
                for case in plan.cases(cameras, codec):
                    try:
                        row = call(run_case, case, plan, work)
                    except Exception as error:  # the process itself died
                        row = case.about | {"note": one_line(error)}
                    rows.append(over_public(row, public))
                    print(json.dumps(rows[-1]), flush=True)
    finally:
        if options.work is None:
            shutil.rmtree(root)
    finish("eval", [{key: row.get(key) for key in KEYS} for row in rows], options, hardware=hardware())


def prepare(plan: Plan, work: Path) -> None:
    """The checkpoint, if it is not there."""
    work.mkdir(parents=True, exist_ok=True)
    full_size.write_checkpoint(work / MODEL, small=plan.small)


def make_store(plan: Plan, work: Path, cameras: int, codec: str) -> None:
    """A store of just as many samples as a case reads, in the place of the one before, brought into the page cache."""
    shutil.rmtree(work / "store", ignore_errors=True)
    shortest, longest = plan.lengths(cameras)
    reader = full_size.write_store(
        work / "store",
        work / MODEL,
        cameras=cameras,
        codec=codec,
        samples=(SETTLE + plan.measured) * plan.batches[cameras],
        shortest=shortest,
        longest=longest,
    )
    prepare_medium(reader, cold=False)


if __name__ == "__main__":
    main()

"""Reasoning rollouts: tokens a second of the shared-stem sampler against the public loop and against one row at a time.

`generate` is the public sampler: transformers' `generate` with six return sequences, which repeats the whole prompt,
pictures included, and runs every row until the last one has ended. `repeated stem` is the same loop with the prompt
computed once and its KV repeated, on the random numbers of `shared stem`, so that both find the same tokens. Tokens are
those that count: up to and including a row's `<|traj_future_start|>`. Times include the direct prefill.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from benchmark_report import arguments, finish
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, Qwen3VLForConditionalGeneration, StoppingCriteriaList

from alpacache import randomness
from alpacache.alpamayo import Checkpoint, FrozenVLM, load_vlm, rollout
from alpacache.alpamayo.backbone import cache_argument, empty_weights, vlm_config
from alpacache.alpamayo.inputs import InputBuilder, VLMInputs
from alpacache.alpamayo.rollout import TEMPERATURE, TOP_P, RolloutSampler, pick
from alpacache.alpamayo.tiny_checkpoint import make_tiny_checkpoint
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import SampleRef
from alpacache.sources.registry import open_source

ROLLOUTS = 6
LOOPS = ["shared stem", "repeated stem", "one by one", "generate"]
Prompts = list[tuple[str, VLMInputs, VLMInputs]]
"""Sample id, and its inputs with the direct and with the reasoning prompt."""


def prompts(checkpoint: Checkpoint, samples: int, frames: int) -> Prompts:
    source, found = open_source(f"synthetic:{samples}", cameras=(CAMERAS[1],)), []
    direct, reasoning = InputBuilder(checkpoint), InputBuilder(checkpoint, reasoning="rollout")
    for clip_id in source.clip_ids:
        ref = SampleRef(clip_id=clip_id, t0_us=5_100_000)
        sample = source.load(ref, cameras=source.cameras, frames=frames)
        found.append((ref.sample_id, direct.build(sample), reasoning.build(sample)))
    return found


def shared_stem(sampler: RolloutSampler, sample_id: str, inputs: VLMInputs, rollouts: range) -> list[int]:
    prefix = sampler.vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
    tails = sampler.sample(prefix, inputs.stem_len, rollouts=len(rollouts), key=sample_id)
    return [len(tail.token_ids) - len(sampler.question) for tail in tails]


@torch.inference_mode()
def repeated_stem(sampler: RolloutSampler, sample_id: str, inputs: VLMInputs, rollouts: range) -> list[int]:
    """Rows as a batch: the KV of the reasoning prompt once for each, all rows until the last has ended."""
    vlm, text, rows, limit = sampler.vlm, sampler.vlm.model.language_model, len(rollouts), rollout.MAX_TOKENS
    prefix = vlm.prefill(inputs.input_ids, inputs.pixel_values, inputs.image_grid_thw)
    assert prefix.hidden is not None
    cache = DynamicCache(config=vlm.model.config.text_config)
    for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        cache.update(key[None].repeat(rows, 1, 1, 1), value[None].repeat(rows, 1, 1, 1), layer)
    draws = [torch.rand(limit, generator=randomness.generator("rollout", sample_id, row)) for row in rollouts]
    uniform = torch.stack(draws).to(vlm.device)
    hidden, ended, lengths = prefix.hidden[-1:].expand(rows, -1), np.zeros(rows, bool), np.full(rows, limit)
    for step in range(limit):
        tokens = pick(hidden @ sampler.head.T, uniform[:, step], masked=sampler.masked)
        last = bool(ended.all())  # one more token, for the KV of the one before
        now = (tokens == vlm.future_start_id).cpu().numpy() & ~ended
        lengths[now], ended = step + 1, ended | now
        if last:
            break
        output = text(
            inputs_embeds=text.get_input_embeddings()(tokens)[:, None],
            position_ids=torch.full((3, rows, 1), prefix.start_position + step, device=vlm.device),
            use_cache=True,
            **{cache_argument(text): cache},
        )
        hidden = output.last_hidden_state[:, 0]
    return [int(length) for length in lengths]


def one_by_one(sampler: RolloutSampler, sample_id: str, inputs: VLMInputs, rollouts: range) -> list[int]:
    """The same with one row at a time, each with a prefill of its own."""
    return [repeated_stem(sampler, sample_id, inputs, range(row, row + 1))[0] for row in rollouts]


def generate(
    model: Qwen3VLForConditionalGeneration, sampler: RolloutSampler, inputs: VLMInputs, rollouts: range
) -> list[int]:
    end, masked = sampler.vlm.future_start_id, sampler.masked

    def mask(_: Tensor, scores: Tensor) -> Tensor:
        scores[:, masked.start : masked.stop] = -torch.inf
        return scores

    class Ended:
        done: Tensor | None = None

        def __call__(self, ids: Tensor, _: Any, **__: Any) -> Tensor:
            before, self.done = self.done, (ids[:, len(inputs.input_ids) :] == end).any(1)
            stop = before is not None and bool(before.all())
            return torch.full((len(ids),), stop, device=ids.device)

    ids = torch.from_numpy(inputs.input_ids)[None].to(sampler.vlm.device)
    sequences = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=inputs.pixel_values.to(sampler.vlm.device, sampler.vlm.dtype),
        image_grid_thw=inputs.image_grid_thw.to(sampler.vlm.device),
        do_sample=True,
        top_p=TOP_P,
        temperature=TEMPERATURE,
        top_k=0,
        num_return_sequences=len(rollouts),
        max_new_tokens=rollout.MAX_TOKENS,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([mask]),
        stopping_criteria=StoppingCriteriaList([Ended()]),
    )
    texts = sequences[:, ids.shape[1] :].cpu().numpy()
    places = [np.flatnonzero(text == end) for text in texts]
    return [int(place[0]) + 1 if place.size else texts.shape[1] for place in places]


def whole_model(checkpoint: Checkpoint, sampler: RolloutSampler) -> Qwen3VLForConditionalGeneration:
    """The VLM with its head as transformers has it, around the body that is there already."""
    config = vlm_config(checkpoint)
    config._attn_implementation = "sdpa"
    with empty_weights(sampler.vlm.dtype, torch.device("meta")):
        model = Qwen3VLForConditionalGeneration(config)
    model.model = sampler.vlm.model
    model.lm_head.weight = torch.nn.Parameter(sampler.head, requires_grad=False)
    return model.eval()


def measure(
    name: str, loop: Callable[[str, VLMInputs, VLMInputs], list[int]], inputs: Prompts, *, repeats: int
) -> dict[str, Any]:
    loop(*inputs[0])
    best, lengths = float("inf"), [[0]]
    for _ in range(repeats):
        started = time.perf_counter()
        lengths = [loop(*one) for one in inputs]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    tokens = sum(map(sum, lengths))
    return {"loop": name, "seconds": best, "tokens": tokens, "tokens_s": tokens / best}


def rows(vlm: FrozenVLM, checkpoint: Checkpoint, options: argparse.Namespace) -> list[dict[str, Any]]:
    sampler = RolloutSampler.load(checkpoint, vlm, InputBuilder(checkpoint))
    model, numbers = whole_model(checkpoint, sampler), range(ROLLOUTS)
    inputs = prompts(checkpoint, 1 if options.quick else 4, options.frames)
    loops: dict[str, Callable[[str, VLMInputs, VLMInputs], list[int]]] = {
        "shared stem": lambda name, direct, _: shared_stem(sampler, name, direct, numbers),
        "repeated stem": lambda name, _, asked: repeated_stem(sampler, name, asked, numbers),
        "one by one": lambda name, _, asked: one_by_one(sampler, name, asked, numbers),
        "generate": lambda name, _, asked: generate(model, sampler, asked, numbers),
    }
    found = [measure(name, loops[name], inputs, repeats=options.repeats) for name in options.loops]
    return [row | {"against_shared": row["tokens_s"] / found[0]["tokens_s"]} for row in found]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a complete checkpoint; by default a tiny one with random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--loops", nargs="+", default=LOOPS, choices=LOOPS, help="the first is compared with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=rollout.MAX_TOKENS, help="of a rollout at most")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(rollout, "MAX_TOKENS", options.tokens):
        directory = options.model or make_tiny_checkpoint(Path(folder) / "Tiny-R1")
        checkpoint = Checkpoint(str(directory))
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        found = rows(load_vlm(checkpoint, dtype=dtype, device=options.device), checkpoint, options)
    finish("rollout", found, options, hardware=torch.cuda.get_device_name() if options.device != "cpu" else None)


if __name__ == "__main__":
    main()

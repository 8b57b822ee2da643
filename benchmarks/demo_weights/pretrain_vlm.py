"""Pre-training of the demo's tiny VLM; `make_weights.py` runs it.

A randomly initialised VLM knows nothing of roads, and an expert cannot learn from features that do not hold the road.
So the VLM is trained here as Alpamayo's first stage trains the real one: predict the discrete tokens of the future
trajectory from images and ego history, on generated drives. After that it stays frozen.

The future tokens are predicted in parallel from `<|traj_future|>` placeholders, not from the true tokens before them:
with those in sight a model copies the last curvature and never looks at the picture. Every second waypoint is enough.
Before that the vision tower alone is warmed up on the same targets through a small head that is thrown away: without
this the whole model sits on a plateau for thousands of steps, predicting straight.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import vlm_config
from alpacache.alpamayo.inputs import InputBuilder, to_patches
from alpacache.alpamayo.tiny_checkpoint import ACTION_CONSTANTS, FUTURE_BINS, make_tiny_checkpoint
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.sample import SampleRef
from alpacache.sources.synthetic import SyntheticSource

_log = logging.getLogger(__name__)
SEED = 7_000_000
"""Seed of the pre-training drives; no demo drive has it."""
MIX = {"straight": 0.2, "early_curve": 0.15, "late_curve": 0.6, "curve_end": 0.05}
T0_US = (4_600_000, 5_100_000, 5_600_000)
STRIDE = 2
"""Every second waypoint is predicted."""
LIMIT = 4.0
"""Normalised actions beyond this fall into the outermost bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drives:
    """Rendered samples in memory."""

    frames: NDArray[np.uint8]
    """`[N, 3, 128, 256]`, one front image each."""
    history_xyz: NDArray[np.float32]
    history_rot: NDArray[np.float32]
    future_xyz: NDArray[np.float32]
    action: Tensor
    """`[N, 64, 2]` normalised."""

    def __len__(self) -> int:
        return len(self.frames)


def render(count: int, *, seed: int, space: UnicycleActionSpace, t0s_us: tuple[int, ...] = T0_US) -> Drives:
    """Samples of `count` generated clips at the given times."""
    source = SyntheticSource(count, seed=seed, mix=MIX)
    samples = [
        source.load(SampleRef(clip_id=clip, t0_us=t0), cameras=source.cameras, frames=1)
        for clip in source.clip_ids
        for t0 in t0s_us
    ]
    poses = {
        name: np.stack([getattr(s, name) for s in samples])
        for name in ("history_xyz", "history_rot", "future_xyz", "future_rot")
    }
    action = space.to_action(*(torch.from_numpy(value) for value in poses.values()))
    del poses["future_rot"]
    return Drives(frames=np.stack([sample.frames[0, -1] for sample in samples]), action=action, **poses)


class Batches:
    """Drives as VLM inputs: the prompt is the same for all but for the history tokens."""

    def __init__(self, builder: InputBuilder, drives: Drives) -> None:
        self.builder, self.drives = builder, drives
        source = SyntheticSource(1, seed=SEED)
        sample = source.load(SampleRef(clip_id=source.clip_ids[0], t0_us=T0_US[0]), cameras=source.cameras, frames=1)
        template = builder.build(sample)
        self.template = builder.tokenizer.encode(template.text)
        self.future = np.full(2 * (64 // STRIDE), builder.config.traj_token_ids["future"], np.int64)

    def make(self, rows: NDArray[np.int64], flip: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and target actions `[B, 2 * 64 / STRIDE]`; `flip` mirrors picture, history and target."""
        frames, history, action = self.drives.frames[rows], self.drives.history_xyz[rows], self.drives.action[rows]
        if flip:
            frames = frames[..., ::-1]
            history = history * np.asarray([1, -1, 1], np.float32)
            action = mirror(action)
        limits = {"min_pixels": self.builder.config.min_pixels, "max_pixels": self.builder.config.max_pixels}
        pixels, grid = to_patches(np.ascontiguousarray(frames), patch=16, merge=2, temporal=2, **limits)
        ids = [
            np.concatenate([self.builder.tokenizer.fuse_history(self.template, row), self.future]) for row in history
        ]
        input_ids = torch.from_numpy(np.stack(ids))
        kinds = (input_ids == self.builder.tokenizer.id_of("<|image_pad|>")).int()
        inputs = {"input_ids": input_ids, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
        return inputs, action[:, STRIDE // 2 :: STRIDE].flatten(1)


def mirror(action: Tensor) -> Tensor:
    """Left for right: the curvature, un-normalised, changes sign."""
    mean, std = ACTION_CONSTANTS["curvature_mean"], ACTION_CONSTANTS["curvature_std"]
    curvature = -(action[..., 1] * std + mean)
    return torch.stack([action[..., 0], (curvature - mean) / std], dim=-1)


def soft_targets(action: Tensor) -> Tensor:
    """Bin probabilities `[B, tokens, bins]`: a Gaussian of one bin around the value; near bins are nearly right."""
    place = (action.clamp(-LIMIT, LIMIT) + LIMIT) / (2 * LIMIT) * (FUTURE_BINS - 1)
    return torch.softmax(-0.5 * (torch.arange(FUTURE_BINS) - place[..., None]) ** 2, dim=-1)


def expected_action(logits: Tensor) -> Tensor:
    """Mean action `[B, 64, 2]` under the bins `[B, tokens, bins]`; waypoints in between take their neighbour's."""
    centres = torch.linspace(-LIMIT, LIMIT, FUTURE_BINS)
    return (logits.softmax(-1) @ centres).view(len(logits), 64 // STRIDE, 2).repeat_interleave(STRIDE, dim=1)


def predict(model: Qwen3VLForConditionalGeneration, first_bin: int, inputs: dict[str, Tensor]) -> Tensor:
    """Logits `[B, tokens, bins]` of the future tokens; each is predicted at its own placeholder."""
    hidden = model.model(**inputs).last_hidden_state[:, -2 * (64 // STRIDE) :]
    logits: Tensor = hidden @ model.lm_head.weight[first_bin : first_bin + FUTURE_BINS].T
    return logits


def warm_up(
    model: Qwen3VLForConditionalGeneration, train: Batches, held_out: Batches, *, steps: int, batch: int, lr: float
) -> None:
    """Teach the vision tower the curvature ahead, from its image tokens and the current speed.

    Two heads: one sees all tokens in their places and learns quickly, the other must do with any one token. Attention
    starts out as a mean over tokens, so what each of them holds the language model finds at once.
    """
    visual, hidden = model.model.visual, model.config.text_config.hidden_size
    tokens = int((train.template == model.config.image_token_id).sum())
    heads = nn.ModuleList(
        nn.Sequential(nn.Linear(size + 1, 256), nn.GELU(), nn.Linear(256, 64 // STRIDE))
        for size in (tokens * hidden, hidden)
    )
    optimizer = torch.optim.AdamW([*visual.parameters(), *heads.parameters()], lr=lr, weight_decay=0.01)
    order = np.random.default_rng(1)

    def error(batches: Batches, rows: NDArray[np.int64], flip: bool) -> tuple[Tensor, Tensor]:
        inputs, action = batches.make(rows, flip=flip)
        image = visual(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True).pooler_output
        last_step_m = torch.from_numpy(np.linalg.norm(batches.drives.history_xyz[rows, -2], axis=-1))[:, None]
        curvature = action.view(len(rows), -1, 2)[..., 1]
        image = image.view(len(rows), tokens, hidden)
        together = heads[0](torch.cat([image.flatten(1), last_step_m], dim=-1))
        speeds = last_step_m[:, None].expand(-1, tokens, -1)
        alone = heads[1](torch.cat([F.layer_norm(image, (hidden,)), speeds], dim=-1))
        errors = [F.mse_loss(together, curvature), F.mse_loss(alone, curvature[:, None].expand_as(alone))]
        return torch.stack(errors), curvature.var()

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        loss, _ = error(train, order.integers(len(train.drives), size=batch), bool(order.integers(2)))
        optimizer.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                loss, variance = error(held_out, np.arange(len(held_out.drives)), False)
            together, alone = (1 - loss / variance).tolist()
            _log.info("warm-up %d: explained %.3f by all tokens, %.3f by each", step + 1, together, alone)


@torch.no_grad()
def heading_slope(
    model: Qwen3VLForConditionalGeneration, first_bin: int, batches: Batches, space: UnicycleActionSpace
) -> float:
    """Slope of predicted against true heading change where the history is straight and the road curves later."""
    truth: list[Tensor] = []
    predicted: list[Tensor] = []
    drives = batches.drives
    late = np.flatnonzero(np.abs(drives.history_xyz[:, 0, 1]) < 0.05)
    for start in range(0, len(late), 32):
        rows = late[start : start + 32]
        inputs, _ = batches.make(rows, flip=False)
        action = expected_action(predict(model, first_bin, inputs))
        poses = torch.from_numpy(drives.history_xyz[rows]), torch.from_numpy(drives.history_rot[rows])
        for actions, into in ((action, predicted), (drives.action[rows], truth)):
            rot = space.to_path(actions, *poses)[1][:, -1]
            into.append(torch.atan2(rot[:, 1, 0], rot[:, 0, 0]))
    x, y = torch.cat(truth), torch.cat(predicted)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def pretrain(
    out: Path, *, clips: int = 3000, steps: int = 800, warm_up_steps: int = 1500, batch: int = 16, lr: float = 1e-3
) -> dict[str, Any]:
    """Train, write `demo_vlm.safetensors` (bfloat16) and return what was done, as plain JSON."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    base = make_tiny_checkpoint(out / "checkpoint", seed=0)
    checkpoint = Checkpoint(str(base))
    builder = InputBuilder(checkpoint)
    first_bin = checkpoint.config.traj_token_start
    space = checkpoint.config.action_space
    model = Qwen3VLForConditionalGeneration(vlm_config(checkpoint))
    nn.init.normal_(model.model.visual.pos_embed.weight, std=1.0)  # as loud as the patches, or no token knows its place
    torch._dynamo.config.recompile_limit = 64
    for block in (*model.model.language_model.layers, *model.model.visual.blocks):
        block.compile()  # a third faster; nothing else depends on it
    started = time.monotonic()
    train = Batches(builder, render(clips, seed=SEED, space=space))
    held_out = Batches(builder, render(100, seed=SEED + 1, space=space, t0s_us=(5_100_000,)))
    _log.info("rendered %d samples in %.0f s", len(train.drives), time.monotonic() - started)
    warm_up(model, train, held_out, steps=warm_up_steps, batch=32, lr=lr)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    order = np.random.default_rng(0)
    running = 0.0
    for step in range(steps):
        rate = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, action = train.make(order.integers(len(train.drives), size=batch), flip=bool(order.integers(2)))
        loss = F.cross_entropy(predict(model, first_bin, inputs).flatten(0, 1), soft_targets(action).flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = 0.98 * running + 0.02 * float(loss.detach()) if step else float(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            slope = heading_slope(model, first_bin, held_out, space)
            _log.info("step %d: loss %.4f, slope %.3f, %.0f s", step + 1, running, slope, time.monotonic() - started)
            _save(model, out)
    return {
        "drives": {"seed": SEED, "mix": MIX, "t0_us": list(T0_US), "samples": len(train.drives)},
        "steps": {"warm_up": warm_up_steps, "tokens": steps, "batch": batch, "lr": lr},
        "loss": round(running, 4),
        "late_curve_heading_slope": round(slope, 3),
        "torch": torch.__version__,
    }


def _save(model: Qwen3VLForConditionalGeneration, out: Path) -> None:
    state = {f"vlm.{name}": tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, out / "demo_vlm.safetensors", {"format": "pt"})

"""Pre-training of the demo's tiny VLM; `make_weights.py` runs it.

A randomly initialised VLM knows nothing of roads, and an expert cannot learn from features that do not hold the road.
So the VLM is trained here as Alpamayo's first stage trains the real one: predict the discrete tokens of the future
trajectory from images and ego history, on generated drives. After that it stays frozen.

The future tokens are predicted in parallel from `<|traj_future|>` placeholders, not from the true tokens before them:
with those in sight a model copies the last curvature and never looks at the picture. Every second waypoint is enough.
Before that the vision tower alone is warmed up on the same targets through a small head that is thrown away: without
this the whole model sits on a plateau for thousands of steps, predicting straight.

Most of the cars have strayed from the middle of their lane, and small heads, thrown away too, must find the lane in
what every layer offers to attention: of tokens alone and of cars that are where they should be, a VLM learns the bends
ahead, but neither where in the lane nor how askew it is, and what a car cannot see it cannot correct.
"""

import logging
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing import get_context
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
from alpacache.alpamayo.text_layers import LayerKV, text_rows
from alpacache.alpamayo.tiny_checkpoint import ACTION_CONSTANTS, FUTURE_BINS, make_tiny_checkpoint
from alpacache.alpamayo.vlm import FrozenVLM
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.sample import SampleRef
from alpacache.sources.road import POSE_STEP_US, lane_place
from alpacache.sources.synthetic import SyntheticSource

_log = logging.getLogger(__name__)
SEED = 7_000_000
"""Seed of the pre-training drives; no demo drive has it."""
MIX = {"straight": 0.2, "early_curve": 0.15, "late_curve": 0.6, "curve_end": 0.05}
RECOVERY = {"recovery": 1.0}
"""Cars that have strayed from the middle of their lane."""
T0_US = (4_600_000, 5_100_000, 5_600_000)
LANE_M = (0.0, 6.0, 12.0, 20.0, 30.0, 45.0)
"""Where along the road the heads must tell how far to the left the middle of the lane lies."""
STRIDE = 2
"""Every second waypoint is predicted."""
LIMIT = 4.0
"""Normalised actions beyond this fall into the outermost bin."""
_CHUNK = 50
"""Clips that a process renders at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drives:
    """Rendered samples in memory."""

    frames: NDArray[np.uint8]
    """`[N, 3, 128, 256]`, one front image each."""
    history_xyz: NDArray[np.float32]
    history_rot: NDArray[np.float32]
    action: NDArray[np.float32]
    """`[N, 64, 2]` normalised."""
    lane: NDArray[np.float32]
    """`[N, len(LANE_M)]` metres to the left of the car's axis at which the middle of its lane lies so far ahead."""
    place: NDArray[np.float32]
    """`[N, 3]` how far the car is to the left of its lane's middle (m), how far it is turned to the left of the road
    (rad), and the road's curvature 10 m ahead (1/m)."""

    def __len__(self) -> int:
        return len(self.frames)


def joined(parts: list[Drives]) -> Drives:
    """Samples of all."""
    return Drives(**{one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(Drives)})


def render(
    count: int,
    *,
    seed: int,
    space: UnicycleActionSpace,
    processes: Executor,
    mix: Mapping[str, float] = MIX,
    t0s_us: tuple[int, ...] = T0_US,
) -> Drives:
    """Samples of `count` generated clips at the given times."""
    part = partial(_render_part, count, seed=seed, space=space, mix=mix, t0s_us=t0s_us)
    return joined(list(processes.map(part, range(0, count, _CHUNK))))


def _render_part(
    count: int, first: int, *, seed: int, space: UnicycleActionSpace, mix: Mapping[str, float], t0s_us: tuple[int, ...]
) -> Drives:
    """Samples of the clips from `first` on, one chunk of them."""
    torch.set_num_threads(1)
    source = SyntheticSource(count, seed=seed, mix=mix)
    wanted = [(clip, t0) for clip in source.clip_ids[first : first + _CHUNK] for t0 in t0s_us]
    samples = [source.load(SampleRef(clip_id=clip, t0_us=t0), cameras=source.cameras, frames=1) for clip, t0 in wanted]
    names = ("history_xyz", "history_rot", "future_xyz", "future_rot")
    poses = {name: np.stack([getattr(sample, name) for sample in samples]) for name in names}
    action = space.to_action(*(torch.from_numpy(value) for value in poses.values()))
    lanes, places = zip(*(_lane(source, clip, t0) for clip, t0 in wanted), strict=True)
    return Drives(
        frames=np.stack([sample.frames[0, -1] for sample in samples]),
        history_xyz=poses["history_xyz"],
        history_rot=poses["history_rot"],
        action=action.float().numpy(),
        lane=np.stack(lanes).astype(np.float32),
        place=np.stack(places).astype(np.float32),
    )


def _lane(source: SyntheticSource, clip_id: str, t0_us: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`Drives.lane` and `Drives.place` of a sample."""
    drive = source.drive(clip_id)
    at, points = t0_us // POSE_STEP_US, drive.road.points.astype(np.float64)
    z, w = drive.track.quaternion_xyzw[at, 2:]
    (x, y), yaw = drive.track.xyz[at, :2], 2 * np.arctan2(z, w)
    arc, offset = lane_place(drive.road, drive.track.xyz[at, :2], near_m=float(drive.arc_m[at]))
    along = points[:, 6] + drive.road.start_m
    ahead_x, ahead_y = (np.interp(arc + np.asarray(LANE_M), along, points[:, axis]) for axis in (0, 1))
    lane = np.cos(yaw) * (ahead_y - y) - np.sin(yaw) * (ahead_x - x)
    turned = (yaw - np.interp(arc, along, points[:, 5]) + np.pi) % (2 * np.pi) - np.pi
    return lane, np.asarray([offset, turned, np.interp(arc + 10, along, points[:, 4])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the VLM is given, and what it should tell, on its device."""

    ids: Tensor
    """`[B, T]`, the future's placeholders included."""
    pixels: Tensor
    grid: Tensor
    action: Tensor
    """`[B, 2 * 64 / STRIDE]` normalised."""
    lane: Tensor
    """`[B, len(LANE_M)]`, each of variance 1 over the drives."""
    last_step_m: Tensor
    """`[B, 1]` the way of the last 0.1 s, for the heads of the warm-up."""


class Batches:
    """Drives as VLM inputs: the prompt is the same for all but for the history tokens."""

    def __init__(self, builder: InputBuilder, drives: Drives, device: torch.device, lane_std: Tensor) -> None:
        self.builder, self.drives, self.device = builder, drives, device
        source = SyntheticSource(1, seed=SEED)
        sample = source.load(SampleRef(clip_id=source.clip_ids[0], t0_us=T0_US[0]), cameras=source.cameras, frames=1)
        template = builder.tokenizer.encode(builder.build(sample).text)
        future = np.full(2 * (64 // STRIDE), builder.config.traj_token_ids["future"], np.int64)
        self.prefix_len = len(template)
        self.template = torch.from_numpy(np.concatenate([template, future]))
        mirrored = drives.history_xyz * np.asarray([1, -1, 1], np.float32)
        self.ids = [self._ids(template, future, history) for history in (drives.history_xyz, mirrored)]
        self.frames = torch.from_numpy(drives.frames).to(device)
        action = torch.from_numpy(drives.action)
        self.action = [each[:, STRIDE // 2 :: STRIDE].flatten(1).to(device) for each in (action, mirror(action))]
        self.lane = torch.from_numpy(drives.lane).to(device) / lane_std.to(device)
        self.last_step_m = torch.from_numpy(np.linalg.norm(drives.history_xyz[:, -2], axis=-1))[:, None].to(device)

    def __len__(self) -> int:
        return len(self.drives)

    def _ids(self, template: NDArray[np.int64], future: NDArray[np.int64], history: NDArray[np.float32]) -> Tensor:
        fused = [np.concatenate([self.builder.tokenizer.fuse_history(template, row), future]) for row in history]
        return torch.from_numpy(np.stack(fused)).to(self.device)

    def make(self, rows: NDArray[np.int64], *, flip: bool = False) -> Inputs:
        """Inputs of these samples; `flip` mirrors picture, history and targets."""
        chosen = torch.from_numpy(rows).to(self.device)
        frames = self.frames[chosen]
        if flip:
            frames = frames.flip(-1)
        config = self.builder.config
        pixels, grid = to_patches(
            np.broadcast_to(np.uint8(0), frames.shape),  # only the shape counts where pixels are on the device already
            **{"patch": 16, "merge": 2, "temporal": 2},
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            resize=lambda _, size: iter(frames.float().div_(255)),
            device=self.device,
        )
        return Inputs(
            ids=self.ids[flip][chosen],
            pixels=pixels,
            grid=grid,
            action=self.action[flip][chosen],
            lane=self.lane[chosen] * (-1 if flip else 1),
            last_step_m=self.last_step_m[chosen],
        )


class Student(nn.Module):
    """The VLM in training, and the heads that must find the lane in it."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, template: Tensor, device: torch.device) -> None:
        super().__init__()
        self.model = model.to(device)
        FrozenVLM(model.model, future_start_id=-1)  # all pictures are one call of attention, their places known
        model.requires_grad_(True).train()
        image = template == model.config.image_token_id
        self.image = slice(int(image.nonzero()[0, 0]), int(image.nonzero()[-1, 0]) + 1)
        self.tokens = self.image.stop - self.image.start
        grid = torch.tensor([[1, 8, 16]])
        assert int(grid.prod()) == 4 * self.tokens
        found, _ = model.model.get_rope_index(template[None], mm_token_type_ids=image.int()[None], image_grid_thw=grid)
        self.register_buffer("positions", found.to(device))
        text: Any = model.config.text_config
        values = text.num_key_value_heads * text.head_dim
        self.lane_heads = nn.ModuleList(nn.Linear(values, len(LANE_M)) for _ in range(text.num_hidden_layers))
        self.lane_heads.to(device)

    def look(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Image embeddings `[B, tokens, C]` and what is added to them behind the first layer."""
        seen = self.model.model.visual(inputs.pixels, grid_thw=inputs.grid)
        batch = len(inputs.ids)
        (deeper,) = seen.deepstack_features
        return seen.pooler_output.view(batch, self.tokens, -1), deeper.view(batch, self.tokens, -1)

    def forward(self, inputs: Inputs) -> tuple[Tensor, list[LayerKV]]:
        """Last hidden states `[B, T, C]`, and the keys and values of each layer."""
        text: Any = self.model.model.language_model
        image, deeper = self.look(inputs)
        words = self.model.get_input_embeddings()(inputs.ids)
        hidden = torch.cat([words[:, : self.image.start], image, words[:, self.image.stop :]], dim=1)
        rows = text_rows(text, hidden, self.positions.expand(3, *inputs.ids.shape))
        cache = []
        for number, layer in enumerate(text.layers):
            kv = LayerKV()
            rows.hidden = rows.run_layer(layer, rows.hidden, rows.angles, kv, rows.mask)
            if number == 0:
                rows.hidden = rows.hidden + F.pad(deeper, (0, 0, self.image.start, hidden.shape[1] - self.image.stop))
            cache.append(kv)
        return text.norm(rows.hidden), cache

    def predict(self, hidden: Tensor, first_bin: int) -> Tensor:
        """Logits `[B, tokens, bins]` of the future tokens; each is predicted at its own placeholder."""
        weight = self.model.lm_head.weight[first_bin : first_bin + FUTURE_BINS]
        return hidden[:, -2 * (64 // STRIDE) :] @ weight.T

    def token_loss(self, hidden: Tensor, action: Tensor, first_bin: int) -> Tensor:
        """Cross-entropy of the future tokens."""
        return F.cross_entropy(self.predict(hidden, first_bin).flatten(0, 1), soft_targets(action).flatten(0, 1))

    def lanes(self, cache: list[LayerKV]) -> Tensor:
        """`[layers, B, len(LANE_M)]`: the lane as each layer tells an attention that weighs all image tokens alike."""
        told = [kv.values[:, :, self.image].mean(2).flatten(1) for kv in cache]
        return torch.stack([head(one) for head, one in zip(self.lane_heads, told, strict=True)])


def mirror(action: Tensor) -> Tensor:
    """Left for right: the curvature, un-normalised, changes sign."""
    mean, std = ACTION_CONSTANTS["curvature_mean"], ACTION_CONSTANTS["curvature_std"]
    curvature = -(action[..., 1] * std + mean)
    return torch.stack([action[..., 0], (curvature - mean) / std], dim=-1)


def soft_targets(action: Tensor) -> Tensor:
    """Bin probabilities `[B, tokens, bins]`: a Gaussian of one bin around the value; near bins are nearly right."""
    place = (action.clamp(-LIMIT, LIMIT) + LIMIT) / (2 * LIMIT) * (FUTURE_BINS - 1)
    return torch.softmax(-0.5 * (torch.arange(FUTURE_BINS, device=action.device) - place[..., None]) ** 2, dim=-1)


def expected_action(logits: Tensor) -> Tensor:
    """Mean action `[B, 64, 2]` under the bins `[B, tokens, bins]`; waypoints in between take their neighbour's."""
    centres = torch.linspace(-LIMIT, LIMIT, FUTURE_BINS, device=logits.device)
    return (logits.softmax(-1) @ centres).view(len(logits), 64 // STRIDE, 2).repeat_interleave(STRIDE, dim=1)


def rate_at(step: int, steps: int, *, warm: int, least: float, spent: float) -> float:
    """Share of the learning rate: a ramp, then a cosine, which comes to its end early where the time does."""
    done = max(step / steps, spent)
    return min(1.0, (step + 1) / warm) * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def warm_up(
    student: Student, train: Batches, held_out: Batches, *, steps: int, batch: int, lr: float, limit_s: float
) -> int:
    """Teach the vision tower curvature and lane ahead, from its image tokens and the current speed. Returns the steps.

    Two heads: one sees all tokens in their places and learns quickly, the other must do with any one token. Attention
    starts out as a mean over tokens, so what each of them holds the language model finds at once.
    """
    visual, hidden = student.model.model.visual, student.model.config.text_config.hidden_size
    heads = nn.ModuleList(
        nn.Sequential(nn.Linear(size + 1, 256), nn.GELU(), nn.Linear(256, 64 // STRIDE + len(LANE_M)))
        for size in (student.tokens * hidden, hidden)
    ).to(train.device)
    fused = train.device.type == "cuda"
    optimizer = torch.optim.AdamW([*visual.parameters(), *heads.parameters()], lr=lr, weight_decay=0.01, fused=fused)
    order = np.random.default_rng(1)

    def error(batches: Batches, rows: NDArray[np.int64], flip: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Errors by both heads of the curvature and of the lane, and the curvature's variance."""
        inputs = batches.make(rows, flip=flip)
        image, _ = student.look(inputs)
        curvature = inputs.action.view(len(rows), -1, 2)[..., 1]
        together = heads[0](torch.cat([image.flatten(1), inputs.last_step_m], dim=-1))
        speeds = inputs.last_step_m[:, None].expand(-1, student.tokens, -1)
        alone = heads[1](torch.cat([F.layer_norm(image, (hidden,)), speeds], dim=-1))
        wanted = torch.cat([curvature, inputs.lane], dim=-1)
        errors = torch.stack([((together - wanted) ** 2).mean(0), ((alone - wanted[:, None]) ** 2).mean((0, 1))])
        bends = 64 // STRIDE
        return errors[:, :bends].mean(1), errors[:, bends:].mean(1), curvature.var()

    started = time.monotonic()
    for step in range(steps):
        spent = (time.monotonic() - started) / limit_s
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(step, steps, warm=50, least=0.1, spent=spent)
        bends, lanes, _ = error(train, order.integers(len(train), size=batch), bool(order.integers(2)))
        optimizer.zero_grad()
        (bends.sum() + lanes.sum()).backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps or spent >= 1:
            with torch.no_grad():
                bends, lanes, variance = error(held_out, np.arange(min(256, len(held_out))), False)
            told = [f"{number:.3f}" for number in [*(1 - bends / variance).tolist(), *(1 - lanes).tolist()]]
            seconds = time.monotonic() - started
            _log.info(
                "warm-up %d, %.0f s: explained by all tokens and by each: bends %s, %s, lane %s, %s",
                *(step + 1, seconds, *told),
            )
        if spent >= 1:
            break
    return step + 1


@torch.no_grad()
def heading_slope(student: Student, first_bin: int, batches: Batches, space: UnicycleActionSpace) -> float:
    """Slope of predicted against true heading change where the history is straight and the road curves later."""
    truth: list[Tensor] = []
    predicted: list[Tensor] = []
    drives = batches.drives
    late = np.flatnonzero(np.abs(drives.history_xyz[:, 0, 1]) < 0.05)
    for start in range(0, len(late), 32):
        rows = late[start : start + 32]
        action = expected_action(student.predict(student(batches.make(rows))[0], first_bin)).cpu()
        poses = torch.from_numpy(drives.history_xyz[rows]), torch.from_numpy(drives.history_rot[rows])
        for actions, into in ((action, predicted), (torch.from_numpy(drives.action[rows]), truth)):
            rot = space.to_path(actions, *poses)[1][:, -1]
            into.append(torch.atan2(rot[:, 1, 0], rot[:, 0, 0]))
    x, y = torch.cat(truth), torch.cat(predicted)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@torch.no_grad()
def readable(student: Student, batches: Batches) -> dict[str, float]:
    """How much of the variance of `Drives.place` a ridge regression on all keys and values explains, on every fourth.

    The best of three penalties: without a place to look there is none to find.
    """
    rows = []
    for start in range(0, len(batches), 50):
        _, cache = student(batches.make(np.arange(start, min(start + 50, len(batches)))))
        kv = torch.stack([torch.stack([one.keys, one.values], 1) for one in cache], 1)
        rows.append(kv[..., : batches.prefix_len, :].bfloat16().float().flatten(1).cpu())
    features = torch.cat(rows)
    features = (features - features.mean(0)) / (features.std(0) + 1e-3)
    kernel = (features @ features.T / features.shape[1]).double()
    places, train = torch.from_numpy(batches.drives.place).double(), torch.arange(len(kernel)) % 4 != 0
    mean, best = places[train].mean(0), torch.full((places.shape[1],), -torch.inf, dtype=torch.float64)
    for penalty in (1e-3, 1e-2, 1e-1):
        own = kernel[train][:, train] + penalty * torch.eye(int(train.sum()), dtype=torch.float64)
        found = kernel[~train][:, train] @ torch.linalg.solve(own, places[train] - mean) + mean
        missed = ((found - places[~train]) ** 2).sum(0) / ((places[~train] - mean) ** 2).sum(0)
        best = torch.maximum(best, 1 - missed)
    return dict(zip(("lateral_place", "angle_to_road", "curvature_10m"), best.numpy().round(2).tolist(), strict=True))


def pretrain(
    out: Path,
    *,
    device: str = "cpu",
    clips: int = 8000,
    strayed_clips: int = 36000,
    steps: int = 8000,
    warm_up_steps: int = 3000,
    batch: int = 128,
    lr: float = 1e-3,
    limit_s: float = math.inf,
) -> dict[str, Any]:
    """Train, write `demo_vlm.safetensors` (bfloat16) and return what was done, as plain JSON.

    `limit_s` bounds the training (rendering not included): rates then fall as if the steps had come to their end.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    base = make_tiny_checkpoint(out / "checkpoint", seed=0)
    checkpoint = Checkpoint(str(base))
    builder = InputBuilder(checkpoint)
    first_bin, space = checkpoint.config.traj_token_start, checkpoint.config.action_space
    started = time.monotonic()
    model = Qwen3VLForConditionalGeneration(vlm_config(checkpoint))
    nn.init.normal_(model.model.visual.pos_embed.weight, std=1.0)  # as loud as the patches, or no token knows its place
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as processes:
        usual = partial(render, space=space, processes=processes)
        strayed = partial(usual, mix=RECOVERY, t0s_us=(5_100_000,))
        drives = joined([usual(clips, seed=SEED), strayed(strayed_clips, seed=SEED + 4)])
        held_out = usual(100, seed=SEED + 1, t0s_us=(5_100_000,))
        held_out_strayed = strayed(min(1500, strayed_clips), seed=SEED + 5)
    _log.info("rendered %d samples in %.0f s", len(drives), time.monotonic() - started)
    lane_std = torch.from_numpy(drives.lane.std(0))
    train, judged, recovering = (Batches(builder, one, where, lane_std) for one in (drives, held_out, held_out_strayed))
    _log.info("samples are where they are wanted after %.0f s", time.monotonic() - started)
    student, began = Student(model, train.template, where), time.monotonic()
    warmed = warm_up(student, train, recovering, steps=warm_up_steps, batch=batch, lr=lr, limit_s=0.3 * limit_s)
    fused = where.type == "cuda"
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    order = np.random.default_rng(0)
    left_s, since = limit_s - (time.monotonic() - began), time.monotonic()
    for step in range(steps):
        spent = (time.monotonic() - since) / left_s
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_at(step, steps, warm=100, least=0.02, spent=spent)
        inputs = train.make(order.integers(len(train), size=batch), flip=bool(order.integers(2)))
        hidden, cache = student(inputs)
        tokens = student.token_loss(hidden, inputs.action, first_bin)
        lanes = ((student.lanes(cache) - inputs.lane) ** 2).mean()
        optimizer.zero_grad()
        (tokens + lanes).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps or spent >= 1:
            slope = heading_slope(student, first_bin, judged, space)
            lost = held_out_losses(student, recovering, first_bin)
            _log.info(
                "step %d, %.0f s: tokens %.4f (held out %.4f), lane %.4f (held out %s), slope %.3f",
                *(
                    step + 1,
                    time.monotonic() - began,
                    float(tokens.detach()),
                    lost[0],
                    float(lanes.detach()),
                    lost[1],
                    slope,
                ),
            )
            _save(model, out)
        if spent >= 1:
            break
    found = readable(student, recovering)
    _log.info("explained of held-out recoveries by a ridge regression on keys and values: %s", found)
    return {
        "drives": {"seed": SEED, "mix": MIX, "clips": clips, "recoveries": strayed_clips, "t0_us": list(T0_US)},
        "steps": {"warm_up": warmed, "tokens": step + 1, "batch": batch, "lr": lr},
        "loss": round(float(tokens.detach()), 4),
        "late_curve_heading_slope": round(slope, 3),
        "explained_by_keys_and_values": found,
        "device": torch.cuda.get_device_name(where) if fused else "cpu",
        "torch": torch.__version__,
    }


@torch.no_grad()
def held_out_losses(student: Student, batches: Batches, first_bin: int) -> tuple[float, list[float]]:
    """Cross-entropy of the tokens, and the share of the lane's variance that each layer misses."""
    inputs = batches.make(np.arange(min(256, len(batches))))
    hidden, cache = student(inputs)
    tokens = student.token_loss(hidden, inputs.action, first_bin)
    lanes = ((student.lanes(cache) - inputs.lane) ** 2).mean((1, 2))
    return float(tokens), [round(value, 4) for value in lanes.tolist()]


def _save(model: Qwen3VLForConditionalGeneration, out: Path) -> None:
    state = {
        f"vlm.{name}": tensor.detach().bfloat16().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(state, out / "demo_vlm.safetensors", {"format": "pt"})

"""Inputs of a probe: one vector a sample from the cache, the ego history as its rival, targets from the true future.

Keys and values are read only for layers that are asked for, one sample at a time, and pooled before the next. No model
is loaded. Poses alone decide the targets, so no model can move them.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alpacache import randomness
from alpacache.cached_samples.features import KV_SHAPE, POSE_FIELDS, from_bf16_bits, stored_layers, stored_strata
from alpacache.cached_samples.identity import store_codec
from alpacache.driving.sample import DT_S, FUTURE_S, Floats, SampleRef
from alpacache.driving.strata import MOVING_MPS, Strata, heading
from alpacache.errors import UsageError
from alpacache.evaluation.config import Layers, Pool
from alpacache.evaluation.judging import LeftOut
from alpacache.layer_choice import layers_text
from alpacache.metrics.baselines import SPEED_STEPS
from alpacache.prefix.codecs import tensor_codec
from alpacache.progress import OnProgress, Progress, ignore
from cache_store import CacheReader, KVCodec, SampleReadError

HIDDEN = "hidden"
"""Name of the VLM's hidden states after its last layer and final norm."""
HEADING, CURVATURE, SPEED = "heading change", "curvature", "speed change"
TARGETS = {HEADING: "rad", CURVATURE: "1/m", SPEED: "m/s"}
"""Name -> unit of each target, in the order of columns."""
SKETCH = 32
"""Random projections of a token: enough to tell that one of thousands knows something, and few enough to keep."""
LEAST_PATH_M = MOVING_MPS * FUTURE_S
"""Least length that a path's curvature is computed with: the heading of a standing vehicle is noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeData:
    """Features, history and targets of N samples."""

    clips: Sequence[str]
    """Clip id of each sample."""
    features: dict[str, NDArray[np.float32]]
    """Pooled vectors `[N, D]` by set: `hidden`, `layer 0`, ..."""
    history: Floats
    """Speeds, yaw rates and positions `[N, 62]`, see `history_features`."""
    targets: Floats
    """True values `[N, 3]`, columns as in `TARGETS`."""
    late_curve: NDArray[np.bool_]
    """Membership `[N]` of the stratum `LATE_CURVE`: straight through the history, curving afterwards."""
    tokens: NDArray[np.float32] | None = None
    """Single tokens `[N, positions, SKETCH]`, by position in the prefix and each through the same random projections;
    None: only pooled vectors are known."""
    left_out: Sequence[LeftOut] = ()
    """Samples beside these that could not be read."""


def read_probe_data(
    reader: CacheReader,
    sample_ids: Sequence[str],
    *,
    layers: Layers,
    pool: Pool,
    skips: bool = False,
    on_progress: OnProgress = ignore,
) -> ProbeData:
    """Read and pool the features of these samples; with `skips` of those that can be read, unless half cannot.

    Raises `UsageError` for features that the store lacks, that are not finite, or that differ in size;
    `SampleReadError` for a sample that cannot be read and is not left out.
    """
    started = time.monotonic()
    codec = store_codec(reader.identity, store=str(reader.path))
    numbers: list[int] | None = None
    projections: Tensor | None = None
    tokens: list[NDArray[np.float32]] = []
    rows: dict[str, list[NDArray[np.float32]]] = {}
    clips, left_out = list[str](), list[LeftOut]()
    history, targets, late = [], [], []
    for done, sample_id in enumerate(sample_ids, start=1):
        try:
            if numbers is None:
                numbers = _layer_numbers(reader, sample_id, layers, codec)
            vectors = dict[str, NDArray[np.float32]]()
            for name, part in _by_token(reader, sample_id, numbers, codec):
                if not vectors:
                    projections = _projections(part) if projections is None else projections
                    sketch = _sketch(part, projections)
                vectors[name] = pooled(part, pool)
            poses = reader.read(sample_id, fields=POSE_FIELDS)
        except SampleReadError as error:
            left_out.append(LeftOut(sample_id, str(error)))
            if not skips or len(left_out) * 2 > len(sample_ids):
                raise
            continue
        for name, vector in vectors.items():
            rows.setdefault(name, []).append(vector)
            if not np.isfinite(vector).all():
                raise UsageError(
                    f"{sample_id} of {reader.path}: {name} holds NaN or infinity, which no probe can read. Check the "
                    "VLM's weights and the clip's pictures, and extract into a new store."
                )
            if vector.shape != rows[name][0].shape:
                raise UsageError(
                    f"{sample_id} of {reader.path}: {name} pools to {vector.size} numbers, "
                    f"the first sample to {rows[name][0].size}; probe a store of one model."
                )
        tokens.append(sketch)
        clips.append(SampleRef.parse(sample_id).clip_id)
        strata = stored_strata(sample_id, poses)
        history.append(history_features(poses["history_xyz"], poses["history_rot"]))
        targets.append(future_targets(poses["history_xyz"], poses["future_xyz"], strata))
        late.append(strata.straight_history_late_curve)
        rate = done / (time.monotonic() - started)
        on_progress(Progress(done=done, total=len(sample_ids), unit="samples", rate=rate, notes={"part": "read"}))
    return ProbeData(
        clips=clips,
        features={name: np.stack(vectors) for name, vectors in rows.items()},
        history=np.stack(history),
        targets=np.stack(targets),
        late_curve=np.array(late, dtype=bool),
        tokens=np.stack([sketch[: min(map(len, tokens))] for sketch in tokens]),
        left_out=left_out,
    )


def choose_samples(sample_ids: Sequence[str], count: int, *, seed: int) -> list[str]:
    """Choose at most `count` ids, sorted: clips in an order by seed, each whole but for the last."""
    by_clip: dict[str, list[str]] = {}
    for sample_id in sorted(sample_ids):
        by_clip.setdefault(SampleRef.parse(sample_id).clip_id, []).append(sample_id)
    names = sorted(by_clip)
    order = np.random.default_rng(seed).permutation(len(names))
    return sorted([sample_id for place in order for sample_id in by_clip[names[place]]][:count])


def history_features(history_xyz: NDArray[Any], history_rot: NDArray[Any]) -> Floats:
    """Speeds (m/s) and yaw rates (rad/s) of 15 steps, then x and y (m, ego frame at t0) of 16 poses: `[62]`."""
    xy = np.asarray(history_xyz, dtype=np.float64)[:, :2]
    speeds_mps = np.linalg.norm(np.diff(xy, axis=0), axis=-1) / DT_S
    yaw_rates = np.diff(heading(history_rot)) / DT_S
    return np.concatenate([speeds_mps, yaw_rates, xy.ravel()])


def future_targets(history_xyz: NDArray[Any], future_xyz: NDArray[Any], strata: Strata) -> Floats:
    """Targets `[3]` of the true future, columns as in `TARGETS`, left positive.

    Heading change at 6.4 s; mean curvature, which is heading change over path length (at least `LEAST_PATH_M`); speed
    over the last 0.3 s less speed over the 0.3 s before t0.
    """
    driven_m = strata.mean_speed_mps * len(future_xyz) * DT_S
    curvature = strata.heading_change_rad / max(driven_m, LEAST_PATH_M)
    ends = [np.asarray(xyz, dtype=np.float64)[-1 - SPEED_STEPS :, :2] for xyz in (history_xyz, future_xyz)]
    before_mps, after_mps = (float(np.linalg.norm(np.diff(xy, axis=0), axis=-1).mean() / DT_S) for xy in ends)
    return np.array([strata.heading_change_rad, curvature, after_mps - before_mps])


def pooled(vectors: Tensor, pool: Pool) -> NDArray[np.float32]:
    """Pool vectors of the tokens `[T, C]` to one: `[C]`, or `[2 C]` with the last and the mean side by side."""
    parts = {"last": vectors[-1].float(), "mean": vectors.float().mean(0)}
    chosen = list(parts.values()) if pool == "both" else [parts[pool]]
    return torch.cat(chosen).numpy()


def _projections(vectors: Tensor) -> Tensor:
    """Random directions `[C, SKETCH]` for tokens like these `[T, C]`; a few loud channels do not drown the rest."""
    spread = vectors.float().std(0).clamp(min=1e-6)
    generator = randomness.generator("probe", "tokens")
    directions = torch.randn(vectors.shape[1], SKETCH, generator=generator)
    return directions / (spread[:, None] * math.sqrt(len(directions)))


def _sketch(vectors: Tensor, projections: Tensor) -> NDArray[np.float32]:
    """Projections `[T, SKETCH]` of tokens `[T, C]`; none of tokens of another width, which pooling refuses."""
    fits = vectors.shape[1] == len(projections)
    return (vectors.float() @ projections if fits else vectors[:, :SKETCH].float()).numpy()


def _layer_numbers(reader: CacheReader, first: str, layers: Layers, codec: KVCodec | None) -> list[int]:
    """Layers whose values are asked for. Raises `UsageError` for one that is not there, or where nothing is to read."""
    shape = reader.read(first, fields=[KV_SHAPE])[KV_SHAPE] if codec else reader.shape(first, "kv")
    held = stored_layers(reader.identity) or tuple(range(int(shape[0])))
    numbers = list(held) if layers == "all" else [] if layers == "last" else sorted(set(layers))
    if lost := sorted(set(numbers) - set(held)):
        there = f"{len(held)} layers, {layers_text(held)}"
        raise UsageError(f"--layers has {lost[-1]}, but {reader.path} has {there}.")
    if not numbers and HIDDEN not in reader.fields:
        raise UsageError(
            f"store {reader.path} has no hidden states (it was extracted with --hidden-states none). Pass "
            f"--layers {held[-1]} to probe the cached values of the last layer, or extract into a new store with "
            "--hidden-states last."
        )
    return numbers


def _by_token(
    reader: CacheReader, sample_id: str, numbers: Sequence[int], codec: KVCodec | None
) -> Iterator[tuple[str, Tensor]]:
    """Vectors `[T, C]` by name: hidden states where there are any, and layers' values, all heads side by side.

    One layer at a time is decoded.
    """
    if HIDDEN in reader.fields:
        yield HIDDEN, from_bf16_bits(reader.read(sample_id, fields=[HIDDEN])[HIDDEN])
    if not numbers:
        return
    arrays, named = (
        reader.read(sample_id, fields=["kv", *([KV_SHAPE] if codec else [])]),
        stored_layers(reader.identity),
    )
    for layer in numbers:
        place = layer if named is None else named.index(layer)
        if codec is None:
            values = from_bf16_bits(arrays["kv"][place, 1])
        else:
            shape = tuple(arrays[KV_SHAPE].tolist())
            values = tensor_codec(codec).decode_layer(torch.from_numpy(arrays["kv"]), place, shape)[1]
        yield f"layer {layer}", values.transpose(0, 1).flatten(1)

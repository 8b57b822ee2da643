"""Keys and values of a few samples, from the source or a store, and what the codec `transform` learns from them."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.features import POSE_FIELDS, PREFIX_FIELDS, from_bf16_bits
from alpacache.cached_samples.prompt_positions import prompt_positions
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError
from alpacache.extraction.pipeline import read_ahead
from alpacache.extraction.prefill import Prefiller
from alpacache.extraction.preparation import PreparationSettings
from alpacache.extraction.reading_process import open_readers
from alpacache.prefix.calibration import KVSample, Learnt, learn
from alpacache.sources.source import Source
from cache_store import CacheReader

Poses = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeSample:
    """A sample on the host with keys and values as the VLM left them."""

    sample_id: str
    kv: Tensor
    """bfloat16 `[layer, 2, head, token, channel]`, after rotary embedding."""
    positions: Tensor | None
    """`[3, token]`; None where they cannot be told."""
    rope_delta: int
    start_position: int
    poses: Poses
    """History and future, xyz (m, ego frame at t0) and rotations each."""


def read_source(
    refs: Sequence[SampleRef],
    prefiller: Prefiller,
    builder: InputBuilder,
    source: Source,
    settings: PreparationSettings,
    device: torch.device,
    *,
    workers: int,
) -> Generator[WholeSample]:
    """Samples of a source one by one, through the VLM alone; those that cannot be read are left out."""
    alone = [[ref] for ref in refs]
    with open_readers(settings, source, builder, device, workers=workers) as readers:
        begun = read_ahead(alone, readers.one_pass, workers=readers.workers, ahead=workers, begin=readers.begin)
        for _, future in begun:
            try:
                prepared = future.result()
            except (BadClipError, OSError):  # what is wrong with it is told when it is its turn
                continue
            (prefix,) = prefiller.prefixes([prepared])
            kv = torch.stack([prefix.keys, prefix.values], 1).to("cpu", torch.bfloat16)
            if prefix.positions is not None and bool(torch.stack(torch.aminmax(kv)).isfinite().all()):
                yield WholeSample(
                    sample_id=prepared.sample_id,
                    kv=kv,
                    positions=prefix.positions,
                    rope_delta=prefix.rope_delta,
                    start_position=prefix.start_position,
                    poses=_poses(prepared.arrays),
                )


def read_store(reader: CacheReader, sample_ids: Sequence[str]) -> Iterator[WholeSample]:
    """Samples of a store of bfloat16 keys and values, one by one."""
    for sample_id in sample_ids:
        arrays = reader.read(sample_id, (*PREFIX_FIELDS, "image_spans", *POSE_FIELDS))
        tokens, delta = int(arrays["prefix_len"]), int(arrays["rope_delta"])
        spans = [(first, end) for first, end in arrays["image_spans"].tolist()]
        yield WholeSample(
            sample_id=sample_id,
            kv=from_bf16_bits(arrays["kv"]),
            positions=prompt_positions(tokens, spans, delta),
            rope_delta=delta,
            start_position=int(arrays["start_position"]),
            poses=_poses(arrays),
        )


def learn_from(
    samples: Sequence[WholeSample], checkpoint: Checkpoint, layers: Sequence[int] | None, device: torch.device
) -> Learnt:
    """Learn the tables of the codec `transform` from samples whose positions are known.

    Raises `UsageError` where they have too few tokens.
    """
    known = [KVSample(kv=one.kv, positions=one.positions) for one in samples if one.positions is not None]
    angles, axes = _rotary(checkpoint)
    return learn(known, angles=angles, axes=axes, device=device, key_weights=_query_weights(checkpoint, layers))


def _poses(arrays: Mapping[str, Any]) -> Poses:
    history_xyz, history_rot, future_xyz, future_rot = (torch.from_numpy(arrays[name]) for name in POSE_FIELDS)
    return history_xyz, history_rot, future_xyz, future_rot


def _rotary(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Radians a position of each pair of channels, and which of the three positions turns it."""
    from alpacache.alpamayo.backbone import vlm_config
    from alpacache.alpamayo.text_layers import rotary_angles

    return rotary_angles(vlm_config(checkpoint).text_config)


def _query_weights(checkpoint: Checkpoint, layers: Sequence[int] | None) -> torch.Tensor | None:
    """Mean squares of the expert's queries by channel, `[layer, 1, channel]`, as the norm of queries fixes them.

    Of the two channels of a pair, which the rotary embedding mixes, both have the mean.
    """
    names = {
        name: shard for name, shard in checkpoint.with_prefix("expert.").items() if name.endswith(".q_norm.weight")
    }
    found = {int(name.split(".layers.")[1].split(".")[0]): weight.float() for name, weight in checkpoint.read(names)}
    if len(found) != geometry_of(checkpoint).layers:
        return None
    square = torch.stack([found[layer] for layer in sorted(found)]).square()
    pairs = square.view(len(square), 2, -1).mean(1)
    weights = torch.cat([pairs, pairs], 1)[:, None]
    return weights if layers is None else weights[list(layers)]

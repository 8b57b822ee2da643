"""The codec of a store: the one it was begun with, another store's, or one that is learnt from the first samples."""

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.features import stored_layers
from alpacache.cached_samples.identity import codec_for, store_codec
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.extraction.pipeline import read_ahead
from alpacache.extraction.prefill import Prefiller, StoredFeatures
from alpacache.extraction.preparation import PreparationSettings
from alpacache.extraction.reading_process import open_readers
from alpacache.layer_choice import layers_text
from alpacache.prefix.calibration import KVSample, calibrate
from alpacache.progress import OnNote
from alpacache.sources.source import Source
from cache_store import KVCodec, TransformCodec
from cache_store.writer import stored_identity

CALIBRATION_SAMPLES = 32
"""Samples that a codec is learnt from, at most, spread over the selection."""
_FEW = 8
"""Tokens for each channel of a group, below which a warning says that the basis is learnt from few."""
_LONGER = 1.25
"""A sample that takes so many times the bytes that its codec was learnt for is told of."""

_log = logging.getLogger(__name__)


def known_codec(
    name: str,
    codec_from: str | None,
    stored: Mapping[str, Any] | None,
    *,
    store: str,
    checkpoint: Checkpoint,
    layers: Sequence[int] | None,
) -> KVCodec | None:
    """The codec of this name, with the tables of the store that is there or of the one to take them from.

    One that is yet to be learnt has no tables. Raises `UsageError` where the other store's is not for this model, or is
    another codec than asked for.
    """
    codec = codec_for(name, layers)
    if not isinstance(codec, TransformCodec):
        if codec_from is not None:
            raise UsageError(
                f"--codec-from {codec_from} goes with --codec transform:RATE, whose tables it takes; --codec is {name}."
            )
        return codec
    if stored is not None and stored.get("codec") == name:
        return store_codec(stored, store=store)
    if codec_from is None:
        return codec
    theirs = stored_identity(codec_from)
    if theirs is None:
        raise UsageError(f"--codec-from {codec_from}: there is no store; give one made with --codec {name}.")
    if theirs.get("codec") != name:
        raise UsageError(
            f"--codec-from {codec_from}: that store's codec is {theirs.get('codec')}, not {name}; pass --codec "
            f"{theirs.get('codec')}, or another store."
        )
    found = store_codec(theirs, store=codec_from)
    assert isinstance(found, TransformCodec)
    mine, model = checkpoint.vlm_fingerprint(), theirs.get("model")
    weights = model.get("vlm_weights_sha256") if isinstance(model, Mapping) else None
    if weights != mine:
        raise UsageError(
            f"--codec-from {codec_from}: its codec was learnt from another VLM (weights {str(weights)[:12]}, this "
            f"one's are {mine[:12]}); leave --codec-from out to learn one from these samples."
        )
    if (held := stored_layers(theirs)) != (None if layers is None else tuple(layers)):
        said = ["all" if each is None else layers_text(each) for each in (held, layers)]
        raise UsageError(
            f"--codec-from {codec_from}: its codec is for layers {said[0]} of the VLM, this run stores {said[1]}; pass "
            "the same --layers, or another store."
        )
    return found


def learnt_codec(
    codec: TransformCodec,
    refs: Sequence[SampleRef],
    checkpoint: Checkpoint,
    builder: InputBuilder,
    *,
    source: Source,
    settings: PreparationSettings,
    layers: tuple[int, ...] | None,
    device: torch.device,
    workers: int,
    on_note: OnNote,
) -> TransformCodec:
    """Learn the codec from samples spread over these, as far as they can be read. Nothing is written.

    Raises `UsageError` where none can be read, or they have too few tokens.
    """
    spread = refs[:: max(1, len(refs) // CALIBRATION_SAMPLES)]
    with closing(_prefixes(spread, checkpoint, builder, source, settings, layers, device, workers)) as prefixes:
        samples = list(islice(prefixes, CALIBRATION_SAMPLES))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not samples:
        raise UsageError(f"none of the {len(refs)} samples can be read, so the codec has nothing to be learnt from.")
    angles, axes = _rotary(checkpoint)
    weights = _query_weights(checkpoint, layers)
    found = calibrate(samples, rate=codec.rate, angles=angles, axes=axes, device=device, key_weights=weights)
    tables = found.calibrated
    tokens, channels = sum(one.kv.shape[3] for one in samples), len(tables.groups[0].mean)
    on_note(
        f"the codec is learnt from {len(samples)} samples ({tokens:,} tokens): {codec.rate:g} bits a value, "
        f"tables of {len(tables.to_bytes()) / 1e6:.3g} MB."
    )
    if tokens < _FEW * channels:
        on_note(
            f"WARNING: {tokens:,} tokens are few for vectors of {channels} channels: later samples may take more bits "
            f"than {codec.rate:g}. Begin the store with more samples, or take --codec-from a store that had them."
        )
    return found


def longer_than_learnt(codec: KVCodec | None, arrays: Mapping[str, Any]) -> float | None:
    """How many times the bytes that its codec was learnt for a sample takes; None where that is as it should be."""
    shape = arrays.get("kv_shape")
    if not isinstance(codec, TransformCodec) or shape is None:
        return None
    expected = codec.expected_bytes(tuple(int(n) for n in shape))
    ratio = len(arrays["kv"]) / max(1, expected)
    return ratio if ratio > _LONGER else None


def warn_of(longer: Mapping[str, float], codec: KVCodec | None, extracted: int) -> None:
    """Say which samples are unlike those that the codec was learnt from."""
    if not longer or not isinstance(codec, TransformCodec):
        return
    worst = max(longer, key=longer.__getitem__)
    _log.warning(
        "%d of %d samples take more than %g times the %g bits a value that the codec was learnt for (most: %s, %.1f "
        "bits): they are unlike the samples it was learnt from. Their error is within the same bound; another store, "
        "with a codec learnt from such samples, would be smaller.",
        len(longer),
        extracted,
        _LONGER,
        codec.rate,
        worst,
        longer[worst] * codec.rate,
    )


def _prefixes(
    refs: Sequence[SampleRef],
    checkpoint: Checkpoint,
    builder: InputBuilder,
    source: Source,
    settings: PreparationSettings,
    layers: tuple[int, ...] | None,
    device: torch.device,
    workers: int,
) -> Generator[KVSample]:
    """Keys and values of samples on the host, one by one; samples that cannot be read are left out."""
    stored = StoredFeatures(codec=None, hidden_states=False, rollouts=0, layers=layers)
    prefiller = Prefiller(checkpoint, builder, stored, device, dtype=settings.dtype)
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
                yield KVSample(kv=kv, positions=prefix.positions)


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

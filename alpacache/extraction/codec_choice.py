"""The codec of a store: the one it was begun with, another store's, or one that is learnt from the first samples."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.features import stored_layers
from alpacache.cached_samples.identity import CHOICE, codec_for, store_codec
from alpacache.errors import UsageError
from alpacache.extraction.codec_errors import DRAWS
from alpacache.extraction.codec_learning import WholeSample, learn_from
from alpacache.extraction.codec_trial import split_samples, try_codecs
from alpacache.extraction.config import TRIED, most_velocity_error
from alpacache.layer_choice import layers_text
from alpacache.prefix.codecs import forget_tables
from alpacache.progress import OnNote
from cache_store import KVCodec, LearntCodec
from cache_store.writer import stored_identity, stored_provenance

CALIBRATION_SAMPLES = 32
"""Samples that a codec is learnt from, at most, spread over the selection."""
_SPARE_BYTES = 3 * 2**30
"""Room on a GPU beside the expert's weights: samples, tables, activations."""
_FEW = 8
"""Tokens for each channel of a group, below which a warning says that the basis is learnt from few."""
_LONGER = 1.25
"""Samples are named from so many times the bytes on that their codec was learnt for."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenCodec:
    """The codec of a run."""

    name: str
    """Name in the store's identity."""
    codec: KVCodec | None
    """None for bfloat16; without tables where it is yet to be learnt."""
    evidence: Mapping[str, Any] | None = None
    """Record of what was measured; None for a codec that was given by name."""


def known_codec(
    name: str,
    codec_from: str | None,
    stored: Mapping[str, Any] | None,
    *,
    store: str,
    checkpoint: Checkpoint,
    layers: Sequence[int] | None,
) -> ChosenCodec | None:
    """The codec of this name, with the tables of the store that is there or of the one to take them from.

    One that is yet to be learnt has no tables; None for one that is yet to be chosen. Raises `UsageError` where the
    other store's is not for this model, or is another codec than asked for, and where a store is there whose codec was
    not chosen as it is asked for now.
    """
    if most_velocity_error(name) is not None:
        if layers is not None:
            raise UsageError(
                f"--codec {name} is judged by the model's own expert, which attends to all layers, and --layers "
                "stores some; name a codec."
            )
        if stored is not None:
            return _chosen_before(name, stored, "the store", store)
        if codec_from is None:
            return None
        theirs = _identity_of(codec_from, name)
        chosen = _chosen_before(name, theirs, f"--codec-from {codec_from}: that store", codec_from)
        if not isinstance(chosen.codec, LearntCodec):
            return chosen
        return replace(chosen, codec=_their_codec(chosen.name, codec_from, checkpoint, layers))
    codec = codec_for(name, layers)
    if not isinstance(codec, LearntCodec):
        if codec_from is not None:
            raise UsageError(
                f"--codec-from {codec_from} goes with --codec transform:RATE, whose tables it takes; --codec is {name}."
            )
    elif stored is not None and stored.get("codec") == name:
        codec = store_codec(stored, store=store)
    elif codec_from is not None:
        codec = _their_codec(name, codec_from, checkpoint, layers)
    return ChosenCodec(name=name, codec=codec)


def _chosen_before(asked: str, identity: Mapping[str, Any], whose: str, store: str) -> ChosenCodec:
    """The codec of a store that was chosen as it is asked for now. Raises `UsageError` where it was not."""
    evidence = (stored_provenance(store) or {}).get(CHOICE)
    before = evidence.get("asked") if isinstance(evidence, Mapping) else None
    name = str(identity.get("codec"))
    if before != asked:
        how = "given by name" if before is None else f"chosen by --codec {before}"
        raise UsageError(
            f"{whose} has the codec {name}, {how}; pass --codec {before or name}, or another --store for --codec "
            f"{asked}."
        )
    assert isinstance(evidence, Mapping)
    return ChosenCodec(name=name, codec=store_codec(identity, store=store), evidence=evidence)


def _identity_of(codec_from: str, name: str) -> Mapping[str, Any]:
    theirs = stored_identity(codec_from)
    if theirs is None:
        raise UsageError(f"--codec-from {codec_from}: there is no store; give one made with --codec {name}.")
    return theirs


def _their_codec(name: str, codec_from: str, checkpoint: Checkpoint, layers: Sequence[int] | None) -> LearntCodec:
    """The codec of another store. Raises `UsageError` where it is another, or was learnt from another model."""
    theirs = _identity_of(codec_from, name)
    if theirs.get("codec") != name:
        raise UsageError(
            f"--codec-from {codec_from}: that store's codec is {theirs.get('codec')}, not {name}; pass --codec "
            f"{theirs.get('codec')}, or another store."
        )
    found = store_codec(theirs, store=codec_from)
    assert isinstance(found, LearntCodec)
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


def lacks_tables(codec: KVCodec | None) -> bool:
    """Tell whether a codec is yet to be learnt."""
    return isinstance(codec, LearntCodec) and codec.tables_bytes is None


def tables_of(codec: KVCodec | None) -> bytes | None:
    """Tables of a codec that was learnt, as a new store keeps them; None for any other."""
    return None if codec is None else codec.tables_bytes


def fits_beside(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Tell whether a GPU has room for the expert too."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    weights = 2 * sum(math.prod(info.shape) for info in checkpoint.infos(checkpoint.with_prefix("expert.")).values())
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > weights + _SPARE_BYTES


def new_codec(
    asked: str,
    codec: ChosenCodec | None,
    samples: Sequence[WholeSample],
    checkpoint: Checkpoint,
    *,
    selected: int,
    layers: tuple[int, ...] | None,
    device: torch.device,
    on_note: OnNote,
) -> ChosenCodec:
    """The codec of a new store: with tables that are learnt from these samples, and chosen if it is None.

    `selected`: number of samples that these are of. Nothing is written. Raises `UsageError` where they are none, have
    too few tokens, or no codec is as good as asked.
    """
    if not samples:
        raise UsageError(f"none of the {selected} samples can be read, so the codec has nothing to be learnt from.")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if codec is None:
        codec = chosen_codec(asked, samples, checkpoint, device=device, on_note=on_note)
    else:
        assert isinstance(codec.codec, LearntCodec)
        learnt = learn_from(samples, checkpoint, layers, device).codec(codec.codec.rate)
        _tell_learnt(learnt, samples, on_note)
        codec = replace(codec, codec=learnt)
    if device.type == "cuda":
        forget_tables(device)
        torch.cuda.empty_cache()
    return codec


def chosen_codec(
    asked: str, samples: Sequence[WholeSample], checkpoint: Checkpoint, *, device: torch.device, on_note: OnNote
) -> ChosenCodec:
    """The smallest codec within the error of the velocity that `asked` allows, as in `auto:2%`.

    Raises `UsageError` with what was measured where none is.
    """
    from alpacache.alpamayo import load_expert  # seconds of imports, which no refusal should wait for

    most = most_velocity_error(asked)
    assert most is not None
    learnt, judged = split_samples(samples)
    expert = load_expert(checkpoint, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    rounding, found = try_codecs(TRIED, learnt, judged, checkpoint, expert, gradients=False)
    tried = {name: one.errors for name, one in found.items() if one.errors is not None}
    by_size = sorted(tried, key=lambda name: tried[name].bytes_a_sample)
    within = [name for name in by_size if tried[name].velocity <= most]
    measured = ", ".join(f"{name} {tried[name].velocity:.2%}" for name in reversed(by_size))
    if not within:
        raise UsageError(
            f"--codec {asked}: no codec keeps the error of the expert's velocity within {most:.2%} on {len(judged)} "
            f"samples of these: {measured}. Allow more, or pass --codec bf16, which loses nothing; rounding to "
            f"bfloat16 once more makes {rounding.velocity:.2%}."
        )
    name = within[0]
    evidence = {
        "asked": asked,
        "chosen": name,
        "velocity_error": {each: round(errors.velocity, 6) for each, errors in tried.items()},
        "bytes_a_sample": {each: round(errors.bytes_a_sample) for each, errors in tried.items()},
        "velocity_error_of_rounding": round(rounding.velocity, 6),
        "learnt_from": len(learnt),
        "judged_on": len(judged),
        "draws": DRAWS,
    }
    codec = found[name].codec
    on_note(
        f"--codec {asked}: {name} is the smallest codec within it, {tried[name].velocity:.2%} of the expert's velocity "
        f"and {tried[name].bytes_a_sample / 1e6:.3g} MB a sample on {len(judged)} of these ({measured})."
    )
    if isinstance(codec, LearntCodec):
        _tell_learnt(codec, learnt, on_note)
    return ChosenCodec(name=name, codec=codec, evidence=evidence)


def _tell_learnt(codec: LearntCodec, samples: Sequence[WholeSample], on_note: OnNote) -> None:
    tokens, channels, tables = sum(one.kv.shape[3] for one in samples), codec.width, codec.tables_bytes
    assert tables is not None
    on_note(
        f"the codec is learnt from {len(samples)} samples ({tokens:,} tokens): {codec.rate:g} bits a value, "
        f"tables of {len(tables) / 1e6:.3g} MB."
    )
    if tokens < _FEW * channels:
        on_note(
            f"WARNING: {tokens:,} tokens are few for vectors of {channels} channels: later samples may take more bits "
            f"than {codec.rate:g}. Begin the store with more samples, or take --codec-from a store that had them."
        )


def longer_than_learnt(codec: KVCodec | None, arrays: Mapping[str, Any]) -> float | None:
    """Ratio of a sample's bytes to those that its codec was learnt for; None where it is as it should be."""
    shape = arrays.get("kv_shape")
    if not isinstance(codec, LearntCodec) or shape is None:
        return None
    expected = codec.expected_bytes(tuple(int(n) for n in shape))
    ratio = len(arrays["kv"]) / max(1, expected)
    return ratio if ratio > _LONGER else None


def warn_of(longer: Mapping[str, float], codec: KVCodec | None, extracted: int) -> None:
    """Say which samples are unlike those that the codec was learnt from."""
    if not longer or not isinstance(codec, LearntCodec):
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

"""The codec of a store: the one it was begun with, another store's, or one that is learnt from the first samples."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.cached_samples.features import KV_SHAPE, stored_layers
from alpacache.cached_samples.identity import CHOICE, codec_for, store_codec
from alpacache.errors import UsageError
from alpacache.extraction.codec_errors import DRAWS
from alpacache.extraction.codec_learning import WholeSample, learn_from
from alpacache.extraction.codec_trial import JUDGED_OF, split_samples, try_codecs
from alpacache.extraction.config import TRIED, most_velocity_error
from alpacache.layer_choice import layers_text
from alpacache.prefix.codecs import forget_tables
from alpacache.progress import OnNote
from cache_store import KVCodec, LearntCodec
from cache_store.kv.registry import codec_name
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
    not chosen as it is asked for now, or is not the other store's.
    """
    if most_velocity_error(name) is not None:
        if layers is not None:
            raise UsageError(
                f"--codec {name} is judged by the model's own expert, which attends to all layers, and --layers "
                "stores some; name a codec."
            )
        if stored is not None:
            _check_same_codec(stored, codec_from, store)
            return _chosen_before(name, stored, "--store", store, checkpoint)
        if codec_from is None:
            return None
        theirs = _identity_of(codec_from, name)
        _check_same_vlm(theirs, codec_from, checkpoint, layers)
        return _chosen_before(name, theirs, "--codec-from", codec_from, checkpoint)
    codec = codec_for(name, layers)
    if not isinstance(codec, LearntCodec):
        if codec_from is not None:
            raise UsageError(
                f"--codec-from {codec_from} goes with --codec transform:RATE, whose tables it takes; --codec is {name}."
            )
    elif stored is not None and _same_name(stored, name):
        _check_same_codec(stored, codec_from, store)
        return ChosenCodec(name=str(stored["codec"]), codec=store_codec(stored, store=store))
    elif codec_from is not None:
        return _their_codec(name, codec_from, checkpoint, layers)
    return ChosenCodec(name=name, codec=codec)


def _same_name(identity: Mapping[str, Any], name: str) -> bool:
    """Tell whether a store's codec has this name; earlier versions wrote `transform:2.0` as it was given."""
    try:
        return codec_name(str(identity.get("codec"))) == name
    except ValueError:  # of a later version
        return False


def _check_same_codec(stored: Mapping[str, Any], codec_from: str | None, store: str) -> None:
    """Raise `UsageError` where the store that is there has another codec, or other tables, than the other one."""
    if codec_from is None:
        return
    theirs = stored_identity(codec_from)
    if theirs is None or stored.get("codec_definition") != theirs.get("codec_definition"):
        what = "there is no store" if theirs is None else "its codec or tables are others"
        raise UsageError(
            f"--codec-from {codec_from}: {what}, and the store {store} has its own; leave --codec-from out to go on "
            "with that, or pass another --store."
        )


def _chosen_before(
    asked: str, identity: Mapping[str, Any], option: str, store: str, checkpoint: Checkpoint
) -> ChosenCodec:
    """The codec of a store that was chosen as it is asked for now, by this model's expert.

    `option` names the store on the command line. Raises `UsageError` where it was not.
    """
    evidence = (stored_provenance(store) or {}).get(CHOICE)
    before = evidence.get("asked") if isinstance(evidence, Mapping) else None
    name = str(identity.get("codec"))
    if before != asked:
        how = "given by name" if before is None else f"chosen by --codec {before}"
        raise UsageError(
            f"{option} {store} has the codec {name}, {how}; pass --codec {before or name}, or another {option} for "
            f"--codec {asked}."
        )
    assert isinstance(evidence, Mapping)
    codec = store_codec(identity, store=store)
    expert, mine = evidence.get("expert_sha256"), checkpoint.fingerprint(*EXPERT_PARTS)
    if expert != mine and _vlm_weights(identity) == checkpoint.vlm_fingerprint():  # another VLM is told of by `open`
        by = f"another expert (weights {str(expert)[:12]}, this one's are {mine[:12]})"
        by = "an expert that it does not name, as of an earlier version" if expert is None else by
        alone = option == "--codec-from" and not isinstance(codec, LearntCodec)
        raise UsageError(
            f"{option} {store} has the codec {name}, which --codec {asked} chose by {by}; pass --codec {name}"
            f"{' without --codec-from' if alone else ''} to take it all the same, or another {option}."
        )
    return ChosenCodec(name=name, codec=codec, evidence=evidence)


def _identity_of(codec_from: str, name: str) -> Mapping[str, Any]:
    theirs = stored_identity(codec_from)
    if theirs is None:
        raise UsageError(f"--codec-from {codec_from}: there is no store; give one made with --codec {name}.")
    return theirs


def _their_codec(name: str, codec_from: str, checkpoint: Checkpoint, layers: Sequence[int] | None) -> ChosenCodec:
    """The codec of another store. Raises `UsageError` where it is another, or was learnt from another model."""
    theirs = _identity_of(codec_from, name)
    if not _same_name(theirs, name):
        raise UsageError(
            f"--codec-from {codec_from}: that store's codec is {theirs.get('codec')}, not {name}; pass --codec "
            f"{theirs.get('codec')}, or another store."
        )
    _check_same_vlm(theirs, codec_from, checkpoint, layers)
    return ChosenCodec(name=str(theirs["codec"]), codec=store_codec(theirs, store=codec_from))


def _check_same_vlm(
    theirs: Mapping[str, Any], codec_from: str, checkpoint: Checkpoint, layers: Sequence[int] | None
) -> None:
    """Raise `UsageError` where the codec of another store is of another VLM, or of other layers of it."""
    weights, mine = _vlm_weights(theirs), checkpoint.vlm_fingerprint()
    if weights != mine:
        raise UsageError(
            f"--codec-from {codec_from}: its codec was learnt or chosen for another VLM (weights {str(weights)[:12]}, "
            f"this one's are {mine[:12]}); leave --codec-from out to find one by these samples."
        )
    if (held := stored_layers(theirs)) != (None if layers is None else tuple(layers)):
        said = ["all" if each is None else layers_text(each) for each in (held, layers)]
        raise UsageError(
            f"--codec-from {codec_from}: its codec is for layers {said[0]} of the VLM, this run stores {said[1]}; pass "
            "the same --layers, or another store."
        )


def _vlm_weights(identity: Mapping[str, Any]) -> object:
    model = identity.get("model")
    return model.get("vlm_weights_sha256") if isinstance(model, Mapping) else None


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

    `selected`: number of samples that these are of. Nothing is written. Raises `UsageError` where they are none, or
    too few to judge on others than were learnt from, have too few tokens, or no codec is as good as asked.
    """
    if not samples:
        raise UsageError(f"none of the {selected} samples can be read, so the codec has nothing to be learnt from.")
    if codec is None and len(samples) < JUDGED_OF:
        raise UsageError(
            f"--codec {asked}: {len(samples)} of the {selected} samples can be read, and a choice needs {JUDGED_OF}: "
            "codecs are learnt from two of three samples and judged on the third. Begin the store with more, or name a "
            "codec."
        )
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
        "expert_sha256": checkpoint.fingerprint(*EXPERT_PARTS),
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


_UNLIKE = {
    "": "%d of %d samples take more than %g times the %g bits a value that the codec was learnt for (most: %s, %.1f "
    "bits): they are unlike the samples it was learnt from. Their error is within the same bound; another store, with "
    "a codec learnt from such samples, would be smaller.",
    "tail.": "%d of %d samples have tails that take more than %g times the %g bits a value that the codec was learnt "
    "for (most: %s, %.1f bits): it is learnt from prefixes alone. Their error is within the same bound.",
}
"""What is said where prefixes, or all tails of a sample, take more bytes; by how names of their fields begin."""


def longer_than_learnt(codec: KVCodec | None, arrays: Mapping[str, Any]) -> dict[str, float]:
    """Ratio of a sample's bytes to those that its codec was learnt for, where it is not as it should be.

    Of the prefix as `""`, of all tails together as `tail.`.
    """
    if not isinstance(codec, LearntCodec):
        return {}
    used, expected = dict.fromkeys(_UNLIKE, 0), dict.fromkeys(_UNLIKE, 0)
    for name, shape in arrays.items():
        if name.endswith(KV_SHAPE):
            part = "" if name == KV_SHAPE else "tail."
            used[part] += len(arrays[name.removesuffix("_shape")])
            expected[part] += codec.expected_bytes(tuple(int(n) for n in shape))
    return {part: used[part] / expected[part] for part in _UNLIKE if used[part] > _LONGER * expected[part]}


def warn_of(longer: Mapping[str, Mapping[str, float]], codec: KVCodec | None, extracted: int) -> None:
    """Say which samples, by their ids, are unlike those that the codec was learnt from, in prefix or tails."""
    if not isinstance(codec, LearntCodec):
        return
    for part, times in longer.items():
        worst = max(times, key=times.__getitem__)
        bits = times[worst] * codec.rate
        _log.warning(_UNLIKE[part], len(times), extracted, _LONGER, codec.rate, worst, bits)

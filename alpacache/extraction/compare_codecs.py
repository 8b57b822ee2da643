"""`alpacache codecs`: what each codec costs in bytes, and what it does to the expert, on a few of one's own samples."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.cached_samples.features import stored_layers
from alpacache.cached_samples.identity import check_same_model
from alpacache.driving.cameras import check_places, sort_cameras
from alpacache.driving.sample import SampleRef
from alpacache.errors import UsageError
from alpacache.extraction.codec_errors import DRAWS, CodecErrors
from alpacache.extraction.codec_learning import WholeSample, read_source, read_store
from alpacache.extraction.codec_trial import split_samples, spread_over, try_codecs
from alpacache.extraction.config import TRIED, CodecsConfig
from alpacache.extraction.prefill import Prefiller, StoredFeatures
from alpacache.extraction.preparation import PreparationSettings
from alpacache.extraction.reading_process import reading_workers
from alpacache.gpu.device import enter, resolve_device
from alpacache.layer_choice import layers_text
from alpacache.prefix.codecs import forget_tables
from alpacache.progress import OnProgress, ignore
from alpacache.sources.config import Side
from alpacache.sources.registry import check_reach, open_source
from alpacache.sources.selection import select
from alpacache.sources.source import Source
from cache_store import CacheReader
from cache_store.writer import stored_identity

_OF_SOURCES = ("split", "t0", "cameras", "frames")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedCodec:
    """A row of the comparison."""

    codec: str
    errors: CodecErrors | None
    """None where the codec cannot be made."""
    refused: str | None
    """Reason why the codec cannot be made."""
    tables_bytes: int
    """Tables that a store has once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecsReport:
    """Errors that codecs make in the expert, by rising bytes."""

    input: str
    model: str
    learnt_from: int
    """Samples that codecs were learnt from."""
    judged_on: int
    """Samples that codecs were judged on, others unless there are fewer than three."""
    draws: int
    """Noise draws of each, at times spread as in training."""
    expert_dtype: str
    rounding: CodecErrors
    """Errors of another rounding to bfloat16: no codec needs to be better."""
    codecs: tuple[ComparedCodec, ...]
    seconds: float


def compare_codecs(config: CodecsConfig, *, on_progress: OnProgress = ignore) -> CodecsReport:
    """Try codecs on a few samples of a source or a store; nothing is written.

    Raises `UsageError` for a store that is not of bfloat16 or of another model, and where no sample can be read.
    """
    started = time.monotonic()
    checkpoint, device = Checkpoint(config.model), resolve_device(config.device)
    identity = stored_identity(config.input) if _may_be_store(config.input) else None
    if identity is not None:
        _check_of_store(config)
        samples = _from_store(config.input, checkpoint, identity, samples=config.samples)
    else:
        enter(device)
        settings = PreparationSettings(
            source=config.input, model=config.model, cameras=sort_cameras(config.cameras), frames=config.frames, seed=0,
            camera_names=None, frame_numbers=None,
        )  # fmt: skip
        refs, source = _selected(settings, split=config.split, t0=config.t0)
        chosen = spread_over(refs, config.samples)
        samples = _from_source(chosen, source, settings, checkpoint, device, workers=reading_workers(config.workers))
    if not samples:
        raise UsageError(f"no sample of {config.input} can be read; `alpacache check` says why.")
    learnt, judged = split_samples(samples)
    from alpacache.alpamayo import load_expert  # seconds of imports, which no refusal should wait for

    enter(device)
    expert = load_expert(checkpoint, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, device=device)
    rounding, found = try_codecs(
        config.codecs or TRIED, learnt, judged, checkpoint, expert,
        gradients=config.gradients, seed=config.seed, on_progress=on_progress,
    )  # fmt: skip
    forget_tables(device)
    rows = [
        ComparedCodec(
            codec=name,
            errors=tried.errors,
            refused=tried.refused,
            tables_bytes=len((tried.codec and tried.codec.tables_bytes) or b""),
        )
        for name, tried in found.items()
    ]
    return CodecsReport(
        input=config.input,
        model=checkpoint.model,
        learnt_from=len(learnt),
        judged_on=len(judged),
        draws=DRAWS,
        expert_dtype=str(expert.dtype).removeprefix("torch."),
        rounding=rounding,
        codecs=tuple(sorted(rows, key=lambda row: row.errors.bytes_a_sample if row.errors else 0.0)),
        seconds=time.monotonic() - started,
    )


def _may_be_store(place: str) -> bool:
    """Tell whether a text can be a store's place: sources are named by a kind, but for directories."""
    kind, colon, _ = place.partition(":")
    return not colon or len(kind) == 1 or "://" in place


def _check_of_store(config: CodecsConfig) -> None:
    """Raise `UsageError` for a setting that chooses among recordings, where the samples are a store's."""
    usual = CodecsConfig(input=config.input, model=config.model)
    if given := [name for name in _OF_SOURCES if getattr(config, name) != getattr(usual, name)]:
        raise UsageError(f"--{given[0]} is of recordings, and {config.input} is a store; leave it out.")


def _from_store(
    store: str, checkpoint: Checkpoint, identity: Mapping[str, object], *, samples: int
) -> list[WholeSample]:
    """Read so many samples of a bfloat16 store, spread over it."""
    check_same_model(checkpoint, identity, store=store)
    if identity.get("codec") != "bf16":
        raise UsageError(
            f"store {store} has keys and values in {identity.get('codec')}; what codecs lose is told against bfloat16. "
            "Give the recordings, or a store extracted with --codec bf16."
        )
    if (layers := stored_layers(identity)) is not None:
        raise UsageError(
            f"store {store} has keys and values of layers {layers_text(layers)}, and the model's own expert, which "
            "judges, attends to all. Give the recordings, or a store extracted without --layers."
        )
    reader = CacheReader(store)
    plain = [name for name in reader.sample_ids if SampleRef.parse(name).view == 0]
    return list(read_store(reader, spread_over(plain, samples)))


def _selected(settings: PreparationSettings, *, split: Side, t0: str) -> tuple[list[SampleRef], Source]:
    """Open a source and choose its samples on one side of the split."""
    try:
        check_reach(settings.source)
    except UsageError as error:
        if not _may_be_store(settings.source):
            raise
        raise UsageError(f"there is no store at {settings.source}, and as recordings {error}") from None
    source = open_source(settings.source, cameras=settings.cameras)
    refs, _ = select(source, split=split, t0=t0)
    return refs, source


def _from_source(
    refs: Sequence[SampleRef],
    source: Source,
    settings: PreparationSettings,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    workers: int,
) -> list[WholeSample]:
    """Run the VLM over these samples of recordings."""
    builder = settings.input_builder(checkpoint)
    if not builder.format.camera_names:
        check_places(settings.cameras, ())
    settings = replace(settings, camera_names=builder.format.camera_names, frame_numbers=builder.format.frame_numbers)
    stored = StoredFeatures(codec=None, hidden_states=False, rollouts=0)
    prefiller = Prefiller(checkpoint, builder, stored, device, dtype=settings.dtype)
    found = list(read_source(refs, prefiller, builder, source, settings, device, workers=workers))
    del prefiller
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found

"""Codecs tried on a few samples: learnt from some of them, judged by the model's own expert on others."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.errors import UsageError
from alpacache.extraction.codec_errors import ROUNDING, CodecErrors, CodecJudge
from alpacache.extraction.codec_learning import WholeSample, learn_from
from alpacache.progress import OnProgress, Progress, ignore
from cache_store import KVCodec, LearntCodec, codec_named

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert

Item = TypeVar("Item")
TRIAL_SAMPLES = 48
"""Samples of a trial, at most, spread over the selection."""
JUDGED_OF = 3
"""Every third sample is judged on, and nothing is learnt from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedCodec:
    """A codec and what it does to the expert."""

    codec: KVCodec | None
    """The codec with its tables; None for bfloat16 and where it cannot be."""
    errors: CodecErrors | None
    """None where the codec cannot be made."""
    refused: str | None = None
    """Reason why the codec cannot be made."""


def spread_over(samples: Sequence[Item], most: int) -> list[Item]:
    """Choose at most so many of the samples, evenly apart."""
    count = min(len(samples), most)
    return [samples[number * len(samples) // count] for number in range(count)]


def split_samples(samples: Sequence[WholeSample]) -> tuple[list[WholeSample], list[WholeSample]]:
    """Samples to learn from and samples to judge on; the same where there are too few for both."""
    if len(samples) < JUDGED_OF:
        return list(samples), list(samples)
    judged = samples[JUDGED_OF - 1 :: JUDGED_OF]
    return [one for number, one in enumerate(samples) if number % JUDGED_OF != JUDGED_OF - 1], list(judged)


def try_codecs(
    names: Sequence[str],
    learnt: Sequence[WholeSample],
    judged: Sequence[WholeSample],
    checkpoint: Checkpoint,
    expert: "ActionExpert",
    *,
    gradients: bool,
    seed: int = 0,
    on_progress: OnProgress = ignore,
) -> tuple[CodecErrors, dict[str, TriedCodec]]:
    """Measure what rounding to bfloat16 once more does, and what each of the named codecs does.

    Raises `UsageError` where the expert attends to other layers than the samples have.
    """
    layers = judged[0].kv.shape[0]
    if expert.prefix_layers != tuple(range(layers)):
        raise UsageError(
            f"the expert of {checkpoint.model} attends to {len(expert.prefix_layers)} layers of the VLM, the samples "
            f"have keys and values of {layers}: it cannot judge codecs of them. `extract --codec NAME` needs no judge."
        )
    codecs, refused = _with_tables(names, learnt, checkpoint, expert.device)
    judge = CodecJudge(expert=expert, codecs=codecs, gradients=gradients, seed=seed)
    started = time.monotonic()
    for number, sample in enumerate(judged, 1):
        judge.add(sample)
        rate = number / (time.monotonic() - started)
        on_progress(Progress(done=number, total=len(judged), unit="samples", rate=rate, notes={}))
    if expert.device.type == "cuda":
        torch.cuda.empty_cache()
    errors = judge.errors()
    found = {
        name: TriedCodec(codec=codecs.get(name), errors=errors.get(name), refused=refused.get(name)) for name in names
    }
    return errors[ROUNDING], found


def _with_tables(
    names: Sequence[str], learnt: Sequence[WholeSample], checkpoint: Checkpoint, device: torch.device
) -> tuple[dict[str, KVCodec | None], Mapping[str, str]]:
    """The named codecs, those of `transform` learnt; and why others cannot be."""
    codecs: dict[str, KVCodec | None] = {}
    refused: dict[str, str] = {}
    known, bases = [one for one in learnt if one.positions is not None], None
    for name in names:
        codec = codec_named(name)
        if isinstance(codec, LearntCodec):
            try:
                if not known:
                    raise UsageError(
                        "where the images of these samples lie cannot be told from what the store has; give the "
                        "recordings they were extracted from."
                    )
                bases = bases or learn_from(known, checkpoint, None, device)
                codecs[name] = bases.codec(codec.rate)
            except UsageError as error:
                refused[name] = str(error)
        else:
            codecs[name] = codec
    return codecs, refused

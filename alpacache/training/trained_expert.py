"""The expert as a run has trained it: the checkpoint of a run, checked and put into the base.

Predictions come from here alone, so that an evaluation and a driver have the same weights in the same precision.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.alpamayo.new_expert import begun_with
from alpacache.cached_samples.identity import check_base, check_same_vlm
from alpacache.training.run_directory import find_checkpoint, read_trained
from alpacache.training.run_state import read_state
from alpacache.training.trainable import apply_checkpoint, changed_tensors

if TYPE_CHECKING:
    from alpacache.alpamayo import ActionExpert


def find_trained(
    run: str, base: Checkpoint, *, vlm: Mapping[str, str] | None, what: str, average: bool
) -> tuple[Path, dict[str, Any]]:
    """Path and state of a run's checkpoint, checked to be one that can predict on this model's features.

    Its tensors are read and let go again: a damaged one must not end an evaluation after the others' hours.

    Args:
        vlm: the VLM that the features come from, as in `CachedDataset.vlm`; `what` names them in errors.
        average: whether the run's average of the weights is wanted.

    Raises `UsageError` where the run was trained from another model than `base`, on features of another VLM than `vlm`,
    or has no average where one is wanted, `DataError` where it is damaged.
    """
    path = find_checkpoint(run).resolve()  # `best` may move on while a run is still training
    state = read_state(path, average=average)
    base = begun_with(base, state)
    check_base(base, state["base"], run=path)
    check_same_vlm(state.get("vlm"), vlm, run=path, what=what)
    changed_tensors(read_trained(path, average=average).model, base.shapes(*EXPERT_PARTS), where=path)
    return path, state


def load_trained(
    base: Checkpoint, run: Path | None, device: torch.device, *, average: bool = False, dtype: torch.dtype | None = None
) -> "ActionExpert":
    """Load the base's expert, or of a run's checkpoint the expert that it trained: the base's, or one of its own size.

    `dtype`: bfloat16 on a GPU and float32 on the CPU unless given.
    """
    from alpacache.alpamayo import load_expert  # seconds of imports, which no refusal should wait for

    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if run is None:
        return load_expert(base, dtype=dtype, device=device).eval()
    content = read_trained(run, average=average)
    expert = load_expert(begun_with(base, content.state), dtype=dtype, device=device)
    apply_checkpoint(expert, content.model, where=str(run))
    return expert.eval()

"""The VLM backbone's geometry: the one place that knows it is Qwen3-VL.

Released Alpamayo checkpoints are Qwen3-VL (Cosmos-Reason2), whatever older write-ups say. A checkpoint on another
backbone needs another pair of these functions.
"""

import copy
import inspect
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.configuration import read_json
from alpacache.alpamayo.hub import hub_file
from alpacache.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLTextConfig


def companion_file(checkpoint: Checkpoint, name: str) -> Path:
    """A file of the VLM the checkpoint was built on (`vlm_name_or_path`: a path beside it, a path, or a hub id)."""
    where = checkpoint.config.vlm_name_or_path
    if checkpoint.directory is not None and (checkpoint.directory / where).is_dir():
        directory = checkpoint.directory / where
    elif Path(where).is_dir():
        directory = Path(where)
    elif where.count("/") == 1 and not where.startswith((".", "/")):
        return hub_file(where, name)
    else:
        raise CheckpointError(
            f"{checkpoint.model}: vlm_name_or_path is {where!r}, neither a directory beside it nor a hub id."
        )
    if not (directory / name).is_file():
        raise CheckpointError(f"{directory / name} does not exist; vlm_name_or_path must hold the VLM's {name}.")
    return directory / name


def vlm_config(checkpoint: Checkpoint) -> "Qwen3VLConfig":
    """The VLM's configuration with its vocabulary extended to the checkpoint's."""
    from transformers import Qwen3VLConfig

    raw = read_json(companion_file(checkpoint, "config.json"))
    if raw.get("model_type") != "qwen3_vl":
        raise CheckpointError(
            f"{checkpoint.config.vlm_name_or_path}: model_type is {raw.get('model_type')!r}; alpacache knows "
            "'qwen3_vl'. Another backbone is one new module beside alpacache/alpamayo/backbone.py."
        )
    raw = copy.deepcopy(raw)
    for section in (raw, raw["text_config"], raw["vision_config"]):
        for key in ("dtype", "torch_dtype", "_attn_implementation", "transformers_version"):
            section.pop(key, None)
    raw["vision_config"].pop("model_type", None)
    raw["text_config"]["vocab_size"] = checkpoint.config.vocab_size
    return Qwen3VLConfig.from_dict(raw)


def expert_config(checkpoint: Checkpoint) -> "Qwen3VLTextConfig":
    """The expert's configuration: the VLM's text model with the checkpoint's `expert_cfg` over it."""
    overrides: Mapping[str, Any] = checkpoint.config.raw["expert_cfg"]
    text = copy.deepcopy(vlm_config(checkpoint).text_config)
    for key, value in overrides.items():
        if not hasattr(text, key):
            raise CheckpointError(f"{checkpoint.model}: expert_cfg has the unknown key {key!r}.")
        setattr(text, key, value)
    text.vocab_size = 1  # the expert has no embeddings; a table of 155,697 rows would be allocated only to be dropped
    text.pad_token_id = None
    return text


@contextmanager
def empty_weights(dtype: torch.dtype, device: torch.device) -> "Iterator[None]":
    """Build modules on `device` in `dtype`, weights allocated but not initialised; buffers are computed as usual."""
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def cache_argument(model: "PreTrainedModel") -> str:
    """What this transformers calls the KV cache in a forward: `cache` from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

"""The VLM backbone: the one place that knows it is Qwen3-VL.

Released Alpamayo checkpoints are Qwen3-VL (Cosmos-Reason2), whatever older write-ups say. A checkpoint on another
backbone needs another module with these functions.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from alpacache.alpamayo.checkpoint import Checkpoint, hub_file, listed
from alpacache.alpamayo.family import EXPERT_PARTS, Geometry
from alpacache.alpamayo.foreign_files import Count, Schema, Width, conform, read_json
from alpacache.errors import AlpacacheError, CheckpointError
from alpacache.finite import is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen3VLConfig, Qwen3VLTextConfig

Module = TypeVar("Module", bound=nn.Module)
_Side = Annotated[int, Field(ge=1, le=256)]


class _TextSizes(Schema):
    """Bounds for sizes before a module is built from them, even one without memory."""

    model_config = ConfigDict(from_attributes=True)
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count


class _VisionSizes(Schema):
    model_config = ConfigDict(from_attributes=True)
    hidden_size: Width
    intermediate_size: Width
    out_hidden_size: Width
    depth: Count
    num_heads: Count
    patch_size: _Side
    spatial_merge_size: _Side
    temporal_patch_size: _Side
    in_channels: _Side
    num_position_embeddings: Width
    deepstack_visual_indexes: Annotated[list[int], Field(max_length=1024)]


class _VLMFile(Schema):
    """The VLM's `config.json`, as far as it is read before transformers reads it."""

    text_config: dict[str, object]
    vision_config: dict[str, object]


def companion_file(checkpoint: Checkpoint, name: str) -> Path:
    """A file of the VLM the checkpoint was built on (`vlm_name_or_path`: a path beside it, a path, or a hub id)."""
    where = checkpoint.config.vlm_name_or_path
    for directory in ((checkpoint.directory or Path()) / where, Path(where)):
        if os.path.isdir(directory):  # noqa: PTH112  # `Path.is_dir` raises for too long a name
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"{directory / name} does not exist; vlm_name_or_path must hold the VLM's {name}."
                )
            return directory / name
    if where.count("/") == 1 and not where.startswith((".", "/")):
        return hub_file(where, name)
    raise CheckpointError(
        f"{checkpoint.model}: vlm_name_or_path is {where!r}, neither a directory beside it nor a hub id."
    )


def vlm_config(checkpoint: Checkpoint) -> "Qwen3VLConfig":
    """The VLM's configuration with its vocabulary extended to the checkpoint's."""
    from transformers import Qwen3VLConfig

    path = companion_file(checkpoint, "config.json")
    raw = read_json(path)
    if raw.get("model_type") != "qwen3_vl":
        raise CheckpointError(
            f"{checkpoint.config.vlm_name_or_path}: model_type is {raw.get('model_type')!r}; alpacache knows "
            "'qwen3_vl'. Another backbone is one new module beside alpacache/alpamayo/backbone.py."
        )
    raw |= conform(_VLMFile, raw, path).model_dump()
    for section in (raw, raw["text_config"], raw["vision_config"]):
        for key in ("dtype", "torch_dtype", "_attn_implementation", "transformers_version"):
            section.pop(key, None)
    raw["vision_config"].pop("model_type", None)
    raw["text_config"]["vocab_size"] = checkpoint.config.vocab_size
    with refusing(path):
        config = Qwen3VLConfig.from_dict(raw)
    conform(_TextSizes, config.text_config, f"{path}: text_config")
    conform(_VisionSizes, config.vision_config, f"{path}: vision_config")
    return config


def expert_config(checkpoint: Checkpoint) -> "Qwen3VLTextConfig":
    """The expert's configuration: the VLM's text model with the checkpoint's overrides."""
    text = vlm_config(checkpoint).text_config
    known, where = text.to_dict(), f"{checkpoint.model}: expert_cfg"
    with refusing(where):
        for key, value in checkpoint.config.expert_overrides.items():
            if key not in known:
                raise CheckpointError(f"{where} has the unknown key {key!r}.")
            setattr(text, key, value)
    conform(_TextSizes, text, where)
    text.vocab_size = 1  # the expert has no embeddings; a table of 155,697 rows would be allocated only to be dropped
    text.pad_token_id = None
    return text


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """A checkpoint's sizes, from configs and safetensors headers: no weight is read.

    Raises `CheckpointError` for a checkpoint without a VLM.
    """
    text = vlm_config(checkpoint).text_config
    home, prefix = checkpoint.vlm_home
    vlm = home.shapes(*([prefix] if prefix else ["model.", "lm_head."]))
    if not vlm:
        raise CheckpointError(f"{home.model} has no tensor of a VLM; pass a complete checkpoint.")
    return Geometry(
        model=checkpoint.model,
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        vlm_hidden=text.hidden_size,
        vlm_parameters=sum(map(math.prod, vlm.values())),
        expert_shapes=checkpoint.shapes(*EXPERT_PARTS),
    )


def load_module(
    checkpoint: Checkpoint, prefix: str, make: Callable[[], Module], *, dtype: torch.dtype, device: torch.device
) -> Module:
    """The module that `make` builds, with the weights that the checkpoint has under `prefix`.

    It is built without memory first and compared with the weights' headers, so that no config, however damaged, makes
    this allocate more than the weights need.
    """
    with refusing(f"{checkpoint.model}: config.json"), empty_weights(dtype, torch.device("meta")):
        shapes = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    checkpoint.check_shapes(shapes, prefix)
    with empty_weights(dtype, device):
        module = make()
    state, finite = module.state_dict(), {}
    for name, tensor in checkpoint.read(checkpoint.with_prefix(prefix)):
        finite[name] = is_finite(state[name.removeprefix(prefix)].copy_(tensor))  # asked last, so that no copy waits
    check_finite(checkpoint, finite)
    return module


def check_finite(checkpoint: Checkpoint, finite: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` naming the tensors, of those with a flag of `is_finite`, that are not finite."""
    if bad := [name for name, flag in finite.items() if not flag]:
        raise CheckpointError(
            f"{checkpoint.model} has weights that are not finite (NaN or infinity): {listed(bad)}. Fetch the "
            "checkpoint again; if it is one of your own, make it again from weights that are."
        )


@contextmanager
def refusing(where: object) -> Iterator[None]:
    """Turn whatever transformers raises over a foreign configuration into a `CheckpointError` of one line."""
    try:
        yield
    except AlpacacheError:
        raise
    except Exception as error:  # it raises bare exceptions of many kinds, `KeyError` for an activation's name
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{where} does not describe a model that can be built ({told[:300]}).") from error


@contextmanager
def empty_weights(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Build modules on `device` in `dtype`, weights allocated but not initialised; buffers are computed as usual."""
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the least number elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def cache_argument(model: "PreTrainedModel") -> str:
    """Name of a forward's KV cache argument in this transformers: `cache` from 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

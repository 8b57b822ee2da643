"""The VLM backbone: the one place that knows it is Qwen3-VL.

Released Alpamayo checkpoints are Qwen3-VL (Cosmos-Reason2), whatever older write-ups say. A checkpoint on another
backbone needs another module with these functions.
"""

import copy
import inspect
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from alpacache.alpamayo.checkpoint import Checkpoint, hub_file, listed
from alpacache.alpamayo.family import EXPERT_PARTS, Geometry, VLMSizes
from alpacache.alpamayo.foreign_files import Count, Schema, Width, conform, read_json
from alpacache.errors import AlpacacheError, CheckpointError
from alpacache.finite import is_finite
from alpacache.layer_choice import chosen_layers
from alpacache.strict_json import plain

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig, Qwen3VLTextConfig

Module = TypeVar("Module", bound=nn.Module)
_Side = Annotated[int, Field(ge=1, le=256)]
_Token = Annotated[int, Field(ge=0, lt=2**20)]
_Place = Annotated[int, Field(ge=0, lt=1024)]
_Theta = Annotated[float, Field(gt=1, le=1e15, allow_inf_nan=False)]
_Epsilon = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Rope(Schema):
    """Rotary angles of the text model."""

    rope_type: Literal["default"]
    rope_theta: _Theta
    mrope_section: Annotated[tuple[Count, Count, Count], Field(strict=False)]
    mrope_interleaved: bool = True


class _Text(Schema):
    """Settings that decide the text model's numbers, within bounds: modules are built of it, if only without memory."""

    model_config = ConfigDict(from_attributes=True)
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    hidden_act: str
    rms_norm_eps: _Epsilon
    attention_bias: bool
    rope_parameters: _Rope

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            heads, of_keys = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {of_keys}")
        if 2 * sum(self.rope_parameters.mrope_section) != self.head_dim:
            section = list(self.rope_parameters.mrope_section)
            raise ValueError(f"mrope_section {section} does not add up to half of head_dim {self.head_dim}")
        return self


class _Vision(Schema):
    """The same of the vision tower."""

    model_config = ConfigDict(from_attributes=True)
    hidden_size: Width
    intermediate_size: Width
    out_hidden_size: Width
    depth: Count
    num_heads: Count
    hidden_act: str
    patch_size: _Side
    spatial_merge_size: _Side
    temporal_patch_size: _Side
    in_channels: _Side
    num_position_embeddings: Width
    deepstack_visual_indexes: Annotated[list[_Place], Field(max_length=1024, strict=False)]

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.hidden_size % (
            4 * self.num_heads
        ):  # a quarter of each head's channels turns with rows, one with columns
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of 4 num_heads, {4 * self.num_heads}")
        return self


class _Numbers(Schema):
    """Settings that decide the VLM's numbers."""

    model_config = ConfigDict(from_attributes=True)
    text_config: _Text
    vision_config: _Vision
    image_token_id: _Token


class _TextFile(Schema):
    """Keys of `text_config` that transformers is given, where it has a form of its own for them."""

    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_theta: _Theta | None = None


class _VLMFile(Schema):
    """The VLM's `config.json`, as far as it is read before transformers reads it."""

    text_config: _TextFile
    vision_config: dict[str, object]
    image_token_id: _Token | None = None
    video_token_id: _Token | None = None


LAYER_MAP = "expert_layer_map"
"""Key of `config.json`: the VLM's layer that each layer of the expert attends to. Where it is absent, layer i has i."""
_TEXT_KEYS = {*_Text.model_fields, *_TextFile.model_fields, "max_position_embeddings", "initializer_range"}
_VISION_KEYS = {*_Vision.model_fields, "initializer_range"}
_KEYS = ("model_type", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def companion_file(checkpoint: Checkpoint, name: str) -> Path:
    """A file of the VLM the checkpoint was built on (`vlm_name_or_path`: a path beside it, a path, or a hub id).

    A checkpoint that names none has these files itself. Beside one on the hub is within its repository.
    """
    where = checkpoint.config.vlm_name_or_path
    if where is None:
        return checkpoint.file(name)
    parts = PurePosixPath(where).parts
    if checkpoint.directory is None and len(parts) == 1 and parts[0] not in ("..", "/"):
        return checkpoint.file(f"{parts[0]}/{name}")
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
        f"config.json of {checkpoint.model}: vlm_name_or_path is {reprlib.repr(where)}, neither a directory beside it "
        "nor a hub id."
    )


def vlm_config(checkpoint: Checkpoint) -> "Qwen3VLConfig":
    """The VLM's configuration with its vocabulary extended to the checkpoint's.

    transformers is given what decides the model alone: any other key would become an attribute of its config, and some
    change what a forward returns.
    """
    from transformers import Qwen3VLConfig

    path, inline = vlm_file(checkpoint), checkpoint.config.vlm
    raw: Mapping[str, Any] = read_json(companion_file(checkpoint, "config.json")) if inline is None else inline
    if raw.get("model_type") != "qwen3_vl":
        raise CheckpointError(
            f"{path}: model_type is {reprlib.repr(raw.get('model_type'))}; alpacache knows 'qwen3_vl'. Another "
            "backbone is one new module beside alpacache/alpamayo/backbone.py."
        )
    conform(_VLMFile, raw, path)
    text = _decisive(raw["text_config"])
    vision = {key: value for key, value in raw["vision_config"].items() if key in _VISION_KEYS}
    given = {key: raw[key] for key in (*_KEYS, "tie_word_embeddings") if key in raw}
    with refusing(path):
        config = Qwen3VLConfig.from_dict(
            {**given, "text_config": {**text, "vocab_size": checkpoint.config.vocab_size}, "vision_config": vision}
        )
    conform(_Numbers, config, path)
    return config


def vlm_file(checkpoint: Checkpoint) -> str:
    """The place of the VLM's configuration, for errors."""
    path = companion_file(checkpoint, "config.json")
    return f"{path}" if checkpoint.config.vlm is None else f"{path}: vlm_config"


def prefix_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Collect the settings that decide a prefix, defaults spelled out, whoever wrote the files."""
    config = checkpoint.config
    tokens = ("vocab_size", "traj_vocab_size", "traj_token_start", "min_pixels", "max_pixels")
    history = plain(config.history)
    if config.history.from_origin:  # as all of those had it that stores were first made of
        del history["from_origin"]
    return {
        **{name: getattr(config, name) for name in tokens},
        "traj_token_ids": dict(config.traj_token_ids),
        "history": history,
        "vlm": conform(_Numbers, vlm_config(checkpoint), vlm_file(checkpoint)).model_dump(mode="json"),
    }


def expert_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Collect the settings in `config.json` that decide the expert's numbers, beside the shapes of its weights."""
    config = checkpoint.config
    layer_map = {LAYER_MAP: list(config.raw[LAYER_MAP])} if LAYER_MAP in config.raw else {}
    own = None if config.expert_text is None else _own_settings(checkpoint)
    return {
        **layer_map,
        "dtype": str(config.dtype).removeprefix("torch."),
        "action_space": plain(config.action_space),
        "action_in_proj": plain(config.action_in_proj),
        "expert": plain(_decisive(config.expert_overrides)) if own is None else own,
    }


def _decisive(text: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a text model that decide its numbers, copied: transformers writes into what it is given."""
    return copy.deepcopy({key: value for key, value in text.items() if key in _TEXT_KEYS})


def expert_config(checkpoint: Checkpoint) -> "Qwen3VLTextConfig":
    """The expert's configuration: its own or the VLM's text model's, with the checkpoint's overrides."""
    text, own = vlm_config(checkpoint).text_config, checkpoint.config.expert_text
    where = f"config.json of {checkpoint.model}: {'.'.join(checkpoint.config.family.expert_block)}"
    if own is not None:
        text = _own_text(text, own, where, mapped=LAYER_MAP in checkpoint.config.raw)
    known = text.to_dict()
    with refusing(where):
        for key, value in checkpoint.config.expert_overrides.items():
            if key not in known:
                raise CheckpointError(f"{where} has the unknown key {key!r}.")
            if key in _TEXT_KEYS:  # the others decide nothing here
                setattr(text, key, value)
    conform(_Text, text, where)
    text.vocab_size = 1  # the expert has no embeddings; a table of 155,697 rows would be allocated only to be dropped
    text.pad_token_id = None
    return text


def layer_map_of(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The VLM's layer that each layer of the expert attends to. Raises `CheckpointError` for one that there is not."""
    layers = expert_config(checkpoint).num_hidden_layers
    given = checkpoint.config.raw.get(LAYER_MAP, list(range(layers)))
    there = vlm_config(checkpoint).text_config.num_hidden_layers
    good = isinstance(given, list) and all(type(layer) is int and 0 <= layer < there for layer in given)
    if not good or len(given) != layers:
        raise CheckpointError(
            f"config.json of {checkpoint.model}: {LAYER_MAP} is {reprlib.repr(given)}; expected {layers} layers of the "
            f"VLM, one for each of the expert's, 0 to {there - 1}."
        )
    return tuple(given)


def some_layers(checkpoint: Checkpoint, choice: str | None) -> tuple[int, ...] | None:
    """The VLM's layers that `--layers` chooses, rising; None for all of them. Raises `UsageError` for others."""
    if choice is None:
        return None
    count = vlm_config(checkpoint).text_config.num_hidden_layers
    layers = chosen_layers(choice, count)
    return None if len(layers) == count else layers


def _own_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The numbers of an expert's own text model, defaults spelled out."""
    return conform(_Text, expert_config(checkpoint), checkpoint.file("config.json")).model_dump(mode="json")


def _own_text(vlm: "Qwen3VLTextConfig", own: Mapping[str, Any], where: str, *, mapped: bool) -> "Qwen3VLTextConfig":
    """An expert's own text model, whose layers attend to those of the VLM's, or as they are `mapped` to them."""
    from transformers import Qwen3VLTextConfig

    conform(_TextFile, own, where)
    with refusing(where):
        text = Qwen3VLTextConfig.from_dict(_decisive(own))
    for key in ("num_key_value_heads", "head_dim", *([] if mapped else ["num_hidden_layers"])):
        if (found := getattr(text, key)) != (expected := getattr(vlm, key)):
            raise CheckpointError(
                f"{where}: {key} is {reprlib.repr(found)}; the VLM, to whose layers the expert's attend, has "
                f"{expected}."
            )
    return text


def stored_dtypes(checkpoint: Checkpoint) -> set[str]:
    """Types that the VLM's weights are stored in, as safetensors names them: `BF16`, `F32`."""
    home, prefix = checkpoint.vlm_home
    return {info.dtype for info in home.infos(home.with_prefix(prefix or "model.")).values()}


def geometry_of(checkpoint: Checkpoint) -> Geometry:
    """A checkpoint's sizes, from configs and safetensors headers: no weight is read.

    Raises `CheckpointError` for a checkpoint without a VLM.
    """
    config = vlm_config(checkpoint)
    text = config.text_config
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
        vlm=_vlm_sizes(config, {name.removeprefix(f"{prefix}model."): shape for name, shape in vlm.items()}),
        expert_shapes=checkpoint.shapes(*EXPERT_PARTS),
    )


def _vlm_sizes(config: "Qwen3VLConfig", shapes: Mapping[str, tuple[int, ...]]) -> VLMSizes:
    """The VLM's sizes: parameters of its parts by the shapes of its tensors, by name behind `model.`."""
    text, vision = config.text_config, config.vision_config

    def count(part: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(part))

    return VLMSizes(
        layer_parameters=count("language_model.layers.0."),
        tower_parameters=count("visual."),
        embedding_parameters=count("language_model.embed_tokens."),
        intermediate=text.intermediate_size,
        query_width=text.num_attention_heads * text.head_dim,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        merged=vision.spatial_merge_size**2,
        deepstack=len(vision.deepstack_visual_indexes),
    )


def described_by(checkpoint: Checkpoint) -> str:
    """The files that say which tensors a checkpoint has, for errors."""
    own, vlm = checkpoint.file("config.json"), companion_file(checkpoint, "config.json")
    return f"{own}" if own == vlm else f"{own} and {vlm}"


def load_module(
    checkpoint: Checkpoint,
    prefix: str,
    make: Callable[[], Module],
    *,
    described_by: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Module:
    """The module that `make` builds of the files `described_by`, with the checkpoint's weights under `prefix`.

    It is built without memory first and compared with the weights' headers, so that no config, however damaged, makes
    this allocate more than the weights need.
    """
    checkpoint.check_shapes(
        module_shapes(make, described_by=described_by, dtype=dtype), prefix, described_by=described_by
    )
    with empty_weights(dtype, device):
        module = make()
    state, finite = module.state_dict(), {}
    for name, tensor in checkpoint.read(checkpoint.with_prefix(prefix)):
        finite[name] = is_finite(state[name.removeprefix(prefix)].copy_(tensor))  # asked last, so that no copy waits
    check_finite(checkpoint, finite)
    return module


def module_shapes(
    make: Callable[[], nn.Module], *, described_by: str, dtype: torch.dtype
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of the module that `make` builds of the files `described_by`; it gets no memory."""
    with refusing(described_by), empty_weights(dtype, torch.device("meta")):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


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
        told = re.sub(r"\b\w*(?:Error|Exception): ", "", " ".join(str(error).split()))
        if isinstance(error, KeyError) or not told:
            told = f"{told} is not known".strip()
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


def cache_argument(model: nn.Module) -> str:
    """Name of a forward's KV cache argument in this transformers: `cache` from 5.24 on, `past_key_values` before."""
    return _cache_argument(type(model).forward)


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

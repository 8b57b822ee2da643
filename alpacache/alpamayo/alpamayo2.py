"""Alpamayo 2 Super: its nested `config.json`, its prompt and its released sizes.

Where it differs from R1 without a word in any error: 45 history tokens, without a displacement from the origin; history
bins come before future bins; routes stand in the prompt as they are; a reasoning text starts at once and never ends the
turn; the weights hold no constants; the expert is narrower than its attention.

Source: NVlabs/alpamayo2 and its recipe (behaviour; golden data pins it).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from alpacache.alpamayo.config_blocks import (
    ActionInBlock,
    ActionOutBlock,
    ActionSpaceBlock,
    Dtype,
    FutureTokenizerBlock,
    HistoryTokenizerBlock,
    TokenId,
    check_bins,
    pixel_limits,
    torch_dtype,
)
from alpacache.alpamayo.family import (
    AlpamayoConfig,
    Family,
    Geometry,
    HistoryTokens,
    Released,
    VLMSizes,
    released_expert_shapes,
)
from alpacache.alpamayo.foreign_files import Pixels, Schema, Width, conform
from alpacache.alpamayo.prompt import REASONING, PromptFormat
from alpacache.errors import CheckpointError


class _SuperIds(Schema):
    history_pad: TokenId
    future_pad: TokenId
    history_start: TokenId
    future_start: TokenId
    history_end: TokenId
    future_end: TokenId
    history_id0: TokenId
    future_id0: TokenId


class _SuperHistory(HistoryTokenizerBlock):
    predict_yaw: Literal[False] = False
    pad_origin_at_beginning: bool = True


class _SuperText(Schema):
    vocab_size: Width
    eos_token_id: TokenId


class _SuperVLM(Schema):
    text_config: _SuperText


class _SuperDiffusion(Schema):
    int_method: Literal["euler"] = "euler"
    use_classifier_free_guidance: Literal[False] | None = None


class _SuperExpert(Schema):
    llm_config: dict[str, Any]
    action_space_cfg: ActionSpaceBlock
    action_in_proj_cfg: ActionInBlock
    action_out_proj_cfg: ActionOutBlock
    diffusion_cfg: _SuperDiffusion = _SuperDiffusion()
    expert_non_causal_attention: Literal[True] = True


class _SuperConfig(Schema):
    """The file. Values that no public code builds a prompt or a model for are refused."""

    vlm_class: Literal["Qwen3VLForConditionalGeneration"] = "Qwen3VLForConditionalGeneration"
    vlm_config: _SuperVLM
    expert_config: _SuperExpert
    traj_ids: _SuperIds
    history_vocab_size: Width
    future_vocab_size: Width
    tokens_per_history_traj: Width
    hist_traj_tokenizer_cfg: _SuperHistory
    future_traj_tokenizer_cfg: FutureTokenizerBlock
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    enable_expert: Literal[True] = True
    logit_cap: Literal[0] | None = None
    token_layout: Literal["camera_ts"] | None = None
    frame_label: Literal["frame_num", "none"] | None = None
    include_camera_ids: bool | None = None
    include_frame_nums: bool | None = None
    use_dt_tokens: Literal[False] | None = None


def read_nested_config(family: Family, raw: Mapping[str, Any], path: Path) -> AlpamayoConfig:
    """The config of 2 Super. Whether the prompt names cameras and numbers frames is what the file says."""
    config = conform(_SuperConfig, raw, path)
    history, ids = config.hist_traj_tokenizer_cfg, config.traj_ids
    bins = config.history_vocab_size + config.future_vocab_size
    first = min(ids.history_id0, ids.future_id0)
    _check_together(config, path)
    tokens = HistoryTokens(
        first_id=ids.history_id0,
        bins=history.num_bins,
        low=history.ego_xyz_min,
        high=history.ego_xyz_max,
        from_origin=history.pad_origin_at_beginning,
    )
    if config.tokens_per_history_traj != tokens.count:
        raise CheckpointError(
            f"{path}: tokens_per_history_traj is {config.tokens_per_history_traj}; hist_traj_tokenizer_cfg with "
            f"pad_origin_at_beginning {str(history.pad_origin_at_beginning).lower()} gives {tokens.count}."
        )
    numbered = {"frame_num": True, "none": False, None: config.include_frame_nums is not False}[config.frame_label]
    named = config.include_camera_ids is not False
    prompt = replace(family.prompt, camera_names=named, frame_numbers=numbered, history_tokens=tokens.count)
    expert, turn_end = config.expert_config, config.vlm_config.text_config.eos_token_id
    least, most = pixel_limits(config.min_pixels, config.max_pixels, SUPER_RELEASED.pixels, path)
    return AlpamayoConfig(
        raw=raw,
        family=replace(family, prompt=prompt),
        dtype=torch_dtype(config.dtype or config.torch_dtype),
        vlm=raw["vlm_config"],
        vocab_size=config.vlm_config.text_config.vocab_size,
        traj_vocab_size=bins,
        traj_token_start=first,
        traj_token_ids={
            "history": ids.history_pad,
            "future": ids.future_pad,
            **ids.model_dump(include={"history_start", "future_start", "history_end", "future_end"}),
        },
        min_pixels=least,
        max_pixels=most,
        history=tokens,
        action_space=expert.action_space_cfg.space,
        action_in_proj=expert.action_in_proj_cfg.model_dump(exclude={"target"}),
        expert_text=expert.llm_config,
        expert_overrides={},
        never_sampled=(range(first, first + bins), range(turn_end, turn_end + 1)),
        turn_end=turn_end,
    )


def _check_together(config: _SuperConfig, path: Path) -> None:
    """Refuse bins that do not lie side by side, ids beyond the vocabulary, and an expert that cannot see the VLM."""
    ids, history = config.traj_ids, config.hist_traj_tokenizer_cfg
    check_bins(history, path)
    if history.num_bins > config.history_vocab_size or config.future_traj_tokenizer_cfg.num_bins > (
        config.future_vocab_size
    ):
        raise CheckpointError(
            f"{path}: history_vocab_size and future_vocab_size are {config.history_vocab_size} and "
            f"{config.future_vocab_size}; the tokenizers have num_bins {history.num_bins} and "
            f"{config.future_traj_tokenizer_cfg.num_bins}."
        )
    behind_history = ids.history_id0 + config.history_vocab_size
    if ids.future_id0 != behind_history and ids.history_id0 != ids.future_id0 + config.future_vocab_size:
        raise CheckpointError(
            f"{path}: traj_ids.future_id0 is {ids.future_id0}; history_id0 {ids.history_id0} and history_vocab_size "
            f"{config.history_vocab_size} put it at {behind_history}."
        )
    last = max(*ids.model_dump().values(), behind_history - 1, ids.future_id0 + config.future_vocab_size - 1)
    vocabulary = config.vlm_config.text_config.vocab_size
    if vocabulary <= last:
        raise CheckpointError(
            f"{path}: vlm_config.text_config.vocab_size is {vocabulary}; traj_ids take tokens up to {last}."
        )


SUPER_RELEASED = Released(
    geometry=Geometry(
        model="released geometry (Alpamayo2-Super)",
        layers=64,
        kv_heads=8,
        head_dim=128,
        vlm_hidden=5120,
        vlm_parameters=33_396_711_664,
        vlm=VLMSizes(
            layer_parameters=487_598_336,
            tower_parameters=595_266_800,
            embedding_parameters=155_776 * 5120,
            intermediate=25600,
            query_width=8192,
            vision_hidden=1152,
            vision_intermediate=4304,
            merged=4,
            deepstack=3,
        ),
        expert_shapes=released_expert_shapes(layers=64, hidden=1536, intermediate=6144),
    ),
    # Counted with the released tokenizer: 825 tokens with the front camera's four images of 182, 5,316 with all seven.
    text_tokens=78,
    answer_tokens=11,
    question_tokens=23,
    camera_tokens=(4, 3, 4, 5, 4, 5, 5),
    frame_tokens=4,
    pixels={"patch": 16, "merge": 2, "min_pixels": 163_840, "max_pixels": 196_608},
)
SUPER = Family(
    name="2",
    package="alpamayo2_super",
    architecture="Alpamayo2Super",
    read_config=read_nested_config,
    prompt=PromptFormat(
        camera_names=True, frame_numbers=True, history_tokens=45, reasoning=(REASONING, ""), route=("", "")
    ),
    stores_constants=False,
    nested=True,
    expert_block=("expert_config", "llm_config"),
    expert_prefix="expert.",
    rounds_target=False,
    released=SUPER_RELEASED,
)
"""`nvidia/Alpamayo2-Super`."""

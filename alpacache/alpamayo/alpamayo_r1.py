"""Alpamayo R1: its flat `config.json`, its prompt and its released sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

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
from alpacache.alpamayo.prompt import PromptFormat
from alpacache.errors import CheckpointError


class _TokenIds(Schema):
    history: TokenId
    future: TokenId
    history_start: TokenId
    future_start: TokenId
    history_end: TokenId
    future_end: TokenId


class _Config(Schema):
    """The file. Null stands for the default wherever there is one."""

    vlm_name_or_path: Annotated[str, Field(min_length=1, max_length=4096)]
    vocab_size: Width
    traj_vocab_size: Width
    traj_token_start_idx: TokenId
    traj_token_ids: _TokenIds
    expert_cfg: dict[str, Any]
    action_space_cfg: ActionSpaceBlock
    action_in_proj_cfg: ActionInBlock
    action_out_proj_cfg: ActionOutBlock
    hist_traj_tokenizer_cfg: HistoryTokenizerBlock | None = None
    traj_tokenizer_cfg: FutureTokenizerBlock | None = None
    dtype: Dtype | None = None
    torch_dtype: Dtype | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    include_camera_ids: bool | None = None
    include_frame_nums: bool | None = None


def read_flat_config(family: Family, raw: Mapping[str, Any], path: Path) -> AlpamayoConfig:
    """The config of R1 and 1.5."""
    config = conform(_Config, raw, path)
    history = config.hist_traj_tokenizer_cfg or HistoryTokenizerBlock()
    future = config.traj_tokenizer_cfg or FutureTokenizerBlock()
    _check_together(config, family, history, future, path)
    least, most = pixel_limits(config.min_pixels, config.max_pixels, R1_RELEASED.pixels, path)
    return AlpamayoConfig(
        raw=raw,
        family=family,
        dtype=torch_dtype(config.dtype or config.torch_dtype),
        vlm_name_or_path=config.vlm_name_or_path,
        vocab_size=config.vocab_size,
        traj_vocab_size=config.traj_vocab_size,
        traj_token_start=config.traj_token_start_idx,
        traj_token_ids=config.traj_token_ids.model_dump(),
        min_pixels=least,
        max_pixels=most,
        history=HistoryTokens(
            first_id=config.traj_token_start_idx + future.num_bins,  # the future's bins come first
            bins=history.num_bins,
            low=history.ego_xyz_min,
            high=history.ego_xyz_max,
        ),
        action_space=config.action_space_cfg.space,
        action_in_proj=config.action_in_proj_cfg.model_dump(exclude={"target"}),
        expert_overrides=config.expert_cfg,
        never_sampled=(range(config.traj_token_start_idx, config.traj_token_start_idx + config.traj_vocab_size),),
    )


def _check_together(
    config: _Config, family: Family, history: HistoryTokenizerBlock, future: FutureTokenizerBlock, path: Path
) -> None:
    """Refuse ids that are not where the vocabulary has them, and bins without a width."""
    first_special = config.traj_token_start_idx + config.traj_vocab_size
    for name, token in config.traj_token_ids.model_dump().items():
        expected = first_special + family.special_tokens.index(f"<|traj_{name}|>")
        if token != expected:
            raise CheckpointError(
                f"{path}: traj_token_ids.{name} is {token}; traj_token_start_idx {config.traj_token_start_idx} and "
                f"traj_vocab_size {config.traj_vocab_size} put it at {expected}."
            )
    last = first_special + len(family.special_tokens)
    if config.vocab_size < last:
        raise CheckpointError(f"{path}: vocab_size is {config.vocab_size}; its own tokens take {last}.")
    if future.num_bins + history.num_bins > config.traj_vocab_size:
        raise CheckpointError(
            f"{path}: traj_vocab_size is {config.traj_vocab_size}; traj_tokenizer_cfg and hist_traj_tokenizer_cfg have "
            f"num_bins {future.num_bins} and {history.num_bins}."
        )
    check_bins(history, path)


R1_RELEASED = Released(
    geometry=Geometry(
        model="released geometry (Alpamayo-R1-10B)",
        layers=36,
        kv_heads=8,
        head_dim=128,
        vlm_hidden=4096,
        vlm_parameters=8_800_000_000,  # the public card's 8.2 and 0.6 billion
        vlm=VLMSizes(
            layer_parameters=192_946_432,
            tower_parameters=576_388_336,
            embedding_parameters=155_697 * 4096,
            intermediate=12288,
            query_width=4096,
            vision_hidden=1152,
            vision_intermediate=4304,
            merged=4,
            deepstack=3,
        ),
        expert_shapes=released_expert_shapes(layers=36, hidden=2048, intermediate=8256),
    ),
    text_tokens=81,  # counted with its tokenizer: 809 tokens with one camera's four images of 182
    answer_tokens=11,
    question_tokens=24,  # 13 more than the direct prompt has there: 822 tokens against 809
    pixels={"patch": 16, "merge": 2, "min_pixels": 163_840, "max_pixels": 196_608},
)
R1 = Family(
    name="r1",
    package="alpamayo_r1",
    architecture="AlpamayoR1",
    read_config=read_flat_config,
    prompt=PromptFormat(camera_names=False, frame_numbers=False),
    stores_constants=True,
    released=R1_RELEASED,
)
"""`nvidia/Alpamayo-R1-10B`."""

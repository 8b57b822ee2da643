"""Alpamayo R1: its flat `config.json`, its prompt and its released sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from alpacache.alpamayo.family import AlpamayoConfig, Family, Geometry, HistoryTokens, Released, VLMSizes
from alpacache.alpamayo.foreign_files import Count, Fraction, Number, Pixels, Schema, Width, conform
from alpacache.alpamayo.prompt import PromptFormat
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.errors import CheckpointError

_Id = Annotated[int, Field(ge=0, lt=2**20)]
_XYZ = Annotated[tuple[Number, Number, Number], Field(strict=False)]
_Bounds = Annotated[tuple[Annotated[Number, Field(lt=0)], Annotated[Number, Field(gt=0)]], Field(strict=False)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Dtype = Literal["bfloat16", "float32", "torch.bfloat16", "torch.float32"]


class _Block(Schema):
    """A `*_cfg` block that names its class. Only the last part is compared, and nothing is ever imported by it."""

    known: ClassVar[str]
    target: str = Field(alias="_target_")

    @field_validator("target")
    @classmethod
    def _is_known(cls, target: str) -> str:
        last = target.rsplit(".", 1)[-1]
        if last != cls.known:
            raise ValueError(f"it is a {last[:80]!r}; alpacache knows {cls.known!r} only")
        return target


class _ActionSpace(_Block):
    known = "UnicycleAccelCurvatureActionSpace"
    accel_mean: Number
    accel_std: _Scale
    curvature_mean: Number
    curvature_std: _Scale
    dt: _Scale = 0.1
    n_waypoints: Count = 64
    theta_lambda: Fraction = 1e-6
    theta_ridge: Fraction = 1e-8
    v_lambda: Fraction = 1e-6
    v_ridge: Fraction = 1e-4
    a_lambda: Fraction = 1e-4
    a_ridge: Fraction = 1e-4
    kappa_lambda: Fraction = 1e-4
    kappa_ridge: Fraction = 1e-4
    curvature_bounds: _Bounds = (-0.33, 0.33)


class _ActionInProjection(_Block):
    known = "PerWaypointActionInProjV2"
    hidden_size: Width = 512
    num_fourier_feats: Count = 20
    max_freq: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 100.0
    num_enc_layers: Count = 2


class _ActionOutProjection(_Block):
    known = "Linear"


class _HistoryTokenizer(Schema):
    num_bins: Annotated[int, Field(ge=2, le=2**20)] = 1000
    ego_xyz_min: _XYZ = (-4.0, -4.0, -10.0)
    ego_xyz_max: _XYZ = (4.0, 4.0, 10.0)


class _FutureTokenizer(Schema):
    num_bins: _Id = 0


class _TokenIds(Schema):
    history: _Id
    future: _Id
    history_start: _Id
    future_start: _Id
    history_end: _Id
    future_end: _Id


class _Config(Schema):
    """The file. Null stands for the default wherever there is one."""

    vlm_name_or_path: Annotated[str, Field(min_length=1, max_length=4096)]
    vocab_size: Width
    traj_vocab_size: Width
    traj_token_start_idx: _Id
    traj_token_ids: _TokenIds
    expert_cfg: dict[str, Any]
    action_space_cfg: _ActionSpace
    action_in_proj_cfg: _ActionInProjection
    action_out_proj_cfg: _ActionOutProjection
    hist_traj_tokenizer_cfg: _HistoryTokenizer | None = None
    traj_tokenizer_cfg: _FutureTokenizer | None = None
    dtype: _Dtype | None = None
    torch_dtype: _Dtype | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    include_camera_ids: bool | None = None
    include_frame_nums: bool | None = None


def read_flat_config(family: Family, raw: Mapping[str, Any], path: Path) -> AlpamayoConfig:
    """The config of R1 and 1.5."""
    config = conform(_Config, raw, path)
    space = config.action_space_cfg.model_dump(exclude={"target", "dt", "n_waypoints"})
    history = config.hist_traj_tokenizer_cfg or _HistoryTokenizer()
    future = config.traj_tokenizer_cfg or _FutureTokenizer()
    _check_together(config, family, history, future, path)
    return AlpamayoConfig(
        raw=raw,
        family=family,
        dtype=getattr(torch, (config.dtype or config.torch_dtype or "bfloat16").removeprefix("torch.")),
        vlm_name_or_path=config.vlm_name_or_path,
        vocab_size=config.vocab_size,
        traj_vocab_size=config.traj_vocab_size,
        traj_token_start=config.traj_token_start_idx,
        traj_token_ids=config.traj_token_ids.model_dump(),
        min_pixels=config.min_pixels or R1_RELEASED.pixels["min_pixels"],
        max_pixels=config.max_pixels or R1_RELEASED.pixels["max_pixels"],
        history=HistoryTokens(
            first_id=config.traj_token_start_idx + future.num_bins,  # the future's bins come first
            bins=history.num_bins,
            low=history.ego_xyz_min,
            high=history.ego_xyz_max,
        ),
        action_space=UnicycleActionSpace(
            **space, dt_s=config.action_space_cfg.dt, waypoints=config.action_space_cfg.n_waypoints
        ),
        action_in_proj=config.action_in_proj_cfg.model_dump(exclude={"target"}),
        expert_overrides=config.expert_cfg,
    )


def _check_together(
    config: _Config, family: Family, history: _HistoryTokenizer, future: _FutureTokenizer, path: Path
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
    if any(low >= high for low, high in zip(history.ego_xyz_min, history.ego_xyz_max, strict=True)):
        raise CheckpointError(
            f"{path}: hist_traj_tokenizer_cfg has ego_xyz_min {list(history.ego_xyz_min)} and ego_xyz_max "
            f"{list(history.ego_xyz_max)}; expected each below its partner."
        )


def _expert_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the released expert and its projections, without its model class; a test compares the two."""
    hidden, head_dim, intermediate, projection = 2048, 128, 8256, 512
    queries, keys = 16 * head_dim, 8 * head_dim
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    trunk = {
        **{"0.weight": (projection, 60), "0.bias": (projection,), "2.weight": (projection,)},
        **{"3.weight": (projection, projection), "3.bias": (projection,), "5.weight": (projection,)},
        **{"6.weight": (hidden, projection), "6.bias": (hidden,)},
    }
    return {
        **{f"expert.layers.{n}.{name}.weight": shape for n in range(36) for name, shape in layer.items()},
        **{f"action_in_proj.encoder.trunk.{name}": shape for name, shape in trunk.items()},
        **dict.fromkeys(("expert.norm.weight", "action_in_proj.norm.weight", "action_in_proj.norm.bias"), (hidden,)),
        "action_out_proj.weight": (2, hidden),
        "action_out_proj.bias": (2,),
    }


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
        expert_shapes=_expert_shapes(),
    ),
    text_tokens=81,  # counted with its tokenizer: 809 tokens with one camera's four images of 182
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

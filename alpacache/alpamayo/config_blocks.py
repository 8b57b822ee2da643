"""Blocks of a checkpoint's `config.json` that several families have, as schemas of what is read of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from alpacache.alpamayo.foreign_files import Count, Fraction, Number, Schema, Width
from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.driving.sample import DT_S, FUTURE_STEPS
from alpacache.errors import CheckpointError

TokenId = Annotated[int, Field(ge=0, lt=2**20)]
XYZ = Annotated[tuple[Number, Number, Number], Field(strict=False)]
_Bounds = Annotated[tuple[Annotated[Number, Field(lt=0)], Annotated[Number, Field(gt=0)]], Field(strict=False)]
_Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dtype = Literal["bfloat16", "float32", "torch.bfloat16", "torch.float32"]
"""Types that constants absent from the weights may be rounded to."""


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


class ActionSpaceBlock(_Block):
    """The space that actions are normalised in."""

    known = "UnicycleAccelCurvatureActionSpace"
    accel_mean: Number
    accel_std: _Scale
    curvature_mean: Number
    curvature_std: _Scale
    dt: _Scale = DT_S
    n_waypoints: Count = FUTURE_STEPS
    theta_lambda: Fraction = 1e-6
    theta_ridge: Fraction = 1e-8
    v_lambda: Fraction = 1e-6
    v_ridge: Fraction = 1e-4
    a_lambda: Fraction = 1e-4
    a_ridge: Fraction = 1e-4
    kappa_lambda: Fraction = 1e-4
    kappa_ridge: Fraction = 1e-4
    curvature_bounds: _Bounds = (-0.33, 0.33)

    @field_validator("dt")
    @classmethod
    def _is_step(cls, dt: float) -> float:
        if not math.isclose(dt, DT_S, rel_tol=1e-6):
            raise ValueError(f"it is {dt:g}; samples and paths have steps of {DT_S:g} s only")
        return dt

    @field_validator("n_waypoints")
    @classmethod
    def _is_future(cls, n_waypoints: int) -> int:
        if n_waypoints != FUTURE_STEPS:
            raise ValueError(f"it is {n_waypoints}; samples and paths have {FUTURE_STEPS} waypoints only")
        return n_waypoints

    @property
    def space(self) -> UnicycleActionSpace:
        """The action space with these constants, not rounded."""
        return UnicycleActionSpace(**self.model_dump(exclude={"target", "dt", "n_waypoints"}))


class ActionInBlock(_Block):
    """Arguments of `ActionInProjection`."""

    known = "PerWaypointActionInProjV2"
    hidden_size: Width = 512
    num_fourier_feats: Count = 20
    max_freq: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 100.0
    num_enc_layers: Count = 2


class ActionOutBlock(_Block):
    """The projection back to actions."""

    known = "Linear"


class HistoryTokenizerBlock(Schema):
    """Bins of the ego history."""

    num_bins: Annotated[int, Field(ge=2, le=2**20)] = 1000
    ego_xyz_min: XYZ = (-4.0, -4.0, -10.0)
    ego_xyz_max: XYZ = (4.0, 4.0, 10.0)


class FutureTokenizerBlock(Schema):
    """Bins of the future, which only the VLM's own training uses."""

    num_bins: TokenId = 0


def torch_dtype(name: Dtype | None) -> torch.dtype:
    """The type of this name, bfloat16 where a file has none."""
    found: torch.dtype = getattr(torch, (name or "bfloat16").removeprefix("torch."))
    return found


def check_bins(history: HistoryTokenizerBlock, path: Path) -> None:
    """Raise `CheckpointError` for bins without a width."""
    if any(low >= high for low, high in zip(history.ego_xyz_min, history.ego_xyz_max, strict=True)):
        raise CheckpointError(
            f"{path}: hist_traj_tokenizer_cfg has ego_xyz_min {list(history.ego_xyz_min)} and ego_xyz_max "
            f"{list(history.ego_xyz_max)}; expected each below its partner."
        )


def pixel_limits(lowest: int | None, highest: int | None, released: Mapping[str, int], path: Path) -> tuple[int, int]:
    """`min_pixels` and `max_pixels` of a file, those of the released model where it has none.

    Raises `CheckpointError` where no picture is within them.
    """
    least, most = lowest or released["min_pixels"], highest or released["max_pixels"]
    if least > most:
        raise CheckpointError(
            f"{path}: max_pixels is {most}, below min_pixels, {least}; no picture has such a size. Take both from the "
            "model that the weights are of."
        )
    return least, most

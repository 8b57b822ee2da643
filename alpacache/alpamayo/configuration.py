"""The public checkpoint's `config.json`, read as plain data.

The file names its classes in `_target_` strings. They are matched by their last part only (`alpamayo_r1.` and
`alpamayo1_5.` differ in nothing that matters here) and never imported, so a config cannot make this program run code.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alpacache.driving.action_space import UnicycleActionSpace
from alpacache.errors import CheckpointError

Family = Literal["r1", "1.5"]
_TARGETS = {
    "action_space_cfg": "UnicycleAccelCurvatureActionSpace",
    "action_in_proj_cfg": "PerWaypointActionInProjV2",
    "action_out_proj_cfg": "Linear",
    "diffusion_cfg": "FlowMatching",
    "hist_traj_tokenizer_cfg": "DeltaTrajectoryTokenizer",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlpamayoConfig:
    """What the project needs of a checkpoint's `config.json`."""

    raw: Mapping[str, Any]
    """The file as it is."""
    family: Family
    """`1.5` names cameras and frames in its prompt, `r1` does not."""
    dtype: str
    """`bfloat16` or `float32`: constants absent from the weights are rounded to it."""
    vlm_name_or_path: str
    """Hub id or path of the VLM's own config and tokenizer; a path may be relative to the checkpoint."""
    vocab_size: int
    traj_vocab_size: int
    traj_token_start: int
    """Id of `<i0>`."""
    traj_token_ids: Mapping[str, int]
    """Ids of `history`, `future`, and their `_start` and `_end`."""
    min_pixels: int
    max_pixels: int
    future_bins: int
    """Trajectory tokens before the first history bin (0 where the config has no future tokenizer bins)."""
    history_bins: int
    history_xyz_min: tuple[float, ...]
    history_xyz_max: tuple[float, ...]

    @property
    def sha256(self) -> str:
        """Hash of the config's meaning (keys sorted), part of a store's identity."""
        return hashlib.sha256(json.dumps(self.raw, sort_keys=True).encode()).hexdigest()

    def section(self, name: str) -> Mapping[str, Any]:
        """One `*_cfg` block, checked to name the class this project implements."""
        block = self.raw.get(name)
        if not isinstance(block, Mapping):
            raise CheckpointError(f"config.json has no {name}; this is not a complete Alpamayo checkpoint.")
        target = str(block.get("_target_", "")).rsplit(".", 1)[-1]
        if target != _TARGETS[name]:
            raise CheckpointError(f"config.json: {name} is a {target!r}; alpacache knows {_TARGETS[name]!r} only.")
        return block

    def action_space(self, constants: Mapping[str, float]) -> UnicycleActionSpace:
        """The action space with the four given constants (rounded as the checkpoint has them)."""
        block = self.section("action_space_cfg")
        names = (
            "theta_lambda",
            "theta_ridge",
            "v_lambda",
            "v_ridge",
            "a_lambda",
            "a_ridge",
            "kappa_lambda",
            "kappa_ridge",
        )
        options = {name: float(block[name]) for name in names if name in block}
        return UnicycleActionSpace(
            **constants, dt_s=float(block.get("dt", 0.1)), waypoints=int(block.get("n_waypoints", 64)), **options
        )


def read_config(path: Path) -> AlpamayoConfig:
    """Read and check `config.json`; every missing key is named in one error."""
    raw = read_json(path)
    wanted = (
        "vlm_name_or_path",
        "vocab_size",
        "traj_vocab_size",
        "traj_token_start_idx",
        "traj_token_ids",
        "expert_cfg",
    )
    missing = [key for key in wanted if key not in raw]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; expected the config.json of an Alpamayo checkpoint.")
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in ("bfloat16", "float32"):
        raise CheckpointError(f"{path}: dtype is {dtype!r}; expected 'bfloat16' or 'float32'.")
    history = raw.get("hist_traj_tokenizer_cfg") or {}
    future = raw.get("traj_tokenizer_cfg") or {}
    targets = [str(block.get("_target_", "")) for block in raw.values() if isinstance(block, Mapping)]
    return AlpamayoConfig(
        raw=raw,
        family="1.5" if any(target.startswith("alpamayo1_5.") for target in targets) else "r1",
        dtype=dtype,
        vlm_name_or_path=str(raw["vlm_name_or_path"]),
        vocab_size=int(raw["vocab_size"]),
        traj_vocab_size=int(raw["traj_vocab_size"]),
        traj_token_start=int(raw["traj_token_start_idx"]),
        traj_token_ids={str(key): int(value) for key, value in raw["traj_token_ids"].items()},
        min_pixels=int(raw.get("min_pixels") or 163_840),
        max_pixels=int(raw.get("max_pixels") or 196_608),
        future_bins=int(future.get("num_bins", 0)),
        history_bins=int(history.get("num_bins", 1000)),
        history_xyz_min=tuple(float(x) for x in history.get("ego_xyz_min", (-4, -4, -10))),
        history_xyz_max=tuple(float(x) for x in history.get("ego_xyz_max", (4, 4, 10))),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB."""
    if path.stat().st_size > 64 * 2**20:
        raise CheckpointError(f"{path} is {path.stat().st_size} bytes; refusing to parse more than 64 MiB of JSON.")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value

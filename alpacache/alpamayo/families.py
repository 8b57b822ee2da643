"""The registry of model families, and which of them a checkpoint belongs to."""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from alpacache.alpamayo.alpamayo2 import SUPER, SUPER_RELEASED
from alpacache.alpamayo.alpamayo_r1 import R1, R1_RELEASED
from alpacache.alpamayo.family import AlpamayoConfig, Family, Released
from alpacache.alpamayo.foreign_files import read_json
from alpacache.alpamayo.prompt import ROUTE_TOKENS, PromptFormat
from alpacache.errors import CheckpointError

ALPAMAYO_1_5 = replace(
    R1,
    name="1.5",
    package="alpamayo1_5",
    architecture="Alpamayo1_5",
    prompt=PromptFormat(camera_names=True, frame_numbers=True, route=ROUTE_TOKENS),
    own_tokens=("<|_padding_0|>",),
    stores_constants=False,
    released=replace(
        R1_RELEASED,
        geometry=replace(R1_RELEASED.geometry, model="released geometry (Alpamayo-1.5-10B)"),
        camera_tokens=SUPER_RELEASED.camera_tokens,
        frame_tokens=SUPER_RELEASED.frame_tokens,
    ),
)
"""`nvidia/Alpamayo-1.5-10B`: R1 with cameras named, frames numbered, optional routes, no constants in the weights."""

FAMILIES: dict[str, Family] = {family.name: family for family in (ALPAMAYO_1_5, R1, SUPER)}
"""By name. The first whose package a config names is taken: one that was derived from an older family, and still names
its classes, stands before that."""

RENAMED = frozenset({"r1", "1.5"})
"""Families whose checkpoints public scripts give each other's names: what a checkpoint holds tells them apart."""

HUB_IDS = {"r1": "nvidia/Alpamayo-R1", "1.5": "nvidia/Alpamayo-1.5", "2": "nvidia/Alpamayo2-Super"}
"""Family -> beginning of its public checkpoints' hub ids."""

DEFAULT_FAMILY, RELEASED = R1, R1_RELEASED
"""The model that plans are made for where none is named."""


def released(name: str | None = None) -> tuple[Family, Released]:
    """A family with a public checkpoint, and its sizes; None: the default."""
    family = DEFAULT_FAMILY if name is None else FAMILIES[name]
    assert family.released is not None
    return family, family.released


def read_config(path: Path) -> AlpamayoConfig:
    """A checkpoint's `config.json`, by its family's schema. Raises `CheckpointError` for anything else."""
    return parse_config(read_json(path), path)


def parse_config(raw: Mapping[str, Any], path: Path) -> AlpamayoConfig:
    """The config that a parsed `config.json` holds; the path is for errors. Raises as `read_config`."""
    family = recognise(raw, path)
    return family.read_config(family, raw, path)


def recognise(raw: Mapping[str, Any], path: Path) -> Family:
    """The family that a `config.json` names: by the packages of its `_target_` classes, else by its `model_type`.

    It is the one whose schema the file has. Of families in `RENAMED` the checkpoint may be another; of any other its
    `model_type`, if it has one, is the family's too: a newer model may well use an older one's classes.
    """
    targets = [block.get("_target_") for block in raw.values() if isinstance(block, Mapping)]
    packages = {target.split(".", 1)[0] for target in targets if isinstance(target, str)} - {"torch"}
    model_type = raw.get("model_type")
    for named in (packages, {model_type} if isinstance(model_type, str) else set()):
        for family in FAMILIES.values():
            if family.package in named and (family.name in RENAMED or model_type in (None, family.package)):
                return family
    named_packages = ", ".join(sorted(name[:80] for name in packages)) or "no class of a model"
    known = ", ".join(f"{family.package} ({name})" for name, family in FAMILIES.items())
    raise CheckpointError(
        f"{path} is not of a model family that alpacache knows: model_type is {reprlib.repr(model_type)}, its _target_ "
        f"entries name {named_packages}; supported: {known}."
    )

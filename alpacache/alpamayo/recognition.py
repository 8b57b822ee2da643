"""Recognises the family of a checkpoint by what it holds.

Public scripts give a 1.5 checkpoint R1's names, and back. So the classes in `config.json` say which code can load it,
not which prompt it was trained with, and a wrong prompt is another model input that no error would ever tell. Weights,
the config's own words about the prompt, and the names in tokenizer files are left as they were.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpacache.alpamayo.checkpoint import Checkpoint, MissingFileError
from alpacache.alpamayo.families import FAMILIES, RENAMED
from alpacache.alpamayo.family import Family
from alpacache.alpamayo.foreign_files import opened
from alpacache.alpamayo.prompt import PromptFormat
from alpacache.driving.cameras import marks_words

_PROJECTION, _SPACE, _FREQUENCIES = "action_in_proj.", "action_space.", "action_in_proj.sinus.0.freqs"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
_LIMIT_BYTES = 64 * 2**20
_STATED = {"include_camera_ids": "camera_names", "include_frame_nums": "frame_numbers"}
"""Key of `config.json` -> field of `PromptFormat`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """One thing that a checkpoint holds."""

    text: str
    families: tuple[str, ...]
    """Names of the families whose checkpoints hold it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognition:
    """Evidence for the family of a checkpoint."""

    named: Family
    """The family that its classes are named after."""
    signs: tuple[Sign, ...]

    @property
    def family(self) -> Family | None:
        """The one family that holds everything found, or, where nothing was, the one named; None: a contradiction."""
        if not self.signs:
            return self.named
        held = set.intersection(*(set(sign.families) for sign in self.signs))
        return FAMILIES[held.pop()] if len(held) == 1 else None

    @property
    def text(self) -> str:
        """The evidence in words: `the weights hold no freqs and no action_space.* (as 1.5's do)`."""
        if not self.signs:
            return f"by the names of its classes, {self.named.package}"
        found = [f"{sign.text} (as {' or '.join(sign.families) or 'no family'}'s)" for sign in self.signs]
        return "; ".join([*found, f"its classes are named {self.named.package}"])


def recognise_family(checkpoint: Checkpoint) -> Recognition:
    """Look at names of weights, at the config and at tokenizer files that are on this machine; no weight is read."""
    config = checkpoint.config
    named = config.family
    if named.name not in RENAMED:
        return Recognition(named=named, signs=())
    kin = [family for name, family in FAMILIES.items() if name in RENAMED]
    signs = (*_held_constants(checkpoint, kin), *_stated(config.raw, kin), *_named_tokens(checkpoint, kin))
    return Recognition(named=named, signs=signs)


def prompt_words(prompt: PromptFormat) -> str:
    """`cameras named, frames not numbered`."""
    return marks_words(prompt.camera_names, prompt.frame_numbers)


def _held_constants(checkpoint: Checkpoint, kin: list[Family]) -> Iterator[Sign]:
    """R1's weights hold the projection's frequencies and the action space's constants; 1.5's do not."""
    try:
        names = checkpoint.names
    except MissingFileError:  # a config without weights, as a plan is made with
        return
    if any(name.startswith(_PROJECTION) for name in names):
        frequencies = _FREQUENCIES in names
        space = any(name.startswith(_SPACE) for name in names)
        text = f"the weights hold {'' if frequencies else 'no '}freqs and {'' if space else 'no '}{_SPACE}*"
        held = tuple(family.name for family in kin if family.stores_constants is frequencies is space)
        yield Sign(text=text, families=held)


def _stated(raw: Mapping[str, Any], kin: list[Family]) -> Iterator[Sign]:
    for key, field in _STATED.items():
        if (value := raw.get(key)) is not None:
            held = tuple(family.name for family in kin if getattr(family.prompt, field) is value)
            yield Sign(text=f"config.json has {key} {str(value).lower()}", families=held)


def _named_tokens(checkpoint: Checkpoint, kin: list[Family]) -> Iterator[Sign]:
    """1.5's tokenizer files have names of their own. R1's prove nothing: R1's classes write them for 1.5, too."""
    for family in kin:
        for path in _tokenizer_files(checkpoint) if family.own_tokens else ():
            with opened(path) as (file, size):
                found = size <= _LIMIT_BYTES and family.own_tokens[0].encode() in file.read()
            if found:
                yield Sign(text=f"{path.name} names the token {family.own_tokens[0]}", families=(family.name,))
                break


def _tokenizer_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Tokenizer files of the checkpoint, and of the VLM where that lies beside it."""
    for name in _TOKENIZER_FILES:
        if (path := checkpoint.file_here(name)) is not None:
            yield path
    for name in _TOKENIZER_FILES:
        for folder in (checkpoint.directory or Path(), Path()):
            path = folder / (checkpoint.config.vlm_name_or_path or "") / name
            if os.path.isfile(path):  # noqa: PTH113  # `Path.is_file` raises for too long a name
                yield path

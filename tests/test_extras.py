"""What messages and pages tell people to install is there to be installed."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_extra_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    files += [file for package in ("alpacache", "cache_store", "cli") for file in (ROOT / package).rglob("*.py")]
    named = {name for file in files for name in re.findall(r"alpacache\[(\w+)\]", file.read_text(encoding="utf-8"))}
    assert {"lora", "pai", "s3", "wandb"} <= named <= set(extras)
    assert all(extras[name] for name in named)

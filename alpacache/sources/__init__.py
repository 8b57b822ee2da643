"""Data sources: folders, PhysicalAI-AV, prepared datasets, generated drives. `source` says what one promises."""

from typing import Any

from alpacache import on_first_use

_HOMES = dict.fromkeys(
    ("KINDS", "check_reach", "check_still_there", "is_streamed", "open_source"), "alpacache.sources.registry"
)


def __getattr__(name: str) -> Any:
    return on_first_use(__name__, name, _HOMES)

"""Measures of predicted paths: distance from the driven one, share of each turn that is taken, and intervals.

The errors of the public evaluation are imported on first use: training needs one of them and none of the rest.
"""

from typing import TYPE_CHECKING, Any

from alpacache import on_first_use

if TYPE_CHECKING:
    from alpacache.metrics.paths import corner_distance, extra_metrics, min_ade

__all__ = ["corner_distance", "extra_metrics", "min_ade"]


def __getattr__(name: str) -> Any:
    return on_first_use(__name__, name, dict.fromkeys(__all__, "alpacache.metrics.paths"))

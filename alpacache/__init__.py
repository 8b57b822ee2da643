"""Fine-tune the action expert of Alpamayo driving models from a cache of the frozen VLM's features.

Stage one, `extract`: the VLM runs once per sample and its KV cache goes to a store. Stage two, `train`: the expert
learns from that store alone. `evaluate`: did it help? `export`: a complete checkpoint again. `probe`: do the features
hold the curve? `load_driver`: pictures and poses in, paths out. All are imported on first use, so
that `import alpacache` is cheap.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "extract": "alpacache.extraction.extract",
    "ExtractConfig": "alpacache.extraction.config",
    "compare_codecs": "alpacache.extraction.compare_codecs",
    "CodecsConfig": "alpacache.extraction.config",
    "train": "alpacache.training.train",
    "TrainConfig": "alpacache.training.config",
    "evaluate": "alpacache.evaluation.evaluate",
    "EvalConfig": "alpacache.evaluation.config",
    "export": "alpacache.exporting.export",
    "ExportConfig": "alpacache.exporting.config",
    "plan": "alpacache.planning.plan",
    "PlanConfig": "alpacache.planning.config",
    "load_driver": "alpacache.driver.driver",
    "probe": "alpacache.evaluation.probe",
    "ProbeConfig": "alpacache.evaluation.config",
}
__all__ = ["__version__", *_HOMES]


def on_first_use(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """Import a package's name from the module that `homes` gives for it; for `__getattr__`. Raises `AttributeError`."""
    if name in homes:
        return getattr(import_module(homes[name]), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    return on_first_use(__name__, name, _HOMES)

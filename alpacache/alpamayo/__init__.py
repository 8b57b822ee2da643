"""The Alpamayo model families: everything that imports model classes of transformers.

Two small interfaces face the rest of the project: a frozen VLM that turns samples into `PrefixFeatures`, and an action
expert that turns `(noisy action, t, prefix)` into a velocity. Both are imported on first use: the processes that read
samples need neither and start twice as fast.
"""

from typing import TYPE_CHECKING, Any

from alpacache import on_first_use
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.prefix.layout import PrefixLayout
from alpacache.prefix.packed import PackedPrefixes
from alpacache.prefix.prefix import EncodedPrefix, PrefixFeatures, Tail

if TYPE_CHECKING:
    from alpacache.alpamayo.expert import ActionExpert, action_space, load_expert
    from alpacache.alpamayo.vlm import FrozenVLM, load_vlm

__all__ = [
    "ActionExpert",
    "Checkpoint",
    "EncodedPrefix",
    "FrozenVLM",
    "PackedPrefixes",
    "PrefixFeatures",
    "PrefixLayout",
    "Tail",
    "action_space",
    "load_expert",
    "load_vlm",
]

_HOMES = dict.fromkeys(("ActionExpert", "action_space", "load_expert"), "alpacache.alpamayo.expert")
_HOMES |= dict.fromkeys(("FrozenVLM", "load_vlm"), "alpacache.alpamayo.vlm")


def __getattr__(name: str) -> Any:
    return on_first_use(__name__, name, _HOMES)

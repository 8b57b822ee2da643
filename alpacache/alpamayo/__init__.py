"""The Alpamayo model family: everything that imports model classes of transformers.

Two small interfaces face the rest of the project: a frozen VLM that turns samples into `PrefixFeatures`, and an action
expert that turns `(noisy action, t, prefix)` into a velocity.
"""

from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.expert import ActionExpert, load_expert
from alpacache.alpamayo.packed_prefix import PackedPrefixes, PrefixLayout
from alpacache.alpamayo.prefix import EncodedPrefix, PrefixFeatures, Tail
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
    "load_expert",
    "load_vlm",
]

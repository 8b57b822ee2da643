"""Alpamayo 1.5: R1 with cameras named and frames numbered in the prompt, and no constants in the weights."""

from dataclasses import replace

from alpacache.alpamayo.alpamayo_r1 import R1
from alpacache.alpamayo.prompt import PromptFormat

ALPAMAYO_1_5 = replace(
    R1,
    name="1.5",
    package="alpamayo1_5",
    architecture="Alpamayo1_5",
    prompt=PromptFormat(camera_names=True, frame_numbers=True),
    stores_constants=False,
    released=None,
)
"""`nvidia/Alpamayo-1.5-10B`."""

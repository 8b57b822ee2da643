"""Positions of a stored prefix's tokens: stores keep where images lie in a prompt, and how far they shift what follows.

Text goes on by one on all three axes. An image keeps the first, and has its rows and columns on the others; what
follows it goes on from its longer side. So the rope delta tells the sides of images of one size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def prompt_positions(tokens: int, spans: Sequence[tuple[int, int]], rope_delta: int) -> Tensor | None:
    """M-RoPE positions `[3, T]` of the first `tokens` of a prompt whose images, wider than high, are of one size.

    Args:
        spans: first and one-past-last place of each image's tokens, rising.
        rope_delta: position of a text token behind the images, less its place.

    Returns None where no such images fit these numbers.
    """
    size = 0
    if spans:
        sizes = {end - first for first, end in spans}
        size, rest = spans[0][1] - spans[0][0], rope_delta % len(spans)
        wide = size + rope_delta // len(spans)
        if len(sizes) > 1 or rest or wide < 1 or size % wide:
            return None
    elif rope_delta:
        return None
    parts, place, position = [], 0, 0
    for first, end in (*spans, (tokens, tokens)):
        if first > place:
            parts.append((position + torch.arange(first - place)).expand(3, -1))
        position += max(0, first - place)
        if end > first:
            inside = torch.arange(size)
            parts.append(position + torch.stack([torch.zeros_like(inside), inside // wide, inside % wide]))
            position += wide
        place = max(place, end)
    return torch.cat(parts, 1)[:, :tokens]

"""Prompts side by side on their way through the VLM's layers, and what is cut from the layers' KV for each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from alpacache.alpamayo.text_layers import LayerKV, TextRows
from alpacache.prefix.prefix import PrefixFeatures, Tail

Endings = Mapping[str, tuple[NDArray[np.int64], str]]
"""By name: token ids behind a prompt's stem, and what they say, for people."""


@dataclass(slots=True, kw_only=True)
class PromptRows:
    """Prompts padded to the longest, each with the endings that go on from its stem as one more sequence."""

    prompts: TextRows
    lengths: list[int]
    """Tokens of each prompt."""
    deltas: list[int]
    """Rope delta of each prompt."""
    positions: list[Tensor]
    """`[3, T]` M-RoPE positions of each prompt, on the CPU."""
    stems: list[int] = field(default_factory=list)
    """Tokens of each prompt that its endings follow."""
    endings: list[Endings] = field(default_factory=list)
    tails: TextRows | None = None
    """The endings of each prompt, one after the other, padded to the longest."""

    def advance(self, number: int, layer: nn.Module) -> LayerKV:
        """Go through layer `number`; its KV has the padded prompts, then their tails."""
        kv = LayerKV()
        self.prompts.advance(number, layer, kv)
        if self.tails is not None:
            self.tails.advance(number, layer, kv)
        return kv

    def parts(self, row: int) -> dict[str, slice]:
        """Places in a layer's KV of a prompt (`""`) and of its tails, by name."""
        found, first = {"": slice(0, self.lengths[row])}, self.prompts.hidden.shape[1]
        for name, (ids, _) in (self.endings[row] if self.endings else {}).items():
            found[name] = slice(first, first := first + len(ids))
        return found

    def start_position(self, row: int, name: str) -> int:
        """Position of the first action token behind a prompt (`""`) or behind one of its tails."""
        if not name:
            return self.deltas[row] + self.lengths[row]
        return self.deltas[row] + self.stems[row] + len(self.endings[row][name][0])

    def features(self, cache: Sequence[LayerKV], hidden: Tensor) -> list[tuple[PrefixFeatures, dict[str, Tail]]]:
        """Each prompt's prefix and tails, out of the KV of all layers and the hidden states after the final norm."""
        made = []
        for row, (length, delta) in enumerate(zip(self.lengths, self.deltas, strict=True)):
            parts = {
                name: (
                    torch.stack([layer.keys[row, :, where] for layer in cache]),
                    torch.stack([layer.values[row, :, where] for layer in cache]),
                )
                for name, where in self.parts(row).items()
            }
            keys, values = parts.pop("")
            prefix = PrefixFeatures(
                keys=keys,
                values=values,
                hidden=hidden[row, :length],
                rope_delta=delta,
                prefix_len=length,
                start_position=self.start_position(row, ""),
                positions=self.positions[row],
            )
            tails = {
                name: Tail(
                    keys=keys,
                    values=values,
                    token_ids=self.endings[row][name][0],
                    start_position=self.start_position(row, name),
                    text=self.endings[row][name][1],
                )
                for name, (keys, values) in parts.items()
            }
            made.append((prefix, tails))
        return made

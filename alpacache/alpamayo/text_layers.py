"""The VLM's text model as a loop over its layers.

transformers' own forward goes through all layers at once and keeps their KV until the end. Here a layer is a step of
its own: its weights may come just before it and its KV may go as soon as it is made. The numbers are the same, bit for
bit.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alpacache.alpamayo.backbone import additive_mask, cache_argument


class LayerKV:
    """Keys and values of one layer, to which each run of the layer appends. The layer takes it for a cache."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self._keys, self._values = keys, values

    @property
    def keys(self) -> Tensor:
        """`[B, kv_heads, T, head_dim]`, after rotary embedding."""
        assert self._keys is not None
        return self._keys

    @property
    def values(self) -> Tensor:
        """`[B, kv_heads, T, head_dim]`."""
        assert self._values is not None
        return self._values

    @property
    def tokens(self) -> int:
        """T; 0 before the first run."""
        return 0 if self._keys is None else self._keys.shape[2]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all. What else transformers passes is for caches of many layers."""
        if self._keys is not None and self._values is not None:
            keys, values = torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values


@dataclass(slots=True, kw_only=True)
class TextRows:
    """Prompts side by side on their way through the layers."""

    hidden: Tensor
    """`[B, T, C]`, what the next layer takes."""
    angles: tuple[Tensor, Tensor]
    """Cosine and sine of the rotary embedding, `[B, T, head_dim]` each."""
    mask: Tensor | None = None
    """`[B or 1, 1, T, columns]`, added to the attention's logits or boolean; None: causal without a mask."""
    image_places: Tensor | None = None
    """Indices of the image tokens among the `B * T`."""
    deepstack: list[Tensor] = field(default_factory=list)
    """Additions to the image tokens after each of the first layers, `[images' tokens, C]`."""
    run_layer: "RunLayer" = field(default_factory=lambda: run_layer)
    """Takes the rows through one layer."""

    def advance(self, number: int, layer: nn.Module, kv: LayerKV) -> None:
        """Go through layer `number`, whose keys and values are appended to `kv`."""
        self.hidden = self.run_layer(layer, self.hidden, self.angles, kv, self.mask)
        if self.image_places is not None and number < len(self.deepstack):
            flat, added = self.hidden.flatten(0, 1), self.deepstack[number]
            flat.index_copy_(0, self.image_places, flat[self.image_places] + added)


def run_layer(
    layer: nn.Module, hidden: Tensor, angles: tuple[Tensor, Tensor], kv: LayerKV, mask: Tensor | None
) -> Tensor:
    """Hidden states `[B, T, C]` after one layer of transformers' text model; arguments as in `TextRows`."""
    cache: dict[str, Any] = {cache_argument(layer): kv}
    after: Tensor = layer(hidden, position_embeddings=angles, attention_mask=mask, **cache)
    return after


def rotary_angles(config: Any) -> tuple[Tensor, Tensor]:
    """How transformers' text model turns keys: radians a position of each pair of channels, `[head_dim / 2]`, and which
    of the three M-RoPE positions it goes by.
    """
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rotary: Any = Qwen3VLTextRotaryEmbedding(config)
    one_each = torch.eye(3, dtype=torch.long)[:, None]  # the token of each place is at 1 on one axis alone
    _, sin = rotary(torch.zeros(1), one_each)
    return rotary.inv_freq.float(), sin[0, :, : len(rotary.inv_freq)].abs().argmax(0)


RunLayer = Callable[[nn.Module, Tensor, tuple[Tensor, Tensor], LayerKV, Tensor | None], Tensor]
"""`run_layer`, or what gives the same to rounding."""


def text_rows(text: Any, hidden: Tensor, positions: Tensor, *, before: int = 0, mask: Tensor | None = None) -> TextRows:
    """Rows that are about to enter the first layer of transformers' text model.

    Args:
        hidden: `[B, T, C]` embeddings.
        positions: `[3, B, T]` M-RoPE positions.
        before: tokens that the layers' KV holds already.
        mask: as in `TextRows`; None: each token sees all before it.
    """
    if mask is None:
        mask = _causal_mask(text.config._attn_implementation, hidden, before)
    return TextRows(hidden=hidden, angles=text.rotary_emb(hidden, positions), mask=mask)


def _causal_mask(attention: str, hidden: Tensor, before: int) -> Tensor | None:
    """The mask that this implementation needs for causal attention; None where it needs none."""
    length = hidden.shape[1]
    if attention != "eager" and (before == 0 or length == 1):
        return None
    columns = torch.arange(before + length, device=hidden.device)
    seen = columns <= columns[before:, None]
    return (additive_mask(seen, hidden.dtype) if attention == "eager" else seen)[None, None]

"""Attention inside images, all images of a forward at once.

transformers' plain path calls the kernel once for each image and layer and asks the device for the images' sizes
before each layer, so a GPU waits for Python. Images of one size, the usual case, can be a batch instead. In a prototype
on an H200 (no rotary embedding) a vision block over 32 images of 720 patches took 1.65 ms rather than 3.64.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen3VLModel

IMAGE_ATTENTION = "images"


def image_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    images: int = 1,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of each of `images` equal parts of the tokens to itself.

    Args:
        query, key, value: `[1, heads, images * patches, head_dim]`.

    Returns `[1, images * patches, heads, head_dim]`, as transformers expects of a registered attention.
    """
    apart = (query.shape[1], images, -1, query.shape[3])
    query, key, value = (tensor[0].reshape(apart).transpose(0, 1) for tensor in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register(IMAGE_ATTENTION, image_attention)


def attend_to_images_at_once(model: Qwen3VLModel) -> None:
    """Replace sdpa by `image_attention` in the model's vision tower; other implementations stay."""
    if model.visual.config._attn_implementation == "sdpa":
        model.visual.config._attn_implementation = IMAGE_ATTENTION
        model.visual.register_forward_pre_hook(_join_equal_images, with_kwargs=True)


def _join_equal_images(tower: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Compute on the CPU where the tower's sequences end: after each image, or only at the end if all are equal."""
    grid: Tensor = named["grid_thw"].cpu()
    sizes = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])
    equal = bool((sizes == sizes[0]).all())
    lengths = sizes.sum()[None] if equal else sizes
    ends = lengths.new_zeros(len(lengths) + 1)
    ends[1:] = lengths.cumsum(0)
    return positional, {**named, "cu_seqlens": ends, "images": len(sizes) if equal else 1}

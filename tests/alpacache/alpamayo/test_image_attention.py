"""Images of one size in one call of the kernel: the numbers of one call each."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from alpacache.alpamayo import load_vlm
from alpacache.alpamayo.vlm import IMAGE_ATTENTION, image_attention


def test_parts_attend_to_themselves_alone():
    query, key, value = torch.randn(3, 1, 4, 5 * 7, 8, generator=torch.Generator().manual_seed(0))
    found, weights = image_attention(None, query, key, value, None, scaling=0.3, images=5, is_causal=False)
    assert weights is None
    for part in range(5):
        place = slice(7 * part, 7 * part + 7)
        own = (tensor[:, :, place] for tensor in (query, key, value))
        expected = F.scaled_dot_product_attention(*own, scale=0.3).transpose(1, 2)
        torch.testing.assert_close(found[:, place], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clips", [(0,), (0, 1, 2)])
def test_the_tower_gives_what_it_gives_image_by_image(clips, golden, golden_dir, monkeypatch):
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted(F.scaled_dot_product_attention, calls))
    ours, plain = load_vlm(str(golden_dir)), load_vlm(str(golden_dir), attention="eager")
    assert ours.model.visual.config._attn_implementation == IMAGE_ATTENTION
    assert plain.model.visual.config._attn_implementation == "eager"
    pixels = torch.cat([golden[f"clip{clip}.pixel_values"] for clip in clips])
    grid = torch.cat([golden[f"clip{clip}.image_grid_thw"] for clip in clips])
    with torch.inference_mode():
        found, expected = (vlm.model.visual(pixels, grid_thw=grid) for vlm in (ours, plain))
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)
    sizes = SimpleNamespace(images=len(grid), kinds=len(set(map(tuple, grid.tolist()))))
    assert len(calls) == len(ours.model.visual.blocks) * (1 if sizes.kinds == 1 else sizes.images)


def noted(function, calls):
    def call(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)

    return call

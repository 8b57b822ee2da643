"""Frames to patches against the public image path."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from alpacache.alpamayo.images import fit_size, image_tokens, to_patches, to_processor_size

GOLDEN = Path(__file__).parents[2] / "data" / "preprocess"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
LIMITS = {"min_pixels": 163_840, "max_pixels": 196_608}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['height']}x{case['width']}")
def test_patches_equal_golden(case, relative_error):
    expected = load_file(GOLDEN / "pixels.safetensors")
    frames = np.stack(
        [np.asarray(Image.open(GOLDEN / name).convert("RGB")).transpose(2, 0, 1) for name in case["frames"]]
    )
    pixels, grid = to_patches(frames, patch=16, merge=2, temporal=2, **LIMITS)
    key = f"case{case['case']}."
    rows, golden = expected[key + "rows"], expected[key + "pixel_values_rows"]
    assert pixels.shape == (case["patches"], 1536)
    assert grid.tolist() == expected[key + "image_grid_thw"].tolist()
    assert relative_error(pixels[rows], golden) <= 1e-4
    assert float((pixels[rows] - golden).abs().max()) <= 1e-3
    assert image_tokens(case["height"], case["width"], patch=16, merge=2, **LIMITS) == case["tokens_per_frame"]


@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (900, 1600), (720, 1280)])
def test_common_frames_become_720_patches(height, width):
    assert fit_size(height, width, factor=32, **LIMITS) == (320, 576)


@pytest.mark.parametrize(
    "size", [(1080, 1920), (120, 200), (320, 700), (320, 576)], ids=lambda size: "x".join(map(str, size))
)
@pytest.mark.parametrize("count", [1, 4])
def test_however_pictures_lie_in_memory_their_pixels_are_those_of_resizing_them_whole(size, count):
    decoded = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    decoded[:, : size[0] // 2] = decoded[:, : size[0] // 2] // 128 * 255  # where the resize overshoots
    turned = decoded.transpose(0, 3, 1, 2)
    frames = np.ascontiguousarray(turned)
    whole = torch.from_numpy(frames).float() / 255.0
    fitted = fit_size(*size, factor=32, **LIMITS)
    whole = F.interpolate(whole, size=fitted, mode="bicubic", antialias=True, align_corners=False)
    whole = (whole - 0.5) / 0.5
    # one row a patch of the merged block: channel, time, row, column
    rows = F.unfold(whole, kernel_size=16, stride=16).mT.reshape(
        count, fitted[0] // 32, 2, fitted[1] // 32, 2, 3, 1, 256
    )
    wanted = rows.transpose(2, 3).expand(-1, -1, -1, -1, -1, -1, 2, -1).reshape(-1, 1536)
    turned.flags.writeable = False
    for each in (frames, turned, frames[..., ::-1][..., ::-1]):
        assert torch.equal(to_patches(each, patch=16, merge=2, temporal=2, **LIMITS)[0], wanted)


def test_degenerate_images_are_refused():
    with pytest.raises(ValueError, match="degenerate"):
        fit_size(2, 500, factor=32, **LIMITS)
    with pytest.raises(ValueError, match="expected uint8"):
        to_patches(np.zeros((1, 3, 64, 64), np.float32), patch=16, merge=2, temporal=2, **LIMITS)


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None
import numpy as np
from alpacache.alpamayo.images import to_patches
frames = np.zeros((1, 3, 64, 96), np.uint8)
print(to_patches(frames, patch=16, merge=2, temporal=2, min_pixels=1, max_pixels=10**6)[1].tolist())
"""


def test_works_without_torchvision():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCHVISION], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[1, 4, 6]]"


@pytest.mark.parametrize(("height", "width"), [(360, 640), (120, 200)], ids=["smaller", "larger"])
def test_processor_size_says_what_8_bits_and_cut_off_edges_cost(height, width):
    """Black and white blocks, where the resize overshoots most."""
    limits = {"patch": 16, "merge": 2, "min_pixels": 40_000, "max_pixels": 60_000}
    blocks = np.random.default_rng(0).integers(0, 2, (2, 3, height // 8, width // 8), dtype=np.uint8)
    frames = (blocks * 255).repeat(8, 2).repeat(8, 3)
    before = frames.copy()
    stored, (largest, mean) = to_processor_size(frames[None], **limits)
    fitted = fit_size(height, width, factor=32, min_pixels=40_000, max_pixels=60_000)
    assert stored.shape == (1, 2, 3, *fitted)
    direct, through = (to_patches(each, temporal=2, **limits)[0] for each in (frames, stored[0]))
    off = (direct.double() - through.double()).abs()
    assert largest == pytest.approx(off.max().item(), abs=1e-6)
    assert mean == pytest.approx(off.mean().item(), abs=1e-6)
    assert 1 / 255 < largest < 0.5
    inside = (direct > -1) & (direct < 1)
    assert off[inside].max() <= 1 / 255 + 1e-6
    np.testing.assert_array_equal(frames, before)


def test_pictures_of_processor_size_are_left_alone():
    limits = {"patch": 16, "merge": 2, "min_pixels": 40_000, "max_pixels": 60_000}
    frames = np.random.default_rng(0).integers(0, 255, (1, 3, 160, 288), dtype=np.uint8)
    stored, deviation = to_processor_size(frames, **limits)
    np.testing.assert_array_equal(stored, frames)
    assert deviation == (0.0, 0.0)

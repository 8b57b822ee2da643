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

from alpacache.alpamayo.inputs import to_patches
from alpacache.driving.picture_size import fit_size, image_tokens

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


def test_other_than_uint8_frames_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        to_patches(np.zeros((1, 3, 64, 64), np.float32), patch=16, merge=2, temporal=2, **LIMITS)


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None
import numpy as np
from alpacache.alpamayo.inputs import to_patches
frames = np.zeros((1, 3, 64, 96), np.uint8)
print(to_patches(frames, patch=16, merge=2, temporal=2, min_pixels=1, max_pixels=10**6)[1].tolist())
"""


@pytest.mark.system
def test_works_without_torchvision():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCHVISION], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[1, 4, 6]]"

"""The frozen VLM against the public code's golden output."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_rollouts import extend, rollouts

from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.sample import SampleRef
from alpacache.sources.registry import open_source

PARITY = 1e-4


def assert_same_prefix(got, expected, relative_error, largest):
    assert (got.prefix_len, got.rope_delta) == (expected.prefix_len, expected.rope_delta)
    assert got.start_position == expected.start_position
    assert got.hidden.shape[0] == got.keys.shape[2] == got.prefix_len
    for name in ("keys", "values", "hidden"):
        assert relative_error(getattr(got, name), getattr(expected, name)) <= largest


@pytest.mark.parametrize("clip", [0, 1, 2])
def test_prefill_equals_golden(clip, golden, golden_cases, golden_prefixes, relative_error):
    prefix, case = golden_prefixes[clip], golden_cases["cases"][clip]
    assert prefix.prefix_len == case["prefix_len"]
    assert prefix.rope_delta == case["rope_delta"] == int(golden[f"clip{clip}.rope_delta"])
    assert prefix.start_position == case["prefix_len"] + case["rope_delta"]
    assert relative_error(prefix.keys, golden[f"clip{clip}.keys"]) <= PARITY
    assert relative_error(prefix.values, golden[f"clip{clip}.values"]) <= PARITY
    assert relative_error(prefix.hidden, golden[f"clip{clip}.hidden"]) <= PARITY


def test_stem_extended_by_its_tail_equals_the_whole_prompt(golden, golden_vlm, golden_prefixes, relative_error):
    ids, whole = golden["clip0.input_ids_fused"], golden_prefixes[0]
    stem = golden_vlm.prefill(ids[:-6], golden["clip0.pixel_values"], golden["clip0.image_grid_thw"])
    extended = extend(golden_vlm, stem, ids[-6:])
    assert extended.prefix_len == whole.prefix_len
    assert extended.start_position == whole.start_position
    assert relative_error(extended.keys, whole.keys) <= 1e-5
    assert relative_error(extended.values, whole.values) <= 1e-5
    assert relative_error(extended.hidden, whole.hidden) <= 1e-5


def test_rollout_rows_end_where_the_public_sampler_ends_them(golden, golden_vlm):
    future_start = golden_vlm.future_start_id
    for case in ("rollout_mixed", "rollout_early"):
        sequences = golden[f"{case}.sequences"]
        prompt = len(golden[f"{case}.input_ids_fused"])
        names = ("input_ids_fused", "pixel_values", "image_grid_thw", "sequences")
        for row, prefix in zip(
            sequences, rollouts(golden_vlm, *(golden[f"{case}.{name}"] for name in names)), strict=True
        ):
            emitted = np.flatnonzero(row[prompt:-1].numpy() == future_start)
            counted = prompt + emitted[0] + 1 if emitted.size else len(row)
            assert prefix.start_position == prefix.rope_delta + counted
            assert prefix.prefix_len == (counted if emitted.size else len(row) - 1)


def test_prefill_refuses_a_prompt_that_does_not_fit_its_images(golden, golden_vlm):
    with pytest.raises(ValueError, match="image tokens, its images give"):
        golden_vlm.prefill(
            golden["clip0.input_ids_fused"], golden["clip0.pixel_values"], golden["clip1.image_grid_thw"]
        )


def test_prefill_keeps_no_state_between_samples(golden, golden_vlm, golden_prefixes):
    names = ("input_ids_fused", "pixel_values", "image_grid_thw")
    golden_vlm.prefill(*(golden[f"clip2.{name}"] for name in names))
    again = golden_vlm.prefill(*(golden[f"clip0.{name}"] for name in names))
    assert torch.equal(again.keys, golden_prefixes[0].keys)


def test_dtype_is_the_checkpoints_unless_given(tiny_checkpoint, golden_dir):
    assert load_vlm(str(tiny_checkpoint)).dtype == torch.bfloat16
    assert load_vlm(str(golden_dir), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0), (1, 1)])
def test_a_batch_equals_one_by_one(order, golden, golden_vlm, golden_prefixes, relative_error):
    """Prompts of 81, 94 and 149 tokens with different numbers of images, side by side in any order."""
    names = {"input_ids": "input_ids_fused", "pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"}
    clips = [SimpleNamespace(**{key: golden[f"clip{clip}.{name}"] for key, name in names.items()}) for clip in order]
    found = golden_vlm.prefill_batch(clips)
    for clip, prefix in zip(order, found, strict=True):
        assert_same_prefix(prefix, golden_prefixes[clip], relative_error, 1e-5)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_a_batch_of_different_cameras_equals_one_by_one(dtype, largest, tiny_checkpoint_15, relative_error):
    """In float32 to rounding; in bfloat16 by no more than its own rounding does."""
    builder, vlm = InputBuilder(Checkpoint(str(tiny_checkpoint_15))), load_vlm(str(tiny_checkpoint_15), dtype=dtype)
    exact = load_vlm(str(tiny_checkpoint_15), dtype=torch.float32)
    source = open_source("synthetic:4")
    inputs = []
    for number, (cameras, frames) in enumerate(((1, 2), (3, 2), (1, 1), (3, 2))):
        ref = SampleRef(clip_id=source.clip_ids[number], t0_us=5_100_000)
        inputs.append(builder.build(source.load(ref, cameras=CAMERAS[:cameras], frames=frames)))
    assert len({len(one.input_ids) for one in inputs}) == 3
    for one, prefix in zip(inputs, vlm.prefill_batch(inputs), strict=True):
        alone, single = ((one.input_ids, one.pixel_values, one.image_grid_thw) for _ in range(2))
        expected = vlm.prefill(*alone)
        assert_same_prefix(prefix, expected, relative_error, largest)
        if dtype == torch.bfloat16:
            rounding = relative_error(expected.keys, exact.prefill(*single).keys)
            assert relative_error(prefix.keys, expected.keys) <= 2 * rounding


def test_a_batch_names_the_prompt_that_does_not_fit(golden, golden_vlm):
    one = SimpleNamespace(
        input_ids=golden["clip0.input_ids_fused"],
        pixel_values=golden["clip0.pixel_values"],
        image_grid_thw=golden["clip1.image_grid_thw"],
    )
    with pytest.raises(ValueError, match="image tokens, its images give"):
        golden_vlm.prefill_batch([one, one])

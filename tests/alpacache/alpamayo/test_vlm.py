"""The frozen VLM against the public code's golden output."""

import numpy as np
import pytest
import torch

from alpacache.alpamayo import load_vlm

PARITY = 1e-4


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
    extended = golden_vlm.extend(stem, ids[-6:])
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
            sequences, golden_vlm.rollout(*(golden[f"{case}.{name}"] for name in names)), strict=True
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

"""Prompts with a route: the public text to the byte, and the KV of its twins against whole prompts run alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from alpacache.alpamayo import Checkpoint, load_vlm
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.driving.sample import SampleRef
from alpacache.errors import BadClipError, UsageError
from alpacache.sources.registry import open_source

ROUTE = "turn left in 40 m"


@pytest.fixture(scope="module")
def samples():
    """Two samples of different lengths of prompt, the first with a route."""
    source = open_source("synthetic:2")
    return [
        replace(
            source.load(SampleRef(clip_id=clip_id, t0_us=5_100_000), cameras=source.cameras, frames=frames),
            route=route,
        )
        for clip_id, frames, route in zip(source.clip_ids, (1, 2), (ROUTE, "Continue onto Main St"), strict=True)
    ]


@pytest.fixture(scope="module")
def builder(tiny_checkpoint_15):
    return InputBuilder(Checkpoint(str(tiny_checkpoint_15)), routes="source")


def test_the_route_stands_between_history_and_question_in_tokens_of_its_own(samples, builder):
    tokenizer, routed = builder.tokenizer, builder.build(samples[0])
    plain = builder.build(replace(samples[0], route=None))
    assert routed.stem_len == plain.stem_len
    assert f"<|traj_history_end|><|route_start|>{ROUTE}<|route_end|>output the future trajectory." in routed.text
    route = [tokenizer.id_of("<|route_start|>"), *tokenizer.encode(ROUTE), tokenizer.id_of("<|route_end|>")]
    stem, tail = np.split(plain.input_ids, [plain.stem_len])
    assert routed.input_ids.tolist() == [*stem, *route, *tail]
    assert plain.route is None
    assert routed.route == ROUTE


def test_a_route_goes_as_it_is_where_the_model_has_no_tokens_for_it(samples, tiny_checkpoint):
    raw = InputBuilder(Checkpoint(str(tiny_checkpoint)), routes="source", route_tokens=False)
    assert f"<|traj_history_end|>{ROUTE}output the future trajectory." in raw.build(samples[0]).text


def test_a_model_without_routes_refuses_them_unless_told_that_it_has_them(tiny_checkpoint, samples):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    with pytest.raises(UsageError, match=r"family r1, which was not trained with routes.*--route-tokens"):
        InputBuilder(checkpoint, routes="source")
    with pytest.raises(ValueError, match="no place for a route"):
        InputBuilder(checkpoint).build(samples[0])
    told = InputBuilder(checkpoint, routes="source", route_tokens=True)
    assert f"<|route_start|>{ROUTE}<|route_end|>" in told.build(samples[0]).text


def test_the_identity_says_whether_routes_are_given(builder, tiny_checkpoint_15):
    without = InputBuilder(Checkpoint(str(tiny_checkpoint_15))).identity()["prompt"]
    assert set(without) == {"template", "camera_names", "reasoning"}  # as before there were routes
    given = {"given": "source", "form": "<|route_start|>(route)<|route_end|>"}
    assert builder.identity()["prompt"] == without | {"route": given}


def test_a_token_of_the_model_in_a_route_is_refused_whatever_it_looks_like(samples, tiny_checkpoint_15):
    builder = InputBuilder(Checkpoint(str(tiny_checkpoint_15)), routes="source")
    builder.tokenizer._tokenizer.add_tokens(["left"])
    with pytest.raises(BadClipError, match="holds a token of the model's own") as caught:
        builder.build(samples[0])
    assert caught.value.kind == "bad_route"


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_twins_equal_whole_prompts_run_alone(dtype, bar, samples, builder, tiny_checkpoint_15, relative_error):
    vlm = load_vlm(str(tiny_checkpoint_15), dtype=dtype)
    inputs = [builder.build(sample) for sample in samples]
    made = vlm.prefill_with_tails(inputs, [builder.twins(sample.route) for sample in samples])
    assert [list(twins) for _, twins in made] == [["unrouted", "swapped"], ["unrouted"]]
    others = {"unrouted": None, "swapped": "turn right in 40 m"}
    for sample, one, (prefix, twins) in zip(samples, inputs, made, strict=True):
        alone = vlm.prefill(one.input_ids, one.pixel_values, one.image_grid_thw)
        assert relative_error(prefix.keys, alone.keys) <= bar
        assert relative_error(prefix.values, alone.values) <= bar
        for name, tail in twins.items():
            live = builder.build(replace(sample, route=others[name]))
            expected = vlm.prefill(live.input_ids, live.pixel_values, live.image_grid_thw)
            found = prefix.with_tail(one.stem_len, tail)
            assert found.prefix_len == expected.prefix_len
            assert found.start_position == expected.start_position
            assert np.array_equal(tail.token_ids, live.input_ids[one.stem_len :])
            assert tail.text == (others[name] or "")
            assert relative_error(found.keys, expected.keys) <= bar
            assert relative_error(found.values, expected.values) <= bar

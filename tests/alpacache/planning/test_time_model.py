"""The model of times against every time it was made from, and how it scales."""

import dataclasses
from functools import partial

import pytest

from alpacache.errors import UsageError
from alpacache.planning.gpus import GPUS, gpu_named
from alpacache.planning.memory_model import memory_plan
from alpacache.planning.time_model import (
    bus_seconds,
    compute_seconds,
    optimizer_seconds,
    prefill_seconds,
    reading_seconds,
    step_seconds,
)

H100 = GPUS["h100"]
FASTER_MS = 3.7
"""Of a micro-batch, since the H100's steps were measured; by the H200's."""


@pytest.fixture
def work(released):
    """At the length that was measured."""
    return partial(released, longest=2975)


@pytest.mark.parametrize(
    ("changes", "draws", "micro_batch", "step_ms"),
    [
        ({}, 1, 8, 46.9),
        ({}, 1, 4, 64.2),
        ({}, 4, 8, 92.9),
        ({"longest": 840, "batch_size": 16}, 1, 16, 52.9),
    ],
)
def test_the_steps_that_were_measured(changes, draws, micro_batch, step_ms, work):
    load = work(**changes)
    plan = memory_plan(load, draws=draws, micro_batch=micro_batch, checkpointing=False)
    seconds = compute_seconds(load, plan, H100) + optimizer_seconds(load, H100)
    parts = load.batch_size / micro_batch
    assert seconds * 1e3 == pytest.approx(step_ms - parts * FASTER_MS, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "milliseconds"),
    [(4 * 790, 160), (8 * 790, 303), (2974, 153), (2 * 2974, 295), (4 * 2974, 585), (8 * 2974, 1160)],
)
def test_the_prefills_that_were_measured(tokens, milliseconds):
    assert prefill_seconds(8_800_000_000, tokens, H100) * 1e3 == pytest.approx(milliseconds, rel=0.04)


@pytest.mark.parametrize(
    ("tokens", "milliseconds"), [(4 * 790, 153), (8 * 790, 292), (2 * 2974, 283), (8 * 2974, 1123)]
)
def test_an_h200_prefills_as_fast(tokens, milliseconds):
    assert prefill_seconds(8_800_000_000, tokens, GPUS["h200"]) * 1e3 == pytest.approx(milliseconds, rel=0.06)


@pytest.mark.parametrize(
    ("changes", "micro_batch", "step_ms"), [({}, 8, 37.7), ({"longest": 840, "batch_size": 16}, 16, 44.7)]
)
def test_the_steps_that_were_measured_on_an_h200(changes, micro_batch, step_ms, work):
    load, h200 = work(**changes), GPUS["h200"]
    plan = memory_plan(load, draws=1, micro_batch=micro_batch, checkpointing=False)
    seconds = compute_seconds(load, plan, h200) + optimizer_seconds(load, h200)
    assert seconds * 1e3 == pytest.approx(step_ms, rel=0.03)


def test_a_short_prefill_takes_as_long_as_its_launches():
    slow = dataclasses.replace(H100, tflops=H100.tflops / 10)
    assert prefill_seconds(8_800_000_000, 200, H100) == prefill_seconds(8_800_000_000, 800, H100) == 0.075
    assert prefill_seconds(8_800_000_000, 800, slow) > 0.4


def test_reading_goes_with_cameras_pixels_and_cores():
    # Measured with 16 cores: 20.7 to 21.7 samples/s of one camera, 3.9 to 4.85 of four.
    assert reading_seconds(1, (1080, 1920), 16) == pytest.approx(1 / 21.2, rel=0.07)
    assert reading_seconds(4, (1080, 1920), 16) == pytest.approx(1 / 4.54, rel=0.1)
    assert reading_seconds(1, (540, 960), 8) == pytest.approx(reading_seconds(1, (1080, 1920), 16) / 2)


def test_half_the_arithmetic_and_half_the_bandwidth_each_slow_their_part(work):
    load = work()
    plan = memory_plan(load, draws=1, micro_batch=8, checkpointing=False)
    slow = dataclasses.replace(H100, tflops=H100.tflops / 2)
    narrow = dataclasses.replace(H100, memory_gb_s=H100.memory_gb_s / 2)
    both = dataclasses.replace(slow, memory_gb_s=narrow.memory_gb_s)
    whole, parts = compute_seconds(load, plan, H100), [compute_seconds(load, plan, gpu) for gpu in (slow, narrow)]
    longer = [part - whole for part in parts]
    assert min(longer) > 0.1 * whole
    assert compute_seconds(load, plan, both) - whole == pytest.approx(sum(longer))
    assert pytest.approx(whole - sum(longer)) == 8.3e-3
    assert optimizer_seconds(load, narrow) == pytest.approx(2 * 13.2e-3, rel=0.001)
    assert optimizer_seconds(load, slow) == pytest.approx(13.2e-3, rel=0.001)
    again = memory_plan(load, draws=1, micro_batch=8, checkpointing=True)
    assert compute_seconds(load, again, H100) == pytest.approx(whole * 4 / 3)


def test_the_bus_is_hidden_by_the_forward_and_by_places(work):
    load = work(longest=880)
    whole = memory_plan(load, draws=1, micro_batch=8, checkpointing=False)
    some = memory_plan(load, draws=1, micro_batch=8, checkpointing=False, streamed_layers=36)
    assert bus_seconds(whole, 25e9) == 0
    assert bus_seconds(some, 25e9) == pytest.approx(0.2778, rel=0.01)  # 6.95 GB
    resident = step_seconds(load, whole, H100, 25e9)
    assert resident == compute_seconds(load, whole, H100) + optimizer_seconds(load, H100)
    free = step_seconds(load, some, H100, 1e15)
    assert resident < free < 1.1 * resident  # gradients are moved
    slow = step_seconds(load, some, H100, 25e9)
    # Two thirds of forward and backward, and the bus, of which four of 144 places' worth beside the backward.
    assert slow == pytest.approx(0.2778 * (1 - 4 / 144) + compute_seconds(load, whole, H100) * 2 / 3, rel=0.03)


def test_a_second_backward_takes_two_thirds_more_and_hides_the_bus(work):
    load = work(longest=880)
    once, twice, both = (
        memory_plan(load, draws=1, micro_batch=8, checkpointing=checkpointing, backwards=backwards, streamed_layers=0)
        for backwards, checkpointing in ((1, False), (2, False), (2, True))
    )
    never, always = (
        [compute_seconds(load, dataclasses.replace(plan, decoded_layers=kept), H100) for plan in (once, twice, both)]
        for kept in (0, 36)
    )
    decoding = never[0] - always[0]  # once more
    base = always[0] - decoding
    assert always[1] - decoding == pytest.approx(base * 5 / 3)
    assert always[2] - decoding * 4 / 3 == pytest.approx(base * 7 / 3)
    assert never[1] - always[1] == pytest.approx(2 * decoding)
    some = memory_plan(load, draws=1, micro_batch=8, checkpointing=False, backwards=2, streamed_layers=9)
    resident = step_seconds(load, twice, H100, 25e9)
    assert step_seconds(load, some, H100, 1e15) == pytest.approx(resident)
    bus = bus_seconds(some, 25e9)
    first = compute_seconds(load, twice, H100) * 3 / 5  # a forward and a backward of 1/3 + 2/3 + 2/3
    assert step_seconds(load, some, H100, 25e9) == pytest.approx(first + bus * (1 - 4 / 36), rel=0.02)


def test_each_backward_is_launched_kernel_by_kernel_without_a_graph(work):
    """Two backwards seemed to take no launches, and were chosen where one was faster."""
    load = work(longest=880)
    plans = [
        memory_plan(load, draws=1, micro_batch=8, checkpointing=False, backwards=backwards, captured=False)
        for backwards in (1, 2)
    ]
    once, twice = (step_seconds(load, plan, H100, 25e9) - optimizer_seconds(load, H100) for plan in plans)
    assert once == pytest.approx(0.177)
    assert twice == pytest.approx(0.177 * 5 / 3)


def test_gpus_are_found_by_what_people_call_them():
    assert gpu_named("RTX 4090") is GPUS["4090"]
    with pytest.raises(UsageError, match=r"known: h100, .*--probe"):
        gpu_named("gtx1080")
    for secret, shown in (("hf_" + 30 * "x", "is '\\*\\*\\*';"), ("abcd" * 10, "is 'abcdabcdabcdabcd\\.\\.\\.';")):
        with pytest.raises(UsageError, match=shown):
            gpu_named(secret)

"""The memory plan against what was measured on an H100, and the choices it makes."""

import dataclasses

import pytest

from alpacache.alpamayo import Checkpoint, load_expert
from alpacache.alpamayo.family import EXPERT_PARTS
from alpacache.errors import UsageError
from alpacache.planning.gpus import GPUS
from alpacache.planning.memory_model import fastest_plan, memory_plan
from alpacache.planning.time_model import compute_seconds, optimizer_seconds
from alpacache.planning.workload import expert_sizes
from alpacache.training.auto_settings import choose_draws
from alpacache.training.trainable import choose_trainable
from cache_store import codec_named

GIB = 2**30
LORA_COUNT = 27_550_000


MEASURED = [
    # changes of the workload, (draws, micro-batch, checkpointing), GiB reserved on an H100 with torch 2.11
    ({}, (1, 8, False), 19.74),
    ({"longest": 880, "batch_size": 16}, (1, 16, False), 17.80),
    ({"trainable": "lora", "trained": LORA_COUNT, "batch_size": 4}, (1, 4, False), 7.25),
    ({"trainable": "lora", "trained": LORA_COUNT, "batch_size": 4, "compiled": False}, (1, 4, False), 7.55),
    ({}, (4, 8, True), 19.26),
    ({}, (4, 2, False), 20.58),
    ({}, (4, 8, False), 21.01),
    ({}, (1, 4, False), 19.76),
]


@pytest.mark.parametrize(("changes", "settings", "gib"), MEASURED)
def test_within_five_percent_of_what_was_measured(changes, settings, gib, released):
    draws, micro_batch, checkpointing = settings
    plan = memory_plan(released(**changes), draws=draws, micro_batch=micro_batch, checkpointing=checkpointing)
    assert plan.device_bytes / GIB == pytest.approx(gib, rel=0.05)


def test_the_table_adds_up(released):
    plan = memory_plan(released(validates=True), draws=1, micro_batch=8, checkpointing=False)
    lines = dict(plan.table())
    total = lines.pop("sum, to be reserved")
    outside = lines.pop("CUDA context, beside it") + lines.pop("pinned host memory")
    assert sum(lines.values()) == total == plan.device_bytes
    assert outside > 0
    assert lines["validation"] > 0


@pytest.mark.parametrize("which", ["all", "head", "lora"])
def test_counts_are_those_of_the_real_parameters(tiny_checkpoint, which):
    checkpoint = Checkpoint(str(tiny_checkpoint))
    sizes = expert_sizes(checkpoint.shapes(*EXPERT_PARTS), which, 4)
    assert (sizes["layers"], sizes["hidden"], sizes["intermediate"]) == (4, 96, 192)
    expert = load_expert(checkpoint)
    assert sizes["parameters"] == sum(parameter.numel() for parameter in expert.parameters())
    trained = choose_trainable(expert, which, lora_rank=4, seed=0)
    assert sizes["trained"] == sum(parameter.numel() for parameter in trained.values())


def choose(work, cap_gib, **fixed):
    settings = {"draws": 1, "micro_batch": None, "checkpointing": None} | fixed
    return fastest_plan(work, cap_bytes=int(cap_gib * GIB), **settings)


def test_the_whole_batch_without_checkpointing_where_it_fits(released):
    plan = choose(released(), 23.5)
    assert (plan.micro_batch, plan.checkpointing) == (8, False)


def test_many_draws_are_made_to_fit_and_settings_that_were_given_stay(released):
    work = released()
    plan = choose(work, 23.5, draws=8)
    assert plan.device_bytes <= 23.5 * GIB
    assert memory_plan(work, draws=8, micro_batch=8, checkpointing=False).device_bytes > 23.5 * GIB
    assert choose(work, 23.5, draws=8, checkpointing=False).micro_batch < 8
    assert choose(work, 23.5, draws=8, micro_batch=2).micro_batch == 2


def test_a_margin_is_kept_unless_it_is_what_decides(released):
    work = released()
    needed = memory_plan(work, draws=1, micro_batch=8, checkpointing=False).device_bytes / GIB
    assert choose(work, needed * 1.05).checkpointing is False
    tight = choose(work, needed * 1.001)
    assert tight.device_bytes <= 0.97 * needed * 1.001 * GIB
    least = released(longest=880, batch_size=1)
    only = min(
        memory_plan(least, draws=1, micro_batch=1, checkpointing=choice).device_bytes for choice in (False, True)
    )
    assert choose(least, only / GIB + 0.001).device_bytes <= only + GIB // 1000


def test_layers_stay_decoded_where_there_is_room(released):
    short, long = released(longest=880, batch_size=16), released()
    assert choose(short, 23.5).decoded_layers == 36
    some = choose(long, 23.5)
    assert 20 < some.decoded_layers < 36
    assert 0.93 < some.device_bytes / GIB / 23.5 <= 0.94
    assert dict(some.table())["decoded layers"] == some.decoding
    least = memory_plan(long, draws=1, micro_batch=8, checkpointing=False)
    assert least.decoded_layers == 2
    assert some.device_bytes - least.device_bytes == (some.decoded_layers - 2) * least.decoding // 2
    assert choose(long, least.device_bytes / GIB / 0.96, micro_batch=8, checkpointing=False).decoded_layers == 2
    adapters = choose(released(trainable="lora", trained=LORA_COUNT, batch_size=4), 23.5)
    assert 2 < adapters.decoded_layers < 36
    assert adapters.device_bytes / GIB < 9
    plain = released(layout=dataclasses.replace(long.layout, codec=None))
    assert choose(plain, 23.5).decoding == 0


def test_what_cannot_fit_is_refused_with_the_batch_that_would(tmp_path, released):
    with pytest.raises(UsageError, match=r"20\.00 GiB are allowed") as error:
        choose(released(batch_size=64), 20)
    assert "weights" in str(error.value)
    batch = int(str(error.value).split("--batch-size to ")[1].split(",")[0])
    assert choose(released(batch_size=batch), 20)
    with pytest.raises(UsageError):
        choose(released(batch_size=batch + 1), 20)


def test_a_card_too_small_for_all_parameters_is_told_of_lora(released):
    with pytest.raises(UsageError, match="--trainable lora"):
        choose(released(batch_size=1), 11.5)


BUS = 25e9


@pytest.mark.parametrize("cap_gib", [11.5, 13.5, 15.5])
@pytest.mark.parametrize("batch_size", [8, 16])
def test_a_small_card_trains_all_parameters_with_state_in_ram(cap_gib, batch_size, released):
    work = released(longest=880, batch_size=batch_size, validates=True)
    plan = choose(work, cap_gib, bus_bytes_s=BUS)
    assert 0.93 * cap_gib < plan.device_bytes / GIB <= 0.99 * cap_gib
    assert plan.backwards == 2
    if cap_gib == 15.5:  # with no gradient kept, everything has room
        assert plan.streamed_layers == 0
        assert plan.decoded_layers > 2
        return
    assert 0 < plan.streamed_layers <= 20
    whole = memory_plan(work, draws=1, micro_batch=batch_size, checkpointing=False)
    assert plan.moments + plan.streamed == whole.moments
    assert plan.pinned - plan.streamed == whole.pinned
    lines = dict(plan.table())
    assert lines[f"of that, moments of {plan.streamed_layers} layers"] == plan.streamed
    assert sum(size for _, size in plan.device_table()[:-1]) == plan.device_bytes
    fewer = dataclasses.asdict(plan) | {"streamed_layers": plan.streamed_layers - 1}
    names = ("draws", "micro_batch", "checkpointing", "streamed_layers", "backwards", "captured")
    settings = {name: fewer[name] for name in names}
    assert memory_plan(work, **settings).device_bytes > 0.97 * cap_gib * GIB  # as many layers stay as have room


def test_two_backwards_take_whole_batches_and_save_the_gradients(released):
    work = released(longest=880, batch_size=16, validates=True)
    once, twice = (
        memory_plan(work, draws=1, micro_batch=16, checkpointing=True, backwards=backwards) for backwards in (1, 2)
    )
    saved = once.device_bytes - twice.device_bytes
    assert once.gradients - once.activations - twice.gradients < saved < once.gradients
    assert twice.gradients == once.gradients // 18
    halves = choose(work, 11.5, micro_batch=8, bus_bytes_s=BUS)
    assert halves.backwards == 1
    assert choose(work, 11.5, bus_bytes_s=BUS).settings == (
        "micro-batches of 16, checkpointing, gradients made twice, moments of 16 layers in RAM"
    )
    four_cameras = released(batch_size=8, validates=True)
    assert choose(four_cameras, 11.5, bus_bytes_s=BUS).backwards == 2  # nothing else fits


@pytest.mark.parametrize(("batch_size", "cap_gib"), [(16, 6.0), (32, 6.5), (64, 7.5)])
def test_a_batch_that_two_backwards_cannot_take_whole_is_told_which_they_can(batch_size, cap_gib, released):
    """It was told of lora alone: the remedy left out that activations go with the batch."""
    with pytest.raises(UsageError, match="Lower --batch-size") as error:
        choose(released(longest=880, batch_size=batch_size), cap_gib, bus_bytes_s=BUS)
    batch = int(str(error.value).split("--batch-size to ")[1].split(",")[0])
    assert choose(released(longest=880, batch_size=batch), cap_gib, bus_bytes_s=BUS).backwards == 2
    with pytest.raises(UsageError):
        choose(released(longest=880, batch_size=batch + 1), cap_gib, bus_bytes_s=BUS)


def test_a_setting_that_rules_out_what_would_fit_is_named(released):
    asked = {"micro_batch": 1, "checkpointing": False}
    for given, told in (
        ({"micro_batch": 1}, "Leave --micro-batch out, or"),
        ({"checkpointing": False}, "Leave --no-checkpointing out, or"),
        (asked, "Leave --micro-batch and --no-checkpointing out, or"),
    ):
        with pytest.raises(UsageError, match=told):
            choose(released(longest=880, batch_size=16), 7.5, bus_bytes_s=BUS, **given)
    with pytest.raises(UsageError, match="Use --trainable lora"):
        choose(released(longest=880, batch_size=16), 4.5, bus_bytes_s=BUS, **asked)


def test_gradients_are_not_made_twice_for_a_margin_alone(released):
    """A step would take 1.7 times as long, for 2 % less memory."""
    work = released(trainable="lora", trained=LORA_COUNT, longest=880, batch_size=2, validates=True)
    once = memory_plan(work, draws=1, micro_batch=2, checkpointing=True)
    assert choose(work, once.device_bytes / GIB / 0.985, bus_bytes_s=BUS) == once


def test_a_heavy_codec_needs_room_for_several_groups_where_all_layers_are_decoded_at_once(released):
    layout = dataclasses.replace(released().layout, codec=codec_named("transform:2.2"))
    work = released(longest=880, layout=layout)
    least = memory_plan(work, draws=1, micro_batch=8, checkpointing=False)
    each, more = 8 * 880 * 4096, 3 * 2 * (8 * 880 + 8) * (2048 + 8)
    roomy = choose(work, 40)
    assert roomy.decoded_layers == 36
    assert roomy.device_bytes - least.device_bytes == 34 * each + more
    almost = choose(work, (roomy.device_bytes - 1) / GIB / 0.94, micro_batch=8, checkpointing=False)
    assert almost.decoded_layers == 35
    assert almost.device_bytes - least.device_bytes == 33 * each


def test_nothing_is_streamed_where_everything_fits_or_where_it_does_not_help(released):
    assert choose(released(), 23.5, bus_bytes_s=BUS) == choose(released(), 23.5)
    with pytest.raises(UsageError):
        choose(released(longest=880), 11.5)
    head = released(trainable="head", trained=1_900_000, batch_size=1)
    assert choose(head, 7.0, bus_bytes_s=BUS).streamed_layers == 0


def test_a_slow_card_launches_kernel_by_kernel_and_computes_nothing_twice(released):
    """Gradients then take the memory of activations as they go; launching takes no longer than computing."""
    work, slow = released(longest=880), dataclasses.replace(GPUS["4090"], tflops=58, memory_gb_s=504)
    fast, patient = (choose(work, 11.5, bus_bytes_s=2 * BUS, gpu=gpu) for gpu in (GPUS["h200"], slow))
    assert (fast.captured, fast.backwards) == (True, 2)
    assert (patient.captured, patient.checkpointing, patient.backwards) == (False, False, 1)
    assert choose(released(longest=880, captured=False), 11.5, bus_bytes_s=BUS).captured is False


def test_draws_fill_the_time_that_the_disk_takes(released):
    work = released()

    def plan_for(draws):
        return choose(work, 23.5, draws=draws)

    def step_s(draws):
        return compute_seconds(work, plan_for(draws), gpu) + optimizer_seconds(work, gpu)

    def plan_for_two(draws):
        return choose(work, 23.5 if draws < 3 else 1, draws=draws)

    gpu = GPUS["h100"]
    assert choose_draws(plan_for, work, batch_s=0.0, gpu=gpu) == 1
    assert choose_draws(plan_for, work, batch_s=1.0, gpu=gpu) == 8
    between = choose_draws(plan_for, work, batch_s=0.06, gpu=gpu)
    assert 1 < between < 8
    assert step_s(between // 2) < 0.06 <= step_s(between)
    assert choose_draws(plan_for_two, work, batch_s=1.0, gpu=gpu) == 2

"""GPU memory and RAM that stage one will take, settled before the first sample."""

from dataclasses import dataclass

import torch

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.backbone import geometry_of
from alpacache.alpamayo.family import Geometry
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.cached_samples.features import kv_bytes
from alpacache.extraction.prefill import StoredFeatures
from alpacache.extraction.preparation import PreparationSettings, ReadSample
from alpacache.gpu.device import cap_memory
from alpacache.gpu.host_memory import available_bytes
from alpacache.planning.prefill_plan import PATCH_VALUES, PrefillPlan, PrefillWork, WeightsHome, choose_plan
from alpacache.planning.sample_size import planned_prompt
from alpacache.planning.time_model import prefill_batch
from alpacache.torchrun import this_process

_PICTURE = (1080, 1920)
"""Assumed where no sample can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSettings:
    """Settings of the way through the VLM, which decide speed and memory and not what is stored."""

    workers: int
    """Samples that are read at a time."""
    writers: int
    """Threads that commit samples."""
    batch_size: int | None
    """Samples that go through the VLM at a time; None: as many as suit the device."""
    deterministic: bool
    compile: bool | None
    """None: where it pays."""
    home: WeightsHome | None
    """Home of the text layers' weights; None: the fastest that fits."""
    budget_bytes: int | None
    """GPU memory that the allocator may take; None: what is free."""

    def rows(self, cameras: int, frames: int, device: torch.device) -> int:
        """Samples that go through the VLM at a time where memory does not matter."""
        batched = device.type == "cuda" and not self.deterministic
        return self.batch_size or (prefill_batch(cameras=cameras, frames=frames) if batched else 1)


def prefill_work(
    found: ReadSample | None,
    checkpoint: Checkpoint,
    builder: InputBuilder,
    settings: PreparationSettings,
    stored: StoredFeatures,
    *,
    samples: int,
    rows: int,
    ahead: int,
) -> PrefillWork:
    """Collect what stage one's memory depends on, for samples as large as `found`, or as a usual one for None."""
    geometry, itemsize = geometry_of(checkpoint), settings.dtype.itemsize
    tokens, image_tokens, pixel_bytes, tails = _sizes(found, builder, settings, geometry)
    layers = geometry.layers if stored.layers is None else len(stored.layers)
    stored_bytes = sum(
        kv_bytes((layers, 2, geometry.kv_heads, length, geometry.head_dim), stored.codec) for length in (tokens, *tails)
    )
    if stored.hidden_states:
        stored_bytes += 2 * tokens * geometry.vlm_hidden
    return PrefillWork(
        geometry=geometry,
        tokens=tokens + sum(tails),
        image_tokens=image_tokens,
        stored_bytes=stored_bytes,
        pixel_bytes=pixel_bytes,
        rows=rows,
        ahead=ahead,
        samples=samples,
        run_layers=stored.run_layers,
        itemsize=itemsize,
        rollouts=stored.rollouts > 0,
        sharers=this_process().local_world_size,
    )


def plan_memory(work: PrefillWork, asked: PrefillSettings, device: torch.device) -> PrefillPlan:
    """Choose where the weights live and how many samples go at once; hold the allocator to the budget.

    Raises `UsageError` where nothing fits.
    """
    host_bytes = available_bytes() // work.sharers
    if device.type == "cuda":
        device_bytes = cap_memory(asked.budget_bytes, device)
    else:
        device_bytes = host_bytes if asked.budget_bytes is None else asked.budget_bytes
    exact_rows = asked.batch_size is not None or asked.deterministic
    return choose_plan(work, device_bytes=device_bytes, host_bytes=host_bytes, asked=asked.home, exact_rows=exact_rows)


def _sizes(
    found: ReadSample | None, builder: InputBuilder, settings: PreparationSettings, geometry: Geometry
) -> tuple[int, int, int, list[int]]:
    """Tokens of this sample, its images' tokens, its pixels' bytes, and the lengths of its twins; or of a usual one."""
    if found is not None:
        inputs = found.inputs
        images = int((inputs.image_spans[:, 1] - inputs.image_spans[:, 0]).sum())
        twins = [len(ids) for ids, _ in builder.twins(inputs.route).values()]
        return len(inputs.input_ids), images, inputs.pixel_values.numel() * settings.dtype.itemsize, twins
    prompt = planned_prompt(builder, settings.shown, frames=settings.frames, picture=_PICTURE)
    images = len(settings.shown) * settings.frames * prompt.tokens_an_image
    return prompt.tokens, images, images * geometry.vlm.merged * PATCH_VALUES * settings.dtype.itemsize, []


def told_plan(plan: PrefillPlan) -> str:
    """One line on a plan, for people."""
    where = {"gpu": "on the GPU", "ram": "in RAM", "files": "in the checkpoint's files"}[plan.home]
    sizes = f"{plan.device_bytes / 2**30:.2f} GiB of GPU memory and {plan.host_bytes / 2**30:.1f} GiB of RAM planned"
    if plan.home == "gpu":
        return f"memory: the VLM's weights {where}, {plan.rows} samples at a time; {sizes}."
    tower = "the vision tower comes for each group, too" if plan.tower_streams else "the vision tower on the GPU"
    return (
        f"memory: the text layers' weights {where}, {tower}; groups of {plan.group} samples, {plan.rows} of them in a "
        f"layer at a time; {sizes}."
    )

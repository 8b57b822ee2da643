"""Memory of stage one, worked out before the first sample: where weights live and how many samples go at once.

Weights that are not on the GPU are copied once for each *group* of samples, so a group must be large enough to compute
for as long as the copy takes. *Rows* are the samples that go through a layer side by side. What a token takes while a
layer computes was counted from the layers' operations, allocation by allocation, and does not depend on the card.
"""

from dataclasses import dataclass
from typing import Literal

from alpacache.alpamayo.family import Geometry
from alpacache.alpamayo.weight_homes import SLOTS, STAGES
from alpacache.errors import UsageError
from alpacache.planning.gpus import GPUS, MEASURED
from alpacache.planning.time_model import prefill_seconds
from alpacache.planning.workload import BF16_BYTES, halved

WeightsHome = Literal["gpu", "ram", "files"]
_BUS_BYTES_S, _FILE_BYTES_S = 20e9, 3e9
"""Rates assumed of copies from page-locked RAM, to be on the safe side, and of reads from an NVMe drive, where groups
are chosen."""
_SPARE = 1.5
"""A group computes so many times as long as its weights take to arrive, on the fastest card measured."""
_MOST_GROUP = 256
_WORKSPACE_BYTES = 80 * 2**20
"""cuBLAS's workspace and small tensors."""
_GAPS = 0.02
"""Share that is lost to pages nothing fills."""
PATCH_VALUES = 3 * 2 * 16 * 16
"""Values of a patch: two frames, three colours, 16 by 16 pixels."""
_ANGLES_A_PATCH = 576
"""Bytes of a patch's cosines and sines in float32."""
_RAM_LEFT_BYTES = 2 * 2**30
"""RAM left to everything else on the machine."""
PLACES: tuple[tuple[WeightsHome, bool], ...] = (
    ("gpu", False),
    ("ram", False),
    ("ram", True),
    ("files", False),
    ("files", True),
)
"""Homes of the text layers' weights, each without and with the vision tower's, from the fastest on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsPlace:
    """A place for the VLM's weights, and the bytes that they take."""

    home: WeightsHome
    """Home of the text layers' weights while they do not compute."""
    tower_streams: bool
    """The vision tower has the same home; False: it stays on the GPU."""
    on_device: int
    """Weights on the GPU at a time."""
    on_host: int
    """Page-locked weights; of what several processes share, this one's part."""
    streamed: int
    """Weights that are copied to the GPU each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWork:
    """Stage one, as far as its memory depends on it."""

    geometry: Geometry
    tokens: int
    """Tokens of the longest prompt."""
    image_tokens: int
    """Tokens of its images."""
    stored_bytes: int
    """KV and hidden states of a sample as they are stored."""
    pixel_bytes: int
    """A sample's pixels as the VLM takes them."""
    rows: int
    """Samples that go through the VLM at a time, or fewer where memory is short."""
    ahead: int
    """Samples that are read ahead or on their way to the store."""
    samples: int
    """Samples to extract by this process."""
    run_layers: int | None = None
    """Number of the text layers, from the first, that are run through; None: all."""
    itemsize: int = BF16_BYTES
    """Bytes of a weight."""
    rollouts: bool = False
    sharers: int = 1
    """Processes of this machine that share the weights in RAM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPlan:
    """Memory of stage one in bytes, and the settings it is for."""

    home: WeightsHome
    """Home of the text layers' weights."""
    tower_streams: bool
    """The vision tower comes for each group, too."""
    group: int
    """Samples that go through a layer before the next layer is needed."""
    rows: int
    """Samples of these that go through it side by side."""
    buffers: int
    """Samples that have room on the host while their KV arrives and until they are committed."""
    weights: int
    """Weights on the GPU at a time."""
    group_bytes: int
    """Hidden states of the group."""
    activations: int
    kv: int
    """Keys and values until they have left, and what the encoder needs."""
    workspace: int
    host_weights: int
    """Page-locked weights; of what several processes share, this one's part."""
    host_samples: int
    """Samples that were read, and those that are on their way to the store."""
    streamed_bytes: int
    """Weights that are copied for each group."""

    @property
    def device_bytes(self) -> int:
        """Peak of what the allocator reserves."""
        return self.weights + self.group_bytes + self.activations + self.kv + self.workspace

    @property
    def host_bytes(self) -> int:
        return self.host_weights + self.host_samples

    def device_table(self) -> list[tuple[str, int]]:
        """Lines that make up `device_bytes`, and the sum: (what, bytes)."""
        return [
            ("weights", self.weights),
            ("hidden states of a group", self.group_bytes),
            ("activations", self.activations),
            ("KV and encoder", self.kv),
            ("workspace", self.workspace),
            ("sum, to be reserved", self.device_bytes),
        ]

    def table(self) -> list[tuple[str, int]]:
        """The same with the host's memory: (what, bytes)."""
        beside = [("host memory for weights", self.host_weights), ("host memory for samples", self.host_samples)]
        return [*self.device_table(), *beside]


def place_of(
    geometry: Geometry,
    itemsize: int,
    home: WeightsHome,
    *,
    tower_streams: bool = False,
    sharers: int = 1,
    run_layers: int | None = None,
) -> WeightsPlace:
    """Count what the weights of a VLM that writes no text take in this place.

    `run_layers`: text layers, from the first, that have to come; None: all. On the GPU all are loaded first.
    """
    sizes = geometry.vlm
    layer, tower = sizes.layer_parameters * itemsize, sizes.tower_parameters * itemsize
    if home == "gpu":
        everything = layer * geometry.layers + tower + sizes.embedding_parameters * itemsize
        return WeightsPlace(home=home, tower_streams=False, on_device=everything, on_host=0, streamed=0)
    streamed = layer * (run_layers or geometry.layers) + (tower if tower_streams else 0)
    return WeightsPlace(
        home=home,
        tower_streams=tower_streams,
        on_device=max(SLOTS * layer, tower) if tower_streams else SLOTS * layer + tower,
        on_host=-(-streamed // sharers) if home == "ram" else STAGES * max(layer, tower if tower_streams else 0),
        streamed=streamed,
    )


def place_weights(geometry: Geometry, itemsize: int, *, device_bytes: int, host_bytes: int) -> WeightsPlace | None:
    """The fastest place that fits into what there is for the weights alone; None where none does."""
    for home, tower_streams in PLACES:
        place = place_of(geometry, itemsize, home, tower_streams=tower_streams)
        if place.on_device <= device_bytes and (home == "gpu" or place.on_host + _RAM_LEFT_BYTES <= host_bytes):
            return place
    return None


def resident_plan(work: PrefillWork, rows: int) -> PrefillPlan:
    """Memory with all weights on the GPU."""
    weights = place_of(work.geometry, work.itemsize, "gpu").on_device
    weights += work.geometry.vlm.embedding_parameters * work.itemsize if work.rollouts else 0
    tokens = rows * work.tokens
    # While layers compute, the batch before lies encoded beside the cache; later the cache, what is cut from it for
    # each sample, and both batches encoded.
    cache, encoded = tokens * _kv_token(work) * work.geometry.layers, rows * work.stored_bytes
    computing, cutting = _activations(work, rows) + cache + encoded, 2 * cache + 2 * encoded
    kv = cache + encoded
    activations = max(computing, cutting) - kv
    return PrefillPlan(
        home="gpu",
        tower_streams=False,
        group=rows,
        rows=rows,
        buffers=work.ahead,
        weights=weights,
        group_bytes=_group_bytes(work, rows),
        activations=activations,
        kv=kv,
        workspace=_WORKSPACE_BYTES + round(_GAPS * (kv + activations)),
        host_weights=0,
        host_samples=work.ahead * (work.stored_bytes + work.pixel_bytes),
        streamed_bytes=0,
    )


def streamed_plan(work: PrefillWork, home: WeightsHome, *, group: int, rows: int, tower_streams: bool) -> PrefillPlan:
    """Memory with the text layers' weights, and the vision tower's if `tower_streams`, in another home."""
    place = place_of(
        work.geometry,
        work.itemsize,
        home,
        tower_streams=tower_streams,
        sharers=work.sharers,
        run_layers=work.run_layers,
    )
    # A layer of the rows: computed, cut, side by side; then what the encoder makes, some of which has yet to go.
    kv = rows * work.tokens * _kv_token(work) * 5
    activations = _activations(work, rows)
    buffers = 2 * group
    return PrefillPlan(
        home=home,
        tower_streams=tower_streams,
        group=group,
        rows=rows,
        buffers=buffers,
        weights=place.on_device,
        group_bytes=_group_bytes(work, group),
        activations=activations,
        kv=kv,
        workspace=_WORKSPACE_BYTES + round(_GAPS * (_group_bytes(work, group) + kv + activations)),
        host_weights=place.on_host,
        host_samples=buffers * work.stored_bytes + (2 * group + work.ahead) * work.pixel_bytes,
        streamed_bytes=place.streamed,
    )


def choose_plan(
    work: PrefillWork,
    *,
    device_bytes: int,
    host_bytes: int,
    asked: WeightsHome | None = None,
    exact_rows: bool = False,
) -> PrefillPlan:
    """Choose the fastest plan that fits: weights on the GPU, else in RAM, else in the files.

    Args:
        device_bytes, host_bytes: what there is.
        asked: only this home.
        exact_rows: never fewer rows than the work asks for.

    Raises `UsageError` where nothing fits, with what is needed.
    """
    rows = [work.rows] if exact_rows else halved(work.rows)
    least: PrefillPlan | None = None
    for home, tower_streams in PLACES:
        if (asked is not None and home != asked) or (home != "gpu" and work.rollouts):
            continue
        for few in rows:  # with the least groups
            if home == "gpu":
                plan = resident_plan(work, few)
            else:
                plan = streamed_plan(work, home, group=few, rows=few, tower_streams=tower_streams)
            if plan.device_bytes <= device_bytes and (home == "gpu" or _fits_host(plan, host_bytes)):
                return _with_room_used(work, plan, device_bytes=device_bytes, host_bytes=host_bytes)
            if least is None or plan.device_bytes <= least.device_bytes:
                least = plan
    assert least is not None or work.rollouts
    raise UsageError(_refusal(work, least, asked=asked, device_bytes=device_bytes, host_bytes=host_bytes))


def _with_room_used(work: PrefillWork, plan: PrefillPlan, *, device_bytes: int, host_bytes: int) -> PrefillPlan:
    """The plan with as large a group as hides its weights, or as fits."""
    if plan.home == "gpu":
        return plan
    best, wanted = plan, min(hiding_group(work, plan), max(work.samples, plan.rows))
    while best.group < wanted:
        more = streamed_plan(
            work, plan.home, group=best.group + plan.rows, rows=plan.rows, tower_streams=plan.tower_streams
        )
        if more.device_bytes > device_bytes or not _fits_host(more, host_bytes):
            break
        best = more
    return best


def hiding_group(work: PrefillWork, plan: PrefillPlan) -> int:
    """Samples that compute for longer than their weights take to arrive, on the fastest card that was measured."""
    rate = _BUS_BYTES_S if plan.home == "ram" else _FILE_BYTES_S
    parameters = work.geometry.parameters_run(work.run_layers)
    one = prefill_seconds(parameters, plan.rows * work.tokens, GPUS[MEASURED]) / plan.rows
    wanted = _SPARE * plan.streamed_bytes / rate / one
    return min(_MOST_GROUP, plan.rows * -(-int(wanted) // plan.rows))


def _fits_host(plan: PrefillPlan, host_bytes: int) -> bool:
    return plan.host_bytes + _RAM_LEFT_BYTES <= host_bytes


def _refusal(
    work: PrefillWork, least: PrefillPlan | None, *, asked: WeightsHome | None, device_bytes: int, host_bytes: int
) -> str:
    if work.rollouts:
        needed = (least or resident_plan(work, 1)).device_bytes
        lower = "lower --batch-size, " if least is not None and least.rows > 1 else ""
        remedy = f"Pass --reasoning none, {lower}or take a larger --memory-budget or GPU."
        if least is None:
            where = "in RAM" if asked == "ram" else "in the files"
            remedy = f"With --weights {asked} they stay {where}: "
            remedy += "leave it out." if needed <= device_bytes else "pass --reasoning none."
        return (
            f"reasoning rollouts need the VLM's weights on the GPU, {needed / 2**30:.1f} GiB with what else stage one "
            f"takes, because each token goes through all of them; {device_bytes / 2**30:.1f} GiB are allowed. {remedy}"
        )
    assert least is not None
    lines = "\n  ".join(f"{size / 2**30:7.2f} GiB  {name}" for name, size in least.table())
    where = {"gpu": "on the GPU", "ram": "in RAM", "files": "in the files"}[least.home]
    remedy = "Raise --memory-budget, take fewer --cameras or --frames"
    remedy += ", or leave --weights out." if asked else ", or free host memory."
    return (
        f"stage one would take {least.device_bytes / 2**30:.2f} GiB of GPU memory and {least.host_bytes / 2**30:.2f} "
        f"GiB of RAM with the weights {where} and {least.group} samples at a time; {device_bytes / 2**30:.2f} and "
        f"{max(0, host_bytes - _RAM_LEFT_BYTES) / 2**30:.2f} GiB are there:\n  {lines}\n{remedy}"
    )


def _kv_token(work: PrefillWork) -> int:
    """Bytes of a token's keys and values in one layer."""
    return 2 * work.geometry.kv_heads * work.geometry.head_dim * work.itemsize


def _group_bytes(work: PrefillWork, group: int) -> int:
    """Hidden states, rotary angles and what the first layers add to the images' tokens."""
    wide = work.geometry.vlm_hidden * work.itemsize
    angles = 2 * work.geometry.head_dim * work.itemsize
    return group * (work.tokens * (wide + angles) + work.image_tokens * work.geometry.vlm.deepstack * wide)


def _activations(work: PrefillWork, rows: int) -> int:
    """The widest moment of a text layer, or of a block of the vision tower beside the pixels."""
    sizes, hidden, e = work.geometry.vlm, work.geometry.vlm_hidden, work.itemsize
    text = max(3 * sizes.intermediate + 2 * hidden, 5.5 * hidden, 5.5 * sizes.query_width) * e
    image: float = max(16 * sizes.vision_hidden, 2 * sizes.vision_intermediate + 3 * sizes.vision_hidden) * e
    image += 2 * sizes.vision_hidden * e + PATCH_VALUES * e + _ANGLES_A_PATCH
    return round(rows * max(work.tokens * text, work.image_tokens * sizes.merged * image))

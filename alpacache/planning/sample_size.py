"""Prompt and size of a sample before it exists, counted from one that has every length but no content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from alpacache.alpamayo.families import released
from alpacache.alpamayo.family import Geometry
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt import ROUTE_TOKENS
from alpacache.alpamayo.rollout import MAX_TOKENS
from alpacache.cached_samples.features import KV_SHAPE, ROUTE, store_fields, tail_name
from alpacache.driving.cameras import FRONT_CAMERA
from alpacache.driving.picture_size import image_tokens
from alpacache.driving.sample import DEFAULT_T0_US, FUTURE_STEPS, HISTORY_STEPS, SampleRef
from cache_store import KVCodec
from cache_store.format.sample_group import Value
from cache_store.upkeep.store_info import sample_size

JPEG_BYTES = 25_000
"""Size assumed for the small front picture."""
_ROUTE_CHARACTERS = 3
"""Characters of a route that are assumed for a token: instructions have many numbers, a token a digit."""
_TEXT_BYTES = 8
"""Bytes of text assumed for a generated token."""
CLIP_ID = "0" * 36
"""A clip id as long as PhysicalAI-AV's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPrompt:
    """The prompt that the VLM will read for a sample."""

    cameras: tuple[str, ...]
    frames: int
    text: str
    tokens: int
    """Length of the whole prefix."""
    tokens_an_image: int
    question_tokens: int
    """Tokens between the stem and a reasoning rollout's text."""
    twins: Mapping[str, int] = field(default_factory=dict)
    """Tokens behind the stem in each twin of a prompt with a route."""
    route: str | None = None


def planned_prompt(
    builder: InputBuilder | None,
    cameras: tuple[str, ...],
    *,
    frames: int,
    picture: Sequence[int],
    route: str | None = None,
    family: str | None = None,
) -> PlannedPrompt:
    """Count the direct prompt as the builder makes it, or without one as for the released model of a family.

    Args:
        cameras: names, sorted by index.
        frames: images a camera.
        picture: height and width of the recordings.
        route: navigation text in it.
    """
    height, width = picture
    twins = {}
    if builder is not None:
        text, ids, tokens = builder.prompt(cameras, frames=frames, height=height, width=width, route=route)
        length, question = len(ids), len(builder.tail_ids("rollout", route=route))
        twins = {name: len(ids) for name, (ids, _) in builder.twins(route).items()}
    else:
        described, sizes_of = released(family)
        tokens = image_tokens(height, width, **sizes_of.pixels)
        text = described.prompt.render([[tokens] * frames] * len(cameras), cameras=cameras)
        length = sizes_of.direct_tokens(cameras, frames=frames, image_tokens=tokens)
        question = sizes_of.question_tokens
        if route is not None:
            around = described.prompt.route or ROUTE_TOKENS
            more = len(route) // _ROUTE_CHARACTERS + sum(map(bool, around))
            twins = {"unrouted": sizes_of.answer_tokens, "swapped": sizes_of.answer_tokens + more}
            length, question = length + more, question + more
    sizes = {"tokens": length, "tokens_an_image": tokens, "question_tokens": question}
    return PlannedPrompt(cameras=cameras, frames=frames, text=text, twins=twins, route=route, **sizes)


def longest_tail(prompt: PlannedPrompt) -> int:
    """Tokens with KV of the longest reasoning rollout there can be: the last of its text has none."""
    return prompt.question_tokens + MAX_TOKENS - 1


def sample_bytes(
    geometry: Geometry,
    prompt: PlannedPrompt,
    *,
    codec: KVCodec | None,
    hidden_states: bool,
    clip_id: str = CLIP_ID,
    jpeg_bytes: int = JPEG_BYTES,
    rollouts: int = 0,
    layers: Sequence[int] | None = None,
) -> dict[str, int]:
    """Count the bytes of one sample by field, as `info` does.

    Reasoning rollouts are taken to be as long as they can get, so their bytes are an upper bound. `layers`: the VLM's
    whose KV is stored (None: all), which `codec` is for.
    """
    cameras, tokens = prompt.cameras, prompt.tokens
    counts = ("stem_len", "prefix_len", "rope_delta", "start_position", "t0_us", "view")
    small: dict[str, Value] = {
        "input_ids": np.zeros(tokens, np.int64),
        "image_spans": np.zeros((len(cameras) * prompt.frames, 2), np.int64),
        **{name: np.zeros((), np.int64) for name in counts},
        "frame_timestamps_us": np.zeros((len(cameras), prompt.frames), np.int64),
        "clip_id": clip_id,
        "cameras": list(cameras),
        "prompt": prompt.text,
    }
    for when, steps in (("history", HISTORY_STEPS), ("future", FUTURE_STEPS)):
        small |= {f"{when}_xyz": np.zeros((steps, 3), np.float32), f"{when}_rot": np.zeros((steps, 3, 3), np.float32)}
    if FRONT_CAMERA in cameras:
        small["front_jpeg"] = np.zeros(jpeg_bytes, np.uint8)
    lengths = {"": tokens}
    for name in map(tail_name, range(rollouts)):
        lengths[name] = longest_tail(prompt)
        small |= {
            f"{name}input_ids": np.zeros(lengths[name] + 1, np.int64),
            f"{name}start_position": np.zeros((), np.int64),
            f"{name}text": " " * (_TEXT_BYTES * MAX_TOKENS),
        }
    routed = prompt.route is not None
    if prompt.route is not None:
        small[ROUTE] = prompt.route
    for twin, length in prompt.twins.items():
        name = tail_name(twin)
        lengths[name] = length
        small |= {f"{name}input_ids": np.zeros(length, np.int64), f"{name}start_position": np.zeros((), np.int64)}
        small[f"{name}text"] = prompt.route or ""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, length in lengths.items():
        count = geometry.layers if layers is None else len(layers)
        kv_shape = (count, 2, geometry.kv_heads, length, geometry.head_dim)
        shapes[f"{name}kv"] = kv_shape
        if codec is not None:
            small[f"{name}{KV_SHAPE}"] = np.zeros(len(kv_shape), np.int64)
            shapes[f"{name}kv"] = (codec.expected_bytes(kv_shape),)
    if hidden_states:
        shapes["hidden"] = (tokens, geometry.vlm_hidden)
    schema = store_fields(hidden_states=hidden_states, codec=codec, rollouts=rollouts, routes=routed)
    fields = {one.name: one for one in schema}
    sample_id = SampleRef(clip_id=clip_id, t0_us=DEFAULT_T0_US).sample_id
    return sample_size(sample_id, small, shapes, fields)

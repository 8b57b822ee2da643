"""A sample that does not exist yet: its prompt and the bytes that it will take in a store."""

from dataclasses import dataclass

import numpy as np

from alpacache.alpamayo import Checkpoint
from alpacache.alpamayo.geometry import RELEASED_PIXELS, RELEASED_TEXT_TOKENS, Geometry
from alpacache.alpamayo.images import image_tokens
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.prompt import render_prompt
from alpacache.features import KV_SHAPE, store_fields
from alpacache.sample import DEFAULT_T0_US, FRONT_CAMERA, FUTURE_STEPS, HISTORY_STEPS, SampleRef
from cache_store import CODECS
from cache_store.sample_group import Value
from cache_store.sample_size import sample_size

JPEG_BYTES = 25_000
"""Assumed of the small front picture."""
CLIP_ID = "0" * 36
"""As long as PhysicalAI-AV's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPrompt:
    """What the VLM will read of a sample."""

    cameras: tuple[str, ...]
    frames: int
    text: str
    tokens: int
    """Of the whole prefix."""
    tokens_an_image: int


def planned_prompt(
    checkpoint: Checkpoint | None, cameras: tuple[str, ...], *, frames: int, picture: tuple[int, int]
) -> PlannedPrompt:
    """The direct prompt, counted with the checkpoint's tokenizer; without one as counted for the released R1.

    Args:
        cameras: names, sorted by index.
        frames: images a camera.
        picture: height and width of the recordings.
    """
    height, width = picture
    if checkpoint is not None:
        text, ids, tokens = InputBuilder(checkpoint).prompt(cameras, frames=frames, height=height, width=width)
        length = len(ids)
    else:
        tokens = image_tokens(height, width, **RELEASED_PIXELS)
        text = render_prompt([[tokens] * frames] * len(cameras), cameras=cameras, named=False)
        length = RELEASED_TEXT_TOKENS + len(cameras) * frames * (tokens + 2)
    return PlannedPrompt(cameras=cameras, frames=frames, text=text, tokens=length, tokens_an_image=tokens)


def sample_bytes(
    geometry: Geometry,
    prompt: PlannedPrompt,
    *,
    codec: str,
    hidden_states: bool,
    clip_id: str = CLIP_ID,
    jpeg_bytes: int = JPEG_BYTES,
) -> dict[str, int]:
    """Bytes of one sample by field, as `info` counts them, from a sample that has every length but no content."""
    cameras, tokens, quantising = prompt.cameras, prompt.tokens, CODECS.get(codec)
    kv_shape = (geometry.layers, 2, geometry.kv_heads, tokens, geometry.head_dim)
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
    shapes: dict[str, tuple[int, ...]] = {"kv": kv_shape}
    if quantising is not None:
        small[KV_SHAPE] = np.zeros(len(kv_shape), np.int64)
        shapes["kv"] = (quantising.encoded_bytes(kv_shape),)
    if hidden_states:
        shapes["hidden"] = (tokens, geometry.vlm_hidden)
    fields = {field.name: field for field in store_fields(hidden_states=hidden_states, codec=quantising)}
    sample_id = SampleRef(clip_id=clip_id, t0_us=DEFAULT_T0_US).sample_id
    return sample_size(sample_id, small, shapes, fields)

"""The exact text the VLM was trained on. One byte of difference is another model input.

Source: the prompt builders of the public Alpamayo R1 and 1.5 code (behaviour; the tests hold the text byte for byte).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from alpacache.driving.sample import CAMERAS

Reasoning = Literal["none", "rollout"]
HISTORY_TOKENS = 48

SYSTEM = "You are a driving assistant that generates safe and accurate actions."
INSTRUCTIONS: Mapping[Reasoning, str] = {
    "none": "output the future trajectory.",
    "rollout": "output the chain-of-thought reasoning of the driving process, then output the future trajectory.",
}
ANSWERS: Mapping[Reasoning, str] = {"none": "<|traj_future_start|>", "rollout": "<|cot_start|>"}
CAMERA_TITLES = (
    "Front left camera",
    "Front camera",
    "Front right camera",
    "Rear left camera",
    "Rear camera",
    "Rear right camera",
    "Front telephoto camera",
)
"""What 1.5's prompt calls each camera, by camera index."""


def render_prompt(
    image_tokens: Sequence[Sequence[int]],
    *,
    cameras: Sequence[str],
    named: bool,
    numbered: bool | None = None,
    reasoning: Reasoning = "none",
    route: str | None = None,
) -> str:
    """The prompt up to and including the first answer token.

    Args:
        image_tokens: `[cameras][frames]` image tokens of each frame.
        cameras: camera names in the same order (by camera index).
        named: write each camera's title, as 1.5 does.
        numbered: write each frame's number; None: where cameras are named, as 1.5 does.
        route: 1.5's optional navigation text.
    """
    numbered = named if numbered is None else numbered
    images = []
    for camera, frames in zip(cameras, image_tokens, strict=True):
        if named:
            images.append(f"{CAMERA_TITLES[CAMERAS.index(camera)]}: ")
        for number, tokens in enumerate(frames):
            images.append(f"frame {number} " if numbered else "")
            images.append(f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>")
    history = f"<|traj_history_start|>{'<|traj_history|>' * HISTORY_TOKENS}<|traj_history_end|>"
    navigation = f"<|route_start|>{route}<|route_end|>" if route else ""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{''.join(images)}{history}{navigation}{INSTRUCTIONS[reasoning]}<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWERS[reasoning]}"
    )


def prompt_identity(*, named: bool, numbered: bool | None = None, reasoning: Reasoning) -> dict[str, Any]:
    """The prompt's part of a store's identity: the text around one one-token image, and whether cameras are named.

    Whether frames are numbered shows in the text.
    """
    text = render_prompt([[1]], cameras=[CAMERAS[1]], named=named, numbered=numbered, reasoning=reasoning)
    tokens = "<|traj_history|>"
    template = text.replace(tokens * HISTORY_TOKENS, f"({HISTORY_TOKENS} x {tokens})")
    return {"template": template, "camera_names": named, "reasoning": reasoning}

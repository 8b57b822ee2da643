"""The exact text the VLM was trained on. One byte of difference is another model input.

Source: the prompt builders of the public Alpamayo R1 and 1.5 code (behaviour; the tests hold the text byte for byte).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alpacache.driving.cameras import CAMERAS

Reasoning = Literal["none", "rollout"]

SYSTEM = "You are a driving assistant that generates safe and accurate actions."
DIRECT = "output the future trajectory."
REASONING = "output the chain-of-thought reasoning of the driving process, then output the future trajectory."
CAMERA_TITLES = (
    "Front left camera",
    "Front camera",
    "Front right camera",
    "Rear left camera",
    "Rear camera",
    "Rear right camera",
    "Front telephoto camera",
)
"""Names of the cameras in a prompt, by camera index."""
ROUTE_TOKENS = ("<|route_start|>", "<|route_end|>")
"""Tokens around a route in Alpamayo 1.5."""
_HISTORY = "<|traj_history|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a model family's prompt is written."""

    camera_names: bool
    """True if each camera's title stands before its images."""
    frame_numbers: bool
    """True if each image has its number before it, counted from 0 for each camera."""
    history_tokens: int = 48
    """Placeholders of the ego history: 16 displacements of x, y and z."""
    direct: tuple[str, str] = (DIRECT, "<|traj_future_start|>")
    """Question and first answer token of the prompt without reasoning, after which the prefix ends."""
    reasoning: tuple[str, str] = (REASONING, "<|cot_start|>")
    """The same of the prompt that makes the model reason first."""
    route: tuple[str, str] | None = None
    """What stands before and behind a route; None if the model was not trained with routes."""

    def render(
        self,
        image_tokens: Sequence[Sequence[int]],
        *,
        cameras: Sequence[str],
        reasoning: Reasoning = "none",
        route: str | None = None,
    ) -> str:
        """The prompt up to and including the first answer token.

        Args:
            image_tokens: `[cameras][frames]` image tokens of each frame.
            cameras: camera names in the same order (by camera index).
            route: optional navigation text. Raises `ValueError` where the format has no place for it.
        """
        if route and self.route is None:
            raise ValueError("this prompt has no place for a route.")
        before, behind = self.route or ("", "")
        images = []
        for camera, frames in zip(cameras, image_tokens, strict=True):
            if self.camera_names:
                images.append(f"{CAMERA_TITLES[CAMERAS.index(camera)]}: ")
            for number, tokens in enumerate(frames):
                images.append(f"frame {number} " if self.frame_numbers else "")
                images.append(f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>")
        history = f"<|traj_history_start|>{_HISTORY * self.history_tokens}<|traj_history_end|>"
        navigation = f"{before}{route}{behind}" if route else ""
        question, answer = self.reasoning if reasoning == "rollout" else self.direct
        return (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{''.join(images)}{history}{navigation}{question}<|im_end|>\n"
            f"<|im_start|>assistant\n{answer}"
        )

    def identity(self, reasoning: Reasoning, *, routes: str = "none") -> dict[str, Any]:
        """The prompt's part of a store's identity: the text around one one-token image, and whether cameras are named.

        Whether frames are numbered shows in the text. With `routes` (`source`, or the one text of all samples) it says
        so and how they are written; without, it is what it was before there were any.
        """
        text = self.render([[1]], cameras=[CAMERAS[1]], reasoning=reasoning)
        template = text.replace(_HISTORY * self.history_tokens, f"({self.history_tokens} x {_HISTORY})")
        identity = {"template": template, "camera_names": self.camera_names, "reasoning": reasoning}
        if routes != "none":
            identity["route"] = {"given": routes, "form": "(route)".join(self.route or ())}
        return identity

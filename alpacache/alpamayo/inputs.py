"""Samples to VLM inputs: image patches, prompt, history tokens. Pure CPU work, safe to run in threads."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from alpacache.alpamayo.backbone import companion_file, vlm_config, vlm_file
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.families import FAMILIES, RENAMED
from alpacache.alpamayo.family import Family
from alpacache.alpamayo.foreign_files import Schema, conform, opened, read_json
from alpacache.alpamayo.prompt import ROUTE_TOKENS, PromptFormat, Reasoning
from alpacache.alpamayo.recognition import Recognition, recognise_family
from alpacache.driving.cameras import CAMERAS
from alpacache.driving.picture_size import check_sides, fit_size, image_tokens
from alpacache.driving.resizing import PicturesToDevice, ResizedPictures, resized
from alpacache.driving.route import swapped
from alpacache.driving.sample import Sample
from alpacache.errors import BadClipError, CheckpointError, UsageError

PROCESSOR = "recipe-float-bicubic-antialias-v1"
"""Name of the way of `to_patches` in a store's identity."""
_TOKENIZER_LIMIT_BYTES = 64 * 2**20
_ORDINARY_PARTS = {"BPE", "ByteLevel", "NFC", "Sequence", "Split"}
_CONTRACTIONS, _SPACES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = (
    {"Regex": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"},
    {
        "Regex": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
    },
)
"""How Qwen's tokenizers split text into words."""
_TRIAL_SECONDS = 6
_TRIAL = """
import resource, sys
from tokenizers import Tokenizer
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
Tokenizer.from_file(sys.argv[1]).encode(sys.stdin.read(), add_special_tokens=False)
"""
_Channels = Annotated[list[float], Field(max_length=16)]


@dataclass(frozen=True, slots=True, kw_only=True)
class VLMInputs:
    """Inputs of the VLM for one sample."""

    text: str
    """The rendered prompt, history placeholders still in it."""
    input_ids: NDArray[np.int64]
    """`[T]`, history tokens in place."""
    pixel_values: Tensor
    """`[patches, patch_values]` float32."""
    image_grid_thw: Tensor
    """`[images, 3]`."""
    image_spans: NDArray[np.int64]
    """`[images, 2]`: first and one-past-last prompt position of each image's tokens."""
    stem_len: int
    """Tokens up to and including `<|traj_history_end|>`: what the direct and the reasoning prompt share."""
    route: str | None = None
    """The route in the prompt."""


class PromptTokenizer:
    """The VLM's tokenizer with the trajectory tokens, checked against the checkpoint's config.

    Tokens are added by position, not by name: 1.5 renames nine special tokens at unchanged ids.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        path = companion_file(checkpoint, "tokenizer.json")
        self._tokenizer = _read_tokenizer(path, config.family.prompt.render([[1]], cameras=[CAMERAS[1]]))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.add_tokens([AddedToken(f"<i{i}>", normalized=False) for i in range(config.traj_vocab_size)])
        self._tokenizer.add_special_tokens(
            [AddedToken(name, normalized=False, special=True) for name in config.family.special_tokens]
        )
        self._config = config
        expected = {"<i0>": config.traj_token_start}
        expected |= {f"<|traj_{name}|>": token for name, token in config.traj_token_ids.items()}
        told = ((name, self.id_of(name), token) for name, token in expected.items())
        if wrong := [f"{name} is {ours}, config.json says {token}" for name, ours, token in told if ours != token]:
            raise CheckpointError(
                f"the tokenizer of {config.vlm_name_or_path or checkpoint.model} does not fit {checkpoint.model}: "
                f"{'; '.join(wrong)}."
            )

    def id_of(self, token: str) -> int:
        """Id of one token, by its R1 name."""
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}; it is not one that Alpamayo extends.")
        return int(token_id)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids `[T]` of a rendered prompt; nothing is added at either end."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def is_plain(self, text: str) -> bool:
        """Tell whether no part of a text is one of the tokens that were added to the vocabulary."""
        added = self._tokenizer.get_added_tokens_decoder()
        return not any(token in added for token in self.encode(text).tolist())

    def decode(self, ids: NDArray[np.int64]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def fuse_history(self, ids: NDArray[np.int64], history_xyz: NDArray[np.float32]) -> NDArray[np.int64]:
        """The prompt's ids with its placeholders replaced by the tokens of the ego history `[16, 3]`."""
        places = np.flatnonzero(ids == self._config.traj_token_ids["history"])
        tokens = self._config.history.encode(history_xyz)
        if len(places) != len(tokens):
            raise ValueError(f"the prompt has {len(places)} history placeholders; expected {len(tokens)}.")
        fused = ids.copy()
        fused[places] = tokens
        return fused


def _read_tokenizer(path: Path, prompt: str) -> Tokenizer:
    """A tokenizer from a foreign file. Parts of other kinds than a byte-level BPE has are tried on a prompt first."""
    with opened(path) as (_, size):
        if size > _TOKENIZER_LIMIT_BYTES:
            raise CheckpointError(f"{path} is {size} bytes; expected at most 64 MiB.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare `Exception`, and a panic of its own is not even one
        told = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is not a tokenizer file ({told}); fetch it again.") from error
    parts = [_state(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.model)]
    if not all(_is_ordinary(part) for part in parts if part is not None):
        _try_apart(path, prompt)
    return tokenizer


def _state(part: Any) -> Any:
    """Description of one part of a tokenizer in its file; for a model, its kind."""
    if part is None:
        return None
    return {"type": "BPE"} if isinstance(part, BPE) else json.loads(part.__getstate__())


def _is_ordinary(part: Any) -> bool:
    """Tell whether this part of a tokenizer costs a few microseconds a word, whatever the word."""
    if not isinstance(part, Mapping) or part.get("type") not in _ORDINARY_PARTS:
        return False
    return part.get("pattern") in (None, *_PATTERNS) and all(map(_is_ordinary, part.get("pretokenizers", ())))


def _try_apart(path: Path, prompt: str) -> None:
    """Tokenize the prompt in a process of its own, with limits.

    A pattern from the file can take ages or gigabytes over a few words, or end in a panic: nothing could stop it here.
    """
    program = [sys.executable, "-c", _TRIAL, str(path)]
    try:
        tried = subprocess.run(program, input=prompt.encode(), capture_output=True, timeout=_TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"{path}: its normalizer or pre_tokenizer is not done with a prompt in {_TRIAL_SECONDS} s; fetch it again."
        ) from None
    if tried.returncode:
        raise CheckpointError(f"{path}: its normalizer, pre_tokenizer or model fails over a prompt; fetch it again.")


class InputBuilder:
    """Turns a `Sample` into `VLMInputs`, as a checkpoint's family, tokenizer and image processor ask for.

    The prompt is the one that the checkpoint was trained with, by what it holds, but for what the caller asks for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        reasoning: Reasoning = "none",
        camera_names: bool | None = None,
        frame_numbers: bool | None = None,
        routes: str = "none",
        route_tokens: bool | None = None,
    ) -> None:
        """
        Args:
            camera_names, frame_numbers: whether the prompt has them; None: as the model was trained.
            routes: `none`, `source` where samples bring their own, or the one text of all.
            route_tokens: write routes between the route tokens, or as they are; None: as the model was trained.

        Raises `UsageError` for routes that the model has no place for.
        """
        self.config, self._checkpoint = checkpoint.config, checkpoint
        self._asked = {"camera_names": camera_names, "frame_numbers": frame_numbers}
        self._route_tokens = route_tokens
        if routes != "none" and self.format.route is None:
            raise UsageError(
                f"{checkpoint.model} is of family {self.family.name}, which was not trained with routes: its "
                "prompt has no place for one. Leave --route out or take a model such as Alpamayo 1.5; if this "
                "checkpoint was trained with routes between the route tokens all the same, pass --route-tokens."
            )
        self.routes = routes
        self.tokenizer = PromptTokenizer(checkpoint)
        self.reasoning = reasoning
        vlm = vlm_config(checkpoint)
        vision = vlm.vision_config
        if (image := self.tokenizer.id_of("<|image_pad|>")) != vlm.image_token_id:
            raise CheckpointError(
                f"{vlm_file(checkpoint)}: image_token_id is {vlm.image_token_id}; the tokenizer's <|image_pad|> is "
                f"{image}."
            )
        told, turn_end = self.config.turn_end, self.tokenizer.id_of("<|im_end|>")
        if told is not None and told != turn_end:
            raise CheckpointError(
                f"{vlm_file(checkpoint)}: text_config.eos_token_id is {told}; the tokenizer's <|im_end|> is {turn_end}."
            )
        self._geometry = {"patch": vision.patch_size, "merge": vision.spatial_merge_size}
        self._temporal = vision.temporal_patch_size
        self._sent: dict[torch.device, PicturesToDevice] = {}
        self._limits = {"min_pixels": self.config.min_pixels, "max_pixels": self.config.max_pixels}
        _check_processor(checkpoint, vision.patch_size, vision.spatial_merge_size, self._temporal)

    @cached_property
    def recognition(self) -> Recognition:
        """Evidence of the checkpoint's family."""
        return recognise_family(self._checkpoint)

    @cached_property
    def family(self) -> Family:
        """The checkpoint's family; where the evidence contradicts itself, the one whose text the caller asks for.

        Raises `CheckpointError` where it does and the caller has not decided both parts.
        """
        if (family := self.recognition.family) is not None:
            return family
        if None in self._asked.values():
            raise CheckpointError(
                f"what {self._checkpoint.model} holds does not tell which prompt it was trained with: "
                f"{self.recognition.text}. Say which it is: --camera-names --frame-numbers for 1.5's text before the "
                "images, --no-camera-names --no-frame-numbers for none, as R1's."
            )
        kin = (FAMILIES[name] for name in sorted(RENAMED))
        fitting = (one for one in kin if all(getattr(one.prompt, key) is value for key, value in self._asked.items()))
        return next(fitting, self.recognition.named)

    @cached_property
    def format(self) -> PromptFormat:
        """How the prompt is written: as the family's, but for what the caller asks for. Raises as `family` does."""
        changes: dict[str, Any] = {name: wanted for name, wanted in self._asked.items() if wanted is not None}
        if self._route_tokens is not None:
            changes["route"] = ROUTE_TOKENS if self._route_tokens else ("", "")
        return replace(self.family.prompt, **changes)

    def prompt(
        self, cameras: Sequence[str], *, frames: int, height: int, width: int, route: str | None = None
    ) -> tuple[str, NDArray[np.int64], int]:
        """Text, ids `[T]` with history placeholders, and image tokens a frame, for pictures of this size."""
        tokens = image_tokens(height, width, **self._geometry, **self._limits)
        images = [[tokens] * frames] * len(cameras)
        text = self.format.render(images, cameras=cameras, reasoning=self.reasoning, route=route)
        return text, self.tokenizer.encode(text), tokens

    def tail_ids(self, reasoning: Reasoning, *, route: str | None = None) -> NDArray[np.int64]:
        """Token ids that follow the stem in a prompt of this kind, up to and including the first answer token."""
        text = self.format.render([[1]], cameras=[CAMERAS[1]], reasoning=reasoning, route=route)
        ids = self.tokenizer.encode(text)
        return ids[self._stem_len(ids) :]

    def twins(self, route: str | None) -> dict[str, tuple[NDArray[np.int64], str]]:
        """Token ids that follow the stem in the twins of a direct prompt with this route, and their routes.

        `unrouted` has none; `swapped`, if the route commands left or right, has the other one.
        """
        if route is None:
            return {}
        twins = {"unrouted": (self.tail_ids("none"), "")}
        if (other := swapped(route)) is not None:
            twins["swapped"] = (self.tail_ids("none", route=other), other)
        return twins

    def _stem_len(self, ids: NDArray[np.int64]) -> int:
        return int(np.flatnonzero(ids == self.config.traj_token_ids["history_end"])[0]) + 1

    def build(
        self, sample: Sample, *, seen: ResizedPictures | None = None, device: torch.device | None = None
    ) -> VLMInputs:
        """Inputs of the VLM for one sample, its route in the prompt; pixels are made on `device`, by default the CPU.

        With `seen`, pictures that the samples before it had are not resized again (on the CPU). With a device, calls
        must not come from several threads at once. Raises `BadClipError`: `bad_route` for a route that holds tokens of
        the model, `wrong_shape` for pictures too long and thin.
        """
        frames, _, height, width = sample.frames.shape[1:]
        try:
            check_sides(height, width)
        except ValueError as error:
            raise BadClipError("wrong_shape", f"{sample.ref.sample_id}: {error}") from None
        if sample.route is not None and not self.tokenizer.is_plain(sample.route):
            raise BadClipError("bad_route", f"{sample.ref.sample_id}: its route holds a token of the model's own.")
        resize: Callable[..., Iterator[Tensor]] = _each_resized
        if device is not None:
            resize = self._sent.setdefault(device, PicturesToDevice(device)).resized
        elif seen is not None:
            times = enumerate(sample.frame_timestamps_us.tolist())
            resize = partial(seen.of, [(camera, time_us) for camera, shot in times for time_us in shot])
        pixel_values, grid = to_patches(
            sample.frames.reshape(-1, 3, height, width),
            temporal=self._temporal,
            resize=resize,
            **self._geometry,
            **self._limits,
            device=device,
        )
        text, ids, tokens = self.prompt(sample.cameras, frames=frames, height=height, width=width, route=sample.route)
        starts = np.flatnonzero(ids == self.tokenizer.id_of("<|vision_start|>")) + 1
        return VLMInputs(
            text=text,
            input_ids=self.tokenizer.fuse_history(ids, sample.history_xyz),
            pixel_values=pixel_values,
            image_grid_thw=grid,
            image_spans=np.stack([starts, starts + tokens], axis=1),
            stem_len=self._stem_len(ids),
            route=sample.route,
        )

    def tokens_sha256(self) -> str:
        """Hash of a prompt's ids with all cameras and four frames each: equal for tokenizers that tokenize it alike."""
        text = self.format.render([[1] * 4] * len(CAMERAS), cameras=CAMERAS, reasoning=self.reasoning)
        return hashlib.sha256(self.tokenizer.encode(text).astype("<i8").tobytes()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The part of a store's identity that prompt and image processor make up."""
        return {"prompt": self.format.identity(self.reasoning, routes=self.routes), "processor": self.processor}

    @property
    def processor(self) -> dict[str, Any]:
        """The image processor's part of a store's identity."""
        return {"images": PROCESSOR, **self._geometry, "temporal": self._temporal, **self._limits}


def _each_resized(frames: NDArray[np.uint8], size: tuple[int, int]) -> Iterator[Tensor]:
    return (resized(frame, size) for frame in frames)


def to_patches(
    frames: NDArray[np.uint8],
    *,
    patch: int,
    merge: int,
    temporal: int,
    min_pixels: int,
    max_pixels: int,
    resize: Callable[[NDArray[np.uint8], tuple[int, int]], Iterator[Tensor]] = _each_resized,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Frames `[N, 3, H, W]` RGB to `pixel_values [patches, 3 * temporal * patch^2]` and `image_grid_thw [N, 3]`.

    uint8 / 255 in float32, antialiased bicubic resize, then to -1 .. 1; each frame stands for `temporal` equal ones.
    This is the training recipe's way: resized in float, neither clamped nor rounded. The public sampler resizes uint8
    images instead; the two differ by up to 0.14, so the way is part of a store's identity. `resize` gives the resized
    frames in turn, if some of them are known already, or made on another `device`, where the pixels are made too.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [N, 3, H, W].")
    count, channels, height, width = frames.shape
    fitted = fit_size(height, width, factor=patch * merge, min_pixels=min_pixels, max_pixels=max_pixels)
    pixels = torch.empty(count, channels, *fitted, device=device)
    for number, seen in enumerate(resize(frames, fitted)):
        # One at a time: memory for the float copies of all would be mapped and cleared anew for every sample.
        pixels[number] = seen
    pixels.sub_(0.5).div_(0.5)
    rows, columns = fitted[0] // patch, fitted[1] // patch
    blocks = pixels.reshape(count, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    # tokens by merged block, then the block's patches; within a patch channel, time, row, column
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    blocks = blocks.expand(*blocks.shape[:6], temporal, *blocks.shape[7:])
    grid = torch.tensor([[1, rows, columns]]).repeat(count, 1)
    return blocks.reshape(count * rows * columns, channels * temporal * patch * patch), grid


class _Processor(Schema):
    """Keys of `preprocessor_config.json` that decide about pixels; an absent one is taken as computed here."""

    image_mean: _Channels | None = None
    image_std: _Channels | None = None
    patch_size: int | None = None
    merge_size: int | None = None
    temporal_patch_size: int | None = None


def _check_processor(checkpoint: Checkpoint, patch: int, merge: int, temporal: int) -> None:
    """Refuse a checkpoint whose image processor is not the one this project computes."""
    path = companion_file(checkpoint, "preprocessor_config.json")
    stated = conform(_Processor, read_json(path), path).model_dump(exclude_unset=True)
    expected = dict(zip(_Processor.model_fields, ([0.5] * 3, [0.5] * 3, patch, merge, temporal), strict=True))
    wrong = [f"{key} is {value}, expected {expected[key]}" for key, value in stated.items() if value != expected[key]]
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}; alpacache computes the public recipe's image path only.")

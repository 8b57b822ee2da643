"""Text to token ids, with the trajectory tokens that Alpamayo adds to the VLM's tokenizer.

The extension goes by position, not by name: 1.5 renames nine special tokens at unchanged ids.
"""

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from alpacache.alpamayo.backbone import companion_file
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.prompt import HISTORY_TOKENS
from alpacache.errors import CheckpointError

SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        *("prompt_start", "prompt_end", "image_start", "image_pre_tkn", "image_end"),
        *("traj_history_start", "traj_history_pre_tkn", "traj_history_end", "cot_start", "cot_end"),
        *("meta_action_start", "meta_action_end", "traj_future_start", "traj_future_pre_tkn", "traj_future_end"),
        *("traj_history", "traj_future", "vectorized_wm", "vectorized_wm_start", "vectorized_wm_end"),
        *("vectorized_wm_pre_tkn", "route_start", "route_pad", "route_end"),
        *("question_start", "question_end", "answer_start", "answer_end"),
    )
)
"""In the order in which their ids follow the trajectory tokens."""


class PromptTokenizer:
    """The VLM's tokenizer, extended and checked against the checkpoint's config."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        path = companion_file(checkpoint, "tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer file: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.add_tokens([AddedToken(f"<i{i}>", normalized=False) for i in range(config.traj_vocab_size)])
        self._tokenizer.add_special_tokens(
            [AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS]
        )
        self._config = config
        expected = {"<i0>": config.traj_token_start}
        expected |= {f"<|traj_{name}|>": token for name, token in config.traj_token_ids.items()}
        wrong = [
            f"{name} is {self.id_of(name)}, config.json says {token}"
            for name, token in expected.items()
            if self.id_of(name) != token
        ]
        if wrong:
            raise CheckpointError(
                f"the tokenizer of {config.vlm_name_or_path} does not fit {checkpoint.model}: {'; '.join(wrong)}."
            )

    def id_of(self, token: str) -> int:
        """Id of one token, by its R1 name."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}; it is not one that Alpamayo extends.")
        return int(found)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids `[T]` of a rendered prompt; nothing is added at either end."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: NDArray[np.int64]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def fuse_history(self, ids: NDArray[np.int64], history_xyz: NDArray[np.float32]) -> NDArray[np.int64]:
        """The prompt's ids with its 48 placeholders replaced by the tokens of the ego history `[16, 3]`."""
        places = np.flatnonzero(ids == self._config.traj_token_ids["history"])
        if len(places) != HISTORY_TOKENS:
            raise ValueError(f"the prompt has {len(places)} history placeholders; expected {HISTORY_TOKENS}.")
        fused = ids.copy()
        fused[places] = self.history_ids(history_xyz)
        return fused

    def history_ids(self, history_xyz: NDArray[np.float32]) -> NDArray[np.int64]:
        """Ids `[48]` of the successive differences of the ego history, x, y, z for each step.

        The first difference is against zero. Bins are rounded half to even and clamped.
        """
        config = self._config
        steps = np.diff(history_xyz.astype(np.float32), axis=0, prepend=np.zeros((1, 3), np.float32))
        low = np.asarray(config.history_xyz_min, np.float32)
        high = np.asarray(config.history_xyz_max, np.float32)
        bins = np.round((steps - low) / (high - low) * np.float32(config.history_bins - 1))
        ids: NDArray[np.int64] = np.clip(bins, 0, config.history_bins - 1).astype(np.int64).reshape(-1)
        return ids + (config.traj_token_start + config.future_bins)

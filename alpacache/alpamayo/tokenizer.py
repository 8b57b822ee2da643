"""Text to token ids, with the trajectory tokens that Alpamayo adds to the VLM's tokenizer.

Tokens are added by position, not by name: 1.5 renames nine special tokens at unchanged ids.
"""

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from alpacache.alpamayo.backbone import companion_file
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.errors import CheckpointError


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
            [AddedToken(name, normalized=False, special=True) for name in config.family.special_tokens]
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
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise CheckpointError(f"the tokenizer has no token {token!r}; it is not one that Alpamayo extends.")
        return int(token_id)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids `[T]` of a rendered prompt; nothing is added at either end."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

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

"""Reasoning rollouts: text that the frozen VLM generates after the reasoning prompt, each one a tail on one stem.

What is sampled is what the public sampler samples: logits of the last position, in float32; trajectory tokens, and in
some families the turn's end, masked; then temperature, then the nucleus; at most 256 tokens; a rollout ends with its
first `<|traj_future_start|>`. The public code lets each row run for one token more, because only then the KV of that
one is in its cache. Here that KV is computed and the rollout is done.

To the model all rollouts of a sample are *one* sequence: stem, question, then the tokens of all rollouts as they come,
with a mask that shows each rollout the common part and its own tokens. So stem and question are computed and held once
however many rollouts there are, and a finished one costs nothing more. Each rollout draws its random numbers by key, so
neither the number of rollouts nor what else is extracted changes a draw.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from alpacache import randomness
from alpacache.alpamayo.backbone import additive_mask, check_finite, vlm_config
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.inputs import InputBuilder
from alpacache.alpamayo.text_layers import LayerKV
from alpacache.errors import CheckpointError
from alpacache.finite import is_finite
from alpacache.prefix.prefix import PrefixFeatures, Tail

if TYPE_CHECKING:
    from alpacache.alpamayo.vlm import FrozenVLM

TOP_P = 0.98
TEMPERATURE = 0.6
MAX_TOKENS = 256
"""Longest text of a rollout."""
_HEAD = "lm_head.weight"
_UNITS = 2**40
"""Steps in which probabilities are summed as integers, so that sums are exact whatever order a device adds in."""

Choose = Callable[[int, Sequence[int], Tensor], Tensor]
"""(step, numbers of the running rollouts, their last hidden states `[rows, C]`) -> their next tokens `[rows]`."""


class RolloutSampler:
    """Samples the reasoning rollouts of one sample after the other. Holds no state between calls."""

    def __init__(
        self,
        vlm: "FrozenVLM",
        head: Tensor,
        *,
        question: NDArray[np.int64],
        masked: Sequence[range],
        decode: Callable[[NDArray[np.int64]], str],
    ) -> None:
        """
        Args:
            head: `[vocabulary, C]` the VLM's vocabulary head.
            question: tokens between the stem and the first generated one.
            masked: tokens that are never generated.
            decode: token ids to text.
        """
        self.vlm, self.head = vlm, head
        self.question, self.masked, self.decode = question, masked, decode

    @classmethod
    def load(cls, checkpoint: Checkpoint, vlm: "FrozenVLM", builder: InputBuilder) -> "RolloutSampler":
        """Loads the checkpoint's vocabulary head (1.3 GB in the released models) beside a loaded VLM."""
        config = checkpoint.config
        return cls(
            vlm,
            load_head(checkpoint, vlm),
            question=builder.tail_ids("rollout"),
            masked=config.never_sampled,
            decode=builder.tokenizer.decode,
        )

    def sample(
        self,
        prefix: PrefixFeatures,
        stem_len: int,
        *,
        rollouts: int,
        key: object,
        question: NDArray[np.int64] | None = None,
    ) -> list[Tail]:
        """Tails of freshly sampled rollouts; rollout `n` depends on the prefix's stem, the key and `n`.

        Args:
            prefix: any prefix of the sample; only its first `stem_len` tokens are used.
            key: what the random numbers are for: the sample's id.
            question: this sample's, with its route; None: the sampler's own.
        """
        generators = (randomness.generator("rollout", key, number) for number in range(rollouts))
        draws = torch.stack([torch.rand(MAX_TOKENS, generator=one) for one in generators]).to(self.vlm.device)

        def choose(step: int, running: Sequence[int], hidden: Tensor) -> Tensor:
            return pick(F.linear(hidden, self.head), draws[list(running), step], masked=self.masked)

        return self.generate(prefix, stem_len, choose, rollouts=rollouts, limit=MAX_TOKENS, question=question)

    @torch.inference_mode()
    def generate(
        self,
        prefix: PrefixFeatures,
        stem_len: int,
        choose: Choose,
        *,
        rollouts: int,
        limit: int,
        question: NDArray[np.int64] | None = None,
    ) -> list[Tail]:
        """Tails of rollouts of at most `limit` tokens, each token as `choose` says; `question` as in `sample`."""
        device, asked = self.vlm.device, self.question if question is None else question
        cache = [
            LayerKV(keys[None, :, :stem_len].to(device), values[None, :, :stem_len].to(device))
            for keys, values in zip(prefix.keys, prefix.values, strict=True)
        ]
        first = stem_len + prefix.rope_delta
        common = stem_len + len(asked)
        ids = torch.from_numpy(asked).to(device)
        hidden = self._forward(cache, ids, torch.arange(first, first + len(ids)))[-1:].expand(rollouts, -1)
        owner = torch.full((common + rollouts * limit,), -1, device=device)
        running = list(range(rollouts))
        texts: list[list[int]] = [[] for _ in running]
        columns: list[list[int]] = [list(range(stem_len, common)) for _ in running]
        end = common
        for step in range(limit):
            tokens = choose(step, running, hidden)
            chosen = tokens.tolist()
            for row, token in zip(running, chosen, strict=True):
                texts[row].append(token)
            if step == limit - 1:
                break  # as in the public sampler the last token has no KV
            rows = torch.tensor(running, device=device)
            owner[end : end + len(running)] = rows
            for place, row in enumerate(running):
                columns[row].append(end + place)
            end += len(running)
            seen = (owner[:end] == -1) | (owner[:end] == rows[:, None])  # what has no owner, and its own
            mask = additive_mask(seen, hidden.dtype)[None, None]
            position = first + len(asked) + step
            hidden = self._forward(cache, tokens, torch.full((len(running),), position), mask)
            going_on = [place for place, token in enumerate(chosen) if token != self.vlm.future_start_id]
            running, hidden = [running[place] for place in going_on], hidden[going_on]
            if not running:
                break
        return [
            self._tail(cache, asked, columns[row], texts[row], start=prefix.rope_delta + common + len(texts[row]))
            for row in range(rollouts)
        ]

    def _forward(
        self, cache: Sequence[LayerKV], tokens: Tensor, positions: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Run `n` more tokens, whose KV goes into the cache; their last hidden states `[n, C]`."""
        return self.vlm.extend(cache, tokens[None], positions[None], mask)[0]

    def _tail(
        self, cache: Sequence[LayerKV], question: NDArray[np.int64], columns: list[int], text: list[int], *, start: int
    ) -> Tail:
        places = torch.tensor(columns, device=self.vlm.device)
        ids = np.array(text, np.int64)
        return Tail(
            keys=torch.stack([layer.keys[0][:, places] for layer in cache]),
            values=torch.stack([layer.values[0][:, places] for layer in cache]),
            token_ids=np.concatenate([question, ids]),
            start_position=start,
            text=self.decode(ids).replace("\0", "\ufffd"),  # which stores refuse
        )


def pick(logits: Tensor, uniform: Tensor, *, masked: Sequence[range]) -> Tensor:
    """Sample tokens `[rows]`: those never generated masked, then temperature, then the nucleus of probability `TOP_P`.

    The most probable token always stays. Inverse distribution function over tokens from least to most probable.

    Args:
        logits: `[rows, vocabulary]`; taken to float32.
        uniform: `[rows]` in [0, 1).
    """
    scores = logits.to(torch.float32, copy=True)
    for never in masked:
        scores[:, never.start : never.stop] = -torch.inf
    ordered, tokens = (scores / TEMPERATURE).sort(dim=-1, stable=True)
    below = (ordered.softmax(-1) * _UNITS).long().cumsum(-1)
    dropped = (below[:, :-1] <= (1 - TOP_P) * _UNITS).sum(-1, keepdim=True)
    floor = torch.where(dropped > 0, below.gather(1, (dropped - 1).clamp(min=0)), 0)
    target = floor + (uniform[:, None].double() * (below[:, -1:] - floor)).long()
    place = torch.searchsorted(below, target, right=True)
    place = torch.minimum(torch.maximum(place, dropped), torch.full_like(place, below.shape[1] - 1))
    return tokens.gather(1, place)[:, 0]


def rollout_identity(builder: InputBuilder, rollouts: int) -> dict[str, Any]:
    """The part of a store's identity that says how its tails were sampled."""
    return {
        "rollouts": rollouts,
        "question": builder.tokenizer.decode(builder.tail_ids("rollout")),
        "top_p": TOP_P,
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
    }


def load_head(checkpoint: Checkpoint, vlm: "FrozenVLM") -> Tensor:
    """The vocabulary head `[vocabulary, C]` in the VLM's dtype and on its device; the embeddings where they are tied.

    Raises `CheckpointError` if it is absent or of another shape.
    """
    embeddings: Tensor = vlm.model.get_input_embeddings().weight
    home, prefix = checkpoint.vlm_home
    name = f"{prefix}{_HEAD}"
    where = home.with_prefix(name)
    if name not in where:
        if vlm_config(checkpoint).tie_word_embeddings:
            return embeddings
        raise CheckpointError(
            f"{home.model} has no {name}, which reasoning rollouts need; fetch the complete checkpoint, or pass "
            "--reasoning none."
        )
    head = dict(home.read({name: where[name]}))[name]
    if head.shape != embeddings.shape:
        raise CheckpointError(
            f"{home.model}: {name} is {list(head.shape)}; expected {list(embeddings.shape)} as the embeddings."
        )
    head = head.to(vlm.device, vlm.dtype)
    check_finite(home, {name: is_finite(head)})
    return head

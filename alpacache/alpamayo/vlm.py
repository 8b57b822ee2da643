"""Stage one's model: the frozen VLM, run once a sample.

Only the transformer body is built and read from the checkpoint: the vocabulary head (1.3 GB) is not needed, because
nothing here predicts tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import DynamicCache, Qwen3VLModel

from alpacache.alpamayo.backbone import cache_argument, load_module, vlm_config
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.image_attention import attend_to_images_at_once
from alpacache.alpamayo.inputs import VLMInputs
from alpacache.prefix.prefix import PrefixFeatures


class FrozenVLM:
    """A checkpoint's VLM, which turns prompts into `PrefixFeatures`. Holds no state between calls."""

    def __init__(self, model: Qwen3VLModel, *, future_start_id: int) -> None:
        self.model = model.eval().requires_grad_(False)
        attend_to_images_at_once(self.model)
        self.future_start_id = future_start_id

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.model.language_model.norm.weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.model.language_model.norm.weight
        return weight.device

    def prefill(self, input_ids: ArrayLike | Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> PrefixFeatures:
        """Run the VLM over one prompt.

        Args:
            input_ids: `[T]` fused ids (history tokens already in place); cut after `<|traj_future_start|>`.
            pixel_values: `[patches, patch_values]` of all images, in prompt order.
            image_grid_thw: `[images, 3]` patches in time, height and width of each image.
        """
        return self._prefill([torch.as_tensor(np.asarray(input_ids))], [pixel_values], [image_grid_thw])[0]

    def prefill_batch(self, inputs: Sequence[VLMInputs]) -> list[PrefixFeatures]:
        """Run the VLM over several prompts at once; the closer their lengths, the less computation is wasted.

        Shorter prompts are padded at the end. Attention is causal, so no token sees the padding behind it, and without
        a mask the kernels for plain causal attention can be used. Each result ends where its own prompt does.
        """
        return self._prefill(
            [torch.as_tensor(one.input_ids) for one in inputs],
            [one.pixel_values for one in inputs],
            [one.image_grid_thw for one in inputs],
        )

    @torch.inference_mode()
    def _prefill(
        self, prompts: Sequence[Tensor], pixel_values: Sequence[Tensor], grids: Sequence[Tensor]
    ) -> list[PrefixFeatures]:
        rows = [self._cut(prompt) for prompt in prompts]
        lengths = [len(row) for row in rows]
        ids = torch.full((len(rows), max(lengths)), self.future_start_id)  # padding that is no image token
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        deltas = []
        for number, (row, grid) in enumerate(zip(rows, grids, strict=True)):
            ids[number, : len(row)] = row
            positions[:, number, : len(row)], delta = self._positions(row, grid.cpu())
            deltas.append(delta)
        cache = DynamicCache(config=self.model.config.text_config)
        output = self.model(
            input_ids=ids.to(self.device),
            pixel_values=torch.cat([one.to(self.device, self.dtype, non_blocking=True) for one in pixel_values]),
            image_grid_thw=torch.cat(list(grids)).to(self.device),
            position_ids=positions.to(self.device),
            mm_token_type_ids=(ids == self.model.config.image_token_id).int().to(self.device),
            use_cache=True,
            **{cache_argument(self.model): cache},
        )
        hidden = output.last_hidden_state
        return [
            _features(cache, hidden[number, :length], row=number, rope_delta=delta, start=delta + length)
            for number, (length, delta) in enumerate(zip(lengths, deltas, strict=True))
        ]

    def _positions(self, ids: Tensor, grid: Tensor) -> tuple[Tensor, int]:
        """M-RoPE positions `[3, T]` of one prompt and its rope delta. On the CPU: it is a loop over the images."""
        image = ids == self.model.config.image_token_id
        merged = int((grid.prod(-1) // self.model.config.vision_config.spatial_merge_size**2).sum())
        if int(image.sum()) != merged:
            raise ValueError(
                f"the prompt has {int(image.sum())} image tokens, its images give {merged}; check image_grid_thw."
            )
        positions, deltas = self.model.get_rope_index(
            ids[None], mm_token_type_ids=image.int()[None], image_grid_thw=grid
        )
        return positions[:, 0], int(deltas[0, 0])

    @torch.inference_mode()
    def extend(self, stem: PrefixFeatures, token_ids: ArrayLike | Tensor) -> PrefixFeatures:
        """The prefix of stem and text; only the text's tokens `[N]` are computed."""
        ids = torch.as_tensor(np.asarray(token_ids))[None].to(self.device)
        if ids.shape[1] == 0:
            return stem
        cache = DynamicCache(config=self.model.config.text_config)
        for layer, (key, value) in enumerate(zip(stem.keys, stem.values, strict=True)):
            cache.update(key[None].to(self.device), value[None].to(self.device), layer)
        first = stem.prefix_len + stem.rope_delta
        positions = torch.arange(first, first + ids.shape[1], device=self.device).expand(3, 1, -1)
        output = self.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(ids),
            position_ids=positions,
            use_cache=True,
            **{cache_argument(self.model.language_model): cache},
        )
        hidden = output.last_hidden_state[0]
        if stem.hidden is not None:
            hidden = torch.cat([stem.hidden.to(hidden), hidden])
        start = stem.rope_delta + stem.prefix_len + ids.shape[1]
        return _features(cache, hidden, rope_delta=stem.rope_delta, start=start)

    def rollout(
        self,
        input_ids: ArrayLike | Tensor,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        sequences: Sequence[ArrayLike] | Tensor,
    ) -> list[PrefixFeatures]:
        """Prefixes of recorded reasoning rollouts, as the public sampler leaves them in its cache.

        Args:
            input_ids: `[P]` fused ids of the common prompt.
            sequences: each `[P + N]`, the prompt's positions followed by that rollout's text.

        A row ends after its first `<|traj_future_start|>`. A row that never emits it (or only as its very last token)
        has KV for all tokens but the last, while its start position counts them all.
        """
        stem = self.prefill(input_ids, pixel_values, image_grid_thw)
        prompt_len = len(np.asarray(input_ids))
        result = []
        for row in sequences:
            tokens = np.asarray(row)
            emitted = np.flatnonzero(tokens[prompt_len:-1] == self.future_start_id)
            end = prompt_len + int(emitted[0]) + 1 if emitted.size else len(tokens) - 1
            prefix = self.extend(stem, tokens[prompt_len:end])
            start = stem.rope_delta + (end if emitted.size else len(tokens))
            result.append(replace(prefix, start_position=start))
        return result

    def _cut(self, ids: Tensor) -> Tensor:
        if ids.ndim != 1:
            raise ValueError(f"input_ids has shape {list(ids.shape)}; expected one prompt, [T].")
        starts = (ids == self.future_start_id).nonzero()
        return ids[: int(starts[0, 0]) + 1] if len(starts) else ids


def load_vlm(
    model: str | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
) -> FrozenVLM:
    """Load `vlm.model.*` of a checkpoint (or of the VLM given in its place), one tensor at a time.

    Args:
        model: directory or hub id in the public layout.
        dtype: None means the checkpoint's.
        attention: transformers' name of the attention implementation.

    Raises `CheckpointError` listing every missing, unexpected or misshapen tensor.
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint(str(model))
    config = vlm_config(checkpoint)
    config._attn_implementation = attention
    home, prefix = checkpoint.vlm_home
    body = load_module(
        home,
        f"{prefix}model.",
        lambda: Qwen3VLModel(config),
        dtype=dtype or checkpoint.config.dtype,
        device=torch.device(device),
    )
    return FrozenVLM(body, future_start_id=checkpoint.config.traj_token_ids["future_start"])


def _features(cache: DynamicCache, hidden: Tensor, *, rope_delta: int, start: int, row: int = 0) -> PrefixFeatures:
    """One row of a cache, cut to the length of its hidden states `[T, C]`."""
    keys = torch.stack([layer.keys[row, :, : len(hidden)] for layer in cache.layers])
    values = torch.stack([layer.values[row, :, : len(hidden)] for layer in cache.layers])
    return PrefixFeatures(
        keys=keys, values=values, hidden=hidden, rope_delta=rope_delta, prefix_len=keys.shape[2], start_position=start
    )

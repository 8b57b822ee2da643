"""Stage one's model: the frozen VLM, run once per sample.

Only the transformer body is built and read from the checkpoint: the vocabulary head (1.3 GB) is not needed, because
nothing here predicts tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen3VLModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from alpacache.alpamayo.backbone import additive_mask, described_by, load_module, vlm_config
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.compiled_layers import CompiledLayers
from alpacache.alpamayo.inputs import VLMInputs
from alpacache.alpamayo.prompt_rows import Endings, PromptRows
from alpacache.alpamayo.text_layers import LayerKV, RunLayer, run_layer, text_rows
from alpacache.prefix.prefix import PrefixFeatures, Tail

IMAGE_ATTENTION = "images"


class FrozenVLM:
    """A checkpoint's VLM, which turns prompts into `PrefixFeatures`. Holds no state between calls."""

    def __init__(self, model: Qwen3VLModel, *, future_start_id: int) -> None:
        self.model = model.eval().requires_grad_(False)
        if self.model.visual.config._attn_implementation == "sdpa":  # other implementations stay
            self.model.visual.config._attn_implementation = IMAGE_ATTENTION
            self.model.visual.register_forward_pre_hook(_join_equal_images, with_kwargs=True)
        self.model.visual.register_forward_pre_hook(_PatchPlaces(), with_kwargs=True)
        self.future_start_id = future_start_id
        weight: Tensor = self.model.language_model.norm.weight
        self.dtype, self.device = weight.dtype, weight.device
        self._run_layer: RunLayer = run_layer

    def compile(self, *, backend: str = "inductor") -> None:
        """Have torch.compile fuse the small operations of prefills; from the next one on, which takes longer to begin.

        It rounds differently, and less often. Other numbers of rows and tokens are not compiled again.
        """
        if self._run_layer is run_layer:
            self._run_layer = CompiledLayers(self.model, backend=backend).run_layer

    def prefill(self, input_ids: ArrayLike | Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> PrefixFeatures:
        """Run the VLM over one prompt.

        Args:
            input_ids: `[T]` fused ids (history tokens already in place); cut after `<|traj_future_start|>`.
            pixel_values: `[patches, patch_values]` of all images, in prompt order.
            image_grid_thw: `[images, 3]` patches in time, height and width of each image.
        """
        prompt = (torch.as_tensor(np.asarray(input_ids)), pixel_values, image_grid_thw)
        ((prefix, _),) = self._through(self._embedded([prompt]))
        return prefix

    def prefill_batch(self, inputs: Sequence[VLMInputs]) -> list[PrefixFeatures]:
        """Run the VLM over several prompts at once; the closer their lengths, the less computation is wasted.

        Shorter prompts are padded at the end. Attention is causal, so no token sees the padding behind it, and without
        a mask the kernels for plain causal attention can be used. Each result ends where its own prompt does.
        """
        return [prefix for prefix, _ in self._through(self.begin(inputs))]

    def prefill_with_tails(
        self, inputs: Sequence[VLMInputs], endings: Sequence[Endings]
    ) -> list[tuple[PrefixFeatures, dict[str, Tail]]]:
        """`prefill_batch`, and of each prompt the tails that other endings than its own make of its stem.

        The endings of a prompt are one sequence behind it; each sees the stem and itself.
        """
        return self._through(self.begin(inputs, endings))

    @torch.inference_mode()
    def begin(self, inputs: Sequence[VLMInputs], endings: Sequence[Endings] = ()) -> PromptRows:
        """Prompts with their images' embeddings in place, and their endings, about to enter the first layer."""
        prompts = [(torch.as_tensor(one.input_ids), one.pixel_values, one.image_grid_thw) for one in inputs]
        rows = self._embedded(prompts)
        if any(endings):
            self._add_endings(rows, endings, stems=[one.stem_len for one in inputs])
        return rows

    @torch.inference_mode()
    def _through(self, rows: PromptRows) -> list[tuple[PrefixFeatures, dict[str, Tail]]]:
        """Take the prompts through all layers."""
        text: Any = self.model.language_model
        cache = [rows.advance(number, layer) for number, layer in enumerate(text.layers)]
        return rows.features(cache, text.norm(rows.prompts.hidden))

    def keep_layers(self, count: int) -> None:
        """Give up all layers but the first: of those behind no keys and values are wanted, nor any hidden state."""
        text: Any = self.model.language_model
        text.layers = text.layers[:count]

    def _add_endings(self, rows: PromptRows, endings: Sequence[Endings], *, stems: list[int]) -> None:
        """Give each prompt its endings, padded to the longest."""
        longest = max(sum(len(ids) for ids, _ in of_one.values()) for of_one in endings)
        before = rows.prompts.hidden.shape[1]
        tokens = torch.full((len(stems), longest), self.future_start_id)
        positions = torch.zeros(len(stems), longest, dtype=torch.long)
        owner = torch.full((len(stems), longest), -1)
        for row, (delta, stem, of_one) in enumerate(zip(rows.deltas, stems, endings, strict=True)):
            first = 0
            for number, (ids, _) in enumerate(of_one.values()):
                mine = slice(first, first := first + len(ids))
                tokens[row, mine] = torch.from_numpy(ids)
                positions[row, mine] = delta + stem + torch.arange(len(ids))
                owner[row, mine] = number
        # The mask is made on the device: a copy of it would wait until the device is done with the prompts.
        of_stem, owner = torch.tensor(stems).to(self.device), owner.to(self.device)
        stem_seen = torch.arange(before, device=self.device) < of_stem[:, None, None]
        tail_seen = (owner[:, :, None] == owner[:, None, :]).tril()
        seen = torch.cat([stem_seen.expand(-1, longest, -1), tail_seen], dim=-1)
        mask = additive_mask(seen, self.dtype)[:, None]
        places = positions.to(self.device).expand(3, *positions.shape)
        rows.stems, rows.endings = stems, list(endings)
        rows.tails = text_rows(self.model.language_model, self._embed(tokens), places, mask=mask)

    def extend(self, cache: Sequence[LayerKV], tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run `[B, n]` more text tokens at these positions; their KV goes into the cache, one `LayerKV` a layer.

        `mask` is `[B or 1, 1, n, columns]`, added to the attention's logits; None: causal. Returns the last hidden
        states `[B, n, C]`.
        """
        text: Any = self.model.language_model
        positions = positions.to(tokens.device).expand(3, *tokens.shape)
        rows = text_rows(text, self._embed(tokens), positions, before=cache[0].tokens, mask=mask)
        for number, (layer, kv) in enumerate(zip(text.layers, cache, strict=True)):
            rows.advance(number, layer, kv)
        hidden: Tensor = text.norm(rows.hidden)
        return hidden

    def _embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[B, T, C]` of token ids, on the VLM's device."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
        return embeddings

    @torch.inference_mode()
    def _embedded(self, prompts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> PromptRows:
        """Prompts (ids, pixels, grid) with the embeddings of their images in place."""
        ids_of_all, pixel_values, grids = zip(*prompts, strict=True)
        cut = [self._cut(ids) for ids in ids_of_all]
        for row, grid in zip(cut, grids, strict=True):
            self._check_images(row, grid)
        # First what a GPU is busy with while the rest is laid out.
        seen = self.model.visual(
            torch.cat([one.to(self.device, self.dtype, non_blocking=True) for one in pixel_values]),
            grid_thw=torch.cat(grids).cpu(),
        )
        lengths = [len(row) for row in cut]
        ids = torch.full((len(cut), max(lengths)), self.future_start_id)  # padding that is no image token
        positions = torch.zeros(3, *ids.shape, dtype=torch.long)
        deltas = []
        for number, (row, grid) in enumerate(zip(cut, grids, strict=True)):
            ids[number, : len(row)] = row
            positions[:, number, : len(row)], delta = self._positions(row, grid.cpu())
            deltas.append(delta)
        embeddings = self._embed(ids)
        rows = text_rows(self.model.language_model, embeddings, positions.to(self.device))
        # The places are found on the CPU: a GPU would have to be waited for.
        rows.image_places = (ids == self.model.config.image_token_id).flatten().nonzero()[:, 0].to(self.device)
        embeddings.flatten(0, 1).index_copy_(0, rows.image_places, seen.pooler_output.to(embeddings.dtype))
        rows.run_layer = self._run_layer
        rows.deepstack = [one.to(embeddings.dtype) for one in seen.deepstack_features]
        of_each = [positions[:, number, :length] for number, length in enumerate(lengths)]
        return PromptRows(prompts=rows, lengths=lengths, deltas=deltas, positions=of_each)

    def _positions(self, ids: Tensor, grid: Tensor) -> tuple[Tensor, int]:
        """M-RoPE positions `[3, T]` of one prompt and its rope delta. On the CPU: it is a loop over the images."""
        image = ids == self.model.config.image_token_id
        positions, deltas = self.model.get_rope_index(
            ids[None], mm_token_type_ids=image.int()[None], image_grid_thw=grid
        )
        return positions[:, 0], int(deltas[0, 0])

    def _check_images(self, ids: Tensor, grid: Tensor) -> None:
        """Raise `ValueError` unless a prompt has as many image tokens as its images give."""
        found = int((ids == self.model.config.image_token_id).sum())
        merged = int((grid.prod(-1) // self.model.config.vision_config.spatial_merge_size**2).sum())
        if found != merged:
            raise ValueError(f"the prompt has {found} image tokens, its images give {merged}; check image_grid_thw.")

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
    dtype = dtype or checkpoint.config.dtype
    body = load_module(
        home,
        f"{prefix}model.",
        lambda: Qwen3VLModel(config),
        described_by=described_by(checkpoint),
        dtype=dtype,
        device=torch.device(device),
    )
    return FrozenVLM(body, future_start_id=checkpoint.config.traj_token_ids["future_start"])


def image_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    images: int = 1,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of each of `images` equal parts of the tokens to itself: all images of a forward at once.

    transformers' plain path calls the kernel once for each image and layer and asks the device for the images' sizes
    before each layer, so a GPU waits for Python. Images of one size, the usual case, can be a batch instead: in a
    prototype on an H200 (no rotary embedding) a vision block over 32 images of 720 patches took 1.65 ms, not 3.64.

    Args:
        query, key, value: `[1, heads, images * patches, head_dim]`.

    Returns `[1, images * patches, heads, head_dim]`, as transformers expects of a registered attention.
    """
    apart = (query.shape[1], images, -1, query.shape[3])
    query, key, value = (tensor[0].reshape(apart).transpose(0, 1) for tensor in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register(IMAGE_ATTENTION, image_attention)


def _join_equal_images(tower: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Compute the vision tower's sequence ends, on the CPU: after each image, or only at the end if all are equal."""
    grid: Tensor = named["grid_thw"].cpu()
    sizes = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])
    equal = bool((sizes == sizes[0]).all())
    lengths = sizes.sum()[None] if equal else sizes
    ends = lengths.new_zeros(len(lengths) + 1)
    ends[1:] = lengths.cumsum(0)
    return positional, {**named, "cu_seqlens": ends, "images": len(sizes) if equal else 1}


class _PatchPlaces:
    """Hook that tells the vision tower where its patches are, once for images of the same sizes.

    transformers computes that in each forward, image by image in some 300 small kernels, and asks the device for sizes.
    """

    def __init__(self) -> None:
        self._sizes: list[list[int]] = []
        self._places: dict[str, Tensor] = {}

    def __call__(self, tower: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sizes = named["grid_thw"].tolist()
        if sizes != self._sizes:
            grid, merge = named["grid_thw"].to(tower.pos_embed.weight.device), tower.spatial_merge_size
            taps, shares = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            places = get_vision_position_ids(grid, merge)
            self._sizes = sizes
            self._places = {"interp_indices": taps, "interp_weights": shares, "position_ids": places}
        return positional, {**named, **self._places}

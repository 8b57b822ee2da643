"""The frozen VLM on a GPU that does not hold it: a group of samples goes through one layer, then through the next.

While one layer computes, the next one's weights arrive (`weight_stream`), so that a group large enough hides the bus or
the disk. What a layer computes for some rows is what `FrozenVLM` computes for the same rows, by the same code.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen3VLModel

from alpacache.alpamayo.backbone import check_finite, described_by, empty_weights, module_shapes, vlm_config
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.alpamayo.inputs import VLMInputs
from alpacache.alpamayo.prompt_rows import Endings, PromptRows
from alpacache.alpamayo.text_layers import LayerKV
from alpacache.alpamayo.vlm import FrozenVLM
from alpacache.alpamayo.weight_homes import SLOTS, EmbeddingRows, FilesHome, RamHome, WeightHome, unit_files
from alpacache.alpamayo.weight_stream import WeightStream, allocate, release
from alpacache.finite import is_finite
from alpacache.prefix.prefix import PrefixFeatures
from alpacache.torchrun import this_process

Home = Literal["ram", "files"]
OnLayer = Callable[[int, PromptRows, int, LayerKV], None]
"""(number of the rows, the rows, number of the layer, its KV of these rows)."""


class StreamedVLM(FrozenVLM):
    """A VLM whose text layers, and if need be vision tower, come for each group of samples anew."""

    def __init__(
        self,
        model: Qwen3VLModel,
        *,
        future_start_id: int,
        layers: int,
        embeddings: EmbeddingRows,
        stream: WeightStream,
        tower_streams: bool,
    ) -> None:
        """
        Args:
            model: as large as what stays: its text layers are the `SLOTS` that others come into.
            layers: of the whole text model.
            stream: of the text layers' units in order, after the vision tower's if `tower_streams`.
        """
        super().__init__(model, future_start_id=future_start_id)
        self.layers = layers
        self._embeddings, self._stream = embeddings, stream
        self._left = 0
        """Layers that the group under way has yet to go through."""
        self._tower_shapes = None
        if tower_streams:
            self._tower_shapes = {name: one.shape for name, one in model.visual.named_parameters()}
            release(model.visual)

    @torch.inference_mode()
    def group(
        self, batches: Sequence[tuple[Sequence[VLMInputs], Sequence[Endings]]], on_layer: OnLayer
    ) -> list[PromptRows]:
        """Take batches of prompts, with endings as in `begin`, through all layers, each before the next.

        Returns the rows, whose hidden states have yet to pass `norm`.
        """
        self._finish_group()
        with self._tower():
            rows = [self.begin(inputs, endings) for inputs, endings in batches]
        self._left = self.layers
        self._offer_slots()
        while self._left:
            number = self.layers - self._left
            with self._next_layer() as layer:
                for which, some in enumerate(rows):
                    on_layer(which, some, number, some.advance(number, layer))
        return rows

    def prefill_batch(self, inputs: Sequence[VLMInputs]) -> list[PrefixFeatures]:
        """`FrozenVLM.prefill_batch`, with layers that come one by one: the KV of all of them stays on the device."""
        cache: list[LayerKV] = []
        (rows,) = self.group([(inputs, ())], lambda which, some, number, kv: cache.append(kv))
        return [prefix for prefix, _ in rows.features(cache, self.norm(rows.prompts.hidden))]

    def norm(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm."""
        text: Any = self.model.language_model
        normed: Tensor = text.norm(hidden)
        return normed

    def check_weights(self, checkpoint: Checkpoint) -> None:
        """Raise `CheckpointError` for weights that are not finite, of those that came for the first time. Waits."""
        if flags := self._stream.finite():
            check_finite(checkpoint.vlm_home[0], flags)

    def close(self) -> None:
        """End what brings the weights."""
        self._stream.close()

    def _offer_slots(self) -> None:
        """Let the first layers come, unless they are on their way since the last group."""
        if not self._stream.offered:
            for slot in list(self.model.language_model.layers)[: self.layers]:
                self._stream.offer(slot)

    @contextmanager
    def _next_layer(self) -> Iterator[nn.Module]:
        """The next layer of this group; its slot is offered again at the end, even after an error."""
        layer = self._stream.take()
        self._left -= 1
        try:
            yield layer
        finally:
            if self._tower_shapes is None or self._left >= SLOTS:
                self._stream.offer(layer)

    def _finish_group(self) -> None:
        """Let those layers pass that an error has kept the last group from: units come in a fixed order."""
        if self._left:
            self._offer_slots()
        while self._left:
            with self._next_layer():
                pass

    @contextmanager
    def _tower(self) -> Iterator[None]:
        """Within it the vision tower has its weights."""
        tower = self.model.visual
        if self._tower_shapes is None:
            yield
            return
        allocate(tower, self._tower_shapes)
        try:
            self._stream.offer(tower)
            self._stream.take()
            self._left = self.layers  # they come next, whatever happens here
            yield
        finally:
            release(tower)

    def _embed(self, ids: Tensor) -> Tensor:
        unique, places = torch.unique(ids.cpu(), return_inverse=True)
        rows: Tensor = self._embeddings.rows(unique).to(self.device)[places.to(self.device)]
        return rows


def load_streamed_vlm(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    home: Home,
    tower_streams: bool,
    run_layers: int | None = None,
) -> StreamedVLM:
    """Open `vlm.model.*` of a checkpoint with the text layers' weights in RAM or in the files.

    `run_layers`: how many of the text layers, from the first, are run through and have to come; None: all.

    Raises `CheckpointError` listing every missing, unexpected or misshapen tensor.
    """
    config = vlm_config(checkpoint)
    config._attn_implementation = "sdpa"
    where, prefix = checkpoint.vlm_home
    begin, layers = f"{prefix}model.", run_layers or config.text_config.num_hidden_layers
    described = described_by(checkpoint)
    where.check_shapes(
        module_shapes(lambda: Qwen3VLModel(config), described_by=described, dtype=dtype), begin, described_by=described
    )
    small = copy.deepcopy(config)
    small.text_config.num_hidden_layers = 1
    small.text_config.vocab_size, small.text_config.pad_token_id = 1, None  # embeddings stay in the file
    with empty_weights(dtype, device):
        model = Qwen3VLModel(small)
    slots = model.language_model.layers
    slots.extend(copy.deepcopy(slots[0]) for _ in range(SLOTS - 1))
    stays = ["language_model.norm."] if tower_streams else ["language_model.norm.", "visual."]
    state, finite = model.state_dict(), {}
    for name, tensor in where.read(where.with_prefix(*(begin + part for part in stays))):
        finite[name] = is_finite(state[name.removeprefix(begin)].copy_(tensor))
    check_finite(where, finite)
    units = ["visual."] if tower_streams else []
    units += [f"language_model.layers.{number}." for number in range(layers)]
    files, cuda = unit_files(where, begin, units), device.type == "cuda"
    source: WeightHome
    if home == "ram":
        source = RamHome(files, dtype=dtype, cuda=cuda, share=this_process().local_world_size > 1)
    else:
        source = FilesHome(files, cuda=cuda)
    return StreamedVLM(
        model,
        future_start_id=checkpoint.config.traj_token_ids["future_start"],
        layers=layers,
        embeddings=EmbeddingRows(where, f"{begin}language_model.embed_tokens.weight", dtype=dtype),
        stream=WeightStream(source, device, names=[begin + unit for unit in units]),
        tower_streams=tower_streams,
    )

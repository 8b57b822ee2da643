"""The codec `transform` in torch: on a CPU the numpy reference itself, on a GPU kernels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpacache.errors import UsageError
from alpacache.gpu.device import has_kernels
from alpacache.prefix.tensor_codec import TensorCodec
from cache_store.kv.layered import MAX_VALUE, NOT_FINITE
from cache_store.kv.transform import TransformCodec

if TYPE_CHECKING:
    from alpacache.prefix.packed import PackedPrefixes


class TransformTensorCodec(TensorCodec[TransformCodec]):
    """Groups of layers in a learnt basis.

    What a GPU encodes may differ in codes of components halfway between two, as it adds in another order; what it
    decodes differs from the reference by at most a bfloat16 step of the largest key or value of the token and layer.
    """

    def __init__(self, codec: TransformCodec) -> None:
        super().__init__(codec)
        self.layers_together = 1 if codec.tables is None else codec.tables.together

    def encode(self, kv: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encoded bytes; `positions` `[3, token]`, by default 0, 1, 2 ... on each axis."""
        data, size = self.encode_at(kv, positions)
        if not (used := int(size)):
            raise ValueError(NOT_FINITE)
        return data[:used]

    def encode_async(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_at(kv, None)

    def encode_at(self, kv: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        kv = kv.to(torch.bfloat16).contiguous()
        if has_kernels(kv.device):
            from alpacache.prefix import transform_kernels

            return transform_kernels.encode(self._codec, kv, positions)
        bits = kv.cpu()
        if not bool(torch.stack(torch.aminmax(bits)).abs().lt(MAX_VALUE).all()):
            return torch.empty(0, dtype=torch.uint8, device=kv.device), torch.zeros((), dtype=torch.int64)
        places = None if positions is None else positions.cpu().numpy()
        data = torch.from_numpy(self._codec.encode(bits.view(torch.uint16).numpy(), places))
        return data.to(kv.device), torch.tensor(len(data))

    def encode_layer(self, kv: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        raise UsageError(
            "the codec transform encodes whole samples, but a VLM that the GPU does not hold gives one layer at a "
            "time; take --codec bf16 or int8, or a GPU that holds the VLM."
        )

    def decode(self, data: Tensor, shape: tuple[int, ...]) -> Tensor:
        self._codec.check_size(tuple(data.shape), shape)
        bits = torch.from_numpy(self._codec.decode(data.cpu().numpy(), shape))
        return bits.view(torch.bfloat16).to(data.device)

    def decode_layer(self, data: Tensor, layer: int, shape: tuple[int, ...]) -> Tensor:
        group, within = divmod(layer, self.layers_together)
        bits = torch.from_numpy(self._codec.decode_group(data.cpu().numpy(), group, shape)[within])
        return bits.view(torch.bfloat16).to(data.device)

    def decode_batch(self, prefixes: "PackedPrefixes", layer: int, scratch: Tensor) -> None:
        self.decode_batches(prefixes, layer, [scratch])

    def decode_batches(self, prefixes: "PackedPrefixes", layer: int, scratch: Sequence[Tensor]) -> None:
        from alpacache.prefix import transform_kernels  # needs Triton

        transform_kernels.decode(self._codec, prefixes, layer // self.layers_together, scratch)

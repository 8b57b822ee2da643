"""The interface of a codec in torch: what a `KVCodec` does, on the device that has the keys and values."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from alpacache.errors import UsageError
from cache_store import KVCodec
from cache_store.kv.layered import NOT_FINITE

if TYPE_CHECKING:
    from alpacache.prefix.packed import PackedPrefixes

Definition = TypeVar("Definition", bound=KVCodec)


class TensorCodec(ABC, Generic[Definition]):
    """A codec of keys and values, bit-equal to its numpy reference.

    `shape` is always that of the whole sample, `[layer, 2, head, token, channel]`, and `data` the sample's encoded
    bytes, uint8 and flat.
    """

    layers_together: int = 1
    """Layers that `decode_batch` decodes at a time, because they are encoded together."""

    def __init__(self, codec: Definition) -> None:
        self._codec = codec

    def encode(self, kv: Tensor) -> Tensor:
        """Encoded bytes of keys and values as bfloat16, on the same device; `ValueError` unless all are finite."""
        data, encodable = self.encode_async(kv)
        if not bool(encodable):
            raise ValueError(NOT_FINITE)
        return data

    @abstractmethod
    def encode_async(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded bytes, and whether they are good as a boolean on the same device; the host waits for neither.

        If it waited, the GPU would have finished the VLM by then and idle before every launch.
        """

    def encode_at(self, kv: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """`encode_async` of keys that the rotary embedding has turned at these positions, `[3, token]`.

        A codec whose samples vary in size returns as many bytes as there may be, and instead of whether they are good
        how many of them are the sample's: int64, 0 where it could not be encoded.
        """
        return self.encode_async(kv)

    def encode_layer(self, kv: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Encode one layer of several samples of one length: the bytes that it has within the whole samples'.

        Args:
            kv: `[samples, 2, head, token, channel]`.

        Returns the bytes `[samples, size]` and whether each sample's are good, `[samples]`; the host waits for neither.
        Raises `UsageError` where the codec encodes whole samples only.
        """
        raise UsageError(
            f"a codec of kind {self._codec.kind} encodes whole samples, but a VLM that the GPU does not hold gives one "
            "layer at a time; take --codec bf16 or int8, or a GPU that holds the VLM."
        )

    def decode(self, data: Tensor, shape: tuple[int, ...]) -> Tensor:
        """All keys and values in bfloat16, on the device of the bytes."""
        self._codec.check_size(tuple(data.shape), shape)
        kv = torch.empty(shape, dtype=torch.bfloat16, device=data.device)
        for layer in range(shape[0]):
            kv[layer] = self.decode_layer(data, layer, shape)
        return kv

    @abstractmethod
    def decode_layer(self, data: Tensor, layer: int, shape: tuple[int, ...]) -> Tensor:
        """bfloat16 `[2, head, token, channel]` of one layer, so that a prefix need never exist decoded as a whole.

        Anything may follow the sample's bytes in `data`. May wait for the device.
        """

    @abstractmethod
    def decode_batch(self, prefixes: "PackedPrefixes", layer: int, scratch: Tensor) -> None:
        """Enqueue the decoding of one layer of every sample with GPU kernels, as `decode_layer` would, bit for bit.

        `scratch`: uint8 of `PrefixLayout.scratch_shape`, for all of the `layers_together` layers that `layer` is among.
        A sample's row gets, for each of these layers, `[2, kv_head, longest, channel]` bfloat16, of which the tokens
        beyond the sample's own may be left as they are; and where `is_ordered`, from `PrefixLayout.order_at` on, the
        channel at each place of a key, `[kv_head, channel]` uint8.
        """

    def decode_batches(self, prefixes: "PackedPrefixes", layer: int, scratch: Sequence[Tensor]) -> None:
        """`decode_batch` of `layer` and those encoded with it, and of as many groups behind them as there is scratch
        for."""
        for place, one in enumerate(scratch):
            self.decode_batch(prefixes, layer + place * self.layers_together, one)

    def is_ordered(self, channels: int) -> bool:
        """True if `decode_batch` leaves key channels in an order of each head's own, which queries then follow."""
        return False

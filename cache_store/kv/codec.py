"""The interface of a codec for keys and values, apart from any framework: its identity, its sizes, its bytes.

Each kind of codec is one class here, whose numpy code is the definition of the format, and one class in torch that
gives the same bytes faster (`alpacache.prefix.tensor_codec`). `cache_store.kv.registry` lists the kinds.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray


class KVCodec(ABC):
    """Turns the keys and values of a sample, `[layer, 2, head, token, channel]`, into bytes and back.

    Codecs are immutable and hashable, equal if they read and write the same bytes.
    """

    kind: ClassVar[str]
    """Value of `kind` in the codec's document."""
    fixed_size: ClassVar[bool] = True
    """True if the shape alone gives the size of an encoded sample; if not, `encoded_bytes` is an upper bound."""
    heavy: ClassVar[bool] = False
    """True if decoding is many times the work of reading, so that memory for doing it once a step is well spent."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The document that defines the codec in a store's identity; `kind` is one of its keys."""

    @classmethod
    @abstractmethod
    def from_json(cls, document: dict[str, Any], where: str) -> Self:
        """The codec of an untrusted document of this kind; `FormatError` names `where` it stands."""

    @property
    def tables_bytes(self) -> bytes | None:
        """Learnt tables, as a store keeps them; None for a codec that has none, or none yet."""
        return None

    @abstractmethod
    def encoded_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of an encoded sample; `ValueError` for a shape that this codec does not take."""

    def least_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a sample has at least; of codecs of fixed size what it takes."""
        return self.encoded_bytes(shape) if self.fixed_size else 0

    def expected_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a sample takes as a rule, for plans; of codecs of fixed size what it takes."""
        return self.encoded_bytes(shape)

    def decoding_bytes(self, shape: tuple[int, ...], *, all_layers: bool = False) -> int:
        """Bytes of a device that decoding takes for so many tokens at once, beside what goes in and what comes out.

        `all_layers`: of all layers in one go, in place of those that are encoded together.
        """
        return 0

    @abstractmethod
    def encode(self, bits: NDArray[np.uint16]) -> NDArray[np.uint8]:
        """Encoded bytes of bfloat16 bits; `ValueError` for values that cannot be encoded."""

    @abstractmethod
    def decode(self, data: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint16]:
        """bfloat16 bits of a whole encoded sample."""

    def check_size(self, size: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """`ValueError` unless an array of this size can be the encoded bytes of a sample of this shape."""
        most = self.encoded_bytes(shape)
        least = self.least_bytes(shape)
        if len(size) != 1 or not least <= size[0] <= most:
            takes = f"{most}" if least == most else f"from {least} to {most}"
            raise ValueError(f"{list(shape)} takes {takes} bytes in this codec, got {list(size)}.")

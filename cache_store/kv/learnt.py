"""The interface of a codec whose tables are learnt from samples, once for a store, and kept beside its samples."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

from cache_store.kv.codec import KVCodec


class LearntCodec(KVCodec):
    """A codec with learnt tables, which encodes whole samples in as many bytes as their content takes.

    Without tables, as it is named before anything is learnt, it only estimates sizes.
    """

    fixed_size: ClassVar[bool] = False

    rate: float
    """Bits a value that it is learnt for."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the vectors that a basis is learnt for. Raises `ValueError` without tables."""

    @abstractmethod
    def with_tables(self, read: Callable[[str], bytes], where: str) -> Self:
        """This codec with its tables, read by their hash; `FormatError` where they are not those it was made with."""

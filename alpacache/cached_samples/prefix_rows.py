"""Device memory for the prefixes of a ring's batches, at addresses that stay when the ring is replaced by another."""

import torch

from alpacache.gpu.device import has_kernels
from alpacache.prefix.layout import PrefixLayout


class PrefixRows:
    """One row of bytes a sample, for two batches by default: one is filled while the other is computed on."""

    def __init__(
        self,
        layout: PrefixLayout,
        longest: int,
        *,
        batch_size: int,
        device: torch.device,
        batches: int = 2,
        check_on_device: bool = False,
    ) -> None:
        """Make room for `batches` of up to `batch_size` samples of up to `longest` tokens.

        `check_on_device`: where there is a GPU with Triton, stored bytes are checked in the rows, and damage is told by
        `damage` instead of an error of the threads that read.
        """
        self.layout, self.longest, self.batch_size, self.batches = layout, longest, batch_size, batches
        rows = batches * batch_size
        self.data = torch.empty(rows, layout.row_bytes(longest), dtype=torch.uint8, device=device)
        """`[batches * batch_size, row_bytes]`: batch s takes the s-th of `batches` parts, counted in a circle."""
        self.checked = check_on_device and has_kernels(device)
        self.damage = torch.zeros(rows, dtype=torch.int32, device=device)
        """`[rows]`: not zero from when damaged bytes have come into a row; stays zero unless rows are `checked`."""

    @property
    def device(self) -> torch.device:
        return self.data.device

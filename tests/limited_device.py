"""A device with little memory: it counts what is held and refuses what does not fit.

Knows the device protocol only.
"""

from __future__ import annotations

import weakref

import torch

from moe_runtime.device import CpuDevice


class _Region(bytearray):
    """Memory that tells when it is freed."""


class LimitedDevice(CpuDevice):
    """CPU memory up to `limit` bytes, on the device and pinned alike.

    Attributes:
        held: bytes that tensors hold now; `most`: held at once so far.
        refused: allocations that were refused.
    """

    def __init__(self, limit: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.limit = limit
        self.held = self.most = self.refused = 0
        self._error = error

    def allocate(self, nbytes: int) -> torch.Tensor:
        nbytes = max(nbytes, 1)
        if self.held + nbytes > self.limit:
            self.refused += 1
            raise self._error(f"CUDA out of memory. Tried to allocate {nbytes} bytes.")
        region = _Region(nbytes)
        self.held += nbytes
        self.most = max(self.most, self.held)
        weakref.finalize(region, self._free, nbytes)
        return torch.frombuffer(region, dtype=torch.uint8)

    allocate_host = allocate

    def _free(self, nbytes: int) -> None:
        self.held -= nbytes

"""`SlotPool`: the fast tier's memory, cut into equal slots for experts of one shape.

Knows shapes and alignment only; which expert lies where is `cache`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moe_runtime.model_spec import ExpertParam

__all__ = ["SlotPool", "slot_bytes"]

# Every slot starts alike, so that kernels that look at alignment take the same path in each: an
# expert's result must not depend on the slot that it lies in.
_ALIGNMENT = 64


def _stride(param: ExpertParam) -> int:
    """Bytes from one slot's tensor to the next slot's."""
    return -(-param.nbytes // _ALIGNMENT) * _ALIGNMENT


def slot_bytes(params: Sequence[ExpertParam]) -> int:
    """Bytes that one slot takes, alignment included."""
    return sum(_stride(param) for param in params)


class SlotPool:
    """`count` slots; each holds one expert's tensors.

    Attributes:
        stacked: for each tensor of an expert, all slots as one `[count, *shape]` view.
    """

    def __init__(
        self,
        params: Sequence[ExpertParam],
        count: int,
        allocate: Callable[[int], torch.Tensor],
    ) -> None:
        self.params = tuple(params)
        self.count = count
        self.stacked = tuple(self._stack(param, allocate) for param in params)
        self._slots = tuple(
            tuple(stacked[slot] for stacked in self.stacked) for slot in range(count)
        )

    def _stack(self, param: ExpertParam, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor:
        stride = _stride(param)
        flat = allocate(stride * self.count)[: stride * self.count].view(param.dtype)
        inner: list[int] = []
        step = 1
        for size in reversed(param.shape):
            inner.insert(0, step)
            step *= size
        return flat.as_strided((self.count, *param.shape), (stride // param.dtype.itemsize, *inner))

    @classmethod
    def over(cls, params: Sequence[ExpertParam], stacked: Sequence[torch.Tensor]) -> SlotPool:
        """Slots that are the slices of tensors already in memory; nothing is allocated."""
        pool = cls.__new__(cls)
        pool.params = tuple(params)
        pool.count = int(stacked[0].shape[0])
        pool.stacked = tuple(stacked)
        pool._slots = tuple(tuple(t[slot] for t in stacked) for slot in range(pool.count))
        return pool

    def tensors(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The tensors of one slot, in the order of the layer's params."""
        return self._slots[slot]

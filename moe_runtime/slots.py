"""`SlotPool`: the fast tier's memory, cut into equal slots for experts of one shape.

Knows shapes, layout and alignment only; which expert lies where is `cache`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from moe_runtime.model_spec import ExpertParam

__all__ = ["ALIGNMENT", "SlotPool", "slot_bytes"]

# Every slot starts alike, so that kernels that look at alignment take the same path in each: an
# expert's result must not depend on the slot that it lies in.
ALIGNMENT = 64


def _stored_shape(param: ExpertParam, flipped: bool) -> tuple[int, ...]:
    return param.shape[::-1] if flipped else param.shape


def _stride(param: ExpertParam, flipped: bool) -> int:
    """Bytes from one slot's tensor to the next slot's: aligned, and a whole number of rows."""
    row = _stored_shape(param, flipped)[-1] * param.dtype.itemsize
    unit = math.lcm(ALIGNMENT, row) if len(param.shape) > 1 else ALIGNMENT
    return -(-param.nbytes // unit) * unit


def slot_bytes(params: Sequence[ExpertParam], *, flipped: bool = False) -> int:
    """Bytes that one slot takes, alignment included."""
    return sum(_stride(param, flipped) for param in params)


class SlotPool:
    """`count` slots; each holds one expert's tensors.

    Args:
        flipped: weights lie transposed in the slots: `[in, out]` where the model has `[out, in]`,
            and the other way round.

    Attributes:
        stacked: for each tensor of an expert, all slots as one `[count, *shape as stored]` view.
    """

    def __init__(
        self,
        params: Sequence[ExpertParam],
        count: int,
        allocate: Callable[[int], torch.Tensor],
        *,
        flipped: bool = False,
    ) -> None:
        self.params = tuple(params)
        self.count = count
        self.flipped = flipped
        self.stacked = tuple(self._stack(param, allocate) for param in params)
        self._slots = self._views()

    def _stack(self, param: ExpertParam, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor:
        stride = _stride(param, self.flipped)
        flat = allocate(stride * self.count)[: stride * self.count].view(param.dtype)
        shape = _stored_shape(param, self.flipped)
        inner: list[int] = []
        step = 1
        for size in reversed(shape):
            inner.insert(0, step)
            step *= size
        return flat.as_strided((self.count, *shape), (stride // param.dtype.itemsize, *inner))

    def _views(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        return tuple(tuple(stack[slot] for stack in self.stacked) for slot in range(self.count))

    @classmethod
    def over(
        cls,
        params: Sequence[ExpertParam],
        indexed: Sequence[torch.Tensor | tuple[torch.Tensor, ...]],
    ) -> SlotPool:
        """Slots that are tensors already in memory; nothing is allocated.

        Args:
            indexed: for each param `[experts, ...]`, or one tensor for each expert; of the latter
                there is no `stacked` view.
        """
        pool = cls.__new__(cls)
        pool.params = tuple(params)
        pool.count = len(indexed[0])
        pool.flipped = False
        pool.stacked = tuple(one for one in indexed if isinstance(one, torch.Tensor))
        pool._slots = tuple(tuple(one[slot] for one in indexed) for slot in range(pool.count))
        return pool

    def tensors(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The tensors of one slot as they lie, in the order of the layer's params."""
        return self._slots[slot]

    def targets(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The same memory in the model's own shapes, to be filled or copied from."""
        held = self._slots[slot]
        return tuple(t.mT if self.flipped and t.dim() == 2 else t for t in held)

    def tables(self) -> tuple[tuple[torch.Tensor, int], ...]:
        """Each weight of all slots as one table of rows, and the rows from slot to slot."""
        result = []
        for stack in self.stacked:
            width = stack.shape[-1]
            rows = stack.stride(0) // width
            flat = stack.as_strided((rows * self.count, width), (width, 1))
            result.append((flat, rows))
        return tuple(result)

"""`SlotPool`: the fast tier's memory, cut into equal slots for experts of one shape.

Knows shapes, layout and alignment only; which expert lies where is `cache`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_runtime.model_spec import ExpertParam

__all__ = ["ALIGNMENT", "RowBlocks", "SlotPool", "block_width", "slot_bytes"]

# Every slot starts alike, so that kernels that look at alignment take the same path in each: an
# expert's result must not depend on the slot that it lies in.
ALIGNMENT = 64


# A sum of rows keeps its result in registers while a row has no more elements than about this; a
# wider one is passed over several times. Narrower rows only add to the number of sums.
_WIDEST, _BEST, _UNIT = 256, 128, 32


@dataclass(frozen=True, kw_only=True)
class RowBlocks:
    """Weights lie as blocks of rows, `[out / width, in, width]`, to be computed by sums of rows.

    Args:
        transposed: the model has its weights `[in, out]`, not `[out, in]`.
    """

    transposed: bool

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in a slot of a tensor of this shape in the model; vectors stay as they are."""
        if len(shape) != 2:
            return shape
        out, inner = shape[::-1] if self.transposed else shape
        width = block_width(out)
        return (out // width, inner, width)

    def as_model(self, held: torch.Tensor) -> torch.Tensor:
        """The same memory, a model's tensor but for its `out`, which is two dimensions here."""
        if held.dim() != 3:
            return held
        return held.permute(1, 0, 2) if self.transposed else held.permute(0, 2, 1)


def block_width(out: int) -> int:
    """Elements of a row in a block of a weight with so many outputs; all if nothing divides it."""
    fitting = [w for w in range(_UNIT, _WIDEST + 1, _UNIT) if out % w == 0]
    return min(fitting, key=lambda w: (w < _BEST, abs(w - _BEST)), default=out)


def _stored_shape(param: ExpertParam, rows: RowBlocks | None) -> tuple[int, ...]:
    return param.shape if rows is None else rows.stored(param.shape)


def _stride(param: ExpertParam, rows: RowBlocks | None) -> int:
    """Bytes from one slot's tensor to the next slot's: aligned, and a whole number of rows."""
    row = _stored_shape(param, rows)[-1] * param.dtype.itemsize
    unit = math.lcm(ALIGNMENT, row) if len(param.shape) > 1 else ALIGNMENT
    return -(-param.nbytes // unit) * unit


def slot_bytes(params: Sequence[ExpertParam], *, rows: RowBlocks | None = None) -> int:
    """Bytes that one slot takes, alignment included."""
    return sum(_stride(param, rows) for param in params)


class SlotPool:
    """`count` slots; each holds one expert's tensors.

    Args:
        rows: weights lie as blocks of rows; None if they lie as the model has them.

    Attributes:
        stacked: for each tensor of an expert, all slots as one `[count, *shape as stored]` view.
    """

    def __init__(
        self,
        params: Sequence[ExpertParam],
        count: int,
        allocate: Callable[[int], torch.Tensor],
        *,
        rows: RowBlocks | None = None,
    ) -> None:
        self.params = tuple(params)
        self.count = count
        self.rows = rows
        self.stacked = tuple(self._stack(param, allocate) for param in params)
        self._slots = self._views()

    def _stack(self, param: ExpertParam, allocate: Callable[[int], torch.Tensor]) -> torch.Tensor:
        stride = _stride(param, self.rows)
        flat = allocate(stride * self.count)[: stride * self.count].view(param.dtype)
        shape = _stored_shape(param, self.rows)
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
        pool.rows = None
        pool.stacked = tuple(one for one in indexed if isinstance(one, torch.Tensor))
        pool._slots = tuple(tuple(one[slot] for one in indexed) for slot in range(pool.count))
        return pool

    def tensors(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The tensors of one slot as they lie, in the order of the layer's params."""
        return self._slots[slot]

    def targets(self, slot: int) -> tuple[torch.Tensor, ...]:
        """The same memory to be filled, in the model's own shapes.

        Of weights in blocks the dimension of outputs is two, `[blocks, width]`.
        """
        held = self._slots[slot]
        return held if self.rows is None else tuple(self.rows.as_model(one) for one in held)

    def copies(self, slot: int) -> tuple[torch.Tensor, ...]:
        """What is in a slot, in host memory of its own and in the model's own shapes."""
        pairs = zip(self.targets(slot), self.params, strict=True)
        copied = [held.to("cpu", copy=True).reshape(param.shape) for held, param in pairs]
        return tuple(tensor.contiguous() for tensor in copied)

    def tables(self) -> tuple[tuple[torch.Tensor, int], ...]:
        """Each tensor of all slots as one table of rows, and the rows from slot to slot."""
        result = []
        for stack in self.stacked:
            width = stack.shape[-1]
            rows = stack.stride(0) // width
            flat = stack.as_strided((rows * self.count, width), (width, 1))
            result.append((flat, rows))
        return tuple(result)

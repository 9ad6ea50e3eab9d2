"""`MessageSizes`: bytes of each kind of message that an expert-parallel decode step sends.

Knows widths of a model; neither placements, nor routing, nor links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_runtime.errors import PlanError

__all__ = ["COHERENT", "MODES", "VANILLA", "MessageSizes", "number_bytes"]

VANILLA, COHERENT = "vanilla", "coherent"
MODES = (VANILLA, COHERENT)
_NUMBERS = ((1, 1 << 8), (2, 1 << 15), (4, 1 << 31))  # bytes, numbers that they hold


def number_bytes(count: int) -> int:
    """Bytes of a number below `count`, as the engine packs it."""
    return next(width for width, most in _NUMBERS if count <= most)


@dataclass(frozen=True, kw_only=True)
class MessageSizes:
    """Bytes of the messages of one model.

    Args:
        dispatch: of one row to one device that has experts of it (vanilla).
        combine: of one row's sum over a device's experts, on its way back (vanilla).
        move: of one row to its new device, and to each other that has experts of it (coherent).
        partial_sums: of one row's sum over another device's experts (coherent, top-k above 1).
        keys_values: of one row's new key and value in one layer, with the numbers of both.
        kept: of one token's key and value in one layer alone, as prefill hands them round.
        token: of one row's new token at a step's end.
        row: of a row's number, which goes with its token in coherent mode.
        frame: to each other device in each collective, beside its rows.
        group: further at a coherent step's end: how many rows, and how many keys and values.
        layers: decoder layers of the model, those without experts too.
        top_k: most experts a token; 1 needs no partial sums.
    """

    dispatch: int
    combine: int
    move: int
    partial_sums: int
    keys_values: int
    layers: int
    top_k: int
    kept: int = 0
    token: int = 4
    row: int = 1
    frame: int = 8
    group: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise PlanError(f"message sizes: {name} must be 0 or more bytes, found {value}")
        if not self.layers or not self.top_k:
            raise PlanError("message sizes: a model has one layer and one expert a token at least")

    @classmethod
    def of(
        cls,
        *,
        hidden: int,
        keys_values: int,
        layers: int,
        top_k: int,
        itemsize: int = 2,
        weight: int | None = None,
        experts: int = 256,
        rows: int = 256,
        residual: bool = True,
    ) -> MessageSizes:
        """Of a model's widths, as the engine of `moe_runtime.parallel` packs them.

        A dispatched row is its experts' input with its choices and their weights. A moving one is
        the residual stream with its number, choices and weights: where it arrives, the norm before
        the experts is computed once more.

        Args:
            hidden: numbers of a hidden state.
            keys_values: numbers of one token's key and value in one layer.
            layers: decoder layers.
            itemsize: bytes of a number.
            weight: bytes of a router's weight; `itemsize` if not given.
            experts, rows: of a layer, and of a step, for the width of their numbers.
            residual: whether that norm is found in the model; else the experts' input moves too.
        """
        state = hidden * itemsize
        number, row, layer = map(number_bytes, (experts, rows, layers))
        dispatch = state + top_k * (number + (itemsize if weight is None else weight))
        return cls(
            dispatch=dispatch,
            combine=state,
            move=dispatch + row + (0 if residual else state),
            partial_sums=state + row,
            keys_values=keys_values * itemsize + layer + row,
            kept=keys_values * itemsize,
            row=row,
            layers=layers,
            top_k=top_k,
        )

    def attended_at(self, layer_ids: Sequence[int], position: int) -> int:
        """Decoder layers that a row runs where it is after the MoE layer at `position` and before
        it moves again: up to the next MoE layer itself, or to the model's end. -1: the start.
        """
        first = layer_ids[position] + 1 if position >= 0 else 0
        last = layer_ids[position + 1] if position + 1 < len(layer_ids) else self.layers - 1
        return last - first + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

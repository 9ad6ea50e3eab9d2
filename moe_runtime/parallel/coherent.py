"""Context-coherent decode steps: rows move to the rank of their heaviest expert and stay there.

Every rank has the keys and values of all sequences, so a row's attention can run anywhere, and a
layer needs one all-to-all instead of two (ExFlow, 2401.08383, section IV, for one expert a token).
With more experts a token, those elsewhere send their part of the sum to the row's new home: a
second all-to-all, left out in layers where no row needs it. That part is ours, not the paper's.

Knows decoder layers and their hooks; no tokens, no loop. What is sent is `moving`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_runtime.parallel.held import HeldExperts
from moe_runtime.parallel.link import Link
from moe_runtime.parallel.moving import LayerRows, Mover, Stays
from moe_runtime.parallel.sequence_cache import SequenceCache
from moe_runtime.parallel.shares import LayerShare
from moe_runtime.parallel.structure import DecoderLayer, first_tensor
from moe_runtime.parallel.vanilla import Heard, VanillaLayer

__all__ = ["CoherentDecoder", "Step"]


@dataclass(eq=False, kw_only=True)
class Step:
    """One decode step on one rank.

    Attributes:
        batch: sequences of the step, on all ranks together.
        rows: int64 `[n]`, the sequences whose rows are here now, ascending; changes layer by layer.
        cache: of all sequences.
    """

    batch: int
    rows: torch.Tensor
    cache: SequenceCache

    @property
    def seated(self) -> torch.Tensor:
        """The rows that layers compute: a rank without any computes the first sequence's in vain,
        as layers want one row at least.
        """
        return self.rows if len(self.rows) else self.rows.new_zeros(1)


class CoherentDecoder:
    """The hooks on a decoder's layers; does nothing outside a step.

    Args:
        layers: of the decoder, in order.
        vanilla: the experts' handlers outside of steps, by position.
        heard: told of each MoE layer's rows: position, sequences, ids, weights.
    """

    def __init__(
        self,
        link: Link,
        layers: Sequence[DecoderLayer],
        vanilla: Sequence[VanillaLayer],
        shares: Sequence[LayerShare],
        held: Sequence[HeldExperts],
        heard: Heard | None = None,
    ) -> None:
        self.step: Step | None = None
        self.heard = heard
        self._layers = [
            _DenseLayer(self, number, one)
            if one.position is None
            else _MovingLayer(
                self,
                number,
                one,
                link,
                vanilla[one.position],
                shares[one.position],
                held[one.position],
            )
            for number, one in enumerate(layers)
        ]

    @property
    def handlers(self) -> list[_MovingLayer]:
        """The experts' handlers, by position of the MoE layer."""
        return [layer for layer in self._layers if isinstance(layer, _MovingLayer)]

    @property
    def lean(self) -> tuple[int, ...]:
        """Decoder layers whose rows move with nothing but their residual stream."""
        return tuple(layer.number for layer in self.handlers if layer.lean)

    def hooked(self) -> ExitStack:
        """Hooks in place until the stack is closed."""
        stack = ExitStack()
        for layer in self._layers:
            layer.install(stack)
        return stack


class _DenseLayer:
    """A layer's pre-hook: the rows that are here, in the place of the whole batch."""

    def __init__(self, owner: CoherentDecoder, number: int, layer: DecoderLayer) -> None:
        self._owner, self._number, self._layer = owner, number, layer

    def install(self, stack: ExitStack) -> None:
        """Hook in, until the stack is closed."""
        handle = self._layer.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        stack.callback(handle.remove)

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        step = self._owner.step
        if step is None:
            return None
        rows = step.seated
        step.cache.rows, step.cache.count = rows, len(step.rows)
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self._number == 0:
            hidden = hidden[rows]
        rest = [_of_rows(one, rows, step.batch) for one in args[1:]]
        others = {name: _of_rows(one, rows, step.batch) for name, one in kwargs.items()}
        return (hidden, *rest), others


def _of_rows(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """These rows of every tensor of the whole batch; what has no batch is for all rows."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.dim() and value.shape[0] == batch else value
    if type(value) in (tuple, list):
        return type(value)(_of_rows(one, rows, batch) for one in value)
    if type(value) is dict:
        return {name: _of_rows(one, rows, batch) for name, one in value.items()}
    return value


class _MovingLayer(_DenseLayer):
    """A MoE layer: answers its experts' calls, and moves rows when it has ended."""

    def __init__(
        self,
        owner: CoherentDecoder,
        number: int,
        layer: DecoderLayer,
        link: Link,
        vanilla: VanillaLayer,
        share: LayerShare,
        held: HeldExperts,
    ) -> None:
        super().__init__(owner, number, layer)
        self._vanilla = vanilla
        self._mover = Mover(
            link, share, held, normed=self._normed, shared=self._shared if layer.shared else None
        )
        self._residual: torch.Tensor | None = None
        self._call: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._silent = False
        self.number, self.lean = number, layer.lean

    @property
    def stays(self) -> Stays:
        """Rows that came through since counting began, and those that stayed."""
        return self._mover.stays

    def forget_counts(self) -> None:
        """Begin counting anew."""
        self._mover.stays = Stays()

    def install(self, stack: ExitStack) -> None:
        """Hook in, until the stack is closed."""
        super().install(stack)
        stack.callback(self._layer.module.register_forward_hook(self._leave).remove)
        if self._layer.norm is not None:
            handle = self._layer.norm.register_forward_pre_hook(self._see_residual)
            stack.callback(handle.remove)

    def experts(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Zeros within a step, as the sum comes after the layer; else vanilla's answer."""
        if self._silent:
            return torch.zeros_like(hidden)
        if self._owner.step is None:
            return self._vanilla.experts(hidden, ids, weights)
        self._call = (hidden, ids, weights)
        return torch.zeros_like(hidden)

    def _see_residual(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._owner.step is not None and not self._silent:
            self._residual = args[0]

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        step = self._owner.step
        if step is None:
            return None
        out = first_tensor(output)
        assert self._call is not None, "a MoE layer has called its experts"
        seated, count = len(step.seated), len(step.rows)  # 0 where the row was computed in vain
        hidden, ids, weights = (one[:count] for one in self._call)
        residual = self._residual
        self._tell(step.rows, ids, weights)
        step.rows, moved = self._mover.move(
            LayerRows(
                batch=step.batch,
                whose=step.rows,
                out=out.reshape(seated, -1)[:count],
                residual=None if residual is None else residual.reshape(seated, -1)[:count],
                hidden=hidden,
                ids=ids,
                weights=weights,
            )
        )
        self._call = self._residual = None
        moved = moved[:, None] if len(moved) else out.new_zeros(1, *out.shape[1:])
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def _normed(self, residual: torch.Tensor) -> torch.Tensor:
        assert self._layer.norm is not None
        self._silent = True
        try:
            return first_tensor(self._layer.norm(residual[:, None]))[:, 0]
        finally:
            self._silent = False

    def _shared(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the block adds beside the routed experts."""
        assert self._layer.block is not None
        self._silent = True
        try:
            return first_tensor(self._layer.block(hidden[:, None])).reshape(hidden.shape)
        finally:
            self._silent = False

    def _tell(self, whose: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if self._owner.heard is not None:
            assert self._layer.position is not None
            self._owner.heard(self._layer.position, whose, ids, weights)

"""Context-coherent decode steps: rows move to the rank of their heaviest expert and stay there.

Every rank has the keys and values of all sequences, so a row's attention can run anywhere, and a
layer needs one all-to-all instead of two (ExFlow, 2401.08383, section IV, for one expert a token).
With more experts a token, those elsewhere send their part of the sum to the row's new home: a
second all-to-all, left out in layers where no row needs it. That part is ours, not the paper's.

Knows decoder layers and links; no tokens, no loop.
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
from moe_runtime.parallel.sequence_cache import SequenceCache
from moe_runtime.parallel.shares import LayerShare
from moe_runtime.parallel.structure import DecoderLayer, first_tensor
from moe_runtime.parallel.vanilla import Heard, VanillaLayer, id_dtype

__all__ = ["MOVE", "PARTIAL", "CoherentDecoder", "Stays", "Step"]

MOVE, PARTIAL = "move", "partial_sums"


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


@dataclass(eq=False)
class Stays:
    """Of one layer, on one rank: rows that came through, and those that stayed where they were.

    `split` are rows whose experts are on several ranks, `pieces` the partial sums sent for them.
    """

    rows: int = 0
    stayed: int = 0
    split: int = 0
    pieces: int = 0


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
        self._link, self._vanilla, self._share, self._held = link, vanilla, share, held
        self._residual: torch.Tensor | None = None
        self._call: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._silent = False
        self.stays = Stays()
        self.number, self.lean = number, layer.lean

    def forget_counts(self) -> None:
        """Begin counting anew."""
        self.stays = Stays()

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
        seated = len(step.seated)
        residual = None if self._residual is None else self._residual.reshape(seated, -1)
        moved = self._moved(step, out.reshape(seated, -1), residual, *self._call)
        self._call = self._residual = None
        moved = moved[:, None] if len(moved) else out.new_zeros(1, *out.shape[1:])
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    # -- moving ----------------------------------------------------------------------------------

    def _moved(
        self,
        step: Step,
        out: torch.Tensor,
        residual: torch.Tensor | None,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The rows that live here from now on, `[n, D]`; `step.rows` says whose they are.

        Args:
            out: the layer's output without its routed experts.
            residual: what went into the norm before the experts; None where it is unknown.
            hidden, ids, weights: the experts' call.
        """
        share, here = self._share, self._link.rank
        count = len(step.rows)  # 0 where the only row was computed in vain
        out, hidden, ids, weights = (one[:count] for one in (out, hidden, ids, weights))
        whose = step.rows
        self._tell(whose, ids, weights)
        source = torch.full_like(whose, here)
        home = share.homes(source, ids, weights)
        computing = share.computing(source, ids, home)
        carried = [out, hidden] if residual is None else [residual[:count]]
        arrived, from_ = self._send(step, carried, home, computing, ids, weights)
        *vectors, narrow_whose, narrow_ids, their_weights = arrived.rows
        their_ids, theirs = narrow_ids.long(), narrow_whose.long()
        their_home = share.homes(from_, their_ids, their_weights)
        their_computing = share.computing(from_, their_ids, their_home)
        their_hidden = vectors[1] if residual is None else self._normed(vectors[0])
        sums = self._held.partial_sums(
            torch.cat([hidden, their_hidden]),
            torch.cat([ids, their_ids]),
            torch.cat([weights, their_weights]),
            torch.cat([computing, their_computing]) == here,
        )
        own, others = sums[:count], sums[count:]
        stay, come = home == here, their_home == here
        base = vectors[0][come]
        if residual is not None and self._layer.shared and len(base):
            base = base + self._shared(their_hidden[come])
        result = torch.cat([out[stay] + own[stay], base + others[come]])
        now = torch.cat([whose[stay], theirs[come]])
        if any(arrived.notes):
            part = ((computing == here).any(1)) & ~stay
            pieces = torch.cat([own[part], others[~come]])
            self._add_pieces(
                step,
                result,
                now,
                pieces,
                torch.cat([whose[part], theirs[~come]]),
                torch.cat([home[part], their_home[~come]]),
            )
        self._count(whose, home, computing)
        order = now.argsort()
        step.rows = now[order]
        return result[order]

    def _send(
        self,
        step: Step,
        carried: list[torch.Tensor],
        home: torch.Tensor,
        computing: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[Any, torch.Tensor]:
        """Rows to their new homes and to the ranks that compute for them."""
        link = self._link
        needed = torch.zeros(len(home), link.size, dtype=torch.bool, device=home.device)
        needed.scatter_(1, torch.cat([computing, home[:, None]], 1), value=True)
        needed[:, link.rank] = False
        to, rows = torch.nonzero(needed.T, as_tuple=True)
        whose = step.rows.to(id_dtype(step.batch))
        narrow = ids.to(id_dtype(self._share.held.shape[0]))
        arrived = link.exchange_noted(
            MOVE,
            self._share.layer,
            [one[rows] for one in (*carried, whose, narrow, weights)],
            to,
            note=int(bool((computing != home[:, None]).any())),
        )
        return arrived, arrived.source

    def _add_pieces(
        self,
        step: Step,
        result: torch.Tensor,
        now: torch.Tensor,
        pieces: torch.Tensor,
        whose: torch.Tensor,
        to: torch.Tensor,
    ) -> None:
        """Parts of sums to the homes of their rows; those that come are added to `result`."""
        narrow = whose.to(id_dtype(step.batch))
        self.stays.pieces += len(pieces)
        (parts, of), _ = self._link.exchange(PARTIAL, self._share.layer, [pieces, narrow], to)
        place = torch.full((step.batch,), -1, dtype=torch.long, device=now.device)
        place[now] = torch.arange(len(now), device=now.device)
        result.index_add_(0, place[of.long()], parts)

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

    def _count(self, whose: torch.Tensor, home: torch.Tensor, computing: torch.Tensor) -> None:
        self.stays.rows += len(whose)
        self.stays.stayed += int((home == self._link.rank).sum())
        self.stays.split += int((computing != home[:, None]).any(1).sum())

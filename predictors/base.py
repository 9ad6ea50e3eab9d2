"""What a routing predictor is: the protocol, the rows of a step, and what is shared by all.

Knows no cache, no executor and no file form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from moe_runtime.core import ExpertGrid, IntArray

__all__ = ["Predictor", "Probabilities", "StepRows", "demand"]

Probabilities: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRows:
    """The tokens of one forward call, padding left out.

    Args:
        token_ids: int64 `[T]`, the token that goes in; -1 if unknown.
        sequence_ids: int64 `[T]`, whose token it is; a sequence keeps its number while it lives.
        positions: int64 `[T]`, place of the token in its sequence, from 0.
        decode: one new token for each sequence, after earlier ones; else a prompt or part of one.
    """

    token_ids: IntArray
    sequence_ids: IntArray
    positions: IntArray
    decode: bool

    def __len__(self) -> int:
        """Number of rows, T."""
        return len(self.token_ids)


class Predictor(Protocol):
    """Forecasts which experts the tokens of a forward call will be routed to.

    One object serves one run. For each forward call: `begin_step`, then for each layer in order of
    execution any number of `predict` for layers that have not run, and `observe` once it has.
    Deterministic: the same calls give the same probabilities. Layers are given by their position
    in `grid.layers`.

    Attributes:
        name: what reports call it.
        needs_token_ids: it is of no use where token ids are unknown.
        needs_hidden: it is of no use where `observe` gets no hidden states.
        grid: the layers and experts that it was made for.
    """

    name: ClassVar[str]
    needs_token_ids: ClassVar[bool]
    needs_hidden: ClassVar[bool]
    grid: ExpertGrid

    def begin_step(self, rows: StepRows) -> None:
        """A forward call begins. Mutates."""
        ...

    def observe(
        self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None = None
    ) -> None:
        """The router of a layer has chosen. Mutates.

        Args:
            position: of the layer in `grid.layers`.
            topk_ids: int64 `[T, K]`, the experts of each row; -1 where there is none.
            hidden: `[T, D]`, the experts' input (the router's too in most models), if at hand.
        """
        ...

    def predict(self, position: int) -> Probabilities:
        """Probability of each expert to be among a row's choices at a layer of this step.

        Calibrated: of the entries near .3 some .3 come true. Never mutates what is observable.

        Args:
            position: a layer of this step that has not been observed yet.

        Returns:
            float32 `[T, experts of the layer]`, 0 to 1; a row sums to about the layer's top-k.
        """
        ...

    def reset(self) -> None:
        """Forget the run (sequences, the step under way); what was fitted stays."""
        ...


def demand(probabilities: Probabilities) -> Probabilities:
    """Probability of each expert to be needed by any row, `[experts]`, rows taken as independent.

    Args:
        probabilities: `[T, experts]`, of each row.
    """
    if len(probabilities) == 1:
        one: Probabilities = probabilities[0]
        return one
    with np.errstate(divide="ignore"):
        none = np.log1p(-np.clip(probabilities, 0.0, 1.0)).sum(axis=0)
    result: Probabilities = (-np.expm1(none)).astype(np.float32)
    return result

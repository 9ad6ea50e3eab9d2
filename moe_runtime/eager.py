"""Exact mode: a class's own eager forward, run over experts that appear as it asks for them.

By construction bit-equal to eager, whatever the class does between the products. Knows no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["EagerExperts"]


class EagerExperts:
    """Stands in for an experts module: its attributes, but expert tensors that are fetched.

    Eager forwards visit experts in ascending order and index each expert tensor with the expert's
    number. The first index of an expert lets the one before it go.

    Args:
        names: names of the expert tensors.
        tensors: an expert's tensors while it is in its slot, in the order of `names`.
        ready: yields every expert in ascending order, each while it is in its slot.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        tensors: Callable[[int], tuple[torch.Tensor, ...]],
        ready: Iterator[int],
    ) -> None:
        self._module = module
        self._tensors = tensors
        self._ready = ready
        self._current = -1
        for place, name in enumerate(names):
            setattr(self, name, _Slices(self, place))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
        """The class's eager forward on these arguments."""
        eager = type(self._module).forward.__wrapped__  # type: ignore[attr-defined]
        return eager(self, *arguments)  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Let the last expert go."""
        for _ in self._ready:
            pass

    def fetch(self, expert: int, place: int) -> torch.Tensor:
        """One tensor of an expert, waiting until it is there."""
        while self._current != expert:
            assert self._current < expert, "eager forwards visit experts in ascending order"
            self._current = next(self._ready)
        return self._tensors(expert)[place]


class _Slices:
    """One `[experts, ...]` tensor that is never whole: only `tensor[expert]` exists."""

    def __init__(self, owner: EagerExperts, place: int) -> None:
        self._owner = owner
        self._place = place

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        return self._owner.fetch(int(expert), self._place)

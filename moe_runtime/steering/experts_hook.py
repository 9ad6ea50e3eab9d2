"""A hook before an experts module that changes the weights (and choices) it is called with.

For experts behind transformers' interface: whichever implementation runs them, an attached
runtime's included, gets the changed arguments. Knows the interface's call; not what is computed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.steering.factors import LayerFactors, UseCounter
from moe_runtime.steering.rows import CallRows

__all__ = ["ExpertsHook"]

# Of the interface's call: hidden states, index, weights; their names differ between classes.
_INDEX, _WEIGHTS, _ARGUMENTS = 1, 2, 3


class ExpertsHook:
    """The forward pre-hook of one layer's experts module.

    Args:
        path: of the module.
        factors: of the layer.
        rows: of the call under way.
        uses: takes the choices.
    """

    def __init__(self, path: str, factors: LayerFactors, rows: CallRows, uses: UseCounter) -> None:
        self._path = path
        self._factors = factors
        self._rows = rows
        self._uses = uses

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the weights."""
        rows = self._rows
        if rows.active is False:
            return None
        if len(args) != _ARGUMENTS or kwargs:
            args = _in_order(module, args, kwargs)
        hidden, index, weights = args
        if index.shape != weights.shape:
            raise UnsupportedModelError(
                f"{self._path} ({type(module).__name__}) is called with an index of shape "
                f"{tuple(index.shape)} and weights of shape {tuple(weights.shape)}; steering needs "
                "one weight for each choice"
            )
        active = rows.steered(len(index), self._path)
        some = active if isinstance(active, torch.Tensor) else None
        self._uses.add(index if some is None else index[some.to(index.device)])
        return (hidden, index, self._factors.apply(index, weights, some, rows.owner)), {}


def _in_order(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The three arguments of an experts call by place, however they were given.

    Raises:
        UnsupportedModelError: there are others.
    """
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if len(bound) != _ARGUMENTS:
        raise UnsupportedModelError(
            f"{type(module).__name__} is called with {', '.join(bound)}; steering knows calls with "
            "hidden states, chosen experts and their weights"
        )
    return tuple(bound.values())

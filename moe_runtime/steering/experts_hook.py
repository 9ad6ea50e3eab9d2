"""A hook before an experts module that changes the weights (and choices) it is called with.

For experts behind transformers' interface: whichever implementation runs them, an attached
runtime's included, gets the changed arguments. Knows the interface's call; not what is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.steering.factors import LayerFactors, UseCounter
from moe_runtime.steering.forced import forced
from moe_runtime.steering.router_hook import RouterHook
from moe_runtime.steering.rows import CallRows

__all__ = ["ExpertsHook"]

# Of the interface's call: hidden states, index, weights; their names differ between classes.
_ARGUMENTS = 3


class ExpertsHook:
    """The forward pre-hook of one layer's experts module.

    Args:
        path: of the module.
        rows: of the call under way.
        uses: takes the choices.
        factors: of the layer; None to leave the weights.
        force: experts to put among the choices.
        router: has to have run before each call; None if it need not.
    """

    def __init__(
        self,
        path: str,
        rows: CallRows,
        uses: UseCounter,
        *,
        factors: LayerFactors | None,
        force: Sequence[int] = (),
        router: RouterHook | None = None,
    ) -> None:
        self._path = path
        self._rows = rows
        self._uses = uses
        self._factors = factors
        self._force = tuple(force)
        self._router = router

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace choices and weights; None for no change."""
        # Cheaper in plain running than a decorator that keeps the compiler out.
        if torch.compiler.is_compiling():
            return self._uncompiled(module, args, kwargs)  # type: ignore[no-any-return]
        return self._changed(module, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _uncompiled(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return self._changed(module, args, kwargs)

    def _changed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._router is not None:
            self._router.require_ran(forget=True)
        rows = self._rows
        active: torch.Tensor | bool | None = rows.active
        if active is False:
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
        if active is not None or rows.batch is not None:
            active = rows.steered(len(index), self._path)
        some = active if isinstance(active, torch.Tensor) else None
        if self._force:
            index = forced(index, weights, self._force, some)
        self._uses.add(index if some is None else index[some.to(index.device)])
        if self._factors is not None:
            weights = self._factors.apply(index, weights, some, rows.owner)
        return (hidden, index, weights), {}


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

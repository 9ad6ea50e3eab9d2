"""Method "logit_bias": log(beta) is added to the scores that a router computes, before top-k.

The router is the module beside the experts that has one matrix with a row for each of them. While
the module that holds this matrix runs, `torch.nn.functional.linear` with such a matrix adds the
bias to its result: its own code computes all the rest.

Knows routers by structure; not what the experts do with the choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from moe_runtime.errors import UnsupportedModelError
from moe_runtime.expert_modules import owner_of
from moe_runtime.model_spec import MoELayer
from moe_runtime.steering.rows import CallRows
from moe_runtime.steering.values import Beta

__all__ = ["RouterHook"]

# Instead of log(0): no score is as low, and nothing becomes infinite or "not a number".
_NEVER = -1e4


class RouterHook:
    """The hooks around one layer's router.

    Args:
        model: the model.
        layer: the layer.
        betas: of its steered experts.
        rows: of the call under way.

    Raises:
        UnsupportedModelError: the layer's router is not found, or has several such matrices.
    """

    def __init__(
        self, model: nn.Module, layer: MoELayer, betas: Mapping[int, Beta], rows: CallRows
    ) -> None:
        router, name = _router_matrix(model, layer)
        self._path = layer.path
        self._module, _ = owner_of(router, name)
        self._shape = router.get_parameter(name).shape
        self._rows = rows
        table = torch.zeros(rows.batch or 1, layer.num_experts)
        for expert, beta in betas.items():
            each: Sequence[float] = beta if isinstance(beta, tuple) else (beta,)
            table[:, expert] = torch.tensor([math.log(b) if b else _NEVER for b in each])
        self._table = table
        self._open: list[_AddToScores] = []
        self._ran = False

    def install(self) -> Iterator[RemovableHandle]:
        """The hooks, each as soon as it is in."""
        yield self._module.register_forward_pre_hook(self._enter)
        yield self._module.register_forward_hook(self._leave, always_call=True)

    def require_ran(self, *, forget: bool) -> None:
        """UnsupportedModelError unless the router ran before this call of its experts.

        Args:
            forget: this is the only call of experts that follows it.
        """
        if not self._ran:
            raise UnsupportedModelError(
                f"{self._path}: its router ({type(self._module).__name__}) was not called before "
                "the experts, so that nothing can be added to its scores; use method='multiply'"
            )
        self._ran = not forget

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        mode = _AddToScores(self._shape, self._added)
        mode.__enter__()  # type: ignore[no-untyped-call]
        self._open.append(mode)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._open:
            return
        mode = self._open.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # the call failed
            return
        if mode.seen != 1:
            raise UnsupportedModelError(
                f"{self._path}: its router ({type(module).__name__}) multiplies with its matrix "
                f"{mode.seen} times by torch.nn.functional.linear; method='logit_bias' needs it "
                "once; use method='multiply'"
            )
        self._ran = True

    def _added(self, scores: torch.Tensor) -> torch.Tensor:
        """`scores [..., experts]` with the bias of the call's rows."""
        if self._rows.active is False:
            return scores
        table = self._table.to(scores.device)
        flat = scores.reshape(-1, scores.shape[-1])
        active = self._rows.steered(len(flat), self._path)
        owner = self._rows.owner
        bias = table[0] if owner is None else table[owner.to(scores.device)]
        changed = (flat + bias).to(scores.dtype)
        if isinstance(active, torch.Tensor):
            changed = changed.where(active.to(scores.device)[:, None], flat)
        return changed.reshape(scores.shape)


class _AddToScores(TorchFunctionMode):
    """Changes what `linear` gives with a matrix of this shape; counts how often."""

    def __init__(self, shape: torch.Size, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.seen = 0
        self._shape = shape
        self._change = change

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Torch's own result of `func`, or that of `linear` changed."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is nn.functional.linear:
            matrix = kwargs["weight"] if "weight" in kwargs else args[1]
            # By shape: a router may convert its matrix before.
            if matrix.shape == self._shape:
                self.seen += 1
                return self._change(result)
        return result


def _router_matrix(model: nn.Module, layer: MoELayer) -> tuple[nn.Module, str]:
    """A layer's router and the name of its matrix `[experts, width]` in it."""
    found = [
        (router, names[0])
        for router in _routers(model, layer)
        for names in [_matrices(router, layer.num_experts)]
        if len(names) == 1
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{layer.path} ({layer.class_name}): method='logit_bias' needs one router beside the "
            f"experts with one matrix of {layer.num_experts} rows, found {len(found)}; use "
            "method='multiply'"
        )
    return found[0]


def _routers(model: nn.Module, layer: MoELayer) -> list[nn.Module]:
    """The modules that may be a layer's router."""
    if layer.router:
        return [model.get_submodule(layer.router)]
    experts = model.get_submodule(layer.path)
    parent = model.get_submodule(layer.path.rpartition(".")[0])
    beside = [one for one in parent.children() if one is not experts]
    beside = [one for one in beside if _matrices(one, layer.num_experts)]
    # A projection can have as many rows by chance; a router says what they are.
    told = [one for one in beside if _says_experts(one, layer.num_experts)]
    return told or beside


def _matrices(module: nn.Module, rows: int) -> list[str]:
    return [
        name for name, one in module.named_parameters() if one.dim() == 2 and one.shape[0] == rows
    ]


def _says_experts(module: nn.Module, count: int) -> bool:
    return any(
        "expert" in name.lower() and value == count and not isinstance(value, bool)
        for name, value in vars(module).items()
        if isinstance(value, int)
    )

"""The experts that one rank holds, and computing rows with them by the model's own code.

Knows experts modules and tensors; no links and no plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.errors import ParallelError, UnsupportedModelError
from moe_runtime.model_spec import MoELayer, MoESpec

__all__ = ["HeldExperts", "held_experts", "refuse_modules"]


class HeldExperts:
    """One layer's experts of one rank.

    A class's own eager forward, or one of transformers' functions, computes with tensors of the
    held experts alone: it is called with each (row, choice) pair as a row with one choice.

    Args:
        module: the layer's experts module; its attributes are used, its expert tensors are not.
        num_experts: of the whole layer.
        experts: the numbers of those held, ascending.
        tensors: by name `[held, ...]`, in that order.
        implementation: `"eager"` or a name of transformers' experts functions.
    """

    def __init__(
        self,
        module: nn.Module,
        num_experts: int,
        experts: Sequence[int],
        tensors: Mapping[str, torch.Tensor],
        implementation: str = "eager",
    ) -> None:
        # Out of `__getattr__`'s way, which asks the module.
        self._module = module
        self.num_experts = len(experts)
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
        device = next(iter(tensors.values())).device
        self._local = torch.full((num_experts,), -1, dtype=torch.long, device=device)
        self._local[torch.tensor(list(experts), dtype=torch.long, device=device)] = torch.arange(
            len(experts), device=device
        )
        eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        self._function: Any = (
            eager if implementation == "eager" else ALL_EXPERTS_FUNCTIONS.get(implementation, eager)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def partial_sums(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        mine: torch.Tensor,
    ) -> torch.Tensor:
        """`[n, D]`: for each row the weighted sum over the choices that are this rank's.

        Args:
            hidden: `[n, D]`, the experts' input.
            ids, weights: `[n, k]`.
            mine: bool `[n, k]`, whether this rank computes the choice; it holds those experts.
        """
        result = torch.zeros_like(hidden)
        rows, choices = torch.nonzero(mine, as_tuple=True)
        if not len(rows):
            return result
        local = self._local[ids[rows, choices]]
        if int(local.min()) < 0:
            raise ParallelError(
                "a rank was sent rows for experts that it does not hold: ranks run by different "
                "plans; give all of them the same"
            )
        each = self._function(self, hidden[rows], local[:, None], weights[rows, choices][:, None])
        return result.index_add_(0, rows, each.to(result.dtype))


def refuse_modules(spec: MoESpec) -> None:
    """UnsupportedModelError if experts are modules of their own."""
    apart = next((layer for layer in spec.layers if layer.modules), None)
    if apart is not None:
        raise UnsupportedModelError(
            f"{apart.path} ({apart.class_name}) keeps its experts as modules of their own; expert "
            "parallelism runs experts behind transformers' experts interface only. Run it with "
            "moe_runtime.from_pretrained, in one process"
        )


def held_experts(
    model: PreTrainedModel,
    spec: MoESpec,
    owned: Mapping[int, Sequence[int]],
    tensors: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    implementation: str = "eager",
) -> list[HeldExperts]:
    """Each layer's held experts, by position.

    Args:
        owned: by absolute layer index the experts held, ascending.
        tensors: by layer and name `[held, ...]`, where they were loaded apart; None to copy them
            from the model, which has them all.
    """
    refuse_modules(spec)
    return [
        HeldExperts(
            model.get_submodule(layer.path),
            layer.num_experts,
            owned[layer.layer],
            _copied(model, layer, owned[layer.layer]) if tensors is None else tensors[layer.layer],
            implementation,
        )
        for layer in spec.layers
    ]


def _copied(
    model: PreTrainedModel, layer: MoELayer, experts: Sequence[int]
) -> dict[str, torch.Tensor]:
    chosen = torch.tensor(list(experts), dtype=torch.long)
    found = {}
    for param in layer.params:
        whole = model.get_parameter(f"{layer.path}.{param.name}").detach()
        found[param.name] = whole.index_select(0, chosen.to(whole.device))
    return found

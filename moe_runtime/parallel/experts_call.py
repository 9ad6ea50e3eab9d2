"""The experts function of expert parallelism: transformers calls it, a layer's handler answers.

Knows transformers' experts interface; not what handlers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_runtime.errors import AttachError

__all__ = ["IMPLEMENTATION", "ExpertsHandler", "handled"]

IMPLEMENTATION = "moe_runtime_parallel"
_HANDLER = "_moe_runtime_parallel_handler"


class ExpertsHandler(Protocol):
    """Answers one layer's experts calls."""

    def experts(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What the experts module returns `[n, D]` for `hidden [n, D]`, `ids`, `weights [n, k]`."""


def _experts_forward(
    module: nn.Module, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    handler: ExpertsHandler | None = module.__dict__.get(_HANDLER)
    if handler is None:
        raise AttachError(
            f"{type(module).__name__} runs by {IMPLEMENTATION!r} but belongs to no parallel run; "
            "call moe_runtime.parallel.generate, or model.set_experts_implementation('eager')"
        )
    return handler.experts(hidden, ids, weights)


@contextmanager
def handled(model: PreTrainedModel, handlers: Mapping[str, ExpertsHandler]) -> Iterator[None]:
    """Let these handlers answer the experts calls of a model meanwhile.

    Args:
        handlers: by path of the experts module; each of the model's needs one.
    """
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    modules = {path: model.get_submodule(path) for path in handlers}
    configs: dict[int, Any] = {id(module.config): module.config for module in modules.values()}
    before = {key: config._experts_implementation for key, config in configs.items()}
    taken = [path for path, module in modules.items() if _HANDLER in module.__dict__]
    if taken:
        raise AttachError(f"{taken[0]} takes part in another parallel run; wait for its end")
    try:
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        for path, module in modules.items():
            module.__dict__[_HANDLER] = handlers[path]
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop(_HANDLER, None)
        for key, config in configs.items():
            config._experts_implementation = before[key]

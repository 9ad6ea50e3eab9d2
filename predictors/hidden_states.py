"""What a live model gives its experts, hidden states and choices, and the routers beside them.

Attaches by forward hooks; knows transformers' experts interface through `model_spec`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_runtime.errors import PredictorError
from moe_runtime.model_spec import MoESpec, find_experts_modules
from moe_runtime.trace import RoutingTrace

__all__ = ["Recording", "Router", "record_hidden", "routers_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Rows of a model's run with the hidden states that the experts were given.

    Args:
        trace: the rows; one sequence for each input.
        hidden: for each MoE layer float32 `[N, D]`, on the CPU.
    """

    trace: RoutingTrace
    hidden: tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Router:
    """A layer's router as far as it is linear: float32 `[E, D]` and `[E]`, on the CPU."""

    weight: torch.Tensor
    bias: torch.Tensor


def record_hidden(
    model: nn.Module, spec: MoESpec, inputs: Sequence[torch.Tensor], max_rows: int
) -> Recording:
    """Run texts through a model and keep what its experts are given.

    Args:
        model: a causal language model, evaluating.
        spec: its structure.
        inputs: token ids `[length]` of each text; no padding.
        max_rows: tokens after which no further text is begun.

    Raises:
        PredictorError: no tokens, or a layer that did not run on all of them.
    """
    hidden: list[list[torch.Tensor]] = [[] for _ in spec.layers]
    chosen: list[list[torch.Tensor]] = [[] for _ in spec.layers]
    tokens: list[NDArray[np.int32]] = []
    with _listening(model, spec, hidden, chosen), torch.no_grad():
        for ids in inputs:
            if sum(map(len, tokens)) >= max_rows:
                break
            model(input_ids=ids.reshape(1, -1).to(next(model.parameters()).device), use_cache=False)
            tokens.append(ids.reshape(-1).cpu().numpy().astype(np.int32))
    rows = sum(map(len, tokens))
    if not rows:
        raise PredictorError("nothing to fit gate lookahead to: give texts with tokens")
    states = tuple(torch.cat(parts) if parts else torch.zeros(0, 0) for parts in hidden)
    for layer, state in zip(spec.layers, states, strict=True):
        if len(state) != rows:
            raise PredictorError(
                f"layer {layer.layer} saw {len(state)} of {rows} tokens; gate lookahead needs "
                "every MoE layer to run on every token"
            )
    return Recording(trace=_trace(spec, tokens, [torch.cat(c) for c in chosen]), hidden=states)


def routers_of(model: nn.Module, spec: MoESpec, width: int) -> list[Router]:
    """The router of each MoE layer, found by structure.

    It is the module beside the experts (else beside the block around them) that holds the one
    matrix of experts x hidden size.

    Args:
        model: any that `read_spec` reads.
        spec: its structure.
        width: hidden size, D.

    Raises:
        PredictorError: no such matrix, or several; names layer and modules.
    """
    modules = dict(model.named_modules())
    return [
        _router(modules, layer.path, layer.layer, layer.num_experts, width) for layer in spec.layers
    ]


def _router(
    modules: Mapping[str, nn.Module], path: str, layer: int, experts: int, width: int
) -> Router:
    block = path
    while "." in block:
        block = block.rpartition(".")[0]
        found = {
            f"{name}.{key}": (module, weight)
            for name, module in modules.items()
            if name.startswith(block + ".") and not (name + ".").startswith(path + ".")
            for key, weight in module.named_parameters(recurse=False)
            if tuple(weight.shape) == (experts, width)
        }
        if len(found) == 1:
            module, weight = next(iter(found.values()))
            bias = getattr(module, "bias", None)
            plain = isinstance(bias, torch.Tensor) and tuple(bias.shape) == (experts,)
            return Router(
                weight=weight.detach().to("cpu", torch.float32, copy=True),
                bias=bias.detach().to("cpu", torch.float32, copy=True)
                if plain and isinstance(bias, torch.Tensor)
                else torch.zeros(experts),
            )
        if found:
            raise PredictorError(
                f"layer {layer}: {len(found)} matrices of {experts} x {width} beside the experts "
                f"({', '.join(sorted(found))}), so the router cannot be told; use another predictor"
            )
    raise PredictorError(
        f"layer {layer}: no matrix of {experts} x {width} beside {path}, so no router that gate "
        "lookahead could apply; use another predictor"
    )


@contextmanager
def _listening(
    model: nn.Module,
    spec: MoESpec,
    hidden: list[list[torch.Tensor]],
    chosen: list[list[torch.Tensor]],
) -> Iterator[None]:
    """Forward hooks on the experts modules while the block runs."""
    modules = dict(find_experts_modules(model))
    handles = []

    def hook_of(position: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            state = next(v for v in given if v.is_floating_point())
            ids = next(v for v in given if not v.is_floating_point())
            rows = state.reshape(-1, state.shape[-1])
            hidden[position].append(rows.detach().to("cpu", torch.float32, copy=True))
            chosen[position].append(ids.detach().reshape(len(rows), -1).to("cpu", copy=True))

        return hook

    try:
        for position, layer in enumerate(spec.layers):
            module = modules[layer.path]
            handles.append(module.register_forward_pre_hook(hook_of(position), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(
    spec: MoESpec, tokens: Sequence[NDArray[np.int32]], chosen: Sequence[torch.Tensor]
) -> RoutingTrace:
    lengths = [len(one) for one in tokens]
    rows, width = sum(lengths), max(ids.shape[1] for ids in chosen)
    ids = np.full((rows, len(spec.layers), width), 65535, np.uint16)
    for position, one in enumerate(chosen):
        known = one.numpy()
        valid = known < spec.layers[position].num_experts
        ids[:, position, : known.shape[1]] = np.where(valid, known, 65535)
    numbers = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=np.zeros(ids.shape, np.float16),
        token_ids=np.concatenate(tokens),
        sequence_ids=numbers,
        positions=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        phase=np.zeros(rows, np.uint8),
        step_ids=numbers,
        layer_ids=spec.grid.layers,
        experts=spec.grid.experts,
        top_k=tuple(min(layer.top_k, width) for layer in spec.layers),
        model_id=spec.model_id,
        fingerprint=spec.fingerprint,
        tokenizer_id=spec.model_id,
    )

"""Owns recording the bundled model's routing over held-out rows as a `RoutingTrace`.

Does not know the figures drawn from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bundled_model.data import DOMAINS, Corpus
from moe_runtime.trace import PREFILL, RoutingTrace


@torch.no_grad()
def record_rows(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights, both `[rows, tokens, layers, k]`, by hooks on the routers."""
    experts: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def keep(_module: object, _args: object, out: tuple[torch.Tensor, ...]) -> None:
        experts.append(out[2].view(*ids.shape, -1))
        weights.append(out[1].float().view(*ids.shape, -1))

    handles = [layer.mlp.gate.register_forward_hook(keep) for layer in model.model.layers]
    try:
        model.model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(experts, dim=2), torch.stack(weights, dim=2)


def record_domains(
    model: Any, corpus: Corpus, *, rows: int, context: int = 256
) -> tuple[RoutingTrace, np.ndarray[Any, np.dtype[np.int64]]]:
    """A trace of `rows` held-out rows of each domain, and the domain's number of each token."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for number, domain in enumerate(DOMAINS):
        held_out = torch.from_numpy(corpus.held_out(domain, rows, context).ids)
        parts += [
            (*record_rows(model, ids), ids, torch.full_like(ids, number))
            for ids in held_out.split(8)
        ]
    experts, weights, ids, domains = (torch.cat(column) for column in zip(*parts, strict=True))
    sequences = torch.arange(len(ids)).repeat_interleave(context)
    layers = experts.shape[2]
    trace = RoutingTrace(
        topk_ids=experts.flatten(0, 1).numpy().astype(np.uint16),
        topk_weights=weights.flatten(0, 1).numpy().astype(np.float16),
        token_ids=ids.flatten().numpy().astype(np.int32),
        sequence_ids=sequences.numpy().astype(np.int32),
        positions=np.tile(np.arange(context, dtype=np.int32), len(ids)),
        phase=np.full(ids.numel(), PREFILL, np.uint8),
        step_ids=sequences.numpy().astype(np.int32),
        layer_ids=tuple(range(layers)),
        experts=(model.config.num_experts,) * layers,
        model_id="bundled",
    )
    return trace, domains.flatten().numpy()

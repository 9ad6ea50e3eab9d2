"""How a routing-path network starts, and what it is trained to make small.

Knows no sequences and no schedule.
"""

from __future__ import annotations

import numpy as np
import torch
from moe_runtime.predictors.path_network import PathNetwork
from moe_runtime.predictors.path_sequences import multi_hot
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moe_runtime.core import ExpertGrid, FloatArray
from moe_runtime.trace import UNUSED

__all__ = ["path_loss", "start_from_table"]


def start_from_table(network: PathNetwork, table: FloatArray, rows: FloatArray) -> None:
    """Make the network's logits those of a token-id table, as near as its width allows.

    The table, less its mean, is factored by a singular value decomposition weighted with how often
    each token came: the left factor becomes the embedding, the right one the prior head. The head
    of the decoder starts small.

    Args:
        table: `[V + 1, G]` logits.
        rows: `[V, L]`, how often each layer routed each token.
    """
    weight = np.append(rows.max(axis=1), 1.0)
    mean = (table * weight[:, None]).sum(axis=0) / weight.sum()
    scaled = np.sqrt(weight / weight.sum())[:, None] * (table - mean)
    # The right singular vectors from the smaller square: G is some hundreds, V may be 10**5.
    values, vectors = np.linalg.eigh(scaled.T @ scaled)
    width = min(network.config.d_model, len(values))
    right = vectors[:, ::-1][:, :width]
    # Singular values are shared so that embeddings have entries of about one.
    spread = np.sqrt(np.maximum(values[::-1][:width], 1e-12))
    with torch.no_grad():
        network.embedding.weight[:, :width] = torch.from_numpy((table - mean) @ right / spread)
        network.prior.weight.zero_()
        network.prior.weight[:, :width] = torch.from_numpy(right * spread)
        network.prior.bias.copy_(torch.from_numpy(mean))
        network.head.weight.mul_(0.02)


def path_loss(logits: Tensor, topk_ids: NDArray[np.uint16], grid: ExpertGrid) -> Tensor:
    """Cross entropy with the multi-hot path, summed over a layer's experts, averaged over the
    (token, layer) rows that have a label; `logits [B, S, G]`, `topk_ids [B, S, L, K]`.
    """
    labels = torch.from_numpy(multi_hot(topk_ids, grid))
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    layers = torch.stack([part.sum(-1) for part in each.split(list(grid.experts), -1)], -1)
    routed = torch.from_numpy((topk_ids != UNUSED).any(axis=-1))
    return layers[routed].mean()

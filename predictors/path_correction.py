"""What routers have chosen in the layers passed, and what it says about those to come.

Fits the `correction` of a routing-path predictor. Knows logits and routing; knows no network.
"""

from __future__ import annotations

import numpy as np
import torch
from moe_runtime.predictors.path_sequences import multi_hot
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moe_runtime.core import ExpertGrid

__all__ = ["corrected", "fit_correction"]

ROWS = 2048  # rows of a step


def fit_correction(
    logits: NDArray[np.float32],
    topk_ids: NDArray[np.uint16],
    grid: ExpertGrid,
    *,
    steps: int = 400,
    rate: float = 0.02,
    decay: float = 1e-4,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Linear maps from the surprises of earlier layers to the logits of later ones.

    A surprise is 1 for a chosen expert, 0 for another, less the probability forecast for it. Its
    expectation is zero, so a layer that has not run yet shifts nothing, and the maps fitted with
    all earlier layers known serve any number of them. Logistic regression, layer after layer in
    one pass: the surprises of a layer are those of its corrected forecast.

    Args:
        logits: `[N, G]`, the forecast before the token's first layer.
        topk_ids: `[N, L, K]`, what was chosen.
        decay: weight of the squared maps.

    Returns:
        `[G, G]`: row i shifts the logits of later layers' experts; 0 elsewhere.
    """
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(logits)
    labels = torch.from_numpy(multi_hot(topk_ids, grid))
    maps = torch.zeros(grid.size, grid.size, requires_grad=True)
    optimizer = torch.optim.Adam([maps], lr=rate)
    for step in range(steps):
        some = torch.from_numpy(rng.integers(len(logits), size=min(ROWS, len(logits))))
        truth = labels[some]
        shifted = _shifted(base[some], truth, maps, grid)
        loss = functional.binary_cross_entropy_with_logits(shifted, truth, reduction="sum")
        (loss / len(some) + decay * maps.square().sum()).backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    layer = np.repeat(np.arange(len(grid.layers)), grid.experts)
    fitted: NDArray[np.float32] = maps.detach().numpy() * (layer[:, None] < layer)
    return fitted.astype(np.float32)


def corrected(
    logits: NDArray[np.float32],
    topk_ids: NDArray[np.uint16],
    correction: NDArray[np.float32],
    grid: ExpertGrid,
) -> NDArray[np.float32]:
    """Each layer's logits once all layers before it are known, `[N, G]`."""
    truth = torch.from_numpy(multi_hot(topk_ids, grid))
    found: NDArray[np.float32] = _shifted(
        torch.from_numpy(logits), truth, torch.from_numpy(correction), grid
    ).numpy()
    return found


def _shifted(base: Tensor, truth: Tensor, maps: Tensor, grid: ExpertGrid) -> Tensor:
    surprises: list[Tensor] = []
    shifted: list[Tensor] = []
    for offset, count in zip(grid.offsets, grid.experts, strict=True):
        layer = slice(offset, offset + count)
        now = base[:, layer]
        if surprises:
            now = now + torch.cat(surprises, dim=1) @ maps[:offset, layer]
        shifted.append(now)
        # The maps are not trained through what they make of a surprise.
        surprises.append(truth[:, layer] - now.detach().sigmoid())
    return torch.cat(shifted, dim=1)

"""Method "force": an expert takes the place of the choice of least weight.

Knows tensors `[tokens, choices]` only; no modules, no hooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["forced"]


def forced(
    index: torch.Tensor,
    weights: torch.Tensor,
    experts: Sequence[int],
    active: torch.Tensor | None,
) -> torch.Tensor:
    """The choices with these experts among them, in the place of those of least weight.

    An expert that is among the choices already keeps its place, and none gives its place to
    another. Of equal weights the first choice goes.

    Args:
        index: whole numbers `[tokens, choices]`.
        weights: floats `[tokens, choices]`.
        experts: distinct, and no more than there are choices.
        active: bool `[tokens]`, tokens for which it is done; None for all.

    Returns:
        Whole numbers `[tokens, choices]`; the weight at each place stays what it was.
    """
    assert len(experts) <= index.shape[1], "there is a place for each"
    index = index.clone()
    kept = torch.isin(index, torch.tensor(list(experts), device=index.device))
    for expert in experts:
        missing = ~(index == expert).any(1)
        if active is not None:
            missing &= active.to(index.device)
        least = weights.masked_fill(kept, torch.inf).argmin(1, keepdim=True)
        place = torch.zeros_like(kept).scatter(1, least, value=True) & missing[:, None]
        index[place] = expert
        kept |= place
    return index

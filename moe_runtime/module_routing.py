"""Which experts a call routes to, read off the tensors that it passes around.

Nothing says what a tensor means, so there are several readings of each, to be compared with the
calls that experts then get. Knows no modules, no cache and no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.access import Access

__all__ = ["Reading", "readings"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One reading of one tensor.

    Args:
        name: of the kind of reading and the tensor's place, the same in every call.
        pairs: int64 `[T, E]`, how often a token (row) goes to an expert.
        choices: most experts that a token can have by this reading.
        chosen: int64 `[T, C]`, the expert of each choice, -1 for none; None where choices are not
            told apart.
    """

    name: str
    pairs: torch.Tensor
    choices: int
    chosen: torch.Tensor | None = None

    def counts(self) -> dict[int, int]:
        """Rows that each expert with at least one gets, experts ascending."""
        each: list[int] = self.pairs.sum(dim=0).tolist()
        return {expert: count for expert, count in enumerate(each) if count}

    def access(self, position: int, counts: dict[int, int]) -> Access:
        """What the cache is asked for in the layer at `position`."""
        return Access(
            position=position,
            experts=np.fromiter(counts.keys(), np.int64, len(counts)),
            tokens=np.fromiter(counts.values(), np.int64, len(counts)),
        )

    def top_k(self, floats: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 `[T, K]` and weights float32 `[T, K]`, largest weight first; ids of E: none.

        Args:
            floats: tensors among which the weights may be. They are taken from the last one
                without negative elements that has one for each token, each choice of a token, or
                each token and expert; if there is none, each weight is 1.
        """
        experts = self.pairs.shape[1]
        weights = self._weights(floats)
        uses = self.pairs > 0
        scores = torch.where(uses, weights, torch.full_like(weights, -torch.inf))
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.choices]
        none = ~uses.gather(1, order)
        return (
            order.masked_fill(none, experts),
            weights.gather(1, order).masked_fill(none, 0.0),
        )

    def _weights(self, floats: Sequence[torch.Tensor]) -> torch.Tensor:
        """float32 `[T, E]`."""
        tokens, experts = self.pairs.shape
        for given in reversed(floats):
            tensor = given.detach().float()
            if bool((tensor < 0).any()):
                continue  # a router's raw scores
            if self.chosen is not None and tensor.numel() == self.chosen.numel():
                each = tensor.reshape(self.chosen.shape).masked_fill(self.chosen < 0, 0.0)
                empty = tensor.new_zeros(tokens, experts)
                return empty.scatter_add(1, self.chosen.clamp_min(0), each)
            if tensor.numel() == tokens * experts:
                return tensor.reshape(tokens, experts)
            if tensor.numel() == tokens:
                return tensor.reshape(tokens, 1).expand(tokens, experts)
        return torch.ones(tokens, experts, device=self.pairs.device)


def readings(
    tensors: Sequence[torch.Tensor], *, tokens: int, experts: int, top_k: int
) -> Iterator[Reading]:
    """All readings of a call's tensors, the likeliest first.

    A tensor of whole numbers or bools that ends in a dimension of `experts` and holds only zeros
    and ones is a mask; one of whole numbers below `experts` with a row for each token holds
    indices; one of floats `[..., experts]` holds a router's scores, of which the `top_k` largest
    are taken.

    Args:
        tokens: rows of the experts' input before they are dealt out.
    """
    whole = [t for t in tensors if not t.is_floating_point() and not t.is_complex()]
    for place, tensor in enumerate(whole):
        found = _mask(tensor, tokens, experts, top_k)
        if found is not None:
            pairs, choices = found
            yield Reading(name=f"mask {place}", pairs=pairs, choices=choices)
    for place, tensor in enumerate(whole):
        if tensor.dtype != torch.bool and tensor.numel() and tensor.numel() % tokens == 0:
            chosen = tensor.reshape(tokens, -1).long()
            if int(chosen.min()) >= 0 and int(chosen.max()) < experts:
                yield _by_index(f"indices {place}", chosen, experts)
    for place, tensor in enumerate(tensors):
        scores = tensor.is_floating_point() and tensor.numel() == tokens * experts
        if scores and tensor.shape[-1] == experts:
            chosen = tensor.detach().reshape(tokens, experts).topk(top_k, dim=-1).indices
            pairs = _by_index("", chosen, experts).pairs
            yield Reading(name=f"scores {place}", pairs=pairs, choices=top_k)


def _mask(
    tensor: torch.Tensor, tokens: int, experts: int, top_k: int
) -> tuple[torch.Tensor, int] | None:
    """Pairs `[T, E]` and the most experts of a token, if a tensor can be a mask."""
    if tensor.dim() < 2 or tensor.shape[-1] != experts or not tensor.numel():
        return None
    if tensor.numel() % (tokens * experts):
        return None
    mask = tensor.reshape(tokens, -1, experts).long()
    if int(mask.min()) < 0 or int(mask.max()) > 1:
        return None
    pairs = mask.sum(dim=1)
    most = max(int((pairs > 0).sum(dim=1).max()), mask.shape[1], top_k)
    # A recording has as many choices in every call: either what is declared, or all.
    return pairs, most if most == max(mask.shape[1], top_k) else experts


def _by_index(name: str, chosen: torch.Tensor, experts: int) -> Reading:
    pairs = torch.zeros(len(chosen), experts, dtype=torch.int64, device=chosen.device)
    pairs.scatter_add_(1, chosen, torch.ones_like(chosen))
    choices = min(chosen.shape[1], experts)
    return Reading(name=name, pairs=pairs, choices=choices, chosen=chosen)

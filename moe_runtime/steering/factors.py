"""A layer's betas as a tensor, applied to the weights of chosen experts; uses counted.

Knows tensors `[tokens, choices]` only; no modules, no hooks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_runtime.steering.values import Beta

__all__ = ["LayerFactors", "UseCounter"]

_PENDING_ELEMENTS = 1 << 16
_EACH = 256  # that a call counts for besides its own: so there are never many small ones


class UseCounter:
    """How often each expert of a layer was chosen in steered rows.

    Choices are kept and counted some hundred calls at a time, so that a call costs next to nothing.

    Args:
        experts: of the layer; larger indices (a router's "none") are not counted.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._counts = [0] * experts
        self._pending: list[torch.Tensor] = []
        self._elements = 0

    def add(self, index: torch.Tensor) -> None:
        """Take in chosen experts, any shape. The tensor must not be changed afterwards."""
        self._pending.append(index)
        self._elements += index.numel() + _EACH
        if self._elements > _PENDING_ELEMENTS:
            self._flush()

    def add_count(self, expert: int, count: int) -> None:
        """So many uses of an expert."""
        self._counts[expert] += count

    def of(self, expert: int) -> int:
        """Uses of an expert so far."""
        self._flush()
        return self._counts[expert]

    def _flush(self) -> None:
        if not self._pending:
            return
        chosen = torch.cat([one.reshape(-1).to("cpu", torch.int64) for one in self._pending])
        self._pending.clear()
        self._elements = 0
        counts = chosen.clamp(0, self._experts).bincount(minlength=self._experts + 1)
        self._counts = [a + b for a, b in zip(self._counts, counts.tolist(), strict=False)]


class LayerFactors:
    """The betas of one layer's experts.

    Args:
        experts: of the layer.
        betas: of its steered experts.
        batch: rows of the batch if any beta differs between rows, in the whole model; else None.
        renormalise: keep each token's sum of weights.
    """

    def __init__(
        self, experts: int, betas: Mapping[int, Beta], *, batch: int | None, renormalise: bool
    ) -> None:
        # One more place: routers that may choose nothing say so with the number of experts.
        table = torch.ones(batch or 1, experts + 1)
        for expert, beta in betas.items():
            table[:, expert] = torch.tensor(beta, dtype=torch.float64).to(table.dtype)
        self._experts = experts
        self._by_row = batch is not None
        self._table = table if self._by_row else table[0]
        self._renormalise = renormalise
        self._placed: torch.Tensor | None = None
        self._like: tuple[torch.dtype, torch.device] | None = None

    def apply(
        self,
        index: torch.Tensor,
        weights: torch.Tensor,
        active: torch.Tensor | None,
        owner: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weights times their experts' betas.

        Args:
            index: whole numbers `[tokens, choices]`.
            weights: floats `[tokens, choices]`.
            active: bool `[tokens]`, which tokens are steered; None for all.
            owner: int64 `[tokens]`, each token's row of the batch, where betas are by row.

        Returns:
            Floats like `weights`; what no beta but 1 touches keeps its bits.
        """
        table = self._placed
        if table is None or self._like != (weights.dtype, index.device):
            table = self._place(weights.dtype, index.device)
        if self._by_row:
            assert owner is not None, "betas by row come with rows"
            factors = table[owner.to(index.device)[:, None], index]
        else:
            factors = table.take(index if index.dtype == torch.int64 else index.long())
        if active is not None:
            factors = factors.where(active.to(index.device)[:, None], 1.0)
        changed = weights * factors
        if self._renormalise:
            # The same operation on the same numbers: a token without steered experts gets 1.
            before = weights.to(changed.dtype).sum(-1, keepdim=True)
            after = changed.sum(-1, keepdim=True)
            changed = changed * torch.where(after == 0, torch.ones_like(after), before / after)
        return changed if changed.dtype == weights.dtype else changed.to(weights.dtype)

    def _place(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The table where the weights are; in their dtype if that holds every beta exactly.

        A product of two numbers of a short dtype is rounded once, as that of a longer one is when
        it is shortened: the bits do not depend on it.
        """
        table, short = self._table.to(device), self._table.to(device, dtype)
        fits = not self._renormalise and bool((short.to(table.dtype) == table).all())
        self._placed, self._like = (short if fits else table), (dtype, device)
        return self._placed

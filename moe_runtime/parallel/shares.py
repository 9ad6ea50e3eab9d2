"""A plan as tables that route rows: which rank computes an expert, and where a row goes to live.

Knows ranks, experts and weights; no models and no links.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import PlanError
from moe_runtime.model_spec import MoESpec
from moe_runtime.placement.baselines import contiguous
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology

__all__ = ["LayerShare", "Shares", "contiguous_plan", "shares_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerShare:
    """Who holds the experts of one layer.

    Args:
        layer: absolute layer index.
        held: bool `[E, G]`, whether the rank holds the expert.
        nearest: int64 `[G, E]`, for rows on each rank the rank that computes an expert for them:
            their own if it holds it, else the nearest that does (replicas equally near by turns).
        distance: float64 `[G, G]`, cost from rank to rank.
    """

    layer: int
    held: torch.Tensor
    nearest: torch.Tensor
    distance: torch.Tensor

    def owned(self, rank: int) -> list[int]:
        """Experts that the rank holds, ascending."""
        return [int(expert) for expert in torch.nonzero(self.held[:, rank]).flatten()]

    def homes(self, source: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Where rows go to live: int64 `[n]`, a rank that holds the row's heaviest expert.

        Of several (replicas, or equally heavy experts) the one that holds most of the row's
        experts, then the row's present rank, then the nearest, then the lowest number.

        Args:
            source: int64 `[n]`, the rank that each row is on.
            ids, weights: `[n, k]`, chosen experts and their weights.
        """
        held = self.held[ids]  # [n, k, G]
        heaviest = weights == weights.amax(1, keepdim=True)
        candidate = (held & heaviest[..., None]).any(1)
        ranks = torch.arange(held.shape[-1], device=ids.device)
        own = (source[:, None] == ranks).double()
        near = 1.0 - self.distance[source] / (1.0 + self.distance.max())
        score = 4.0 * held.sum(1) + 2.0 * own + near
        return score.masked_fill(~candidate, -1.0).argmax(1)

    def computing(
        self, source: torch.Tensor, ids: torch.Tensor, home: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rank that computes each choice: int64 `[n, k]`.

        The row's home if it holds the expert, else its present rank, else the nearest.
        """
        nearest = self.nearest[source[:, None], ids]
        if home is None:
            return nearest
        at_home = self.held[ids, home[:, None]]
        return torch.where(at_home, home[:, None], nearest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shares:
    """A plan for one model, ready to route by.

    Args:
        grid: layers and experts.
        size: ranks.
        layers: by position in `grid.layers`.
    """

    grid: ExpertGrid
    size: int
    layers: tuple[LayerShare, ...]

    def owned(self, rank: int) -> dict[int, list[int]]:
        """By absolute layer index the experts that a rank holds, ascending."""
        return {share.layer: share.owned(rank) for share in self.layers}


def contiguous_plan(grid: ExpertGrid, devices: int) -> Plan:
    """Blocks of neighbouring experts: what engines do without a plan."""
    return Plan(
        topology=Topology.of(devices),
        layers=tuple(
            LayerPlan(layer=layer, hosts=tuple((int(row.argmax()),) for row in held))
            for layer, held in zip(grid.layers, contiguous(grid.experts, devices), strict=True)
        ),
    )


def shares_of(plan: Plan, spec: MoESpec, size: int) -> Shares:
    """The tables of a plan.

    Raises:
        PlanError: the plan is for other layers, experts or another number of ranks.
    """
    plan.require_model(
        layer_ids=spec.grid.layers,
        experts=spec.grid.experts,
        fingerprint=spec.fingerprint,
        name=spec.model_id or spec.model_class,
    )
    if plan.devices != size:
        raise PlanError(
            f"the plan places experts on {plan.devices} devices, but {size} ranks run; start "
            f"{plan.devices} ranks (torchrun --nproc-per-node {plan.devices}), or plan for {size}"
        )
    distance = torch.from_numpy(np.array(plan.topology.costs))
    layers = []
    for position, layer in enumerate(plan.layer_ids):
        held = torch.from_numpy(plan.matrix(position).copy())
        layers.append(
            LayerShare(layer=layer, held=held, nearest=_nearest(held, distance), distance=distance)
        )
    return Shares(grid=spec.grid, size=size, layers=tuple(layers))


def _nearest(held: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """int64 `[G, E]`; see `LayerShare`."""
    experts, ranks = held.shape
    cost = distance[:, None, :].expand(ranks, experts, ranks).clone()
    cost[torch.arange(ranks), :, torch.arange(ranks)] = -1.0  # one's own, whatever links cost
    cost = cost.masked_fill(~held[None], float("inf"))
    best = cost.amin(2, keepdim=True)
    # Among equally near replicas by turns, so that no rank gets all the work.
    turn = (torch.arange(ranks)[:, None, None] + torch.arange(experts)[None, :, None]) % ranks
    order = (torch.arange(ranks)[None, None, :] - turn) % ranks
    return order.masked_fill(cost > best, ranks).argmin(2)

"""`DecodeSteps`: which recorded rows run in one decode step, and where each begins it.

Knows rows and devices; neither messages nor links.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.topology import Topology
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import UNUSED, RoutingTrace

__all__ = [
    "DecodeSteps",
    "Holders",
    "choices",
    "first_choices",
    "in_lanes",
    "recorded_steps",
    "starts_of",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeSteps:
    """The rows of a trace as decode steps.

    Args:
        steps: int64 `[N]`, step of each row, numbered from 0 without gaps; never decreases.
        lanes: int64 `[N]`, place of each row's sequence in the batch; one row a lane and step.

    Raises:
        PlanError: no rows, or steps otherwise numbered.
    """

    steps: IntArray
    lanes: IntArray

    def __post_init__(self) -> None:
        if not len(self.steps):
            raise PlanError("no decode steps: the recording has no tokens for one")
        if self.steps[0] != 0 or not set(np.unique(np.diff(self.steps))) <= {0, 1}:
            raise PlanError("steps must be numbered from 0 without gaps and never decrease")

    @property
    def count(self) -> int:
        """Number of steps."""
        return int(self.steps[-1]) + 1

    @property
    def rows(self) -> float:
        """Rows a step, the mean."""
        return len(self.steps) / self.count

    def homes(self, devices: int) -> IntArray:
        """int64 `[N]`: the device on which each row lives: lanes in equal blocks."""
        homes: IntArray = self.lanes * devices // (int(self.lanes.max()) + 1)
        return homes


def in_lanes(
    trace: RoutingTrace, rows: int, *, most: int | None = None
) -> tuple[RoutingTrace, DecodeSteps]:
    """A batch of `rows` sequences out of any recording: its rows in lanes of neighbouring tokens.

    Lane i gets the i-th of `rows` equal parts of the recording; step s runs the s-th row of each.
    So rows of a step are of different texts, and a lane's next row is mostly its text's next token.

    Args:
        most: steps at most; each lane is cut short.

    Returns:
        (the trace's rows in the order of the steps; their steps). Rows that fill no step are left
        out.

    Raises:
        PlanError: the recording has fewer tokens than `rows`.
    """
    count = len(trace) // rows if rows > 0 else 0
    if not count:
        raise PlanError(
            f"the recording has {len(trace)} tokens, a step should have {rows}; give a smaller "
            "batch, or record more"
        )
    order = (np.arange(rows) * count)[None] + np.arange(min(count, most or count))[:, None]
    count = len(order)
    picked = {name: column[order.ravel()] for name, column in trace.columns().items()}
    picked["step_ids"] = np.repeat(np.arange(count, dtype=np.int32), rows)
    mixed = RoutingTrace(**picked, **trace.description())
    lanes = np.tile(np.arange(rows, dtype=np.int64), count)
    return mixed, DecodeSteps(steps=picked["step_ids"].astype(np.int64), lanes=lanes)


def recorded_steps(trace: RoutingTrace) -> DecodeSteps:
    """The trace's own forward calls; a sequence's lane is its rank among the sequence ids."""
    _, steps = np.unique(trace.step_ids, return_inverse=True)
    _, lanes = np.unique(trace.sequence_ids, return_inverse=True)
    return DecodeSteps(steps=steps.astype(np.int64), lanes=lanes.astype(np.int64))


@dataclass(frozen=True, kw_only=True, eq=False)
class Holders:
    """Who serves rows in one layer: the rules of the engine, `moe_runtime.parallel`.

    Args:
        held: bool `[E, G]`, whether the device holds the expert.
        nearest: int64 `[G, E]`, the device that serves each expert to rows of each device: their
            own if it holds it, else the cheapest to reach (replicas equally near by turns).
        costs: float64 `[G, G]`, of the topology.
    """

    held: BoolArray
    nearest: IntArray
    costs: FloatArray

    @classmethod
    def of(cls, held: BoolArray, topology: Topology) -> Holders:
        """Of a layer's placement."""
        experts, devices = held.shape
        costs = np.where(np.eye(devices, dtype=bool), -1.0, topology.costs)
        reach = np.where(held[None], costs[:, None, :], np.inf)
        turn = (np.arange(devices)[:, None, None] + np.arange(experts)[None, :, None]) % devices
        order = (np.arange(devices) - turn) % devices
        best = reach == reach.min(2, keepdims=True)
        nearest = np.where(best, order, devices).argmin(2)
        return cls(held=held, nearest=nearest, costs=topology.costs)

    def targets(
        self, place: IntArray, ids: IntArray, weights: NDArray[np.float16], chosen: BoolArray
    ) -> IntArray:
        """int64 `[N]`: where coherent rows go to live, a device that holds their heaviest expert.

        Of several (replicas, or equally heavy experts) the one that holds most of the row's
        experts, then the row's present device, then the nearest, then the first; rows that chose
        nothing stay.

        Args:
            place: int64 `[N]`, the device that each row is on.
            ids: int64 `[N, K]`, experts; any number where nothing was chosen.
            weights: float16 `[N, K]`, the router's.
            chosen: bool `[N, K]`, whether the slot names an expert.
        """
        weight = np.where(chosen, weights.astype(np.float64), -np.inf)
        heaviest = chosen & (weight == weight.max(1, keepdims=True))
        holding = self.held[ids] & chosen[:, :, None]
        candidate = (holding & heaviest[:, :, None]).any(1)
        own = place[:, None] == np.arange(self.held.shape[1])
        near = 1.0 - self.costs[place] / (1.0 + self.costs.max())
        score = 4.0 * holding.sum(1) + 2.0 * own + near
        best = np.where(candidate, score, -1.0).argmax(1)
        target: IntArray = np.where(candidate.any(1), best, place)
        return target

    def computing(self, place: IntArray, ids: IntArray, target: IntArray | None = None) -> IntArray:
        """int64 `[N, K]`: the device that computes each choice: the row's target if it holds the
        expert, else the nearest to where the row is.
        """
        nearest = self.nearest[place[:, None], ids]
        if target is None:
            return nearest
        there = self.held[ids, target[:, None]]
        computed: IntArray = np.where(there, target[:, None], nearest)
        return computed


def starts_of(
    placement: Sequence[BoolArray],
    topology: Topology,
    trace: RoutingTrace,
    steps: DecodeSteps,
    *,
    by_token: bool = True,
) -> IntArray:
    """int64 `[N]`: the device on which each coherent row begins its step.

    Where its sequence ended the step before; its home in its first step.

    Args:
        by_token: rather where the last row of the same token went in the first MoE layer, if an
            earlier step had one.
    """
    serving = [Holders.of(held, topology) for held in placement]
    starts = steps.homes(topology.devices)
    ended = np.full(int(steps.lanes.max()) + 1, -1, dtype=np.int64)
    # One place more than tokens: a token that is unknown (-1) looks there, and finds nothing.
    first = np.full(int(trace.token_ids.max()) + 2, -1, dtype=np.int64)
    bounds = np.searchsorted(steps.steps, np.arange(steps.count + 1))
    for low, high in pairwise(bounds.tolist()):
        lanes, tokens = steps.lanes[low:high], trace.token_ids[low:high]
        at = np.where(ended[lanes] < 0, starts[low:high], ended[lanes])
        if by_token:
            at = np.where(first[tokens] < 0, at, first[tokens])
        starts[low:high] = at
        for position, holders in enumerate(serving):
            ids, chosen = choices(trace, slice(low, high), position)
            weights = trace.topk_weights[low:high, position]
            at = holders.targets(at, ids, weights, chosen)
            if position == 0:
                known = tokens >= 0
                first[tokens[known]] = at[known]
        ended[lanes] = at
    return starts


def choices(trace: RoutingTrace, rows: slice, position: int) -> tuple[IntArray, BoolArray]:
    """(int64 `[N, K]` experts, 0 where nothing was chosen; bool `[N, K]`, whether it was)."""
    ids = trace.topk_ids[rows, position].astype(np.int64)
    chosen = ids != UNUSED
    return np.where(chosen, ids, 0), chosen


def first_choices(trace: RoutingTrace) -> RoutingTrace:
    """The trace with each row's heaviest expert alone: what decides where a coherent row goes."""
    weights = np.where(trace.topk_ids == UNUSED, -1.0, trace.topk_weights.astype(np.float64))
    slot = weights.argmax(2)[:, :, None]
    return replace(
        trace,
        topk_ids=np.take_along_axis(trace.topk_ids, slot, 2),
        topk_weights=np.take_along_axis(trace.topk_weights, slot, 2),
        top_k=(1,) * len(trace.layer_ids),
    )

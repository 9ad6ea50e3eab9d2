"""The plans to beat: contiguous, random, balanced by load, EPLB's.

Each gives for every MoE layer bool `[E, G]`. Knows no affinity.
"""

from __future__ import annotations

import numpy as np
from moe_runtime.placement.affinity import Affinity
from moe_runtime.placement.assign import LayerSlots, balanced_start, overload
from moe_runtime.placement.eplb import eplb
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.replicas import balance, replica_counts

__all__ = ["balanced", "baselines", "contiguous", "random_placement"]


def contiguous(experts: tuple[int, ...], devices: int) -> list[BoolArray]:
    """Blocks of neighbouring experts, as nearly equal as can be: what engines do by default."""
    return [
        (np.arange(count) * devices // count)[:, None] == np.arange(devices) for count in experts
    ]


def random_placement(experts: tuple[int, ...], devices: int, seed: int) -> list[BoolArray]:
    """Equal blocks of shuffled experts."""
    rng = np.random.default_rng(seed)
    return [held[rng.permutation(len(held))] for held in contiguous(experts, devices)]


def balanced(problem: Problem, affinity: Affinity, seed: int = 0) -> list[BoolArray]:
    """Only the load balanced, with the problem's replicas: also the witness for a load cap."""
    placement = []
    for position, load in enumerate(affinity.load):
        if problem.counts == "equal":
            shares = problem.topology.load_shares
            placement += balance(
                load[None], problem.devices, problem.redundant, shares=shares, seed=seed
            )
        else:
            placement.append(_balanced_capped(problem, position, load, seed))
    return placement


def _balanced_capped(problem: Problem, position: int, load: np.ndarray, seed: int) -> BoolArray:
    """Counts between bounds: the best of some random starts."""
    copies = replica_counts(load, len(load) + problem.redundant, problem.devices)
    owner = np.repeat(np.arange(len(load)), copies)
    slots = LayerSlots(
        owner=owner, load=load[owner] / copies[owner], limits=problem.limits(position, load)
    )
    rng = np.random.default_rng(seed)
    found = [balanced_start(slots, rng, noise) for noise in (0.0, 0.1, 0.2, 0.3)]
    device = min(found, key=lambda one: overload(slots, one))
    return slots.held(device)


def baselines(
    problem: Problem,
    affinity: Affinity,
    seed: int = 0,
    *,
    even: list[BoolArray] | None = None,
) -> dict[str, list[BoolArray]]:
    """All of them by name.

    Args:
        even: what `balanced` gives, if it is at hand: the search takes seconds on large problems.

    EPLB's is left out where counts need not be equal, or where it puts an expert twice on one
    device, which a placement cannot hold.
    """
    devices, experts = problem.devices, problem.experts
    found = {
        "contiguous": contiguous(experts, devices),
        "random": random_placement(experts, devices, seed),
        "load-balanced": balanced(problem, affinity, seed) if even is None else even,
    }
    rival = _eplb(problem, affinity)
    if rival is not None:
        found["eplb"] = rival
    return found


def _eplb(problem: Problem, affinity: Affinity) -> list[BoolArray] | None:
    if problem.counts != "equal":
        return None
    placement = []
    for load in affinity.load:
        slots = len(load) + problem.redundant
        copies = eplb(load[None], slots, 1, 1, problem.devices).copies(problem.devices)[0]
        if copies.max() > 1:
            return None
        placement.append(copies > 0)
    return placement

"""From recordings to a plan: smoothing, caps, solving, and what it is worth held out.

Puts the parts together; which method solves, and what it proves, is `methods`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from moe_runtime.placement.affinity import Affinity, affinity_of, support_of
from moe_runtime.placement.baselines import balanced, baselines
from moe_runtime.placement.cost import crossing_of, load_of, measure
from moe_runtime.placement.eplb import eplb
from moe_runtime.placement.flows import flow_summary
from moe_runtime.placement.instance import make_instance
from moe_runtime.placement.methods import Progress, SolveOptions, solve
from moe_runtime.placement.plan import BoolArray, LayerPlan, Plan
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.recordings import Recording
from moe_runtime.placement.replicas import imbalance
from moe_runtime.placement.smoothing import LEVELS, Smoothing, choose_smoothing, level_called
from moe_runtime.placement.sweep import sweep

from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace

__all__ = ["make_plan", "plan_metrics", "plan_of", "split_holdout"]


def make_plan(
    problem: Problem,
    train: Recording,
    *,
    held_out: Recording | None = None,
    options: SolveOptions | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Fit a plan to a recording and measure it on another.

    Args:
        train: what the plan is made from.
        held_out: tokens that it must not see; None to measure on the training tokens only.
        progress: called with (what is being done, best cost so far, bound so far).

    Returns:
        The plan with its certificate and metrics: `train` and `held_out` for the plan and for each
        baseline, what goes from device to device, the smoothing, and the support of the counts.

    Raises:
        PlanError: caps that cannot be kept, no affinity where it is needed, other layers.
        TraceError: no tokens.
    """
    options = options or SolveOptions()
    say = progress or (lambda *_: None)
    began = time.perf_counter()
    within = problem.objective.distinct > 0
    raw = affinity_of(train, weighted=options.weighted, within=within)
    level, tried = _smoothing(problem, train, options, say)
    witness = balanced(problem, raw, options.seed)
    caps = _caps(problem, raw, witness)
    solved = solve(problem, train, raw, level, options, witness, caps, say, began)
    say("measure", None, None)
    metrics = plan_metrics(
        problem,
        solved.placement,
        train,
        held_out=held_out,
        witness=witness,
        raw=raw,
        seed=options.seed,
    )
    metrics["smoothing"] = {"level": level.name, "held_out_costs": tried}
    if isinstance(train, RoutingTrace) and len(train.layer_ids) > 1:
        support = support_of(train, seed=options.seed)
        metrics["support"] = asdict(support) | {"interval": list(support.interval)}
    plan = plan_of(problem, solved.placement, train)
    return replace(
        plan,
        certificate=solved.certificate,
        metrics=metrics,
        settings={**problem.to_dict(), **asdict(options)},
    )


def plan_of(problem: Problem, placement: Sequence[BoolArray], source: Recording) -> Plan:
    """A bare plan of a placement."""
    return Plan(
        topology=problem.topology,
        layers=tuple(
            LayerPlan(
                layer=layer,
                hosts=tuple(tuple(np.flatnonzero(row).tolist()) for row in held),
            )
            for layer, held in zip(problem.layer_ids, placement, strict=True)
        ),
        model_id=source.model_id,
        fingerprint=source.fingerprint,
        top_k=tuple(source.top_k),
    )


def split_holdout(
    trace: RoutingTrace, share: float, seed: int = 0
) -> tuple[RoutingTrace, RoutingTrace]:
    """Training and held-out rows: whole sequences where there are four, else the tail of the rows.

    Raises:
        PlanError: a share outside 0 to 1, or too few rows for two parts.
    """
    if not 0 < share < 1:
        raise PlanError(f"the held-out share must lie between 0 and 1, found {share}")
    sequences = np.unique(trace.sequence_ids)
    if len(sequences) >= 4:
        order = np.random.default_rng(seed).permutation(sequences)
        count = min(max(1, round(share * len(order))), len(order) - 1)
        test = np.isin(trace.sequence_ids, order[:count])
    else:
        test = np.arange(len(trace)) >= round((1 - share) * len(trace))
    if test.all() or not test.any():
        raise PlanError(
            f"{len(trace)} tokens cannot be split into training and held-out ones; record more, or "
            "name another trace with --test"
        )
    return trace.select(rows=~test), trace.select(rows=test)


def plan_metrics(
    problem: Problem,
    placement: Sequence[BoolArray],
    train: Recording,
    *,
    held_out: Recording | None = None,
    witness: list[BoolArray] | None = None,
    raw: Affinity | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that was measured, the plan beside the baselines, train beside held-out.

    Args:
        witness: what `balanced` gives, if it is at hand.
        raw: `affinity_of(train)`, likewise.
    """
    raw = affinity_of(train, within=False) if raw is None else raw
    rivals = {"plan": list(placement), **baselines(problem, raw, seed, even=witness)}
    tokens = {"train": (train, affinity_of(train, within=False) if raw.weighted else raw)}
    if held_out is not None:
        tokens["held_out"] = (held_out, affinity_of(held_out, within=False))
    measured = {
        name: {
            kind: measure(held, problem.topology, recording, counts).to_dict()
            for kind, (recording, counts) in tokens.items()
        }
        for name, held in rivals.items()
    }
    mine = measured.pop("plan")
    kind, (_, counts) = list(tokens.items())[-1]
    blocks = flow_summary(placement, counts, kind)
    return {**mine, "baselines": measured, "blocks": blocks}


# -- steps ---------------------------------------------------------------------------------------


def _smoothing(
    problem: Problem, train: Recording, options: SolveOptions, say: Progress
) -> tuple[Smoothing, dict[str, float]]:
    """The level asked for, or the one that cross-validation prefers."""
    if options.smoothing != "auto":
        return level_called(options.smoothing), {}
    if not isinstance(train, RoutingTrace) or len(train.layer_ids) < 2:
        return LEVELS["none"], {}
    if problem.objective.is_load or options.method in ("exact", "highs", "cbc"):
        return LEVELS["none"], {}  # programs prove something about the counts as they are
    if min(problem.experts) < problem.devices:
        return LEVELS["none"], {}  # only replicas fill the devices, and the trial has none
    even = all(count % problem.devices == 0 for count in problem.experts)
    free = replace(
        problem,
        load_cap=None,
        redundant=0,
        objective=Objective(),
        counts=problem.counts if even else "capped",
    )

    def fit(part: RoutingTrace, level: Smoothing) -> Callable[[RoutingTrace], float]:
        say(f"smoothing: {level.name}", None, None)
        counts = level.count(part, weighted=options.weighted, within=False)
        instance = make_instance(free, counts, lag_weights=level.lag_weights, power=level.power)
        found = sweep(instance, seed=options.seed, starts=3, perturbations=2, time_limit=10.0)
        placement = instance.placement(found.assignment)
        return lambda test: crossing_of(placement, affinity_of(test, within=False))

    return choose_smoothing(train, fit)


def _caps(problem: Problem, affinity: Affinity, witness: Sequence[BoolArray]) -> list[float] | None:
    """The load cap of each layer, which the witness keeps; None if there is none.

    With replicas and no cap asked for, it is what EPLB reaches, or balancing where that is worse.

    Raises:
        PlanError: the witness does not keep the cap.
    """
    if problem.load_cap is None and not problem.redundant:
        return None
    caps = []
    shares = problem.topology.load_shares
    for layer, held, load in zip(problem.layer_ids, witness, affinity.load, strict=True):
        reached = load_of(held, load, problem.topology)
        if problem.load_cap is not None and reached > problem.load_cap * (1 + 1e-9):
            raise PlanError(
                f"the load cap of {problem.load_cap} cannot be kept in layer {layer}: the most "
                f"even placement found has {reached:.4f}; raise --load-cap to that, or add "
                "redundant slots"
            )
        cap = problem.load_cap
        if cap is None:
            slots = len(load) + problem.redundant
            rival = reached
            if problem.counts == "equal" and load.sum() > 0:
                copies = eplb(load[None], slots, 1, 1, problem.devices).copies(problem.devices)
                rival = imbalance(load, copies[0], shares)
            cap = max(reached, rival) * (1 + 1e-9)
        caps.append(cap)
    return caps

"""From recordings to a plan: smoothing, solving, the certificate, and what it is worth held out.

Puts the parts together; each algorithm has a file of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from moe_runtime.placement.affinity import Affinity, affinity_of, support_of
from moe_runtime.placement.baselines import balanced, baselines
from moe_runtime.placement.bounds import Bound, lower_bound
from moe_runtime.placement.cost import crossing_of, load_of, measure
from moe_runtime.placement.eplb import eplb
from moe_runtime.placement.exact import solve_exactly
from moe_runtime.placement.flows import flow_summary
from moe_runtime.placement.ilp import solve_in_stages as solve_program_in_stages
from moe_runtime.placement.ilp import solve_program
from moe_runtime.placement.instance import Assignment, Instance, make_instance
from moe_runtime.placement.plan import BoolArray, Certificate, LayerPlan, Plan
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.recordings import Recording
from moe_runtime.placement.replicas import imbalance
from moe_runtime.placement.smoothing import LEVELS, Smoothing, choose_smoothing, level_called
from moe_runtime.placement.sweep import keeping_caps, sweep
from moe_runtime.placement.two_stage import solve_in_stages
from moe_runtime.placement.windows import polish

from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace

__all__ = ["METHODS", "SolveOptions", "make_plan", "plan_metrics", "plan_of", "split_holdout"]

Progress: TypeAlias = Callable[[str, float | None, float | None], None]

METHODS = ("auto", "sweep", "exact", "highs", "cbc")
# Of the time limit: the sweeps, the polish by exact windows, the rest for the bound.
_SWEEP_SHARE, _POLISH_SHARE = 0.45, 0.2
_EQUAL = 1e-6  # relative: bounds give away some rounding of singular values


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """How a plan is looked for.

    Args:
        method: `"auto"` (dynamic programming where a layer has few placements, else sweeps and
            exact windows), `"sweep"` (neither), `"exact"` (dynamic programming
            or an error), `"highs"` or `"cbc"` (ExFlow's integer program, that solver).
        stages: 1, or 2: nodes first, then the devices inside each (ExFlow).
        smoothing: `"auto"`, or a name in `LEVELS`.
        weighted: count uses by the router's weights.
        seed: of all random choices.
        time_limit: seconds for solving and the bound together.
        starts: starts of the sweeps.
    """

    method: str = "auto"
    stages: int = 1
    smoothing: str = "auto"
    weighted: bool = False
    seed: int = 0
    time_limit: float = 60.0
    starts: int = 8

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PlanError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}")
        if self.stages not in (1, 2):
            raise PlanError(f"stages must be 1 or 2, found {self.stages}")
        if not (np.isfinite(self.time_limit) and self.time_limit > 0):
            raise PlanError(f"the time limit must be positive seconds, found {self.time_limit}")
        if self.starts < 1:
            raise PlanError(f"starts must be 1 or more, found {self.starts}")
        if self.smoothing != "auto":
            level_called(self.smoothing)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Solved:
    placement: list[BoolArray]
    certificate: Certificate


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
    solved = _solve(problem, train, raw, level, options, witness, caps, say, began)
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


def _solve(
    problem: Problem,
    train: Recording,
    raw: Affinity,
    level: Smoothing,
    options: SolveOptions,
    witness: list[BoolArray],
    caps: list[float] | None,
    say: Progress,
    began: float,
) -> _Solved:
    if problem.objective.is_load:
        return _balanced_only(problem, raw, witness, options, began)
    counts = raw
    if level.repeats or len(level.lag_weights) > 1:
        assert isinstance(train, RoutingTrace)
        within = problem.objective.distinct > 0
        counts = level.count(train, weighted=options.weighted, within=within)
        # Loads are capped as they are, whatever is done to the affinity.
        counts = replace(counts, load=raw.load)
    instance = make_instance(
        problem,
        counts,
        lag_weights=level.lag_weights,
        power=level.power,
        witness=witness,
        load_caps=caps,
    )
    start = instance.assignment(witness)
    assignment, bound, method, proved = _search(problem, instance, start, options, say, began)
    cost = instance.cost(assignment)
    smoothed = "" if level.name == "none" else f", counts smoothed ({level.name})"
    certificate = Certificate(
        objective=f"{problem.objective} on the training tokens{smoothed}",
        value=cost,
        bound=cost if proved else min(bound.cost, cost),
        bound_method=bound.method,
        status="optimal" if proved or cost - bound.cost <= _EQUAL * cost else "feasible",
        method=method,
        seconds=time.perf_counter() - began,
        seed=options.seed,
    )
    return _Solved(placement=instance.placement(assignment), certificate=certificate)


def _search(
    problem: Problem,
    instance: Instance,
    witness: Assignment,
    options: SolveOptions,
    say: Progress,
    began: float,
) -> tuple[Assignment, Bound, str, bool]:
    """(assignment, bound, how found, whether proved optimal)."""
    if options.method in ("auto", "exact") and options.stages == 1:
        say("dynamic programming", None, None)
        most = 20_000 if options.method == "exact" else 3_000
        found = solve_exactly(instance, most_states=most)
        if found is not None:
            bound = Bound(cost=instance.cost(found), method="dynamic programming over the layers")
            return found, bound, "dynamic programming", True
        if options.method == "exact":
            raise PlanError(
                "a layer has too many placements for dynamic programming, or layers further apart "
                "count; use --method sweep, highs or cbc"
            )
    if options.method in ("highs", "cbc"):
        return _program(problem, instance, witness, options, say)

    def best(cost: float) -> None:
        say("sweep", cost, None)

    limit = options.time_limit

    def solve(one: Instance, start: Assignment | None = None) -> Assignment:
        share = (
            _SWEEP_SHARE * limit / (1 if options.stages == 1 else problem.topology.node_count + 1)
        )
        return sweep(
            one,
            seed=options.seed,
            starts=options.starts,
            perturbations=3 * options.starts,
            time_limit=share,
            witness=start,
            progress=lambda _, cost: best(cost),
        ).assignment

    method = "sweeps with exact layers"
    if options.stages == 2 and problem.topology.node_count > 1:
        assignment = solve_in_stages(instance, problem.topology, solve)
        # Inside a node there may be no way to keep a cap that the whole can keep.
        assignment = keeping_caps(instance, assignment, witness)
        method += ", nodes then devices"
    else:
        assignment = solve(instance, witness)
    if options.method == "auto" and options.stages == 1:
        say("polish", instance.cost(assignment), None)
        assignment, accepted = polish(
            instance, assignment, time_limit=_POLISH_SHARE * limit, seed=options.seed
        )
        method += f", exact windows ({accepted} improvements)"
    cost = instance.cost(assignment)
    left = max(0.05 * limit, limit - (time.perf_counter() - began))
    bound = lower_bound(instance, time_limit=left, progress=lambda low: say("bound", cost, low))
    return assignment, bound, method, False


def _program(
    problem: Problem,
    instance: Instance,
    witness: Assignment,
    options: SolveOptions,
    say: Progress,
) -> tuple[Assignment, Bound, str, bool]:
    say(f"integer program ({options.method})", None, None)
    asked: dict[str, Any] = {
        "solver": options.method,
        "time_limit": options.time_limit,
        "seed": options.seed,
    }
    if options.stages == 2:
        found = solve_program_in_stages(instance, problem.topology, **asked)
    else:
        found = solve_program(instance, warm=witness, **asked)
    if found.assignment is None:
        raise PlanError(
            f"{options.method} found no placement within {options.time_limit:g} seconds; give it "
            "more time, or use --method sweep"
        )
    bound = lower_bound(instance, time_limit=0.2 * options.time_limit)
    if found.bound is not None and found.bound > bound.cost:
        bound = Bound(cost=found.bound, method=f"dual bound of {options.method}")
    return found.assignment, bound, f"integer program ({options.method})", found.proved


def _balanced_only(
    problem: Problem,
    raw: Affinity,
    witness: list[BoolArray],
    options: SolveOptions,
    began: float,
) -> _Solved:
    """A plan for the load alone; what it proves is the mean of the layers' highest loads."""
    loads = [
        load_of(held, load, problem.topology) for held, load in zip(witness, raw.load, strict=True)
    ]
    value, bound = float(np.mean(loads)), 1.0
    return _Solved(
        placement=witness,
        certificate=Certificate(
            objective="load on the training tokens (highest over mean, mean of the layers)",
            value=value,
            bound=bound,
            bound_method="the mean load",
            status="optimal" if value - bound < 1e-9 else "feasible",
            method="optimal replica counts, packing by local search",
            seconds=time.perf_counter() - began,
            seed=options.seed,
        ),
    )


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

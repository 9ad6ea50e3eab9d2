"""From recordings to plans: what comes out, what is proved, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.baselines import baselines
from moe_runtime.placement.cost import measure
from moe_runtime.placement.eplb import eplb
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.replicas import imbalance
from moe_runtime.placement.solve import make_plan, split_holdout
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import RoutingTrace
from planted import planted_trace

QUICK: dict[str, Any] = {"smoothing": "none", "time_limit": 1.0, "starts": 2}


def problem_of(trace: RoutingTrace, devices: int = 4, **options: Any) -> Problem:
    options.setdefault("topology", Topology.of(devices))
    return Problem(layer_ids=trace.layer_ids, experts=trace.experts, **options)


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return planted_trace(5, 16, 4, tokens=1200, stay=0.8, seed=7)[0]


@pytest.fixture(scope="module")
def small() -> RoutingTrace:
    return planted_trace(3, 8, 2, tokens=200, stay=0.6)[0]


def test_a_plan_beats_the_others_on_tokens_it_has_not_seen(trace: RoutingTrace) -> None:
    train, test = split_holdout(trace, 0.3)
    plan = make_plan(problem_of(trace), train, held_out=test, options=SolveOptions(**QUICK))
    mine = plan.metrics["held_out"]
    assert set(plan.metrics["baselines"]) == {"contiguous", "random", "load-balanced", "eplb"}
    for rival in plan.metrics["baselines"].values():
        assert mine["crossing"] < 0.6 * rival["held_out"]["crossing"]
        assert mine["distinct_devices"] < rival["held_out"]["distinct_devices"]
    assert mine == measure(plan.matrices(), plan.topology, test).to_dict()
    support = plan.metrics["support"]
    assert support["excess"] > support["excess_shuffled"]
    assert support["tokens"] == len(train)


@pytest.mark.parametrize("method", ["auto", "sweep", "exact", "highs", "cbc"])
def test_every_method_gives_a_plan_with_an_honest_certificate(
    small: RoutingTrace, method: str
) -> None:
    options = SolveOptions(**(QUICK | {"method": method, "time_limit": 8.0}))
    plan = make_plan(problem_of(small, 2), small, options=options)
    found = plan.certificate
    assert found is not None
    assert found.value == pytest.approx(plan.metrics["train"]["crossing"], abs=1e-9)
    best = make_plan(
        problem_of(small, 2), small, options=SolveOptions(**(QUICK | {"method": "exact"}))
    ).certificate
    assert best is not None
    assert best.status == "optimal"
    assert found.bound <= best.value + 1e-9 <= found.value + 2e-9
    if found.status == "optimal":
        assert found.value == pytest.approx(best.value, abs=1e-6)


def test_the_certificate_is_of_the_plan_in_the_file(trace: RoutingTrace, tmp_path: Any) -> None:
    plan = make_plan(problem_of(trace, load_cap=1.2), trace, options=SolveOptions(**QUICK))
    loaded = Plan.load(plan.save(tmp_path / "a.plan.json"))
    assert loaded.layers == plan.layers
    assert loaded.metrics == plan.metrics
    found = measure(loaded.matrices(), loaded.topology, trace)
    assert plan.certificate is not None
    assert found.crossing == pytest.approx(plan.certificate.value, abs=1e-9)
    assert found.load_worst <= 1.2 + 1e-9


def test_the_same_seed_gives_the_same_plan(trace: RoutingTrace) -> None:
    options = SolveOptions(smoothing="strong", time_limit=60.0, starts=2, method="sweep")
    one, two = (make_plan(problem_of(trace), trace, options=options) for _ in range(2))
    assert one.layers == two.layers
    assert one.metrics == two.metrics


def test_two_stages_cross_few_nodes() -> None:
    trace, _ = planted_trace(5, 16, 4, tokens=1500, stay=0.3, nodes=2, stay_in_node=0.8)
    problem = problem_of(trace, topology=Topology.of(4, 2))
    two, one = (
        make_plan(problem, trace, options=SolveOptions(**QUICK, stages=stages)) for stages in (2, 1)
    )
    assert two.metrics["train"]["node_crossing"] <= one.metrics["train"]["node_crossing"] + 1e-9
    assert two.certificate is not None
    assert "nodes then devices" in two.certificate.method


def two_nodes_trace(seed: int) -> RoutingTrace:
    return planted_trace(
        4, 16, 4, tokens=1500, stay=0.5, nodes=2, stay_in_node=0.7, heavy=1.0, seed=seed
    )[0]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cap", [1.02, 1.04])
def test_two_stages_keep_the_load_cap(seed: int, cap: float) -> None:
    trace = two_nodes_trace(seed)
    problem = problem_of(trace, topology=Topology.of(4, 2), load_cap=cap)
    options = SolveOptions(**QUICK, method="sweep", stages=2)
    plan = make_plan(problem, trace, options=options)
    assert plan.metrics["train"]["load_worst"] <= cap + 1e-6


def test_a_node_may_hold_nothing_of_a_layer() -> None:
    trace = two_nodes_trace(0)
    problem = problem_of(trace, topology=Topology.of(4, 2), counts="capped", slack=2.0)
    options = SolveOptions(**QUICK, method="sweep", stages=2)
    plan = make_plan(problem, trace, options=options)
    assert sum(layer.slots for layer in plan.layers) == 4 * 16


def test_fewer_experts_than_devices_are_planned_with_replicas() -> None:
    trace, _ = planted_trace(3, 4, 2, tokens=200)
    problem = problem_of(trace, 8, redundant=4)
    plan = make_plan(problem, trace, options=SolveOptions(**(QUICK | {"smoothing": "auto"})))
    assert all(layer.slots == 8 for layer in plan.layers)


@pytest.mark.parametrize("redundant", [4, 8])
def test_replicas_are_as_even_as_eplbs_and_keep_affinity(redundant: int) -> None:
    trace, _ = planted_trace(4, 16, 4, tokens=1500, stay=0.9, heavy=0.8, seed=3)
    problem = problem_of(trace, redundant=redundant)
    plan = make_plan(problem, trace, options=SolveOptions(**QUICK))
    counts = affinity_of(trace)
    for position, load in enumerate(counts.load):
        copies = eplb(load[None], 16 + redundant, 1, 1, 4).copies(4)[0]
        rival = imbalance(load, copies)
        even = baselines(problem, counts)["load-balanced"][position]
        mine = imbalance(load, plan.matrix(position))
        assert mine <= max(rival, imbalance(load, even)) + 1e-6
    assert all(layer.slots == 16 + redundant for layer in plan.layers)
    balanced = plan.metrics["baselines"]["load-balanced"]["train"]
    assert plan.metrics["train"]["crossing"] < balanced["crossing"]


def test_capped_counts_keep_their_cap(trace: RoutingTrace) -> None:
    problem = problem_of(trace, 3, counts="capped", slack=1.2)
    plan = make_plan(problem, trace, options=SolveOptions(**QUICK))
    for position in range(5):
        held = [len(experts) for experts in plan.device_experts(position)]
        assert sum(held) == 16
        assert max(held) <= np.ceil(1.2 * 16 / 3)
    assert "eplb" not in plan.metrics["baselines"]


def test_counts_without_tokens_can_be_balanced_and_nothing_else(trace: RoutingTrace) -> None:
    counts = RoutingCounts.from_trace(trace)
    problem = problem_of(trace, objective=Objective.parse("load"))
    plan = make_plan(problem, counts, options=SolveOptions(**QUICK))
    assert plan.metrics["train"]["load"] < 1.1
    assert plan.metrics["train"]["crossing"] is None
    for objective in ("crossing", "distinct", "time"):
        wanted = problem_of(trace, objective=Objective.parse(objective))
        with pytest.raises(PlanError, match="counts without tokens"):
            make_plan(wanted, counts, options=SolveOptions(**QUICK))


def test_a_cap_that_cannot_be_kept_names_the_layer_and_what_can() -> None:
    trace, _ = planted_trace(3, 8, 4, tokens=300, heavy=1.5, seed=2)
    with pytest.raises(PlanError, match=r"load cap of 1\.01 cannot be kept in layer \d+"):
        make_plan(problem_of(trace, load_cap=1.01), trace, options=SolveOptions(**QUICK))


def test_a_search_that_is_too_large_for_the_exact_method_is_refused(trace: RoutingTrace) -> None:
    with pytest.raises(PlanError, match="too many placements"):
        make_plan(problem_of(trace), trace, options=SolveOptions(**QUICK, method="exact"))


def test_counts_of_other_layers_are_refused(trace: RoutingTrace, small: RoutingTrace) -> None:
    with pytest.raises(PlanError, match="layers"):
        make_plan(problem_of(trace), small, options=SolveOptions(**QUICK))


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_held_out_tokens_are_not_trained_on(sequences: int) -> None:
    trace, _ = planted_trace(2, 8, 2, tokens=80, sequences=sequences)
    train, test = split_holdout(trace, 0.25, seed=1)
    assert len(train) + len(test) == 80
    assert 0.15 <= len(test) / 80 <= 0.35
    shared = set(train.sequence_ids.tolist()) & set(test.sequence_ids.tolist())
    assert bool(shared) == (sequences < 4)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_shares_that_leave_nothing_are_refused(trace: RoutingTrace, share: float) -> None:
    with pytest.raises(PlanError, match="held-out share"):
        split_holdout(trace, share)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"stages": 3}, "stages"),
        ({"time_limit": 0.0}, "time limit"),
        ({"starts": 0}, "starts"),
        ({"smoothing": "much"}, "smoothing"),
    ],
)
def test_options_are_checked(option: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        SolveOptions(**option)

"""Plans of whole routing groups: the figures of the groups are those of their experts."""

from __future__ import annotations

import numpy as np
import pytest
from moe_runtime.placement.cost import measure
from moe_runtime.placement.groups import experts_of_groups, grouped_problem, in_groups
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.solve import make_plan
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED, RoutingTrace

LAYERS, EXPERTS, GROUPS, TOP_K = 3, 12, 4, 3


def some_trace(rows: int = 60) -> RoutingTrace:
    rng = np.random.default_rng(3)
    ids = rng.random((rows, LAYERS, EXPERTS)).argpartition(TOP_K, axis=2)[:, :, :TOP_K]
    ids = ids.astype(np.uint16)
    ids[0, 0, 2] = UNUSED
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=np.ones(ids.shape, np.float16),
        token_ids=np.arange(rows, dtype=np.int32),
        sequence_ids=(np.arange(rows) // 10).astype(np.int32),
        positions=(np.arange(rows) % 10).astype(np.int32),
        phase=np.zeros(rows, np.uint8),
        step_ids=np.arange(rows, dtype=np.int32),
        layer_ids=(1, 2, 5),
        experts=(EXPERTS,) * LAYERS,
    )


def test_a_plan_of_groups_costs_the_same_as_that_of_their_experts() -> None:
    trace = some_trace()
    problem = Problem(layer_ids=trace.layer_ids, experts=trace.experts, topology=Topology.of(2))
    grouped = make_plan(
        grouped_problem(problem, GROUPS),
        in_groups(trace, GROUPS),
        options=SolveOptions(smoothing="none", time_limit=1.0),
    )
    plan = experts_of_groups(grouped, trace.experts)
    size = EXPERTS // GROUPS
    for layer in plan.layers:
        for group in range(GROUPS):
            assert len(set(layer.hosts[group * size : (group + 1) * size])) == 1
    found = measure(plan.matrices(), plan.topology, trace).to_dict()
    assert found == pytest.approx(grouped.metrics["train"])
    assert plan.certificate is not None
    assert plan.certificate.value == pytest.approx(found["crossing"])


def test_counts_are_summed_by_group() -> None:
    counts = RoutingCounts(counts=(np.arange(6.0),), layer_ids=(2,))
    assert in_groups(counts, 3).counts[0].tolist() == [1.0, 5.0, 9.0]


@pytest.mark.parametrize(
    ("groups", "devices", "redundant", "said"),
    [
        (5, 1, 0, "layer 1: 5 groups do not divide 12 experts"),
        (4, 3, 0, "4 routing groups cannot stay whole on 3 devices"),
        (4, 2, 2, "--redundant 0"),
    ],
)
def test_what_cannot_stay_whole_is_refused(
    groups: int, devices: int, redundant: int, said: str
) -> None:
    problem = Problem(
        layer_ids=(1, 2),
        experts=(12, 12),
        topology=Topology.of(devices),
        redundant=redundant,
    )
    with pytest.raises(PlanError, match=said):
        grouped_problem(problem, groups)

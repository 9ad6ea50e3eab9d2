"""Residency plans: exact against brute force, within every budget, and honest about their bounds.

Does not run a model: `test_pinning.py` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.ilp_residency import solve_packing
from moe_runtime.placement.packing import Packing, fractional_bound, greedy, pack
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.residency import (
    TierAssignment,
    apply_tiers,
    assign_tiers,
    count_uses,
    shrink_counts,
)
from moe_runtime.placement.topology import Topology

from moe_runtime.core import FloatArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace


def plan_of(
    hosts: Sequence[Sequence[Sequence[int]]], devices: int = 1, memory: int = 0, top_k: int = 1
) -> Plan:
    return Plan(
        topology=Topology.of(devices, memory=memory),
        layers=tuple(
            LayerPlan(layer=2 * at + 1, hosts=tuple(tuple(d) for d in layer))
            for at, layer in enumerate(hosts)
        ),
        top_k=(top_k,) * len(hosts),
    )


def one_device(experts: Sequence[int], memory: int = 0, top_k: int = 1) -> Plan:
    return plan_of([[[0]] * count for count in experts], memory=memory, top_k=top_k)


def most_uses(packing: Packing) -> float | None:
    """By trying every choice; None if none keeps capacities and floors."""
    best = None
    for flags in itertools.product((False, True), repeat=len(packing.uses)):
        chosen = np.array(flags, np.bool_)
        if packing.fits(chosen):
            best = max(best or 0.0, packing.value(chosen))
    return best


@st.composite
def problems(draw: st.DrawFn, *, equal: bool = False, replicas: bool = True) -> dict[str, Any]:
    """Arguments of `assign_tiers` with ten experts at most."""
    devices = draw(st.integers(1, 3))
    layers = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    size = st.just(7) if equal else st.integers(1, 9)
    held = []
    for count in layers:
        matrix = np.zeros((count, devices), np.bool_)
        for expert in range(count):
            most = devices if replicas else 1
            chosen = draw(st.sets(st.integers(0, devices - 1), min_size=1, max_size=most))
            matrix[expert, list(chosen)] = True
        held.append(matrix)
    return {
        "counts": [
            np.array(draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)), np.float64)
            for n in layers
        ],
        "expert_bytes": [draw(size) for _ in layers],
        "held": held,
        "memory": [draw(st.integers(1, 40)) for _ in range(devices)],
    }


def packing_of(problem: dict[str, Any]) -> Packing:
    counts, held = problem["counts"], problem["held"]
    sizes = [np.full(len(m), s) for m, s in zip(held, problem["expert_bytes"], strict=True)]
    return Packing(
        uses=np.concatenate(counts),
        nbytes=np.concatenate(sizes).astype(np.int64),
        held=np.concatenate(held),
        capacity=np.array(problem["memory"], np.float64),
    )


def on_device(found: TierAssignment) -> np.ndarray:
    return np.array([tier == "device" for layer in found.tiers for tier in layer], np.bool_)


def value(found: TierAssignment, counts: Sequence[FloatArray]) -> float:
    return float(np.concatenate(counts)[on_device(found)].sum())


@settings(max_examples=60)
@given(problems())
def test_no_choice_serves_more_uses(problem: dict[str, Any]) -> None:
    packing = packing_of(problem)
    found = assign_tiers(**problem)
    best = most_uses(packing)
    assert packing.fits(on_device(found))
    assert value(found, problem["counts"]) == best
    assert found.certificate.status == "optimal"
    assert found.certificate.gap == 0


@settings(max_examples=40)
@given(problems(), st.integers(1, 3))
def test_floors_are_kept_at_the_best_price(problem: dict[str, Any], floor: int) -> None:
    packing = packing_of(problem)
    offset, floors = 0, []
    for matrix in problem["held"]:
        for device in range(matrix.shape[1]):
            members = offset + np.flatnonzero(matrix[:, device])
            floors.append((members, min(floor, len(members))))
        offset += len(matrix)
    feasible = [
        np.array(flags)
        for flags in itertools.product((False, True), repeat=len(packing.uses))
        if packing.fits(np.array(flags))
        and all(np.array(flags)[members].sum() >= least for members, least in floors)
    ]
    if not feasible:
        with pytest.raises(PlanError, match="floor"):
            assign_tiers(**problem, floor=floor)
        return
    found = assign_tiers(**problem, floor=floor)
    chosen = on_device(found)
    assert packing.fits(chosen)
    assert all(chosen[members].sum() >= least for members, least in floors)
    assert packing.value(chosen) == max(packing.value(flags) for flags in feasible)


@given(problems(equal=True, replicas=False))
def test_equal_bytes_are_a_matter_of_sorting(problem: dict[str, Any]) -> None:
    packing = packing_of(problem)
    found = assign_tiers(**problem)
    assert found.certificate.method == "sorted by uses"
    assert value(found, problem["counts"]) == packing.value(greedy(packing))
    for device, memory in enumerate(problem["memory"]):
        mine = packing.held[:, device]
        best = np.sort(packing.uses[mine])[::-1][: memory // 7].sum()
        assert packing.value(on_device(found) & mine) == best


@given(problems(), st.integers(0, 60))
def test_tiers_keep_their_budgets_and_host_comes_second(problem: dict[str, Any], host: int) -> None:
    packing = packing_of(problem)
    found = assign_tiers(**problem, host_bytes=host)
    tiers = np.array([tier for layer in found.tiers for tier in layer])
    assert (packing.load(tiers == "device") <= packing.capacity).all()
    assert packing.nbytes[tiers == "host"].sum() <= host
    alone = assign_tiers(**problem)
    assert value(found, problem["counts"]) == value(alone, problem["counts"])
    spare = host - packing.nbytes[tiers == "host"].sum()
    assert not ((tiers == "disk") & (packing.uses > 0) & (packing.nbytes <= spare)).any()


@given(problems(), st.integers(0, 20))
def test_more_memory_never_serves_fewer_uses(problem: dict[str, Any], more: int) -> None:
    larger = {**problem, "memory": [memory + more for memory in problem["memory"]]}
    counts = problem["counts"]
    assert value(assign_tiers(**problem), counts) <= value(assign_tiers(**larger), counts)


@given(problems())
def test_bounds_hold_for_every_choice(problem: dict[str, Any]) -> None:
    packing = packing_of(problem)
    best = most_uses(packing)
    assert best is not None
    assert packing.value(greedy(packing)) <= best <= fractional_bound(packing) + 1e-9
    solved = solve_packing(packing, time_limit=5)
    assert solved is not None
    assert packing.value(solved.chosen) == best <= solved.bound + 1e-9


@pytest.mark.usefixtures("capfd")
def test_the_program_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    packing = Packing(
        uses=np.array([5.0, 4.0, 3.0]),
        nbytes=np.array([5, 4, 3]),
        held=np.ones((3, 1), np.bool_),
        capacity=np.array([7.0]),
    )
    assert pack(packing, time_limit=5).chosen.tolist() == [False, True, True]
    assert capfd.readouterr() == ("", "")


def test_a_real_size_is_solved_and_proved_within_the_time() -> None:
    """48 layers of 128 experts, of two sizes."""
    rng = np.random.default_rng(5)
    sizes = [1_769_472 if at % 2 else 1_179_648 for at in range(48)]
    found = assign_tiers(
        [rng.gamma(0.4, 100, 128).round() for _ in sizes],
        sizes,
        [np.ones((128, 1), np.bool_)] * 48,
        [2 << 30],
        time_limit=10,
    )
    assert found.certificate.gap < 1e-3
    held = sum(size * row.count("device") for size, row in zip(sizes, found.tiers, strict=True))
    assert (2 << 30) - max(sizes) < held <= 2 << 30


# -- onto a plan ---------------------------------------------------------------------------------

COUNTS = [np.array([8.0, 0.0, 2.0, 6.0]), np.array([1.0, 9.0, 3.0, 1.0])]


def test_a_plan_gets_tiers_and_says_what_they_should_serve() -> None:
    plan = one_device((4, 4), top_k=2)
    tiered = apply_tiers(plan, COUNTS, (10, 10), memory=(50,), host_bytes=20)
    assert tiered.residents() == [(1, 0), (1, 3), (3, 1)]
    assert [layer.tiers for layer in tiered.layers] == [
        ("device", "disk", "host", "device"),
        ("disk", "device", "host", "disk"),
    ]
    found = tiered.metrics["residency"]
    assert found["predicted_share"] == pytest.approx(23 / 30, abs=1e-6)
    assert found["predicted_host_share"] == pytest.approx(5 / 30, abs=1e-6)
    assert [row["predicted_share"] for row in found["layers"]] == [
        pytest.approx(14 / 16),
        pytest.approx(9 / 14, abs=1e-6),
    ]
    assert found["devices"] == [{"device": 0, "memory": 50, "pinned": 3, "pinned_bytes": 30}]
    assert Plan.from_dict(tiered.to_dict()).to_dict() == tiered.to_dict()


def test_everything_stays_where_everything_fits() -> None:
    plan = one_device((4, 4), top_k=2)
    for memory in (0, 80):
        tiered = apply_tiers(plan, COUNTS, (10, 10), memory=(memory,))
        assert len(tiered.residents()) == 8
        assert tiered.metrics["residency"]["predicted_share"] == 1


def test_experts_that_were_never_used_are_not_pinned() -> None:
    tiered = apply_tiers(one_device((4, 4)), COUNTS, (10, 10), memory=(75,), reserve=0)
    assert (1, 1) not in tiered.residents()
    shrunk = apply_tiers(one_device((4, 4)), COUNTS, (10, 10), memory=(75,), reserve=0, shrink=0.5)
    assert len(tiered.residents()) == len(shrunk.residents()) == 7
    assert shrunk.metrics["residency"]["predicted_share"] < 1


def test_each_device_fills_its_own_memory() -> None:
    plan = plan_of([[[0], [0], [1], [0, 1]]], devices=2)
    tiered = apply_tiers(plan, [np.array([5.0, 4.0, 1.0, 3.0])], (10,), memory=(20, 10), reserve=0)
    # Device 1 has one place: the replicated expert would take it and one of device 0 besides.
    assert tiered.residents() == [(1, 0), (1, 1), (1, 2)]


def test_counts_are_shrunk_within_their_layer() -> None:
    shrunk = shrink_counts(COUNTS, 0.25)
    assert [uses.sum() for uses in shrunk] == [uses.sum() for uses in COUNTS]
    assert shrunk[0].tolist() == [7.0, 1.0, 2.5, 5.5]
    assert len({*shrink_counts(COUNTS, 1.0)[0].tolist()}) == 1


def test_a_use_is_a_forward_call() -> None:
    ids = np.array([[[0, 1]], [[0, 2]], [[2, 1]]], np.uint16)
    trace = RoutingTrace(
        topk_ids=ids,
        topk_weights=np.ones(ids.shape, np.float16),
        token_ids=np.arange(3, dtype=np.int32),
        sequence_ids=np.zeros(3, np.int32),
        positions=np.arange(3, dtype=np.int32),
        phase=np.array([0, 0, 1], np.uint8),
        step_ids=np.array([0, 0, 1], np.int32),
        layer_ids=(5,),
        experts=(4,),
    )
    assert [uses.tolist() for uses in count_uses(trace)] == [[1.0, 2.0, 2.0, 0.0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": [COUNTS[0], COUNTS[1] * np.nan]}, "MoE layer 1: expert 0 has nan"),
        ({"counts": [-COUNTS[0], COUNTS[1]]}, "MoE layer 0: expert 0 has -8.0"),
        ({"counts": COUNTS[:1]}, "counts name 1 layers, the plan has 2"),
        ({"counts": [COUNTS[0], COUNTS[1][:2]]}, r"MoE layer 1 have shape \(2,\)"),
        ({"expert_bytes": (10, -1)}, "MoE layer 1 has -1 bytes"),
        ({"expert_bytes": (10,)}, "expert_bytes name 1 layers"),
        ({"memory": (-1,)}, "cannot be negative"),
        ({"memory": (10, 10)}, "memory names 2 devices, the plan has 1"),
        ({"memory": (15,)}, r"device 0: 15 bytes.*2 experts.*layer \d.*5 bytes are missing"),
        ({"memory": (50,), "reserve": 60}, "a reserve of 60 bytes"),
        ({"memory": (50,), "floor": 2}, "2 residents of every layer take 40 bytes, 10 more"),
        ({"memory": (50,), "floor": -1}, "negative"),
        ({"memory": (50,), "shrink": 1.5}, "weight of 0 to 1, found 1.5"),
    ],
)
def test_what_cannot_be_planned_is_said(changed: dict[str, Any], message: str) -> None:
    options = {"counts": COUNTS, "expert_bytes": (10, 10), **changed}
    with pytest.raises(PlanError, match=message):
        apply_tiers(one_device((4, 4), top_k=2), **options)

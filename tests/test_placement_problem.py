"""Problems: the limits they set, and what they refuse, with the numbers that are lacking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.instance import make_instance
from moe_runtime.placement.problem import Objective, Problem
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError
from placements import planted

GIB = 2**30


def problem(experts: int | tuple[int, ...] = 8, devices: int = 4, **options: Any) -> Problem:
    """Layers 3, 4, ... of so many experts."""
    counts = (experts,) if isinstance(experts, int) else experts
    options.setdefault("topology", Topology.of(devices))
    return Problem(layer_ids=tuple(range(3, 3 + len(counts))), experts=counts, **options)


# -- objectives ------------------------------------------------------------------------------------

WEIGHTS = st.integers(0, 400).map(lambda hundredths: hundredths / 100)


@given(crossing=WEIGHTS, distinct=WEIGHTS, time=WEIGHTS)
def test_an_objective_reads_what_it_writes(crossing: float, distinct: float, time: float) -> None:
    objective = Objective(crossing=crossing, distinct=distinct, time=time)
    assert Objective.parse(str(objective)) == objective
    assert objective.is_load == (str(objective) == "load") == (crossing + distinct + time == 0)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("crossing", (1, 0, 0)),
        (" load ", (0, 0, 0)),
        ("time", (0, 0, 1)),
        ("crossing + 0.5*distinct", (1, 0.5, 0)),
        ("2 * time+time", (0, 0, 3)),
        ("0*crossing", (0, 0, 0)),
    ],
)
def test_texts_of_objectives(text: str, weights: tuple[float, ...]) -> None:
    objective = Objective.parse(text)
    assert (objective.crossing, objective.distinct, objective.time) == weights


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("speed", "'speed'"),
        ("crossing+", "''"),
        ("crossing-0.5*distinct", "'crossing-0.5"),
        ("-1*time", r"'-1\*time'"),
        ("crossing+load", "'load'"),
        ("nan*time", r"'nan\*time'"),
        ("Crossing", "'Crossing'"),
    ],
)
def test_other_texts_are_refused(text: str, part: str) -> None:
    with pytest.raises(PlanError, match=f"cannot read {part}.*crossing, distinct, time"):
        Objective.parse(text)


@pytest.mark.parametrize("weight", [-0.5, np.nan, np.inf])
@pytest.mark.parametrize("name", ["crossing", "distinct", "time"])
def test_weights_are_0_or_more(name: str, weight: float) -> None:
    with pytest.raises(PlanError, match=f"weight of {name} must be 0 or more, is {weight}"):
        Objective(**{name: weight})


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: problem(()), "one MoE layer at least"),
        (lambda: problem(counts="any"), "counts must be equal or capped, found 'any'"),
        (lambda: problem(redundant=-4), "cannot be negative, found -4"),
        (lambda: problem(slack=0.9), "slack must be 1 or more, found 0.9"),
        (lambda: problem(slack=np.inf), "slack must be 1 or more, found inf"),
        (lambda: problem(load_cap=0.99), "found 0.99; no placement has a highest load below"),
        (lambda: problem(load_cap=np.nan), "a load cap is a factor .* found nan"),
        (
            lambda: problem((8, 9)),
            (
                r"layer 4: 9 slots \(9 experts, 0 redundant\) cannot be shared equally by 4 "
                "devices; take 3 redundant slots, or counts='capped'"
            ),
        ),
        (
            lambda: problem((8, 10), redundant=4),
            r"layer 4: 14 slots \(10 experts, 4 redundant\).* take 6 redundant slots",
        ),
        (lambda: problem((8, 2)), "layer 4: 2 experts are fewer than 4 devices"),
        (
            lambda: problem((8, 2), redundant=8),
            "layer 4: 8 redundant slots, but 2 experts on 4 devices have use for 6 at most",
        ),
        (
            lambda: problem(8, 1, redundant=1),
            "layer 3: 1 redundant slots, but 8 experts on 1 devices have use for 0 at most",
        ),
    ],
)
def test_slots_that_do_not_work(make: Callable[[], Problem], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


@given(experts=st.integers(1, 20), devices=st.integers(1, 6), redundant=st.integers(0, 12))
def test_the_number_of_redundant_slots_that_is_named_works(
    experts: int, devices: int, redundant: int
) -> None:
    try:
        problem(experts, devices, redundant=redundant)
    except PlanError as error:
        if "cannot be shared equally" not in str(error):
            return
        more = int(str(error).split("; take ")[1].split()[0])
        assert redundant < more < redundant + devices
        if more <= experts * (devices - 1):
            problem(experts, devices, redundant=more)


# -- memory ----------------------------------------------------------------------------------------


def test_memory_that_is_lacking_is_named() -> None:
    # Two layers of 8 experts on 4 devices, 2 of each layer on one: 2 * 1 + 2 * 3 GiB.
    sizes = (GIB, 3 * GIB)
    enough = problem((8, 8), topology=Topology.of(4, memory=8 * GIB), expert_bytes=sizes)
    assert enough.expert_bytes == sizes
    with pytest.raises(
        PlanError,
        match=r"device 0 has 6\.50 GiB for experts, an equal share of them takes 8\.00 GiB: "
        r"1\.50 GiB too little",
    ):
        problem((8, 8), topology=Topology.of(4, memory=13 * GIB // 2), expert_bytes=sizes)
    with pytest.raises(PlanError, match=r"takes 12\.00 GiB: 4\.00 GiB too little"):
        problem((8, 8), topology=Topology.of(4, memory=8 * GIB), expert_bytes=sizes, redundant=4)


def test_the_device_that_lacks_memory_is_named() -> None:
    topology = Topology.from_dict({"devices": 3, "memory": ["4GiB", 0, "1GiB"]})
    with pytest.raises(PlanError, match=r"device 2 has 1\.00 GiB.*takes 2\.00 GiB"):
        problem(6, topology=topology, expert_bytes=(GIB,))


def test_capped_counts_share_all_memory() -> None:
    topology = Topology.from_dict({"devices": 2, "memory": ["6GiB", "2GiB"]})
    limits = problem(8, topology=topology, expert_bytes=(GIB,), counts="capped", slack=1).limits(0)
    assert limits.most.tolist() == [6, 2]
    with pytest.raises(
        PlanError,
        match=r"together have 8\.00 GiB for experts, which take 9\.00 GiB: 1\.00 GiB too little",
    ):
        problem(9, topology=topology, expert_bytes=(GIB,), counts="capped")


def test_memory_does_not_matter_where_it_is_unknown_or_experts_may_spill() -> None:
    small = Topology.of(4, memory=1)
    assert problem(8, topology=small).expert_bytes == (0,)
    assert problem(8, topology=small, expert_bytes=(GIB,), spill=True).spill
    assert problem(8, expert_bytes=(GIB,)).topology.memory == (0,) * 4


# -- limits ----------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    experts=st.integers(1, 20),
    devices=st.integers(1, 5),
    slack=st.floats(1, 3),
    capped=st.booleans(),
    redundant=st.integers(0, 6),
)
def test_limits_have_room_for_all_slots(
    experts: int, devices: int, slack: float, capped: bool, redundant: int
) -> None:
    try:
        limits = problem(
            experts,
            devices,
            slack=slack,
            counts="capped" if capped else "equal",
            redundant=redundant,
        ).limits(0)
    except PlanError:
        return
    assert limits.slots == experts + redundant
    assert limits.least.sum() <= limits.slots <= limits.most.sum()
    assert (limits.most <= experts).all()
    assert np.isinf(limits.load).all()
    if capped:
        assert (limits.most <= slack * limits.slots / devices + 1).all()
        assert not limits.least.any()
    else:
        assert limits.least.tolist() == limits.most.tolist() == [limits.slots // devices] * devices


def test_a_slack_that_leaves_no_room() -> None:
    topology = Topology.from_dict({"devices": 2, "memory": ["30GiB", "1GiB"]})
    with pytest.raises(PlanError, match=r"layer 3: 8 slots, but the devices hold \[4, 1\] at most"):
        problem(4, topology=topology, counts="capped", redundant=4).limits(0)


def test_load_caps_follow_the_speed() -> None:
    topology = Topology.from_dict({"devices": 2, "speed": [3, 1]})
    limits = problem(4, topology=topology, load_cap=1.2).limits(0, np.array([4.0, 2, 1, 1]))
    assert limits.load == pytest.approx([1.2 * 6, 1.2 * 2])
    assert np.isinf(problem(4, topology=topology, load_cap=1.2).limits(0, np.zeros(4)).load).all()
    assert np.isinf(problem(4, topology=topology, load_cap=1.2).limits(0).load).all()


def test_the_expert_that_breaks_the_cap_is_named() -> None:
    load = np.ones(8)
    load[5] = 13.0  # of 20 in all, 5 a device
    capped = problem((8, 8), load_cap=1.5)
    with pytest.raises(
        PlanError,
        match=r"load cap of 1\.5 cannot be kept in layer 4: expert 5 alone has 2\.600 times a "
        r"device's mean load; raise the cap above that",
    ):
        capped.limits(1, load)
    with pytest.raises(PlanError, match=r"expert 5 alone has 2\.600 times"):
        problem(8, load_cap=2.59).limits(0, load)
    problem(8, load_cap=2.6).limits(0, load)
    with pytest.raises(PlanError, match=r"1\.368 times a device's mean load on each of 2 devices"):
        problem(7, redundant=1, load_cap=1.2).limits(0, load[1:])
    problem(8, redundant=4, load_cap=1.2).limits(0, load)  # 13 on 4 devices


# -- instances -------------------------------------------------------------------------------------


def test_counts_of_another_model_are_refused() -> None:
    affinity, _ = planted(2, 8, 2, stay=0.5, pairs=100)
    with pytest.raises(
        PlanError, match=r"counts are of layers \[0, 1\] with \[8\] experts, the pr"
    ):
        make_instance(problem((8, 8), 2), affinity)


def test_settings_of_a_problem() -> None:
    settings_ = problem(8, objective=Objective.parse("time"), load_cap=1.5).to_dict()
    assert settings_ == {
        "objective": "time",
        "redundant": 0,
        "counts": "equal",
        "slack": 1.25,
        "load_cap": 1.5,
        "spill": False,
        "expert_bytes": [0],
    }

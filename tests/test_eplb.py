"""EPLB: its README's example, and what each of its steps promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_runtime.placement.eplb import PhysicalMap, eplb

from moe_runtime.errors import PlanError

# The worked example of DeepSeek's README: 2 layers, 12 experts, 16 slots on 8 devices of 2 nodes.
WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def check(found: PhysicalMap, experts: int, slots: int) -> None:
    """The three arrays say the same."""
    layers = len(found.physical_to_logical)
    assert found.physical_to_logical.shape == (layers, slots)
    assert (found.logical_count >= 1).all()
    assert (found.logical_count.sum(axis=1) == slots).all()
    for layer in range(layers):
        row = found.physical_to_logical[layer]
        assert (np.bincount(row, minlength=experts) == found.logical_count[layer]).all()
        for expert in range(experts):
            places = found.logical_to_physical[layer, expert]
            count = found.logical_count[layer, expert]
            assert (places[count:] == -1).all()
            assert set(places[:count]) == set(np.flatnonzero(row == expert))


def test_the_example_of_its_readme() -> None:
    found = eplb(WEIGHT, 16, 4, 2, 8)
    assert found.physical_to_logical.tolist() == PLACED
    check(found, 12, 16)


@given(data=st.data())
def test_maps_are_consistent_and_groups_stay_on_a_node(data: st.DataObject) -> None:
    nodes = data.draw(st.integers(1, 3))
    groups = nodes * data.draw(st.integers(1, 3))
    size = data.draw(st.integers(1, 4))
    devices = nodes * data.draw(st.integers(1, 3))
    experts = groups * size
    slots = -(-experts // devices) * devices + devices * data.draw(st.integers(0, 2))
    seed = data.draw(st.integers(0, 1000))
    load = np.random.default_rng(seed).integers(0, 50, (2, experts))
    found = eplb(load, slots, groups, nodes, devices)
    check(found, experts, slots)
    node = np.arange(slots) // (slots // nodes)
    for row in found.physical_to_logical:
        for group in range(groups):
            assert len(set(node[row // size == group])) == 1


def test_groups_that_cannot_be_divided_are_ignored() -> None:
    one_node = eplb(WEIGHT, 16, 1, 1, 8)
    for groups in (3, 1):
        found = eplb(WEIGHT, 16, groups, 2, 8)
        assert (found.physical_to_logical == one_node.physical_to_logical).all()


def test_the_heaviest_gets_the_replicas() -> None:
    found = eplb([[90, 10, 10, 10]], 6, 1, 1, 2)
    assert found.logical_count.tolist() == [[3, 1, 1, 1]]
    assert found.copies(2).sum(axis=(1, 2)).tolist() == [6]
    assert found.copies(2).sum(axis=1).tolist() == [[3, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 2, 1, 1, 2), "shape"),
        (([[1.0, np.nan]], 2, 1, 1, 2), "row 0, expert 1"),
        (([[1.0, -1.0]], 2, 1, 1, 2), "not negative, found -1"),
        (([[1.0, 1.0]], 1, 1, 1, 1), "1 slots cannot hold 2 experts"),
        (([[1.0, 1.0]], 2, 3, 1, 1), "2 experts cannot be divided into groups"),
        (([[1.0, 1.0]], 3, 1, 2, 3), "3 devices cannot be divided among nodes"),
        (([[1.0, 1.0]], 3, 1, 1, 2), "3 slots cannot be divided among devices"),
        (([[1.0, 1.0]], 2, 0, 1, 1), "must be 1 at least"),
    ],
)
def test_numbers_that_do_not_fit(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        eplb(*arguments)  # type: ignore[arg-type]

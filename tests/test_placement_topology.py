"""Topologies: the forms of the file, what they mean, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_runtime.placement.topology import Topology

from moe_runtime.errors import PlanError


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any devices, nodes in any order, costs both ways different."""
    devices = draw(st.integers(1, 5))
    nodes = draw(st.lists(st.integers(0, 2), min_size=devices, max_size=devices))
    numbers = sorted(set(nodes))
    number = st.floats(0, 1e6, allow_nan=False)
    rows = draw(st.lists(st.lists(number, min_size=5, max_size=5), min_size=5, max_size=5))
    return Topology(
        nodes=tuple(numbers.index(node) for node in nodes),
        cost=tuple(
            tuple(0.0 if a == b else rows[a][b] for b in range(devices)) for a in range(devices)
        ),
        memory=tuple(draw(st.lists(st.integers(0, 2**50), min_size=devices, max_size=devices))),
        speed=tuple(draw(st.lists(st.floats(0.01, 100), min_size=devices, max_size=devices))),
        unit=draw(st.sampled_from(("hops", "us"))),
    )


@settings(max_examples=60)
@given(topology=topologies())
def test_plain_data_gives_an_equal_topology(topology: Topology) -> None:
    data = topology.to_dict()
    assert Topology.from_dict(data) == topology
    assert Topology.from_dict(json.loads(json.dumps(data))) == topology
    assert Topology.from_dict(yaml.safe_load(yaml.safe_dump(data))) == topology


@settings(max_examples=60)
@given(topology=topologies())
def test_views_agree_with_the_fields(topology: Topology) -> None:
    groups = topology.by_node()
    assert len(groups) == topology.node_count
    assert sorted(device for group in groups for device in group) == list(range(topology.devices))
    assert all(topology.nodes[d] == node for node, group in enumerate(groups) for d in group)
    assert topology.load_shares.sum() == pytest.approx(1.0)
    assert topology.load_shares / topology.load_shares[0] == pytest.approx(
        np.array(topology.speed) / topology.speed[0]
    )
    pairs = {
        topology.cost[a][b]
        for a in range(topology.devices)
        for b in range(topology.devices)
        if a != b
    }
    assert topology.uniform == (len(pairs) < 2 and len(set(topology.speed)) == 1)


def test_even_devices_and_nodes() -> None:
    topology = Topology.of(6, 3, memory=7, same_node=2, other_node=5, unit="us")
    assert topology.nodes == (0, 0, 1, 1, 2, 2)
    assert topology.by_node() == [[0, 1], [2, 3], [4, 5]]
    assert topology.memory == (7,) * 6
    assert topology.unit == "us"
    for a in range(6):
        for b in range(6):
            expected = 0 if a == b else 2 if a // 2 == b // 2 else 5
            assert topology.cost[a][b] == topology.costs[a, b] == expected
    assert not topology.uniform
    assert Topology.of(4).uniform
    assert Topology.of(1).uniform
    assert Topology.of(4, 4).uniform
    assert Topology.of(4).costs.max() == 1
    assert Topology.of(4, 2).costs.max() == 2  # ExFlow's charge for a hop to another node


def test_devices_of_different_speed_are_not_uniform() -> None:
    text = {"devices": 3, "speed": [2, 1, 1]}
    topology = Topology.from_dict(text)
    assert not topology.uniform
    assert topology.load_shares.tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("devices: 4", Topology.of(4)),
        ("devices: 4\nnodes: 2", Topology.of(4, 2)),
        ("{devices: 4, nodes: [0, 0, 1, 1]}", Topology.of(4, 2)),
        ("{devices: 2, memory: 8GiB}", Topology.of(2, memory=8 * 2**30)),
        (
            "{devices: 2, memory: [8GiB, 500 MB]}",
            Topology(nodes=(0, 0), cost=((0, 1), (1, 0)), memory=(8 * 2**30, 500_000_000)),
        ),
        (
            "{devices: 4, nodes: 2, same_node: 3, other_node: 9.5, unit: us}",
            Topology.of(4, 2, same_node=3, other_node=9.5, unit="us"),
        ),
        (
            "{devices: 3, nodes: [1, 0, 1], other_node: 7}",
            Topology(nodes=(1, 0, 1), cost=((0, 7, 1), (7, 0, 7), (1, 7, 0))),
        ),
        (
            "{devices: 2, cost: [[0, 4], [6, 0]], speed: [1, 3]}",
            Topology(nodes=(0, 0), cost=((0, 4), (6, 0)), speed=(1, 3)),
        ),
    ],
)
def test_forms_of_the_file(text: str, expected: Topology, tmp_path: Path) -> None:
    path = tmp_path / "rack.yaml"
    path.write_text(text, encoding="utf-8")
    assert Topology.load(path) == expected
    assert Topology.load(str(path)) == expected


WRONG: list[Any] = [
    ("", "a mapping with the field 'devices'"),
    ("[4]", "a mapping with the field 'devices'"),
    ("{devices: 4, gpus: 8}", "unknown field 'gpus'; known: devices, nodes"),
    ("{nodes: 2}", "devices must be a whole number 1 to 4096, found None"),
    ("{devices: 0}", "found 0"),
    ("{devices: 4097}", "found 4097"),
    ("{devices: true}", "found True"),
    ("{devices: 2.0}", r"found 2\.0"),
    ("{devices: 4, nodes: 3}", "4 devices cannot be spread evenly over 3 nodes"),
    ("{devices: 4, nodes: 0}", "4 devices cannot be spread evenly over 0 nodes"),
    ("{devices: 2, nodes: two}", "nodes must be whole numbers, found 'two'"),
    ("{devices: 2, nodes: [0, 1.5]}", r"nodes must be whole numbers, found 1\.5"),
    ("{devices: 2, nodes: [0, -1]}", "nodes must be whole numbers, found -1"),
    ("{devices: 2, nodes: [0, 2]}", r"numbered from 0 on, found \(0, 2\)"),
    ("{devices: 3, nodes: [0, 1]}", "nodes names 2 devices, devices says 3"),
    ("{devices: 2, nodes: []}", "nodes names 0 devices, devices says 2"),
    ("{devices: 2, unit: 3}", "unit must be a text, found 3"),
    ("{devices: 2, same_node: near}", "same_node must be a number, found 'near'"),
    ("{devices: 2, other_node: true}", "other_node must be a number, found True"),
    ("{devices: 2, same_node: -1}", "costs must be finite and not negative"),
    ("{devices: 2, same_node: .nan}", "costs must be finite"),
    ("{devices: 2, cost: 3}", "cost must be a list of lists"),
    ("{devices: 2, cost: ab}", "cost must be a list of lists"),
    ("{devices: 2, cost: [[0, x], [1, 0]]}", "cost must be a number, found 'x'"),
    ("{devices: 2, cost: [[0, 1]]}", "cost has 1 entries for 2 devices"),
    ("{devices: 2, cost: [[0, 1], [0]]}", "cost row 1 has 1 entries for 2 devices"),
    ("{devices: 2, cost: [[0, 1], [1, 3]]}", r"cost\[1\]\[1\] must be 0, found 3"),
    ("{devices: 2, memory: [1GiB]}", "memory has 1 entries for 2 devices"),
    ("{devices: 2, memory: 3 lorries}", "memory: cannot read '3 lorries'"),
    ("{devices: 2, memory: -5}", "memory: a byte size cannot be negative, found -5"),
    ("{devices: 2, memory: 1.5}", "memory: cannot read 1.5"),
    ("{devices: 2, speed: 0}", "speeds must be positive"),
    ("{devices: 2, speed: [1, .inf]}", "speeds must be positive"),
    ("{devices: 2, speed: [1]}", "speed has 1 entries for 2 devices"),
    ("{devices: 2, speed: fast}", "speed must be a number, found 'fast'"),
    ("{devices: 2", "not a YAML file"),
    ("devices: !!python/object:os.system 2", "not a YAML file"),
    ("{devices: 2, unit: 2026-99-99}", "not a YAML file"),
    pytest.param("[" * 5000, "not a YAML file", id="deep"),
    pytest.param("{devices: 2, same_node: 1" + "0" * 400 + "}", "same_node", id="huge cost"),
    pytest.param("{devices: 2, memory: '1" + "0" * 400 + " GiB'}", "memory", id="huge memory"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_errors_name_file_and_field(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rack.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=message) as error:
        Topology.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.yaml: cannot be read"):
        Topology.load(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match="cannot be read"):
        Topology.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"unit: '\xe4'")
    with pytest.raises(PlanError, match=r"latin\.yaml: not a YAML file"):
        Topology.load(tmp_path / "latin.yaml")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.just(10**400)
    | st.just(2**70),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=150)
@given(
    data=st.dictionaries(
        st.sampled_from(
            ("devices", "nodes", "memory", "speed", "same_node", "other_node", "cost", "unit")
        ),
        VALUES,
    ),
    devices=st.integers(1, 3),
)
def test_any_data_is_a_topology_or_a_plan_error(data: dict[str, Any], devices: int) -> None:
    for given_ in (data, data | {"devices": devices}):
        try:
            topology = Topology.from_dict(given_)
        except PlanError:
            continue
        assert Topology.from_dict(json.loads(json.dumps(topology.to_dict()))) == topology


def test_a_topology_in_code_is_checked_too() -> None:
    with pytest.raises(PlanError, match="one device at least"):
        Topology(nodes=(), cost=())
    with pytest.raises(PlanError, match=r"memory cannot be negative, found \(1, -1\)"):
        Topology(nodes=(0, 0), cost=((0, 1), (1, 0)), memory=(1, -1))
    with pytest.raises(PlanError, match="5 devices cannot be spread evenly over 2 nodes"):
        Topology.of(5, 2)

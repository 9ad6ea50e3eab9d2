"""Measured topologies: from times to nodes and costs, and the command that times copies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from moe_runtime.placement.topology import Topology
from typer.testing import CliRunner

from moe_runtime.cli import app
from moe_runtime.cli.topology import copy_seconds, hop_seconds
from moe_runtime.errors import PlanError


def two_nodes() -> np.ndarray:
    node = np.array([0, 0, 1, 1])
    return np.where(node[:, None] == node[None, :], 2e-6, 9e-6)


def test_close_devices_share_a_node_and_costs_are_in_microseconds(tmp_path: Path) -> None:
    found = Topology.measured(two_nodes(), memory=(5, 6, 7, 8))
    assert found.nodes == (0, 0, 1, 1)
    assert found.costs[0].tolist() == [0.0, 2.0, 9.0, 9.0]
    assert found.unit == "us"
    assert Topology.load(found.save(tmp_path / "t.yaml")) == found


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.full((2, 2), np.nan), np.ones((2, 3))])
def test_times_that_cannot_be_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(PlanError, match="measured times"):
        Topology.measured(wrong)


def test_the_first_copy_of_each_pair_does_not_count() -> None:
    seen: dict[tuple[int, int], int] = {}

    def once(a: int, b: int) -> float:
        seen[a, b] = seen.get((a, b), 0) + 1
        return 99.0 if seen[a, b] == 1 else float(10 * a + b)

    seconds = hop_seconds(3, once)
    assert seconds[1, 2] == 12.0
    assert seconds[2, 1] == 21.0
    assert not seconds.diagonal().any()
    assert set(seen.values()) == {6}


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="has GPUs to measure")
def test_without_gpus_the_command_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["topology", "-o", str(tmp_path / "t.yaml")])
    assert result.exit_code == 2
    assert "--devices" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_copy_takes_time() -> None:
    assert copy_seconds(0, 1, 1 << 20) > 0

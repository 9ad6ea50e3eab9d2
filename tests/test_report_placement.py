"""A plan's page: what it shows, from the plan's file alone and with a trace; damaged metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_runtime.placement.affinity import affinity_of
from moe_runtime.placement.flows import device_flows, flow_summary
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.solve import make_plan
from moe_runtime.placement.topology import Topology
from typer.testing import CliRunner

from moe_runtime.cli import app
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.report import PlanReport
from routing_traces import planted_trace
from test_report import Outline


@pytest.fixture(scope="module")
def plan() -> Plan:
    trace = planted_trace()
    made = make_plan(
        Problem(layer_ids=trace.layer_ids, experts=trace.experts, topology=Topology.of(4, 2)),
        trace[:400],
        held_out=trace[400:],
        options=SolveOptions(method="sweep", smoothing="none", time_limit=1.0, starts=2),
    )
    blocks = flow_summary(made.matrices(), affinity_of(trace[400:]), "held_out")
    return replace(made, metrics={**made.metrics, "blocks": blocks})


def test_the_page_is_whole(plan: Plan) -> None:
    page = PlanReport(plan).to_html()
    outline = Outline(page)
    assert not outline.faults
    assert not outline.fetched
    assert page.count("<svg") == 4
    for words in (
        "Which device holds which expert",
        "Load of each device",
        "From device to device",
    ):
        assert words in page
    assert "#010a0" not in page  # every colour is the page's own


def test_a_trace_adds_its_affinity(plan: Plan) -> None:
    transitions = affinity_of(planted_trace()).transitions
    assert PlanReport(plan, transitions).to_html().count("<svg") == 5
    with pytest.raises(PlanError, match="shapes"):
        PlanReport(plan, transitions[1:])


def test_a_bare_plan_renders() -> None:
    bare = Plan(topology=Topology.of(2), layers=(LayerPlan(layer=3, hosts=((0,), (0, 1), (1,))),))
    report = PlanReport(bare)
    assert "not measured" in report.outcome
    assert report.to_html().count("<svg") == 1
    assert "no certificate" in str(report)


@pytest.mark.parametrize("rubbish", [None, 3, "x", [], {}, {"load": "x"}, [[1]], float("nan")])
@pytest.mark.parametrize(
    "name", ["train", "held_out", "baselines", "blocks", "support", "residency"]
)
def test_whatever_stands_in_the_metrics_renders(plan: Plan, name: str, rubbish: Any) -> None:
    report = PlanReport(replace(plan, metrics={**plan.metrics, name: rubbish}))
    assert str(report)
    assert report.outcome
    if rubbish in ("x", 3):
        assert "</html>" in report.to_html()


def test_overfitting_is_said(plan: Plan) -> None:
    far = {**plan.metrics["held_out"]}
    far["crossing"] = plan.metrics["baselines"]["contiguous"]["held_out"]["crossing"]
    report = PlanReport(replace(plan, metrics={**plan.metrics, "held_out": far}))
    assert any("fits its own tokens" in text for text in report.facts()["warnings"])
    assert not PlanReport(plan).facts()["warnings"]


def test_flows_with_replicas_stay_where_they_can() -> None:
    affinity = affinity_of(planted_trace(layers=2, experts=4, devices=2))
    everywhere = np.ones((4, 2), dtype=np.bool_)
    (flow,) = device_flows([everywhere, everywhere], affinity)
    np.testing.assert_allclose(flow, [[0.5, 0], [0, 0.5]])


def test_command(plan: Plan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "x.plan.json")
    trace = planted_trace().save(tmp_path / "x.trace.safetensors")

    def report(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["report", *map(str, arguments)])

    page = tmp_path / "x.html"
    assert report(path, "-o", page, "--trace", trace).exit_code == 0
    assert page.read_text().count("<svg") == 5
    assert json.loads(report(path, "--json").stdout)["summary"]["devices"] == 4
    other = planted_trace(fingerprint="beef").save(tmp_path / "o.trace.safetensors")
    refused = report(path, "--trace", other, "-o", tmp_path / "no.html")
    assert refused.exit_code == 2
    assert not (tmp_path / "no.html").exists()
    with pytest.raises(ConfigError, match="html"):
        PlanReport(plan).save(tmp_path / "x.pdf")

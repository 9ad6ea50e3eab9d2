"""`PlanReport`: one placement plan as text, plain data, and one HTML page.

Does not know how a plan is made; all it shows is in the plan's file, but for a trace's heat maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_runtime.core import FloatArray
from moe_runtime.errors import PlanError
from moe_runtime.placement.plan import Plan
from moe_runtime.report import plan_facts as facts
from moe_runtime.report.base import FactsReport
from moe_runtime.report.plan_step_time import step_time_lines
from moe_runtime.report.summary import size

__all__ = ["PlanReport"]


class PlanReport(FactsReport):
    """A plan and its renderings: `str(report)`, `facts()`, `to_html()`.

    Args:
        plan: the plan.
        transitions: for each pair of consecutive MoE layers float64 `[E, E']`, how many pairs of
            experts a trace has; the page draws them. May be left out.

    Raises:
        PlanError: transitions of other shapes than the plan's layers.
    """

    def __init__(self, plan: Plan, transitions: Sequence[FloatArray] = ()) -> None:
        expected = list(zip(plan.experts[:-1], plan.experts[1:], strict=True))
        if transitions and [hop.shape for hop in transitions] != expected:
            raise PlanError(
                f"transitions have shapes {[hop.shape for hop in transitions]}, the plan's layers "
                f"want {expected}"
            )
        self.plan = plan
        self.transitions = tuple(transitions)

    @classmethod
    def load(cls, path: str | Path) -> PlanReport:
        """The report of a plan file; PlanError if it holds no plan."""
        return cls(Plan.load(path))

    @property
    def outcome(self) -> str:
        """The plan in one line."""
        return facts.headline(self.plan)

    def findings(self) -> list[str]:
        """What is proved, how far the counts carry, what stays in memory: a line each."""
        plan = self.plan
        proof, residency = facts.certificate_line(plan), facts.residency_line(plan)
        lines = [f"certificate: {proof}"]
        support = facts.support_line(plan) if plan.devices > 1 else None
        lines += [f"support: {support}"] if support else []
        lines += step_time_lines(plan)
        return lines + ([f"residency: {residency}"] if residency else [])

    def facts(self) -> dict[str, Any]:
        """Plain data: what the plan is for, its certificate, measures, layers and warnings."""
        plan = self.plan
        metrics = {name: value for name, value in plan.metrics.items() if name != "blocks"}
        return {
            "outcome": self.outcome,
            "model": plan.model_id,
            "fingerprint": plan.fingerprint,
            "devices": plan.devices,
            "nodes": plan.topology.node_count,
            "certificate": None if plan.certificate is None else plan.certificate.to_dict(),
            "metrics": metrics,
            "layers": facts.layer_rows(plan),
            "settings": dict(plan.settings),
            "warnings": facts.warnings_of(plan),
        }

    def to_html(self) -> str:
        from moe_runtime.report.plan_page import render_plan

        return render_plan(self.plan, self.transitions)

    def __str__(self) -> str:
        plan = self.plan
        lines = [
            self.outcome,
            f"  {'model':<14}{_model(plan)}",
            f"  {'devices':<14}{_topology(plan)}",
        ]
        for line in self.findings():
            name, text = line.split(": ", 1)
            lines.append(f"  {name:<14}{text}")
        lines += [f"  {'warning':<14}{text}" for text in facts.warnings_of(plan)]
        held = bool(facts.section(plan.metrics, "held_out"))
        if plan.devices > 1 and facts.section(plan.metrics, "train"):
            titles = "".join(f"{title:>20}" for title in facts.MEASURES.values())
            lines += ["", f"{'train, held-out' if held else 'on train':<16}{titles}"]
            for name, measured in facts.comparison(plan):
                cells = [facts.pair(measured, field, held=held) for field in facts.MEASURES]
                lines.append(f"{name:<16}" + "".join(f"{cell:>20}" for cell in cells))
        lines += ["", f"{'layer':>5}  experts  slots  on a device  resident  highest load"]
        for row in facts.layer_rows(plan):
            span = str(row["fewest"]) if row["fewest"] == row["most"] else "{fewest}-{most}"
            load = "" if row["load"] is None else f"{row['load']:.3f}"
            lines.append(
                f"{row['layer']:>5}  {row['experts']:>7}  {row['slots']:>5}  "
                f"{span.format(**row):>11}  {row['resident']:>8}  {load:>12}"
            )
        return "\n".join(lines)


def _model(plan: Plan) -> str:
    name = plan.model_id or "unknown model"
    return f"{name} ({plan.fingerprint})" if plan.fingerprint else name


def _topology(plan: Plan) -> str:
    topology = plan.topology
    memory = sorted({value for value in topology.memory if value})
    text = facts.devices_line(plan)
    return text + (f", {' or '.join(map(size, memory))} for experts each" if memory else "")

"""A plan's residents in the runtime: read, checked against the model, loaded, kept, compared.

Does not know how a plan is made, nor which expert is evicted among the others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from moe_runtime.cache import ExpertCache
from moe_runtime.errors import PlanError
from moe_runtime.executor import Executor
from moe_runtime.model_spec import MoESpec
from moe_runtime.placement.plan import Plan

__all__ = ["NamedPlan", "Pinning", "PlanLike", "open_plan"]

PlanLike: TypeAlias = Plan | str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Pinning:
    """The experts that a plan keeps resident, and what it expects of them.

    Args:
        name: of the plan.
        experts: for each MoE layer, in order of execution, its experts that stay; ascending.
        predicted: share of all uses that they should serve; None if the plan does not say.
        predicted_by_layer: the same for each layer.
    """

    name: str
    experts: tuple[tuple[int, ...], ...]
    predicted: float | None
    predicted_by_layer: tuple[float | None, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts that stay, of each layer."""
        return tuple(len(experts) for experts in self.experts)

    def apply(self, executor: Executor) -> None:
        """Load these experts into their slots, for good.

        Raises:
            ExpertReadError: one could not be read; none of them stays then.
        """
        executor.preload(self.experts)
        with executor.exclusive():
            for position, experts in enumerate(self.experts):
                executor.cache.make_permanent(position, experts)

    def record(self, spec: MoESpec, cache: ExpertCache) -> dict[str, Any]:
        """Prediction beside observation since counters were reset; `docs/formats.md`, section Run.

        A layer that ran without the host knowing its routing (a GPU that holds all of it) counts
        no uses.
        """
        counters = cache.counters
        uses, served = counters.hits + counters.misses, counters.permanent_hits
        return {
            "name": self.name,
            "pinned": sum(self.counts),
            "pinned_bytes": sum(
                count * layer.expert_bytes
                for count, layer in zip(self.counts, spec.layers, strict=True)
            ),
            "predicted_share": self.predicted,
            "observed_share": _share(int(served.sum()), int(uses.sum())),
            "layers": [
                {
                    "layer": layer.layer,
                    "pinned": count,
                    "predicted_share": predicted,
                    "observed_share": _share(int(served[position]), int(uses[position])),
                }
                for position, (layer, count, predicted) in enumerate(
                    zip(spec.layers, self.counts, self.predicted_by_layer, strict=True)
                )
            ],
        }


@dataclass(frozen=True, kw_only=True)
class NamedPlan:
    """A plan for one device, and its name: the path of its file, or else its model's."""

    name: str
    plan: Plan

    def for_model(self, spec: MoESpec) -> Pinning:
        """What the plan makes of a model.

        Raises:
            PlanError: the plan is for another model.
        """
        try:
            self.plan.require_model(
                layer_ids=spec.grid.layers,
                experts=spec.grid.experts,
                fingerprint=spec.fingerprint,
                name=spec.model_id or spec.model_class,
            )
        except PlanError as error:
            raise PlanError(f"{self.name}: {error}") from error
        residents: dict[int, list[int]] = {layer: [] for layer in spec.grid.layers}
        for layer, expert in self.plan.residents():
            residents[layer].append(expert)
        expected = self.plan.metrics.get("residency")
        expected = expected if isinstance(expected, Mapping) else {}
        rows = expected.get("layers")
        by_layer = {
            row.get("layer"): row.get("predicted_share")
            for row in (rows if isinstance(rows, Sequence) else ())
            if isinstance(row, Mapping)
        }
        return Pinning(
            name=self.name,
            experts=tuple(tuple(residents[layer]) for layer in spec.grid.layers),
            predicted=_checked_share(expected.get("predicted_share"), self.name),
            predicted_by_layer=tuple(
                _checked_share(by_layer.get(layer), self.name) for layer in spec.grid.layers
            ),
        )


def open_plan(plan: PlanLike | None) -> NamedPlan | None:
    """Read a plan that the runtime is to run; None of None.

    Raises:
        PlanError: no plan, a damaged one, or one for several devices.
    """
    if plan is None:
        return None
    if isinstance(plan, Plan):
        named = NamedPlan(name=plan.model_id or "a plan without a name", plan=plan)
    elif isinstance(plan, str | os.PathLike):
        named = NamedPlan(name=os.fspath(plan), plan=Plan.load(Path(plan)))
    else:
        raise PlanError(f"plan= takes a plan file's path or a Plan, found {type(plan).__name__}")
    if named.plan.devices != 1:
        raise PlanError(
            f"{named.name}: the plan is for {named.plan.devices} devices, the runtime runs one; "
            "make a plan with `moe-runtime plan TRACE --devices 1 --memory SIZE`"
        )
    return named


def _share(served: int, uses: int) -> float | None:
    return round(served / uses, 6) if uses else None


def _checked_share(value: Any, name: str) -> float | None:
    """A share of a plan's own metrics, which are free in form."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= 1:
        raise PlanError(
            f"{name}: metrics.residency: a predicted share must be 0 to 1, found {value!r:.80}; "
            "make the plan again"
        )
    return float(value)

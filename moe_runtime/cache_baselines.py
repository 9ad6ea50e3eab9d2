"""The policies and predictors that caching is compared with, by name, in one harness.

Knows how each is made of recordings; time passes in `timed_simulation`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np

from moe_runtime.core import FloatArray
from moe_runtime.errors import ConfigError
from moe_runtime.eviction import POLICY_NAMES, EvictionPolicy, make_policy
from moe_runtime.predictors.base import Predictor
from moe_runtime.predictors.files import KINDS
from moe_runtime.predictors.fitted import FittedPredictor
from moe_runtime.predictors.oracle import (
    OraclePredictor,
    PreGatePredictor,
    PreviousLayerPredictor,
)
from moe_runtime.predictors.origin import Origin
from moe_runtime.prefetch_planner import PlannerRules
from moe_runtime.timed_result import TimedResult
from moe_runtime.timed_simulation import (
    ComputeModel,
    Forecasting,
    simulate_timed,
    slots_of,
)
from moe_runtime.trace import RoutingTrace
from moe_runtime.virtual_link import LinkModel

__all__ = ["BASELINES", "BOUND", "Baseline", "Setting", "Subject", "combined", "find", "run"]

BOUND = "belady"


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One contender.

    Args:
        name: what it is called.
        policy: of eviction.
        predictor: see `Subject.predictor`; "" to load on demand only.
        per_layer: equal slots for each layer, instead of one pool.
        keep_only: forecasts decide what stays; nothing is loaded ahead.
        lookahead: layers ahead; None for the planner's own.
        summary: in words.
    """

    name: str
    policy: str = "lru"
    predictor: str = ""
    per_layer: bool = False
    keep_only: bool = False
    lookahead: int | None = None
    summary: str = ""

    def title(self, recall: float) -> str:
        """The name in tables, where a stand-in says how good it is made to be."""
        return f"{self.name} (recall {recall:g})" if self.predictor == "pre-gated" else self.name


def _table() -> dict[str, Baseline]:
    rows = [
        Baseline(name="lru", summary="least recently used, one pool"),
        Baseline(
            name="lru-per-layer",
            per_layer=True,
            summary="least recently used, equal slots for each layer (ExpertFlow (He)'s baseline, "
            "without its copies back)",
        ),
        Baseline(name="lfu", policy="lfu", summary="decayed counts"),
        Baseline(name="static", policy="static", summary="most used in other text or the prompt"),
        Baseline(name="echo", policy="echo", summary="what followed like moments of this run"),
        Baseline(name=BOUND, policy=BOUND, summary="needed again last: the bound on demand"),
        Baseline(
            name="previous-layer",
            predictor="previous-layer",
            lookahead=1,
            summary="loads the numbers that the layer before chose",
        ),
    ]
    rows += [
        Baseline(name=kind, predictor=kind, summary=f"loads by the {kind} predictor")
        for kind in ("popularity", "previous-token", "token-table", "pair-counts", "transition")
    ]
    rows += [
        Baseline(
            name="transition-keep",
            predictor="transition",
            keep_only=True,
            summary="the transition predictor decides what stays; nothing is loaded ahead",
        ),
        Baseline(
            name="echo-transition",
            policy="echo",
            predictor="transition",
            summary="loads by the transition predictor, evicts by echo",
        ),
        Baseline(
            name="pre-gated",
            predictor="pre-gated",
            lookahead=1,
            summary="a stand-in for the next layer's gate, right with a stated recall",
        ),
        Baseline(name="oracle", predictor="oracle", summary="the run itself, two layers ahead"),
        Baseline(
            name="oracle-keep",
            predictor="oracle",
            keep_only=True,
            summary="the run itself decides what stays; nothing is loaded ahead",
        ),
    ]
    if "predicted" in POLICY_NAMES:
        rows += [
            Baseline(name="predicted", policy="predicted", summary="the policy that forecasts"),
            Baseline(
                name="predicted-transition",
                policy="predicted",
                predictor="transition",
                summary="the same, given the transition predictor's forecasts, which load too",
            ),
        ]
    return {row.name: row for row in rows}


BASELINES: dict[str, Baseline] = _table()


def find(names: Sequence[str]) -> list[Baseline]:
    """The baselines of these names, in their order; "all" stands for all.

    Raises:
        ConfigError: an unknown name.
    """
    found: dict[str, Baseline] = {}
    for name in names:
        if name != "all" and name not in BASELINES:
            raise ConfigError(f"unknown baseline {name!r}; known: all, {', '.join(BASELINES)}")
        for row in BASELINES.values() if name == "all" else [BASELINES[name]]:
            found[row.name] = row
    return list(found.values())


@dataclass(kw_only=True, eq=False)
class Subject:
    """A run that contenders serve, and what they may know before it.

    Args:
        trace: the run.
        others: recordings of the same model that predictors are fitted to; none of them this run.
            Without any, predictors learn from the run alone.
        prompt: counts for `static` where there are no others; None if there are none either.
        recall, seed: of the pre-gate's stand-in.
        given: predictors by name that were made elsewhere.
    """

    trace: RoutingTrace
    others: Sequence[RoutingTrace] = ()
    prompt: RoutingTrace | None = None
    recall: float = 0.9
    seed: int = 0
    given: dict[str, Predictor] = field(default_factory=dict)

    def predictor(self, name: str) -> Predictor:
        """A predictor for the run: an oracle, one of `given`, or of a kind of predictor files.

        Raises:
            PredictorError: the traces do not hold what it needs.
        """
        if name not in self.given:
            self.given[name] = self._make(name)
        return self.given[name]

    def _make(self, name: str) -> Predictor:
        made: dict[str, Callable[[], Predictor]] = {
            "oracle": lambda: OraclePredictor(self.trace),
            "pre-gated": lambda: PreGatePredictor(self.trace, self.recall, self.seed),
            "previous-layer": lambda: PreviousLayerPredictor(self.trace.grid),
        }
        if name in made:
            return made[name]()
        if name not in KINDS:
            raise ConfigError(f"unknown predictor {name!r}; known: {', '.join([*made, *KINDS])}")
        module, class_name = KINDS[name]
        module_of = importlib.import_module(f"moe_runtime.predictors.{module}")
        kind = cast("type[FittedPredictor]", getattr(module_of, class_name))
        if self.others:
            return kind.fit(self.others)
        return kind.unfitted(Origin(**self.trace.description()))

    def policy(self, name: str) -> EvictionPolicy:
        """A fresh policy.

        Raises:
            ConfigError: unknown, or nothing to count for `static`.
        """
        options: dict[str, Any] = {}
        if name == "static":
            options["counts"] = self._counts()
        elif name == BOUND:
            options["accesses"] = self.trace.accesses()
        return make_policy(name, self.trace.grid, **options)

    def _counts(self) -> FloatArray:
        known = list(self.others) or ([self.prompt] if self.prompt is not None else [])
        if not sum(len(trace) for trace in known):
            raise ConfigError(
                "static keeps what was most used before: give other recordings of the model, or a "
                "trace with its prompt"
            )
        counts = np.zeros(self.trace.grid.size)
        for trace in known:
            for access in trace.iter_accesses():
                counts[self.trace.grid.offsets[access.position] + access.experts] += access.tokens
        return counts


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all contenders run in.

    Args:
        share: of all experts that fit, 0 to 1.
        expert_bytes: bytes of one expert of each layer position.
        trial: whether each run finds out for itself if acting on forecasts pays.
    """

    share: float
    expert_bytes: tuple[int, ...]
    link: LinkModel
    compute: ComputeModel
    trial: bool = False


def run(
    baseline: Baseline, subject: Subject, setting: Setting, rules: PlannerRules | None = None
) -> TimedResult:
    """One contender on one run, from an empty cache.

    Raises:
        As `simulate_timed`, `Subject.policy` and `Subject.predictor`.
    """
    forecasting = None
    if baseline.predictor:
        rules = rules or PlannerRules()
        forecasting = Forecasting(
            predictor=subject.predictor(baseline.predictor),
            rules=PlannerRules(
                lookahead=baseline.lookahead or rules.lookahead,
                bar=rules.bar,
                hold=rules.hold,
                share=rules.share,
                prefetch=not baseline.keep_only,
            ),
            trial=setting.trial,
        )
    pools = slots_of(
        subject.trace.grid, setting.share, setting.expert_bytes, per_layer=baseline.per_layer
    )
    return simulate_timed(
        subject.trace,
        subject.policy(baseline.policy),
        pools,
        expert_bytes=setting.expert_bytes,
        link=setting.link,
        compute=setting.compute,
        forecasting=forecasting,
    )


def combined(results: Sequence[TimedResult]) -> TimedResult:
    """Several runs of one model as one: everything added up. `results` is not empty."""
    summed: dict[str, Any] = {}
    for item in fields(TimedResult):
        values = [getattr(result, item.name) for result in results]
        if item.name == "slots":
            summed[item.name] = values[0]
        elif item.name == "state":
            summed[item.name] = values[0] if len(set(values)) == 1 else "differs"
        elif item.name == "call_seconds":
            summed[item.name] = np.concatenate(values)
        else:
            summed[item.name] = sum(values[1:], start=values[0])
    return TimedResult(**summed)

"""Sets up prediction for a runtime: opens the predictor, joins it to loader, planner and trial.

Decides nothing while a model runs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from moe_runtime.errors import ConfigError
from moe_runtime.forecast import Forecaster
from moe_runtime.loader import ExpertLoader, Prediction
from moe_runtime.model_spec import MoESpec
from moe_runtime.payoff import Payoff
from moe_runtime.predictors.base import Predictor
from moe_runtime.prefetch_planner import PlannerRules, PrefetchPlanner

__all__ = ["PredictorLike", "open_predictor", "predict", "predictor_name"]

PredictorLike: TypeAlias = Predictor | str | os.PathLike[str]


def predictor_name(predictor: PredictorLike | None) -> str | None:
    """What a configuration calls it: the path as given, or the predictor's own name."""
    if predictor is None or isinstance(predictor, str):
        return predictor
    return os.fspath(predictor) if isinstance(predictor, os.PathLike) else predictor.name


def open_predictor(predictor: PredictorLike | None, spec: MoESpec) -> Predictor | None:
    """The predictor itself; a file is read and checked against the model."""
    if predictor is None or not isinstance(predictor, str | os.PathLike):
        return predictor
    raise NotImplementedError


def predict(
    loader: ExpertLoader, spec: MoESpec, predictor: Predictor, options: Mapping[str, Any]
) -> None:
    """Let a loader predict with `predictor` from the next forward call on.

    Args:
        options: arguments of `PlannerRules`, and `trial`.

    Raises:
        ConfigError: an unknown option, or a predictor for other layers or experts.
    """
    chosen = dict(options)
    trial = chosen.pop("trial", True)
    known = {field.name for field in dataclasses.fields(PlannerRules)}
    unknown = sorted(set(chosen) - known)
    if unknown:
        raise ConfigError(
            f"unknown prediction option {unknown[0]!r}; known: {sorted(known | {'trial'})}"
        )
    rules = PlannerRules(**chosen)
    forecaster = Forecaster(predictor, spec.grid, rules.lookahead)
    planner = PrefetchPlanner(
        loader.cache,
        forecaster,
        rules,
        [layer.expert_bytes for layer in spec.layers],
        getattr(loader.cache.policy, "expect", None),
    )
    loader.prediction = Prediction(forecaster, planner, Payoff(enabled=bool(trial)))

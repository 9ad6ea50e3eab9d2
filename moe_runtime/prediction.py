"""Sets up prediction for a runtime: opens the predictor, joins it to loader, planner and trial.

Decides nothing while a model runs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from moe_runtime.errors import ConfigError
from moe_runtime.forecast import Forecaster
from moe_runtime.loader import ExpertLoader, Prediction
from moe_runtime.model_spec import MoESpec
from moe_runtime.payoff import Payoff
from moe_runtime.predictors.base import Predictor
from moe_runtime.predictors.files import load_predictor
from moe_runtime.prefetch_planner import PlannerRules, PrefetchPlanner

__all__ = ["PredictorLike", "open_predictor", "predict", "prediction_record", "predictor_name"]

PredictorLike: TypeAlias = Predictor | str | os.PathLike[str]


def predictor_name(predictor: PredictorLike | None) -> str | None:
    """What a configuration calls it: the path as given, or the predictor's own name."""
    if predictor is None or isinstance(predictor, str):
        return predictor
    return os.fspath(predictor) if isinstance(predictor, os.PathLike) else predictor.name


def open_predictor(predictor: PredictorLike | None, spec: MoESpec) -> Predictor | None:
    """The predictor itself; a file is read and checked against the model.

    Raises:
        PredictorError: the file is damaged, or made for another model.
    """
    if predictor is None or not isinstance(predictor, str | os.PathLike):
        return predictor
    return load_predictor(predictor, fingerprint=spec.fingerprint, grid=spec.grid)


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


def prediction_record(loader: ExpertLoader, spec: MoESpec) -> dict[str, Any] | None:
    """What predicting did since counters were reset; `docs/formats.md`, section Run.

    None without a predictor.
    """
    prediction = loader.prediction
    if prediction is None:
        return None
    counters, accuracy = loader.cache.counters, prediction.forecaster.accuracy
    size = np.array([layer.expert_bytes for layer in spec.layers], np.int64)
    ahead = int(counters.ahead.sum())
    fate = {
        "in_time": counters.in_time,
        "late": counters.late,
        "unused": counters.unused,
        "withdrawn": counters.withdrawn,
    }
    return {
        "predictor": prediction.forecaster.predictor.name,
        "rules": dataclasses.asdict(prediction.planner.rules),
        "seconds": round(prediction.forecaster.seconds, 6),
        "failure": prediction.forecaster.failure,
        "state": prediction.payoff.state,
        "decisions": [decision.to_dict() for decision in prediction.payoff.decisions],
        "loads": {
            "ahead": ahead,
            **{name: int(counts.sum()) for name, counts in fate.items()},
            "pending": ahead - sum(int(counts.sum()) for counts in fate.values()),
            "evictions": counters.ahead_evictions,
        },
        "bytes": {
            "ahead": int(loader.profiler.ahead_bytes.sum()),
            "in_time": int((counters.in_time * size).sum()),
            "late": int((counters.late * size).sum()),
            "unused": int((counters.unused * size).sum()),
            "withdrawn": loader.profiler.withdrawn_bytes,
        },
        "layers": [
            {
                "layer": layer.layer,
                "resident": int(counters.hits[at] - counters.in_time[at]),
                **{name: int(counts[at]) for name, counts in fate.items()},
                "missed": int(counters.misses[at] - counters.late[at]),
                "recall": [
                    _share(accuracy.found[d, at], accuracy.needed[d, at])
                    for d in range(1, len(accuracy.needed))
                ],
            }
            for at, layer in enumerate(spec.layers)
        ],
    }


def _share(part: int, whole: int) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None

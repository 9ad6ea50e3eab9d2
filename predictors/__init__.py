"""Routing predictors (`moe_runtime.predictors`): which experts a token will need next.

They are fitted to routing traces and learn on while a model runs. They do not know the cache, the
executor or placement.
"""

from moe_runtime.predictors.base import Predictor, StepRows, demand
from moe_runtime.predictors.files import StoredPredictor, load_predictor, save_predictor
from moe_runtime.predictors.origin import Origin

__all__ = [
    "Origin",
    "Predictor",
    "StepRows",
    "StoredPredictor",
    "demand",
    "load_predictor",
    "save_predictor",
]

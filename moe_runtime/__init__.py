"""Run and place Mixture-of-Experts models by where their tokens really go."""

import moe_runtime.report  # noqa: F401  first: the function below takes the package's name
from moe_runtime.batch_run import BatchRun
from moe_runtime.batches import generate_batches
from moe_runtime.bundled import bundled_model, bundled_predictor
from moe_runtime.core import ExpertId
from moe_runtime.errors import (
    AttachError,
    BudgetError,
    CheckpointError,
    ConfigError,
    ExpertReadError,
    MoERuntimeError,
    PlanError,
    PredictorError,
    TraceError,
    UnsupportedModelError,
)
from moe_runtime.inspection import inspect_checkpoint
from moe_runtime.lifecycle import attach, detach, from_pretrained
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.runtime import record, report, runtime_of
from moe_runtime.steering import steer
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__

__all__ = [
    "AttachError",
    "BatchRun",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "ExpertId",
    "ExpertReadError",
    "MoERuntimeError",
    "PlanError",
    "PredictorError",
    "RoutingCounts",
    "RoutingTrace",
    "TraceError",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "bundled_model",
    "bundled_predictor",
    "detach",
    "from_pretrained",
    "generate_batches",
    "inspect_checkpoint",
    "record",
    "report",
    "runtime_of",
    "steer",
]

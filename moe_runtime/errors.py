"""The exception tree: everything this library raises for its users.

Knows nothing of what raises it.

    MoERuntimeError
     ├─ ConfigError (ValueError)            an option or a configuration file is wrong
     │   └─ BudgetError                     a memory budget cannot work
     ├─ UnsupportedModelError (ValueError)  the model cannot be run by the executor
     ├─ AttachError (RuntimeError)          attach, detach or a call at the wrong moment
     ├─ CheckpointError                     the checkpoint's files are damaged or incomplete
     │   └─ ExpertReadError (OSError)       one expert could not be read
     ├─ TraceError (ValueError)             a routing trace is damaged or does not fit
     ├─ ParallelError (RuntimeError)        ranks lost each other, disagree, or cannot go on
     ├─ PlanError (ValueError)              a placement plan is damaged, infeasible or does not fit
     └─ PredictorError (ValueError)         a predictor is damaged or does not fit
"""

from __future__ import annotations

__all__ = [
    "AttachError",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "ExpertReadError",
    "MoERuntimeError",
    "ParallelError",
    "PlanError",
    "PredictorError",
    "TraceError",
    "UnsupportedModelError",
]


class MoERuntimeError(Exception):
    """Base of all errors of this library."""


class ConfigError(MoERuntimeError, ValueError):
    """An option or a configuration file is wrong; the message names it and the remedy."""


class BudgetError(ConfigError):
    """A memory budget cannot work; the message says the least that does."""


class UnsupportedModelError(MoERuntimeError, ValueError):
    """The model's structure cannot be run by the executor; the message names what was found."""


class AttachError(MoERuntimeError, RuntimeError):
    """attach, detach or a call came at a moment when it cannot be served."""


class CheckpointError(MoERuntimeError):
    """The checkpoint's files are damaged, incomplete or of an unknown form."""


class ExpertReadError(CheckpointError, OSError):
    """One expert could not be read; the message names expert, file and offset."""


class TraceError(MoERuntimeError, ValueError):
    """A routing trace is damaged, of another version, or does not fit what it is used for."""


class ParallelError(MoERuntimeError, RuntimeError):
    """Ranks that run a model together lost each other, disagree, or cannot go on; says which."""


class PlanError(MoERuntimeError, ValueError):
    """A placement problem has no solution, or a plan is damaged or does not fit what it is for."""


class PredictorError(MoERuntimeError, ValueError):
    """A routing predictor is damaged, made for another model, or lacks what it is made from."""

"""`SteeringParts`: the files of steering that one page is made of, read and of one model.

Does not know how they were made, nor how they are shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.steering.cost import SteeringCost
    from moe_runtime.steering.evaluation import SteeringEvaluation
    from moe_runtime.steering.files import SteeringFile

__all__ = ["STEERING_KINDS", "SteeringParts", "read_parts"]

# What a file says that it is -> the ending of its name by custom.
STEERING_KINDS = {
    "moe-runtime.steering": ".steer.json",
    "moe-runtime.steer-eval": ".steer-eval.json",
    "moe-runtime.steer-cost": ".steer-cost.json",
}


@dataclass(frozen=True, kw_only=True)
class SteeringParts:
    """What is known about steering one model; each part may be missing.

    Args:
        file: which experts, and how they were found.
        evaluations: whether it helped, each on a set of tasks of its own.
        costs: what it costs, each in a budget of its own.
    """

    file: SteeringFile | None = None
    evaluations: tuple[SteeringEvaluation, ...] = ()
    costs: tuple[SteeringCost, ...] = ()

    @property
    def model_id(self) -> str:
        """Of the first part that knows it; "" if none does."""
        return next((one for one, _ in self._models() if one), "")

    @property
    def fingerprint(self) -> str:
        """Of the first part that knows it; "" if none does."""
        return next((one for _, one in self._models() if one), "")

    @property
    def beta(self) -> float | None:
        """The one beta of the steering file's experts; None if there is none, or several."""
        betas = set() if self.file is None else set(self.file.steering.betas.values())
        only = betas.pop() if len(betas) == 1 else None
        return None if isinstance(only, tuple) else only

    def _models(self) -> list[tuple[str, str]]:
        models = [(one.model_id, one.fingerprint) for one in self.evaluations]
        models += [(one.model_id, one.fingerprint) for one in self.costs]
        if self.file is not None:
            models.insert(0, (self.file.model.model_id, self.file.model.fingerprint))
        return models


def read_parts(paths: Sequence[str | Path]) -> SteeringParts:
    """Read files of any of the three kinds, in any order; evaluations and costs keep theirs.

    Raises:
        ConfigError: a file is damaged or of another kind, there are two steering files, or the
            files are of different models.
    """
    from moe_runtime.steering.cost import SteeringCost
    from moe_runtime.steering.evaluation import SteeringEvaluation
    from moe_runtime.steering.files import read_steering

    file: SteeringFile | None = None
    evaluations, costs = [], []
    models: list[tuple[str, str]] = []
    for path in map(Path, paths):
        kind = _kind_of(path)
        if kind == "moe-runtime.steering":
            if file is not None:
                raise ConfigError(
                    f"{path}: a second steering file beside {file.path}; a page shows one"
                )
            file = read_steering(path)
            models.append((str(path), file.model.fingerprint))
        elif kind == "moe-runtime.steer-eval":
            evaluations.append(SteeringEvaluation.load(path))
            models.append((str(path), evaluations[-1].fingerprint))
        else:
            costs.append(SteeringCost.load(path))
            models.append((str(path), costs[-1].fingerprint))
    known = [(name, fingerprint) for name, fingerprint in models if fingerprint]
    for name, fingerprint in known[1:]:
        if fingerprint != known[0][1]:
            raise ConfigError(
                f"{name} is of the model with fingerprint {fingerprint}, {known[0][0]} of "
                f"{known[0][1]}; show files of one model on a page"
            )
    return SteeringParts(file=file, evaluations=tuple(evaluations), costs=tuple(costs))


def _kind_of(path: Path) -> str:
    """What a file says that it is; of a damaged one what its name says, so that its reader can
    say what is wrong with it.
    """
    said = None
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        said = data.get("format") if isinstance(data, dict) else None
    except (OSError, ValueError, RecursionError):
        pass
    if said in STEERING_KINDS:
        return str(said)
    for kind, ending in STEERING_KINDS.items():
        if said is None and path.name.endswith(ending):
            return kind
    raise ConfigError(
        f"{path}: field 'format' is {said!r:.80}, none of {', '.join(map(repr, STEERING_KINDS))}; "
        "this is no file of steering"
    )

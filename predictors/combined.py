"""Combined: the table by token id and the transitions, weighed against each other.

Knows its two members as predictors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from moe_runtime.predictors.base import Probabilities, StepRows
from moe_runtime.predictors.files import Arrays
from moe_runtime.predictors.fitted import Constants, FittedPredictor
from moe_runtime.predictors.logistic import fit_logistic
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.pairs import REACH
from moe_runtime.predictors.replay import replay
from moe_runtime.predictors.token_table import TokenTablePredictor
from moe_runtime.predictors.transition import TransitionPredictor
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

__all__ = ["CombinedPredictor"]

MEMBERS: tuple[type[FittedPredictor], ...] = (TokenTablePredictor, TransitionPredictor)
# Before anything is fitted: the weights of a constant, the members' log-odds, their probabilities.
EVEN = (0.0, 0.5, 0.5, 0.0, 0.0)
WEIGHT_ROWS = 384  # held-out tokens that the weights are fitted to
PULL = 10.0  # of the weights towards EVEN, about as much as so many chosen experts
LEAST = 1e-4  # no member may call an outcome impossible


class CombinedPredictor(FittedPredictor):
    """The members' log-odds and probabilities, added with weights for each layer ahead.

    Log-odds weigh members that confirm each other (logistic pooling), probabilities members of
    which either may be right. The weights come from logistic regression on held-out rows.
    """

    name: ClassVar[str] = "combined"
    kind: ClassVar[str] = "combined"
    needs_token_ids: ClassVar[bool] = True
    candidates: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "weights": [list(EVEN)] * REACH,
            "members": [dict(member.candidates[0]) for member in MEMBERS],
        },
    )
    reach: ClassVar[int] = REACH

    def __init__(
        self, origin: Origin, constants: Constants, members: tuple[FittedPredictor, ...]
    ) -> None:
        super().__init__(origin, constants)
        self._members = members
        self._weights = np.asarray(constants["weights"], np.float64)
        if self._weights.shape != (REACH, len(EVEN)) or not np.isfinite(self._weights).all():
            raise PredictorError(
                f"constant 'weights' must be {REACH} lists of {len(EVEN)} numbers, found shape "
                f"{self._weights.shape}"
            )

    @classmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        pairs = zip(MEMBERS, constants["members"], strict=True)
        return cls(origin, constants, tuple(m.make(origin, trace, own) for m, own in pairs))

    @classmethod
    def choose(cls, origin: Origin, known: RoutingTrace, held: RoutingTrace) -> Constants:
        """Each member's constants, then weights by logistic regression on held-out rows."""
        own = [dict(member.choose(origin, known, held)) for member in MEMBERS]
        constants = {**cls.candidates[0], "members": own}
        trial = cls.make(origin, known, constants)
        parts: list[list[NDArray[Any]]] = [[] for _ in range(REACH)]
        for one in replay(trial, held[:WEIGHT_ROWS], REACH):
            hot = trial.rows_hot(one.position, one.topk_ids)
            evidence = trial.evidence(one.position)
            parts[one.distance - 1].append(
                np.concatenate([evidence, hot[..., None]], axis=2).reshape(-1, len(EVEN) + 1)
            )
        weights = []
        for rows in parts:
            if not rows:
                weights.append(list(EVEN))
                continue
            seen = np.concatenate(rows).astype(np.float64)
            found = fit_logistic(
                seen[:, :-1], seen[:, -1], np.ones(len(seen)), np.asarray(EVEN), PULL
            )
            weights.append([round(float(weight), 5) for weight in found])
        return {**constants, "weights": weights}

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`."""
        super().begin_step(rows)
        for member in self._members:
            member.begin_step(rows)

    def learn(self, position: int, topk_ids: IntArray) -> None:
        """See `FittedPredictor`."""
        for member in self._members:
            member.observe(position, topk_ids)

    def forget(self) -> None:
        """See `FittedPredictor`."""
        for member in self._members:
            member.reset()

    def score(self, position: int) -> NDArray[Any]:
        """See `FittedPredictor`."""
        weights = self._weights[min(position - self.history.newest, REACH) - 1]
        return np.asarray(1.0 / (1.0 + np.exp(-(self.evidence(position) @ weights))))

    def evidence(self, position: int) -> Probabilities:
        """float32 `[T, E, 5]`: one, and what the members say, in the order of `EVEN`."""
        said = [np.clip(m.score(position), LEAST, 1 - LEAST) for m in self._members]
        odds = [np.log(p / (1 - p)) for p in said]
        return np.stack([np.ones_like(odds[0]), *odds, *said], axis=-1).astype(np.float32)

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """See `FittedPredictor`."""
        return {
            f"{member.kind}.{name}": array
            for member in self._members
            for name, array in member.fitted_arrays().items()
        }

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        own = constants["members"]
        if not isinstance(own, list) or not all(isinstance(one, Mapping) for one in own):
            raise PredictorError("constant 'members' must be a list of the members' constants")
        members = []
        for member, given in zip(MEMBERS, own, strict=True):
            head = f"{member.kind}."
            held = {n.removeprefix(head): a for n, a in arrays.items() if n.startswith(head)}
            members.append(member.of_arrays(origin, held, given))
        return cls(origin, constants, tuple(members))

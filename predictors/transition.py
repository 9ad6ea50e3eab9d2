"""Transitions: what a token chose in earlier layers says what it will choose in the next ones.

Two predictors: plain pair counts, and the set-conditioned one. Neither knows hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
from moe_runtime.predictors.base import StepRows
from moe_runtime.predictors.files import Arrays, take_array
from moe_runtime.predictors.fitted import Constants, FittedPredictor, positive
from moe_runtime.predictors.frequency import popularity, take_popularity
from moe_runtime.predictors.history import NOTHING
from moe_runtime.predictors.logistic import fit_logistic
from moe_runtime.predictors.neighbours import Neighbours
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.pairs import REACH, PairTables
from moe_runtime.predictors.rates import Rates
from moe_runtime.predictors.replay import replay
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PredictorError
from moe_runtime.trace import RoutingTrace

Evidence: TypeAlias = list[NDArray[np.float64]]  # by distance - 1

__all__ = ["PairCountPredictor", "TransitionPredictor", "evidence_of", "weights_of"]

STRENGTH = 1024.0  # what fitted popularity weighs, in tokens of the run
BANK_ROWS = 1024  # fitted tokens that are kept as neighbours
WEIGHT_ROWS = 512  # held-out tokens that the weights are fitted to
SEED = 0
KEPT = 0.1  # share of the experts not chosen that weights are fitted to
PULL = 10.0  # of the weights towards those below
PAIR_CHOICES: tuple[dict[str, Any], ...] = tuple(
    {"pair_strength": strength, "pair_cap": cap}
    for strength in (1.0, 4.0)
    for cap in (16.0, 1024.0)
)

# The transition predictor's trials are capped low, so that a run's own pairs soon outweigh those of
# other text: on the two shared runs that have others this gains .001 to .006 recall at k over 1024.
# By distance 1 to 4 the weights of `TransitionPredictor._features`: constant, popularity, chosen by
# the token before, neighbours (log ratio to popularity), pairs (the same), neighbours, pairs.
# Fitted to the four shared traces together (bench/prediction.py measures with the model at hand
# left out); where a predictor is fitted, its own weights are drawn to these.
WEIGHTS: tuple[tuple[float, ...], ...] = (
    (-1.391, 0.679, 0.57, 0.456, 0.783, 3.248, -0.688),
    (-1.293, 0.699, 0.612, 0.481, 0.761, 3.037, -0.755),
    (-1.234, 0.712, 0.614, 0.495, 0.735, 2.95, -0.668),
    (-1.156, 0.731, 0.59, 0.479, 0.75, 2.939, -0.773),
)


class PairCountPredictor(FittedPredictor):
    """The mean, over the experts chosen at the newest layer, of the share that went on to each."""

    name: ClassVar[str] = "pair counts"
    kind: ClassVar[str] = "pair-counts"
    candidates: ClassVar[tuple[dict[str, Any], ...]] = PAIR_CHOICES
    reach: ClassVar[int] = REACH

    def __init__(
        self,
        origin: Origin,
        constants: Constants,
        shares: Sequence[NDArray[Any]],
        pairs: PairTables,
    ) -> None:
        super().__init__(origin, constants)
        self.popularity = Rates(shares, [STRENGTH] * len(shares))
        self.pairs = pairs

    @classmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        shares = popularity(origin, trace)
        return cls(origin, constants, shares, _pairs(origin, trace, shares, constants))

    def learn(self, position: int, topk_ids: IntArray) -> None:
        """See `FittedPredictor`."""
        now = self.rows_hot(position, topk_ids)
        self.popularity.count(position, now.sum(axis=0), len(now))
        self.pairs.learn(self.history, position)

    def forget(self) -> None:
        """See `FittedPredictor`."""
        self.popularity.reset()
        self.pairs.reset()

    def score(self, position: int) -> NDArray[Any]:
        """See `FittedPredictor`."""
        share = self.pairs.share(self.history, position)
        if share is not None:
            return share
        return np.repeat(self.popularity.of(position)[None], len(self.history.rows), axis=0)

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """See `FittedPredictor`."""
        shares = np.concatenate(self.popularity.prior).astype(np.float32)
        return {"popularity": shares, **self.pairs.to_arrays()}

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        pairs = PairTables.of_arrays(origin, arrays)
        return cls(origin, constants, take_popularity(origin, arrays), pairs)


class TransitionPredictor(PairCountPredictor):
    """Conditioned on the set chosen, not on single experts: a log-linear combination of evidence.

    The evidence for an expert is its popularity, whether the token before chose it, the pair
    counts from the newest layer, and what tokens chose whose whole path down to the newest layer
    was most like this one's (`Neighbours`). Weights by distance come from logistic regression on
    held-out rows.
    """

    name: ClassVar[str] = "transition"
    kind: ClassVar[str] = "transition"
    candidates: ClassVar[tuple[dict[str, Any], ...]] = (
        {"pair_strength": 2.0, "pair_cap": 16.0, "weights": [list(row) for row in WEIGHTS]},
    )

    def __init__(
        self,
        origin: Origin,
        constants: Constants,
        shares: Sequence[NDArray[Any]],
        pairs: PairTables,
        neighbours: Neighbours,
    ) -> None:
        super().__init__(origin, constants, shares, pairs)
        self._neighbours = neighbours
        self._weights = np.asarray(constants["weights"], np.float32)
        if self._weights.shape != (REACH, len(WEIGHTS[0])) or not np.isfinite(self._weights).all():
            raise PredictorError(
                f"constant 'weights' must be {REACH} lists of {len(WEIGHTS[0])} numbers, found "
                f"shape {self._weights.shape}"
            )

    @classmethod
    def make(cls, origin: Origin, trace: RoutingTrace | None, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        shares = popularity(origin, trace)
        pairs = _pairs(origin, trace, shares, constants)
        return cls(origin, constants, shares, pairs, _bank(origin, trace))

    @classmethod
    def choose(cls, origin: Origin, known: RoutingTrace, held: RoutingTrace) -> Constants:
        """Weights by logistic regression on held-out rows, drawn to `WEIGHTS`."""
        constants = cls.candidates[0]
        trial = cls.make(origin, known, constants)
        weights = weights_of([evidence_of(trial, held[:WEIGHT_ROWS])])
        return {**constants, "weights": [[round(float(w), 5) for w in row] for row in weights]}

    def begin_step(self, rows: StepRows) -> None:
        """See `Predictor`."""
        self._neighbours.remember(self.history)
        super().begin_step(rows)
        self._neighbours.begin_step(rows.token_ids)

    def forget(self) -> None:
        """See `FittedPredictor`."""
        super().forget()
        self._neighbours.reset()

    def score(self, position: int) -> NDArray[Any]:
        """See `FittedPredictor`."""
        weights = self._weights[min(position - self.history.newest, REACH) - 1]
        logits = self.features(position) @ weights
        return np.asarray(1.0 / (1.0 + np.exp(-logits)))

    def features(self, position: int) -> NDArray[np.float32]:
        """float32 `[T, E, 7]`: the evidence, in the order of `WEIGHTS`."""
        popular = self.popularity.of(position)[None]
        neighbours, worth = self._neighbours.estimate(self.history, position)
        neighbours = (neighbours * worth + popular) / (worth + 1.0)
        pairs = self.pairs.share(self.history, position)
        if pairs is None:
            pairs = popular
        previous = self.rows_hot(position, self.history.previous(position))
        base = np.log(popular)
        result = np.empty((*neighbours.shape, len(WEIGHTS[0])), np.float32)
        result[..., 0] = 1.0
        result[..., 1] = base
        result[..., 2] = previous
        result[..., 3] = np.log(neighbours) - base
        result[..., 4] = np.log(pairs) - base
        result[..., 5] = neighbours
        result[..., 6] = pairs
        return result

    def fitted_arrays(self) -> dict[str, NDArray[Any]]:
        """See `FittedPredictor`."""
        bank = self._neighbours
        return {
            **super().fitted_arrays(),
            "bank": bank.fitted_ids,
            "bank_tokens": bank.fitted_tokens,
        }

    @classmethod
    def of_arrays(cls, origin: Origin, arrays: Arrays, constants: Constants) -> Self:
        """See `FittedPredictor`."""
        layers, limits = len(origin.layer_ids), np.asarray(origin.experts)[None, :, None]
        bank = take_array(arrays, "bank", (None, layers, None), np.int16)
        tokens = take_array(arrays, "bank_tokens", (len(bank),), np.int64)
        if (bank < NOTHING).any() or (bank >= limits).any():
            raise PredictorError("the bank names experts that the model does not have")
        return cls(
            origin,
            constants,
            take_popularity(origin, arrays),
            PairTables.of_arrays(origin, arrays),
            Neighbours(origin.grid, bank, tokens),
        )


def evidence_of(predictor: TransitionPredictor, trace: RoutingTrace) -> Evidence:
    """What a predictor knew, and what came of it, on rows of its model that it was not made of.

    Returns:
        By distance - 1 float64 `[n, 9]`: the seven features, whether the expert was chosen, and
        how many entries this one stands for.
    """
    parts: list[list[NDArray[Any]]] = [[] for _ in range(REACH)]
    rng = np.random.default_rng(SEED)
    for one in replay(predictor, trace, REACH):
        if one.position < one.distance:  # at the call's beginning there are no pairs
            continue
        hot = predictor.rows_hot(one.position, one.topk_ids)
        # Of the experts not chosen a tenth is kept, and stands for ten.
        keep = (hot > 0) | (rng.random(hot.shape) < KEPT)
        outcome = hot[keep][:, None]
        stands_for = np.where(outcome > 0, 1.0, 1.0 / KEPT)
        features = predictor.features(one.position)[keep]
        parts[one.distance - 1].append(np.concatenate([features, outcome, stands_for], axis=1))
    none = np.zeros((0, len(WEIGHTS[0]) + 2))
    return [np.concatenate([none, *rows]).astype(np.float64) for rows in parts]


def weights_of(runs: Sequence[Evidence], *, pull: float = PULL) -> NDArray[np.float64]:
    """Weights `[REACH, 7]` under which what came of the evidence is likeliest, drawn to `WEIGHTS`.

    Args:
        runs: of `evidence_of`, one or more.
        pull: how strongly; about as much as so many chosen experts.
    """
    result = []
    for distance in range(REACH):
        rows = np.concatenate([run[distance] for run in runs])
        centre = np.asarray(WEIGHTS[distance], np.float64)
        result.append(fit_logistic(rows[:, :-2], rows[:, -2], rows[:, -1], centre, pull))
    return np.stack(result)


def _pairs(
    origin: Origin,
    trace: RoutingTrace | None,
    shares: Sequence[NDArray[Any]],
    constants: Constants,
) -> PairTables:
    strength, cap = positive(constants, "pair_strength"), positive(constants, "pair_cap")
    return PairTables.make(origin, trace, shares, strength, cap)


def _bank(origin: Origin, trace: RoutingTrace | None) -> Neighbours:
    """Tokens of a trace, at most `BANK_ROWS`, drawn evenly over it."""
    if trace is None:
        none = np.zeros((0, len(origin.layer_ids), max(*origin.top_k, 1)), np.int16)
        return Neighbours(origin.grid, none, np.zeros(0, np.int64))
    rows = np.unique(np.linspace(0, len(trace) - 1, BANK_ROWS).astype(np.int64))
    ids = trace.topk_ids[rows].astype(np.int32)
    ids[ids == 65535] = NOTHING
    return Neighbours(origin.grid, ids.astype(np.int16), trace.token_ids[rows].astype(np.int64))

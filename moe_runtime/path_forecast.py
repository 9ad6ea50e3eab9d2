"""Paths of coming tokens: a predictor asked and told, and given up when it fails.

Knows predictors and what listeners of the executor hear; no grouping and no models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch

from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.errors import ConfigError
from moe_runtime.predictors.base import Predictor, StepRows
from moe_runtime.steps import Step

__all__ = ["PathForecast", "RoutingListener", "check_predictor"]

_LOG = logging.getLogger("moe_runtime")


def check_predictor(predictor: Predictor, grid: ExpertGrid | None) -> None:
    """ConfigError unless the predictor can say a token's path before the token is computed.

    Args:
        grid: the model's; None if it has no runtime that tells.
    """
    if predictor.needs_hidden:
        raise ConfigError(
            f"predictor {predictor.name!r} needs hidden states, which are there only while a token "
            "is computed; the scheduler needs its path before: use one that does not"
        )
    if grid is not None and predictor.grid != grid:
        raise ConfigError(
            f"predictor {predictor.name!r} is for the layers {predictor.grid.layers} with "
            f"{predictor.grid.experts} experts, the model has {grid.layers} with {grid.experts}; "
            "use one that was fitted to this model"
        )


class RoutingListener:
    """Hears the routing of one forward call at a time; to be put into `executor.listeners`."""

    def __init__(self, grid: ExpertGrid) -> None:
        self._experts = grid.experts
        self._real: IntArray | None = None
        self._rows = 0
        self.chosen: dict[int, IntArray] = {}

    def begin(self, rows: int, real: IntArray | None = None) -> None:
        """A call begins.

        Args:
            rows: of the call; a layer that is given another number of them is not heard.
            real: numbers of the rows to keep, in this order; None for all.
        """
        self._rows, self._real = rows, real
        self.chosen = {}

    def __call__(
        self, position: int, index: torch.Tensor, weights: torch.Tensor, step: Step | None
    ) -> None:
        """One layer's choices `[T, K]`."""
        if len(index) != self._rows:
            return
        chosen = index.detach().to("cpu", torch.int64).numpy()
        if self._real is not None:
            chosen = chosen[self._real]
        self.chosen[position] = np.where(chosen < self._experts[position], chosen, -1)

    def active(self) -> IntArray:
        """Distinct experts of the call, `[layers]`."""
        counts = np.zeros(len(self._experts), np.int64)
        for position, chosen in self.chosen.items():
            needed = np.zeros(self._experts[position] + 1, np.bool_)
            needed[chosen] = True  # -1, "none", is the last
            counts[position] = needed[:-1].sum()
        return counts


class PathForecast:
    """Asks a predictor for the paths of coming tokens and tells it what became of them.

    A predictor that raises, or answers with anything but probabilities, is not asked again:
    `failure` says why, and the log does. Outputs do not depend on forecasts.
    """

    def __init__(self, predictor: Predictor | None) -> None:
        self._predictor = predictor
        self.failure = ""
        if predictor is not None:
            predictor.reset()

    def begin(self, rows: StepRows) -> None:
        """These tokens come next."""
        if self._predictor is not None:
            try:
                self._predictor.begin_step(rows)
            except Exception as error:  # noqa: BLE001  whatever a predictor raises
                self._give_up(error)

    def paths(self, rows: int) -> FloatArray | None:
        """Probabilities `[rows, experts over all layers]` of the tokens that come next; or None."""
        if self._predictor is None:
            return None
        grid = self._predictor.grid
        try:
            layers = [self._predictor.predict(position) for position in range(len(grid.layers))]
            paths = np.concatenate(layers, axis=1).astype(np.float64)
            if paths.shape != (rows, grid.size):
                raise ValueError(f"paths of shape {paths.shape} instead of {(rows, grid.size)}")
            if not (paths.min() >= -1e-6 and paths.max() <= 1.0 + 1e-6):
                raise ValueError("probabilities that are NaN or outside 0 to 1")
        except Exception as error:  # noqa: BLE001  whatever a predictor raises
            self._give_up(error)
            return None
        return np.clip(paths, 0.0, 1.0)

    def observe(self, chosen: Mapping[int, IntArray]) -> None:
        """Where the tokens of `begin` went: `[T, K]` by layer position."""
        if self._predictor is None:
            return
        try:
            for position in sorted(chosen):
                self._predictor.observe(position, chosen[position])
        except Exception as error:  # noqa: BLE001  whatever a predictor raises
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        assert self._predictor is not None
        self.failure = f"predictor {self._predictor.name!r} failed: {error!r}"
        _LOG.warning("%s; sequences stay in the groups they are in", self.failure)
        self._predictor = None

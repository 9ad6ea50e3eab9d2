"""Logistic regression with few features, by Newton's method.

Knows nothing of routing.
"""

from __future__ import annotations

import numpy as np

from moe_runtime.core import FloatArray

__all__ = ["fit_logistic"]

STEPS = 30


def fit_logistic(
    features: FloatArray, outcomes: FloatArray, weights: FloatArray, centre: FloatArray, pull: float
) -> FloatArray:
    """Coefficients `[F]` of the most likely logistic model, drawn to `centre`.

    Minimises the weighted log loss plus `pull / 2` times the squared distance to `centre`.

    Args:
        features: `[N, F]`; a constant must be one of them.
        outcomes: `[N]`, 0 or 1.
        weights: `[N]`, how many rows each stands for.
        centre: `[F]`.
        pull: above 0, so that there is one minimum.
    """
    found = centre.astype(np.float64)
    for _ in range(STEPS):
        p = 1.0 / (1.0 + np.exp(-np.clip(features @ found, -40, 40)))
        slope = features.T @ (weights * (p - outcomes)) + pull * (found - centre)
        bend = (features * (weights * p * (1 - p))[:, None]).T @ features
        step = np.linalg.solve(bend + pull * np.eye(len(found)), slope)
        # Newton overshoots far from the minimum; a step is kept to what is locally true.
        step *= min(1.0, 4.0 / max(float(np.abs(features[:256] @ step).max(initial=0)), 1e-12))
        found -= step
        if float(np.abs(step).max()) < 1e-7:
            break
    return found

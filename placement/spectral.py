"""A first placement from the leading eigenvectors of the affinity of all layers together.

Experts that tokens pass through together lie near each other in them; balanced clusters of the
experts of each layer, around centres that all layers share, are the start. Knows no improvement.
"""

from __future__ import annotations

import numpy as np
from moe_runtime.placement.assign import assign, balanced_start
from moe_runtime.placement.instance import Assignment, Instance
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from moe_runtime.core import FloatArray

__all__ = ["spectral_start"]

_ROUNDS = 12


def spectral_start(instance: Instance, rng: np.random.Generator) -> Assignment:
    """An assignment that keeps all limits; a random one where there is nothing to embed."""
    start = [balanced_start(slots, rng) for slots in instance.slots]
    if not instance.pairs or instance.devices < 2:
        return start
    points = _embedding(instance, rng)
    if points is None:
        return start
    centres = _centres(np.concatenate(points), instance.devices, rng)
    assignment = start
    for _ in range(_ROUNDS):
        before = assignment
        assignment = [
            assign(at @ centres.T, slots, device)
            for at, slots, device in zip(points, instance.slots, assignment, strict=True)
        ]
        if all(np.array_equal(a, b) for a, b in zip(before, assignment, strict=True)):
            break
        sums = np.zeros_like(centres)
        for at, device in zip(points, assignment, strict=True):
            np.add.at(sums, device, at)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(norms > 0, sums / np.maximum(norms, 1e-300), centres)
    return assignment


def _embedding(instance: Instance, rng: np.random.Generator) -> list[FloatArray] | None:
    """For each layer float64 `[S, G - 1]`, rows of length one."""
    sizes = [len(slots.owner) for slots in instance.slots]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    blocks = [(a, b, _normalised(matrix)) for a, b, matrix in instance.pairs]
    wanted = min(instance.devices - 1, int(offsets[-1]) - 2)
    if wanted < 1:
        return None

    def multiply(vector: FloatArray) -> FloatArray:
        result = np.zeros(int(offsets[-1]))
        flat = vector.ravel()
        for a, b, matrix in blocks:
            mine, theirs = slice(offsets[a], offsets[a + 1]), slice(offsets[b], offsets[b + 1])
            result[mine] += matrix @ flat[theirs]
            result[theirs] += matrix.T @ flat[mine]
        return result

    operator = LinearOperator((int(offsets[-1]),) * 2, matvec=multiply, dtype=np.float64)
    try:
        _, vectors = eigsh(
            operator, k=wanted, which="LA", v0=rng.standard_normal(int(offsets[-1])), tol=1e-4
        )
    except ArpackError:
        return None
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.maximum(lengths, 1e-12)
    return [vectors[offsets[n] : offsets[n + 1]] for n in range(instance.layers)]


def _normalised(matrix: FloatArray) -> FloatArray:
    """What is beyond popularity, on the scale of the margins: 0 where the two are independent."""
    total = matrix.sum()
    if total <= 0:
        return matrix
    rows, columns = matrix.sum(1, keepdims=True), matrix.sum(0, keepdims=True)
    scale = np.sqrt(np.maximum(rows, 1e-12 * total) * np.maximum(columns, 1e-12 * total))
    result: FloatArray = (matrix - rows * columns / total) / scale
    return result


def _centres(points: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """Points far from each other, the first random: each next is the least like all before."""
    chosen = [int(rng.integers(len(points)))]
    likeness = points @ points[chosen[0]]
    for _ in range(count - 1):
        chosen.append(int(likeness.argmin()))
        likeness = np.maximum(likeness, points @ points[chosen[-1]])
    centres: FloatArray = points[chosen]
    return centres

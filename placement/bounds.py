"""Certificates at scale: no placement is worth more than these bounds say.

Each pair of layers is bounded by itself, so their sum bounds every placement of all. Two
relaxations of "which slots share a device" are made and then combined; any combination is valid, so
that time only makes them tighter. Knows nothing of how placements are found.

For two layers with n and n' slots on each of G devices let Y [S, S'] say which slots share a
device: entries 0 or 1, rows summing to n', columns to n. And Y = Z W^T with Z, W the indicators of
the devices, so all of its singular values but the first (which is the even part, fixed by the
counts) are sqrt(n n'), and there are G - 1 of them (von Neumann's trace inequality, Ky Fan 1951).

* transport bound T: the most of <A, Y> over the first property, by its linear programming dual;
* spectral bound S: the most over the second, from the singular values of A without its margins;
* combined: <A, Y> = <A - M, Y> + <M, Y> <= T(A - M) + S(M) for every matrix M; M is moved along a
  subgradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from moe_runtime.placement.instance import Instance
from scipy.linalg import svd as scipy_svd

from moe_runtime.core import FloatArray

__all__ = ["Bound", "lower_bound", "pair_bound", "within_bound"]

_DUAL_ROUNDS = 6


@dataclass(frozen=True, kw_only=True)
class Bound:
    """No assignment of an instance has a cost below `cost`; `method` says where that is from."""

    cost: float
    method: str


@dataclass(frozen=True, kw_only=True)
class _Level:
    """A coarser view of the devices: `groups` of them, with this part of a pair's worth."""

    groups: int
    weight: float


def lower_bound(
    instance: Instance,
    *,
    time_limit: float = 30.0,
    steps: int = 60,
    progress: Callable[[float], None] | None = None,
) -> Bound:
    """A lower bound on `Instance.cost`.

    Args:
        time_limit: seconds for tightening; the quick bounds are always made.
        steps: subgradient steps for each pair of layers at most.
        progress: called with the bound so far, the untightened part included.
    """
    began = time.perf_counter()
    base, levels = _levels(instance)
    worth = [base * float(matrix.sum()) for _, _, matrix in instance.pairs]
    cap = float(sum(matrix.sum() for _, _, matrix in instance.pairs))
    rough = [
        [_quick(instance, a, b, matrix, level) for level in levels]
        for a, b, matrix in instance.pairs
    ]
    within = [within_bound(instance, layer) for layer in range(len(instance.together))]

    def cost() -> float:
        pairs = sum(w + sum(r) for w, r in zip(worth, rough, strict=True))
        # Replicas let a pair be counted for each of them; it stays once at most.
        pairs = min(pairs, cap, _pair_total(instance))
        slack = 1e-9 * max(1.0, instance.total)  # the singular values are rounded
        return max(0.0, instance.total - pairs - sum(within) - slack)

    if progress is not None:
        progress(cost())
    tightened = 0
    order = sorted(range(len(rough)), key=lambda n: -sum(rough[n]))
    for done, number in enumerate(order):
        left = time_limit - (time.perf_counter() - began)
        if left <= 0:
            break
        a, b, matrix = instance.pairs[number]
        share = left / (len(order) - done) / len(levels)
        for at, level in enumerate(levels):
            found = level.weight * pair_bound(
                matrix, *_counts(instance, a, b, level), level.groups, steps=steps, seconds=share
            )
            rough[number][at] = min(rough[number][at], found)
        tightened += 1
        if progress is not None:
            progress(cost())
    method = "sum over layer pairs of spectral and transport bounds"
    if tightened:
        method += f", combined for {tightened} of {len(rough)}"
    return Bound(cost=cost(), method=method)


def _pair_total(instance: Instance) -> float:
    """The worth of all pairs when every pair is kept."""
    return instance.total - 0.5 * sum(float(matrix.sum()) for matrix in instance.together)


def _levels(instance: Instance) -> tuple[float, list[_Level]]:
    """What every pair keeps, and the levels at which it can keep more.

    With devices in nodes a pair keeps u elsewhere, v in the same node, 1 on the same device: u for
    all, v - u for those that share a node, 1 - v for those that share a device.
    """
    near, devices = instance.near, instance.devices
    if devices == 1:
        return 1.0, []
    off = near[~np.eye(devices, dtype=bool)]
    low, high = float(off.min()), float(off.max())
    if high > low:
        node = near > low + 1e-12
        groups = {tuple(row) for row in node.tolist()}
        sizes = {int(row.sum()) for row in node}
        blocks = len(groups) * next(iter(sizes)) == devices and len(sizes) == 1
        two_levels = bool(np.isin(near, [low, high, 1.0]).all())
        if blocks and two_levels:
            return low, [
                _Level(groups=len(groups), weight=high - low),
                _Level(groups=devices, weight=1.0 - high),
            ]
    return high, [_Level(groups=devices, weight=1.0 - high)]


def _counts(instance: Instance, a: int, b: int, level: _Level) -> tuple[int, int, bool]:
    """Most slots of layer a and of layer b in a group of devices, and whether all have as many."""
    size = instance.devices // level.groups
    limits = (instance.slots[a].limits, instance.slots[b].limits)
    equal = all(np.array_equal(one.least, one.most) for one in limits)
    equal = equal and all(len(set(one.most.tolist())) == 1 for one in limits)
    most = [int(np.sort(one.most)[-size:].sum()) for one in limits]
    return most[0], most[1], equal


def _quick(instance: Instance, a: int, b: int, matrix: FloatArray, level: _Level) -> float:
    first, second, equal = _counts(instance, a, b, level)
    transport, _ = _transport(matrix, first, second, equal=equal)
    spectral, _ = _spectral(matrix, first, second, level.groups, equal=equal)
    return level.weight * min(transport, spectral, float(matrix.sum()))


def pair_bound(
    matrix: FloatArray,
    first: int,
    second: int,
    equal: bool,
    groups: int,
    *,
    steps: int = 60,
    seconds: float = np.inf,
) -> float:
    """The most that two layers' pairs can be worth: the combined bound.

    Args:
        matrix: float64 `[S, S']`, worth of each pair on one device; not negative.
        first, second: most slots of the first and the second layer on a device.
        equal: whether every device holds exactly so many.
        groups: devices.
        steps, seconds: when to stop tightening.
    """
    began = time.perf_counter()
    part = np.zeros_like(matrix)  # M: starts as the pure transport bound
    spectral_only, _ = _spectral(matrix, first, second, groups, equal=equal)
    transport_only, _ = _transport(matrix, first, second, equal=equal)
    best = min(spectral_only, transport_only, float(matrix.sum()))
    if spectral_only < transport_only:
        part = matrix.copy()
    stride = 1.0
    for _ in range(steps):
        if time.perf_counter() - began > seconds:
            break
        spectral, shared = _spectral(part, first, second, groups, equal=equal)
        transport, kept = _transport(matrix - part, first, second, equal=equal)
        value = spectral + transport
        if value < best - 1e-12:
            best = value
        else:
            stride *= 0.8
        if stride < 1e-3:
            break
        slope = shared - kept
        norm = float((slope * slope).sum())
        if norm < 1e-18:
            break
        # Polyak's step towards a value a little below the best so far.
        aim = 0.02 * stride * best + max(0.0, value - best)
        part = part - aim / norm * slope
    return best


def _spectral(
    matrix: FloatArray, first: int, second: int, groups: int, *, equal: bool
) -> tuple[float, FloatArray]:
    """Bound and the relaxed Y that attains it, `[S, S']`."""
    scale = float(np.sqrt(first * second))
    if not equal:
        left, values, right = _svd(matrix)
        top = min(groups, len(values))
        return scale * float(values[:top].sum()), scale * left[:, :top] @ right[:top]
    centred = matrix - matrix.mean(0, keepdims=True)
    centred = centred - centred.mean(1, keepdims=True)
    left, values, right = _svd(centred)
    top = min(groups - 1, len(values))
    bound = float(matrix.sum()) / groups + scale * float(values[:top].sum())
    return bound, 1.0 / groups + scale * left[:, :top] @ right[:top]


def _svd(matrix: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Thin singular value decomposition.

    LAPACK's quick method gives up now and then (seen on a real trace); its slow one then serves.
    """
    try:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        left, values, right = scipy_svd(matrix, full_matrices=False, lapack_driver="gesvd")
    return left, values, right


def _transport(
    matrix: FloatArray, first: int, second: int, *, equal: bool
) -> tuple[float, FloatArray]:
    """Bound and nearly the Y that attains it, `[S, S']`.

    Dual: prices u on rows and v on columns bound <A, Y> by
    second * sum(u) + first * sum(v) + sum(max(0, A - u - v)); each u alone is best at the
    `second`-th largest entry of its row of A - v, and likewise v. Every pair of prices is valid.
    """
    rows, columns = matrix.shape
    second, first = min(second, columns), min(first, rows)
    floor = -np.inf if equal else 0.0
    across = np.zeros(columns)
    down = np.zeros(rows)
    best = np.inf
    prices = (down, across)
    for _ in range(_DUAL_ROUNDS):
        down = _kth(matrix - across, second, axis=1).clip(min=floor)
        value = _dual(matrix, down, across, first, second)
        if value < best:
            best, prices = value, (down, across)
        # Half a step keeps the two sides from undoing each other's.
        across = 0.5 * (across + _kth((matrix - down[:, None]), first, axis=0).clip(min=floor))
    reduced = matrix - prices[0][:, None] - prices[1][None, :]
    spread = max(float(np.abs(reduced).mean()) * 0.05, 1e-15)
    return best, 1.0 / (1.0 + np.exp(-np.clip(reduced / spread, -30, 30)))


def _dual(
    matrix: FloatArray, down: FloatArray, across: FloatArray, first: int, second: int
) -> float:
    left = matrix - down[:, None] - across[None, :]
    return float(second * down.sum() + first * across.sum() + left.clip(min=0).sum())


def _kth(matrix: FloatArray, k: int, *, axis: int) -> FloatArray:
    """The k-th largest entry along an axis."""
    size = matrix.shape[axis]
    result: FloatArray = np.take(np.partition(matrix, size - k, axis=axis), size - k, axis=axis)
    return result


def within_bound(instance: Instance, layer: int) -> float:
    """The most that the pairs inside one layer can be worth."""
    matrix, slots = instance.together[layer], instance.slots[layer]
    most = int(slots.limits.most.max())
    equal = bool((slots.limits.least == most).all() and (slots.limits.most == most).all())
    if most < 2:
        return 0.0
    rows = np.sort(matrix, axis=1)[:, ::-1][:, : most - 1].sum()
    bounds = [float(rows), float(matrix.sum())]
    if equal:
        size = len(matrix)
        middle = np.eye(size) - 1.0 / size
        values = np.linalg.eigvalsh(middle @ matrix @ middle)[::-1][: instance.devices - 1]
        bounds.append(float(matrix.sum()) / instance.devices + most * float(values.sum()))
    return 0.5 * min(bounds)

"""The token scheduler: sequences put into groups whose tokens will need few experts together.

Knows paths as arrays; no model, no cache of keys and values, and not where a path is known from.

A path says which experts, over all layers, a sequence's next token will be routed to: bool, or a
probability of each. The cost of a grouping is the number of experts that its groups activate,
summed over groups and layers; with probabilities its expectation, sum_e 1 - prod_i (1 - p_ie).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import ConfigError

__all__ = [
    "METHODS",
    "Groups",
    "active_experts",
    "group_sequences",
    "group_sizes",
    "in_order",
    "on_demand_loads",
]

Groups: TypeAlias = tuple[tuple[int, ...], ...]
Paths: TypeAlias = NDArray[Any]

METHODS = ("union", "k-medoids")
_ROUNDS = 30  # the k-medoids of the paper stop here at the latest
_TOLERANCE = 1e-9  # experts; a swap that gains less is rounding


def group_sizes(sequences: int, batch_size: int) -> list[int]:
    """Sizes of the fewest groups: all `batch_size`, the last one what is left."""
    full, rest = divmod(sequences, batch_size)
    return [batch_size] * full + ([rest] if rest else [])


def in_order(sequences: int, batch_size: int) -> Groups:
    """The grouping without a scheduler: one sequence after the other."""
    numbers = range(sequences)
    return tuple(tuple(numbers[at : at + batch_size]) for at in range(0, sequences, batch_size))


def active_experts(paths: Paths, groups: Groups, offsets: Sequence[int] = (0,)) -> FloatArray:
    """Experts that each group activates, expected where paths are probabilities.

    Args:
        paths: bool or probabilities `[S, experts over all layers]`.
        groups: rows of `paths` in each group.
        offsets: first column of each layer, ascending from 0 (`ExpertGrid.offsets`).

    Returns:
        float64 `[groups, layers]`.
    """
    quiet = 1.0 - np.asarray(paths, dtype=np.float64)
    active = np.stack([1.0 - quiet[list(group)].prod(axis=0) for group in groups])
    return np.add.reduceat(active, np.asarray(offsets), axis=1)


def on_demand_loads(active: FloatArray, slots: Sequence[float]) -> float:
    """ExpertFlow (He)'s figure of merit: sum over groups and layers of max(0, active - slots).

    Args:
        active: `[groups, layers]`, as `active_experts` gives it.
        slots: experts that the cache holds of each layer.
    """
    return float(np.maximum(active - np.asarray(slots, dtype=np.float64), 0.0).sum())


def group_sequences(
    paths: Paths,
    batch_size: int,
    *,
    method: str = "union",
    start: Groups | None = None,
    seed: int = 0,
) -> Groups:
    """Put S sequences into groups of `batch_size`; the last takes what is left.

    Args:
        paths: bool or probabilities in 0..1, `[S, experts over all layers]`.
        batch_size: sequences of a group, 1 or more.
        method: `"union"`, ours: the cost itself, lowered by exchanging pairs of sequences until no
            exchange helps, from a greedy start, from the medoids' and from `start`; or
            `"k-medoids"`, ExpertFlow (He)'s, balanced, on the (expected) Hamming distance.
        start: a grouping of these sequences to begin from, in groups of these sizes in any order;
            it is returned as it is if nothing better is found. Only `"union"` uses it.
        seed: of the first medoids.

    Returns:
        Row numbers of each group, ascending in it; groups by their first row, the short one last.

    Raises:
        ConfigError: an unknown method, a batch size below 1, paths of another form or out of range,
            or a start that is no grouping of these sequences.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r} of grouping; known: {', '.join(METHODS)}")
    if batch_size < 1:
        raise ConfigError(f"a batch size is 1 or more, found {batch_size}")
    paths = _checked(paths)
    count = len(paths)
    sizes = group_sizes(count, batch_size)
    if start is not None:
        _check_start(start, count, sizes)
    if len(sizes) < 2 or batch_size == 1:
        return in_order(count, batch_size)
    around = _balanced_medoids(_hamming(paths), sizes, np.random.default_rng(seed))
    if method == "k-medoids":
        return _sorted(around)
    quiet = 1.0 - paths
    # Each start ends in an optimum of its own; what begins from the present grouping wins a tie.
    starts = [around, _greedy(quiet, sizes)]
    if start is not None:
        starts.append([list(group) for group in start])
    best, most = starts[0], -1.0
    for begun in starts:
        found, unused = _exchange(quiet, begun)
        if unused >= most - _TOLERANCE:
            best, most = found, unused
    return _sorted(best)


def _checked(paths: Paths) -> FloatArray:
    checked = np.asarray(paths, dtype=np.float64)
    if checked.ndim != 2:
        raise ConfigError(
            f"paths have the shape [sequences, experts over all layers], found {checked.shape}"
        )
    if checked.size and not (checked.min() >= 0.0 and checked.max() <= 1.0):  # False for NaN
        raise ConfigError("paths hold probabilities 0 to 1; found NaN or a number outside")
    return checked


def _check_start(start: Groups, count: int, sizes: list[int]) -> None:
    members = sorted(row for group in start for row in group)
    if members != list(range(count)) or sorted(map(len, start)) != sorted(sizes):
        raise ConfigError(
            f"a start has each of {count} sequences once, in groups of {sizes}; found "
            f"{len(members)} in groups of {[len(group) for group in start]}"
        )


def _sorted(groups: Sequence[Sequence[int]]) -> Groups:
    """Members ascending, groups by their first member, a shorter one last."""
    ordered = sorted((tuple(sorted(group)) for group in groups), key=lambda g: (-len(g), g))
    return tuple(ordered)


# -- the union of experts --------------------------------------------------------------------------


def _greedy(quiet: FloatArray, sizes: list[int]) -> list[list[int]]:
    """Fill one group after the other with the sequence that leaves most experts unused.

    Each group begins with the sequence that shares least with the rest: it is hardest to place.
    """
    left = np.arange(len(quiet))
    affinity = quiet @ quiet.T
    groups = []
    for size in sizes:
        first = int(affinity[np.ix_(left, left)].sum(axis=1).argmin())
        group = [int(left[first])]
        left = np.delete(left, first)
        unused = quiet[group[0]].copy()
        while len(group) < size:
            best = int((quiet[left] @ unused).argmax())
            group.append(int(left[best]))
            unused *= quiet[left[best]]
            left = np.delete(left, best)
        groups.append(group)
    return groups


def _exchange(quiet: FloatArray, groups: list[list[int]]) -> tuple[list[list[int]], float]:
    """Exchange the best two sequences of different groups, again and again, until none helps.

    Returns:
        The groups, and the expected number of experts that they leave unused (to be maximal: with
        the number of groups fixed, that is the union to be minimal).
    """
    groups = [list(group) for group in groups]
    label = np.empty(len(quiet), np.int64)
    others = np.empty_like(quiet)
    for at, group in enumerate(groups):
        label[group] = at
        others[group] = _without_each(quiet[group])
    # What i's group would leave unused with j in the place of i; i's own column: as it is.
    instead = others @ quiet.T
    while True:
        unused = instead.diagonal()
        gains = instead + instead.T - unused[:, None] - unused[None, :]
        gains[label[:, None] == label[None, :]] = -np.inf
        i, j = (int(at) for at in np.unravel_index(int(gains.argmax()), gains.shape))
        if gains[i, j] <= _TOLERANCE:
            firsts = [group[0] for group in groups]
            return groups, float(instead[firsts, firsts].sum())
        a, b = label[i], label[j]
        groups[a][groups[a].index(i)], groups[b][groups[b].index(j)] = j, i
        label[i], label[j] = b, a
        for at in (a, b):
            others[groups[at]] = _without_each(quiet[groups[at]])
        changed = [*groups[a], *groups[b]]
        instead[changed] = others[changed] @ quiet.T


def _without_each(quiet: FloatArray) -> FloatArray:
    """Row i: the product of all rows but i, `[n, experts]`; without a division, zeros are usual."""
    before = np.ones_like(quiet)
    after = np.ones_like(quiet)
    for at in range(1, len(quiet)):
        np.multiply(before[at - 1], quiet[at - 1], out=before[at])
        np.multiply(after[-at], quiet[-at], out=after[-at - 1])
    before *= after
    return before


# -- balanced k-medoids ----------------------------------------------------------------------------


def _hamming(paths: FloatArray) -> FloatArray:
    """Hamming distance of each two paths `[S, S]`, expected where they are probabilities."""
    size = paths.sum(axis=1)
    distance: FloatArray = size[:, None] + size[None, :] - 2.0 * (paths @ paths.T)
    np.fill_diagonal(distance, 0.0)
    return distance


def _balanced_medoids(
    distance: FloatArray, sizes: list[int], rng: np.random.Generator
) -> list[list[int]]:
    """ExpertFlow (He), 2410.17954, section 3.3: clusters around medoids, then made equal.

    An over-full cluster keeps those nearest to its medoid; the rest go, nearest first, to clusters
    with room. The member nearest to all others becomes the medoid. Ends when a labelling comes
    back or after 30 rounds.
    """
    medoids = rng.choice(len(distance), size=len(sizes), replace=False)
    seen: set[bytes] = set()
    for _ in range(_ROUNDS):
        labels = _balanced_labels(distance[:, medoids], sizes)
        groups = [np.flatnonzero(labels == at) for at in range(len(sizes))]
        if labels.tobytes() in seen:
            break
        seen.add(labels.tobytes())
        medoids = np.array(
            [group[distance[np.ix_(group, group)].sum(axis=1).argmin()] for group in groups]
        )
    return [group.tolist() for group in groups]


def _balanced_labels(distance: FloatArray, sizes: list[int]) -> IntArray:
    """Label of each sequence from its distances to the medoids `[S, groups]`, sizes kept."""
    labels = distance.argmin(axis=1)
    members = np.bincount(labels, minlength=len(sizes))
    room = np.empty(len(sizes), np.int64)
    room[np.argsort(-members, kind="stable")] = sizes  # the short group is the least wanted one
    homeless: list[int] = []
    for at in np.flatnonzero(members > room):
        mine = np.flatnonzero(labels == at)
        kept = np.argsort(distance[mine, at], kind="stable")
        homeless += mine[kept[room[at] :]].tolist()
    labels[homeless] = -1
    room -= np.bincount(labels[labels >= 0], minlength=len(sizes))
    rows, columns = np.asarray(homeless, np.int64), np.arange(len(sizes))
    for flat in np.argsort(distance[rows].ravel(), kind="stable"):
        row, at = rows[flat // len(columns)], flat % len(columns)
        if labels[row] < 0 and room[at]:
            labels[row], room[at] = at, room[at] - 1
    result: IntArray = labels.astype(np.int64)
    return result

"""Where each missing expert is computed: fetched to the device, or on the host where it lies.

A pure decision from times; does not know caches, models or how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import ConfigError
from moe_runtime.hardware.values import HardwareProfile

__all__ = ["Busy", "MissCost", "Placing", "choose_place", "miss_cost"]

_ALL_TRIED = 8  # so many misses or fewer: every assignment is weighed, which is quicker than search
_PAIRS_TRIED = 24  # so many or fewer: two change their places at once too
_ROUNDS = 64

Masks = NDArray[np.bool_]  # [assignments, misses]: True where a miss is computed on the host


@dataclass(frozen=True, kw_only=True)
class MissCost:
    """What one missing expert with its tokens takes, in seconds; infinite where it cannot be.

    Args:
        fetch: on the link, until its weights are on the device.
        device: on the device, once they are.
        host: on the host, with sending its rows there and back.

    Raises:
        ConfigError: a time that is negative or no number, or no place at all.
    """

    fetch: float
    device: float
    host: float

    def __post_init__(self) -> None:
        for name in ("fetch", "device", "host"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"a miss's {name} must be 0 s or more, found {self!r}")
        if self.host == self.fetch + self.device == float("inf"):
            raise ConfigError(f"a miss can be computed nowhere: {self!r}")


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Seconds until each is free of what has been given to it before.

    Args:
        link: copies under way or queued that these would wait for.
        host: experts that the host still computes.
        device: residents of this layer. It is part of the time that counts.
    """

    link: float = 0.0
    host: float = 0.0
    device: float = 0.0

    def __post_init__(self) -> None:
        for name in ("link", "host", "device"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"seconds until {name} is free must be finite, found {self!r}")


@dataclass(frozen=True, kw_only=True)
class Placing:
    """A decision, by indices of the misses.

    Args:
        fetch: those fetched, in the order in which to copy and compute them.
        host: those computed on the host, ascending.
        seconds: until all are done, by the times given.
        if_fetched: until all would be done if every one were fetched; if_hosted: if none were.
        proved: whether no other decision is shorter by these times (else it was searched for).
    """

    fetch: tuple[int, ...]
    host: tuple[int, ...]
    seconds: float
    if_fetched: float
    if_hosted: float
    proved: bool


def choose_place(
    misses: Sequence[MissCost], busy: Busy | None = None, *, thorough: bool = True
) -> Placing:
    """Assign each miss to a place so that all are done soon. Deterministic.

    The fetched go through two stages, link and device, each one at a time, in the order that is
    best for two stages (S. M. Johnson, "Optimal two- and three-stage production schedules with
    setup times included", 1954; it stays best when either stage starts late). The hosted go one
    after another beside them. Up to 8 misses every assignment is weighed. More are searched for:
    from each of several orders of preference for the host, cut where it is best, one miss or, up
    to 24 misses, two change their places as long as that helps. Of equal times one with fewer on
    the host is taken, since what is fetched stays.

    The value of an expert that stays for later steps is not weighed otherwise.

    Args:
        thorough: if False, more than 8 are only cut where it is best in the first of these orders,
            by host over link or device time: a fraction of a millisecond for any number.
    """
    busy = busy or Busy()
    if not misses:
        return Placing(
            fetch=(),
            host=(),
            seconds=busy.device,
            if_fetched=busy.device,
            if_hosted=busy.device,
            proved=True,
        )
    order = _johnson(misses)
    costs = np.array([(misses[i].fetch, misses[i].device, misses[i].host) for i in order])
    if len(misses) <= _ALL_TRIED:
        masks = _every(len(misses))
        seconds = _seconds(masks, costs, busy)
        best = int(seconds.argmin())
        chosen, shortest = masks[best], float(seconds[best])
    else:
        chosen, shortest = _searched(costs, busy, _ROUNDS if thorough else 0)
    ends = _seconds(np.array([[False], [True]]).repeat(len(misses), axis=1), costs, busy)
    return Placing(
        fetch=tuple(i for i, hosted in zip(order, chosen, strict=True) if not hosted),
        host=tuple(sorted(i for i, hosted in zip(order, chosen, strict=True) if hosted)),
        seconds=shortest,
        if_fetched=float(ends[0]),
        if_hosted=float(ends[1]),
        proved=len(misses) <= _ALL_TRIED,
    )


def miss_cost(
    profile: HardwareProfile,
    device: str,
    *,
    nbytes: int,
    tokens: int,
    row_bytes: int,
    pinned: bool = True,
) -> MissCost | None:
    """What a profile says of one miss whose weights lie in host memory.

    The way back from the device, which is not measured, is taken to be as fast as the way there.

    Args:
        device: PyTorch's name of it, like `"cuda:0"`.
        nbytes: of the expert's weights.
        tokens: rows that were routed to it.
        row_bytes: of one row of hidden state.
        pinned: whether the weights lie in page-locked memory; the rows do.

    Returns:
        None where the profile lacks one of the times.
    """
    fetch = profile.copy_seconds(device, nbytes, pinned=pinned)
    there = profile.copy_seconds(device, tokens * row_bytes)
    on_device = profile.expert_seconds(device, tokens, nbytes=nbytes)
    on_host = profile.expert_seconds("host", tokens, nbytes=nbytes)
    if fetch is None or there is None or on_device is None or on_host is None:
        return None
    return MissCost(fetch=fetch, device=on_device, host=on_host + 2 * there)


def _johnson(misses: Sequence[MissCost]) -> list[int]:
    """First those that the link has sooner than the device, quickest link first; then the others,
    longest device first.
    """
    quick = [i for i, miss in enumerate(misses) if miss.fetch <= miss.device]
    slow = [i for i, miss in enumerate(misses) if miss.fetch > miss.device]
    return sorted(quick, key=lambda i: misses[i].fetch) + sorted(
        slow, key=lambda i: -misses[i].device
    )


@lru_cache(maxsize=_ALL_TRIED)
def _every(count: int) -> Masks:
    """All assignments of so many misses, those with fewer on the host first."""
    numbers = sorted(range(1 << count), key=lambda number: (number.bit_count(), number))
    masks: Masks = (np.array(numbers)[:, None] >> np.arange(count) & 1).astype(bool)
    return masks


def _seconds(masks: Masks, costs: FloatArray, busy: Busy) -> FloatArray:
    """Seconds of each assignment, float64 `[assignments]`; `costs` `[misses, 3]`, in order."""
    link = np.where(masks, 0.0, costs[:, 0])
    device = np.where(masks, 0.0, costs[:, 1])
    host = np.where(masks, costs[:, 2], 0.0).sum(axis=1)
    arrived = busy.link + link.cumsum(axis=1)
    total = device.sum(axis=1, keepdims=True)
    # From the arrival of any one of them on, the device has that one's work and all later ones'.
    # A miss on the host adds no more than the one before it or after it does.
    remaining = total - device.cumsum(axis=1) + device
    fetched = np.maximum((arrived + remaining).max(axis=1), busy.device + total[:, 0])
    fetched = np.where(masks.all(axis=1), busy.device, fetched)
    result: FloatArray = np.maximum(
        fetched, np.where(masks.any(axis=1), busy.host + host, busy.device)
    )
    return result


def _searched(costs: FloatArray, busy: Busy, rounds: int) -> tuple[NDArray[np.bool_], float]:
    """A good assignment of many misses, and its seconds: the best end of several descents."""
    count = len(costs)
    masks = _cuts(costs)[: None if rounds else 1]
    seconds = _seconds(masks.reshape(-1, count), costs, busy).reshape(masks.shape[:2])
    orders = np.arange(len(masks))
    at = seconds.argmin(axis=1)
    chosen, shortest = masks[orders, at], seconds[orders, at]
    changes = _changes(count) if rounds else np.empty((0, count), dtype=bool)
    for _ in range(rounds):
        around = chosen[:, None, :] ^ changes
        seconds = _seconds(around.reshape(-1, count), costs, busy).reshape(around.shape[:2])
        at = seconds.argmin(axis=1)
        better = seconds[orders, at] < shortest
        if not better.any():
            break
        chosen = np.where(better[:, None], around[orders, at], chosen)
        shortest = np.where(better, seconds[orders, at], shortest)
    best = int(np.lexsort((chosen.sum(axis=1), shortest))[0])
    return chosen[best], float(shortest[best])


def _cuts(costs: FloatArray) -> Masks:
    """For several orders of preference the first 0, 1, ... all of them on the host.

    bool `[orders, misses + 1, misses]`.
    """
    link, device, host = costs.T
    longer = np.maximum(link, device)
    with np.errstate(all="ignore"):  # infinite times of places that cannot be
        keys = [host / longer, host - longer, host / (link + device), host, -link]
    count = len(costs)
    ranks: list[IntArray] = []
    for key in keys:
        ranked = np.empty(count, dtype=np.int64)
        ranked[np.argsort(np.nan_to_num(key, nan=0.0), kind="stable")] = np.arange(count)
        ranks.append(ranked)
    cuts = np.arange(count + 1)
    masks: Masks = np.stack([ranked[None, :] < cuts[:, None] for ranked in ranks])
    # What can be in one place only is there.
    masks |= np.isinf(link + device)
    masks &= ~np.isinf(host)
    return masks


@lru_cache(maxsize=256)
def _changes(count: int) -> Masks:
    """Which misses change their place in each step that is tried: one, or two of not too many."""
    one = np.eye(count, dtype=bool)
    if count > _PAIRS_TRIED:
        return one
    first, second = np.triu_indices(count, 1)
    return np.concatenate([one, one[first] | one[second]])

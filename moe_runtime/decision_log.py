"""The log of an `ExpertLoader`, replayed through a fresh cache: same decisions, same counts.

Knows cache and log; not when anything happened, nor what was predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_runtime.cache import ExpertCache
from moe_runtime.errors import ConfigError

__all__ = ["replay_log"]

LogEntry = tuple[Any, ...]


def replay_log(
    cache: ExpertCache, log: Sequence[LogEntry], nbytes_of: Callable[[int, int], int] | None = None
) -> int:
    """Do to `cache` what a loader did to its own, and check that it answers alike.

    What a loader decides is in the log: when a layer asked, which experts got a slot before their
    need, in which order transfers ended and slots were given back. What follows from it the cache
    finds again: hits and misses, which are compared, and whom its policy lets go. A run and its
    replay agree in all counters of the cache, and the replay's bytes are those that the run read.

    The entries of a log, in the order in which they happened:

    - `("request", access, (hits, late, misses))`: a layer asks for its experts; hits are pinned
    - `("hits", access)`: the same where all of them were there, without pins
    - `("grant", position, asked, granted)`: slots for missing experts, evicting others
    - `("commit", position, expert)`: a needed expert has arrived
    - `("pin", position, expert)`, `("release", position, experts)`
    - `("ahead", position, expert, done)`: a slot before its need; `done` is False if there was none
    - `("landed", position, expert)`: it arrived before its need
    - `("dropped", position, expert, nbytes)`: called off, after so many bytes
    - `("partial", position, expert, nbytes)`: bytes of one that was called off and is read again
    - `("expected", indices, forecasts)`: what the cache, and a policy that wants them, is told
    - `("abandon",)`: a step failed

    Args:
        cache: as the run's was when its log began (empty, unless something was loaded before), with
            a policy of its own.
        log: of `ExpertLoader.log`.
        nbytes_of: bytes that reading an expert takes, by layer position and number (from a disk
            these are whole blocks); None to count no bytes.

    Returns:
        Bytes read from all tiers, 0 without `nbytes_of`.

    Raises:
        ConfigError: the cache answers otherwise than the run's did, or an entry is unknown; names
            the entry.
    """
    nbytes = 0
    for number, (name, *values) in enumerate(log):
        act = _ACTS.get(name)
        if act is None:
            raise ConfigError(
                f"entry {number} of the log is {name!r}, known are {', '.join(_ACTS)}; replay a "
                "log of this release"
            )
        found, logged = act(cache, *values)
        if found != logged:
            raise ConfigError(
                f"entry {number} of the log, {name!r}: the cache gives {found}, the run had "
                f"{logged}; replay through a cache with the run's slots, policy and first residents"
            )
        if nbytes_of is not None:
            if name in {"commit", "landed"}:
                nbytes += nbytes_of(values[0], values[1])
            elif name in {"dropped", "partial"}:
                nbytes += values[2]
    return nbytes


def _hits(cache: ExpertCache, access: Any) -> tuple[Any, Any]:
    return cache.take_hits(access, access.experts.tolist()) is not None, True


def _expected(cache: ExpertCache, indices: Any, forecasts: Any) -> tuple[Any, Any]:
    cache.expect_nothing()
    for position, (start, count) in enumerate(
        zip(cache.grid.offsets, cache.grid.experts, strict=True)
    ):
        here = indices[(indices >= start) & (indices < start + count)]
        if len(here):
            cache.expect(position, (here - start).tolist())
    if forecasts is not None:
        tell: Callable[[Any], None] | None = getattr(cache.policy, "expect", None)
        if tell is None:
            return f"a policy {cache.policy.name!r} without forecasts", "one that takes them"
        tell(forecasts)
    return None, None


def _quietly(act: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """An act whose answer is not compared."""

    def done(*values: Any) -> tuple[Any, Any]:
        act(*values)
        return None, None

    return done


_ACTS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "request": lambda cache, access, outcome: (cache.request(access), outcome),
    "hits": _hits,
    "grant": lambda cache, at, asked, granted: (cache.grant(at, asked), granted),
    "commit": _quietly(lambda cache, at, expert: cache.commit(at, expert)),
    "pin": _quietly(lambda cache, at, expert: cache.pin(at, expert)),
    "release": _quietly(lambda cache, at, experts: cache.release(at, experts)),
    "ahead": lambda cache, at, expert, done: (cache.load_ahead(at, expert), done),
    "landed": _quietly(lambda cache, at, expert: cache.settle_ahead(at, expert)),
    "dropped": _quietly(lambda cache, at, expert, _: cache.drop_ahead(at, expert)),
    "partial": lambda *_: (None, None),
    "expected": _expected,
    "abandon": _quietly(lambda cache: cache.abandon()),
}

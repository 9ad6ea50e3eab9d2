"""Local search over packings of replicas: swaps, other counts, and shakes out of dead ends.

Changes one layer's packing so that its heaviest device gets lighter. Does not know where the first
packing comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import FloatArray, IntArray

__all__ = ["improve"]

BoolArray: TypeAlias = NDArray[np.bool_]

_EPSILON = 1e-12  # relative; a step must gain more than rounding does
_PAIRS = 24  # replicas of a device that exchanges of two for two look at
_TRIPLES = 20_000  # changes of counts that one step looks at
_SHAKES = 3  # random changes in one shake


@dataclass(kw_only=True, eq=False)
class _State:
    """A packing that changes: who holds what, and the load of each device over its target."""

    load: FloatArray  # [E]
    target: FloatArray  # [G]
    free: BoolArray  # [E, G], where a replica may be put or taken away
    held: BoolArray  # [E, G]

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Recompute what follows from `held`; exact again after each step."""
        self.count = self.held.sum(axis=1)
        self.weight = self.load / self.count
        self.carried = (self.weight @ self.held) / self.target

    def exchange(self, one: int, out: IntArray, other: int, back: IntArray) -> None:
        """Experts `out` go from device `one` to `other`, experts `back` the other way."""
        self.held[out, one], self.held[out, other] = False, True
        self.held[back, one], self.held[back, other] = True, False
        self.refresh()

    def recount(self, more: int, less: int, device: int) -> None:
        """On `device`, a replica of `more` takes the place of one of `less`."""
        self.held[more, device], self.held[less, device] = True, False
        self.refresh()

    @property
    def worst(self) -> tuple[int, float]:
        """The heaviest device, and the load over its target that a step must stay below."""
        device = int(self.carried.argmax())
        return device, float(self.carried[device]) * (1 - _EPSILON)


def improve(
    load: FloatArray,
    held: BoolArray,
    target: FloatArray,
    *,
    free: BoolArray | None = None,
    enough: float = 1.0,
    shakes: int = 0,
    seed: int = 0,
) -> BoolArray:
    """A packing whose heaviest device is no heavier, often lighter.

    Each device keeps its number of replicas, each expert keeps one at least, none is twice on a
    device. Deterministic for a seed.

    Args:
        load: `[E]`, tokens of each expert, spread evenly over its replicas.
        held: bool `[E, G]`, where the search starts; it is not changed.
        target: `[G]`, load that each device should get.
        free: bool `[E, G]`, cells that may change; all if not given.
        enough: stop at this load over target.
        shakes: random restarts from the best packing so far.
        seed: of the shakes.

    Returns:
        bool `[E, G]`.
    """
    if free is None:
        free = np.ones_like(held)
    state = _State(load=load, target=target, free=free, held=held.copy())
    _descend(state, enough)
    best, value = state.held.copy(), float(state.carried.max())
    random = np.random.default_rng(seed)
    for _ in range(shakes):
        if value <= enough:
            break
        _shake(state, random)
        _descend(state, enough)
        found = float(state.carried.max())
        if found <= value:  # equal ones too: they lead elsewhere
            best, value = state.held.copy(), found
        else:
            state.held = best.copy()
            state.refresh()
    return best


def _descend(state: _State, enough: float) -> None:
    """Steps until none makes the heaviest device lighter; cheap kinds of steps first."""
    while state.carried.max() > enough:
        if not (_swap(state) or _recount(state) or _swap_two(state)):
            return


def _swap(state: _State) -> bool:
    """Exchange a replica of the heaviest device with one of another device, if that helps."""
    device, limit = state.worst
    mine = np.flatnonzero(state.held[:, device] & state.free[:, device])
    cells = state.held & state.free & state.free[:, [device]] & ~state.held[:, [device]]
    theirs, there = np.nonzero(cells)
    if not len(mine) or not len(theirs):
        return False
    possible = ~state.held[mine][:, there] & state.free[mine][:, there]
    moved = state.weight[mine][:, None] - state.weight[theirs]
    here = state.carried[device] - moved / state.target[device]
    after = np.maximum(here, state.carried[there] + moved / state.target[there])
    after[~possible] = np.inf
    best = int(after.argmin())
    if not after.flat[best] < limit:
        return False
    i, j = divmod(best, len(theirs))
    state.exchange(device, mine[[i]], int(there[j]), theirs[[j]])
    return True


def _swap_two(state: _State) -> bool:
    """Exchange two replicas of the heaviest device with two of another device, if that helps."""
    device, limit = state.worst
    best, step = limit, None
    for other in np.argsort(state.carried, kind="stable").tolist():
        if other == device:
            continue
        either = state.free[:, device] & state.free[:, other]
        mine = np.flatnonzero(either & state.held[:, device] & ~state.held[:, other])[:_PAIRS]
        theirs = np.flatnonzero(either & state.held[:, other] & ~state.held[:, device])[:_PAIRS]
        if min(len(mine), len(theirs)) < 2:
            continue
        first, second = (np.stack(np.triu_indices(len(x), 1)) for x in (mine, theirs))
        out, back = state.weight[mine[first]].sum(axis=0), state.weight[theirs[second]].sum(axis=0)
        moved = out[:, None] - back
        after = np.maximum(
            state.carried[device] - moved / state.target[device],
            state.carried[other] + moved / state.target[other],
        )
        at = int(after.argmin())
        if after.flat[at] < best:
            i, j = divmod(at, after.shape[1])
            best, step = float(after.flat[at]), (mine[first[:, i]], other, theirs[second[:, j]])
    if step is None:
        return False
    state.exchange(device, *step)
    return True


def _recount(state: _State) -> bool:
    """Give one more replica to one expert and one less to another, if that helps.

    Two kinds help: an expert of the heaviest device is held once more elsewhere, or a replica on
    the heaviest device makes room for one that weighs less.
    """
    device, limit = state.worst
    more, less, there = _recounts(state, device)
    if not len(more):
        return False
    after = _after_recount(state, more, less, there)
    changed = np.where(after != state.carried, after, -np.inf).max(axis=1)
    value = np.maximum(changed, after[:, device])
    best = int(value.argmin())
    if not value[best] < limit:
        return False
    state.recount(int(more[best]), int(less[best]), int(there[best]))
    return True


def _recounts(state: _State, device: int) -> tuple[IntArray, IntArray, IntArray]:
    """Changes of counts that may relieve `device`: expert that gets one more, one less, where."""
    cells = state.held & state.free & (state.count > 1)[:, None]
    less, there = np.nonzero(cells)
    heavy = np.flatnonzero(state.held[:, device] & (state.count < state.held.shape[1]))
    heavy = heavy[np.argsort(-state.weight[heavy], kind="stable")]
    i, j = np.nonzero((~state.held & state.free)[heavy][:, there])
    elsewhere = (heavy[i], less[j], there[j])

    leaving = np.flatnonzero(cells[:, device])
    coming = np.flatnonzero(~state.held[:, device] & state.free[:, device])
    coming = coming[np.argsort(state.weight[coming], kind="stable")]
    here = (
        np.repeat(coming, len(leaving)),
        np.tile(leaving, len(coming)),
        np.full(len(leaving) * len(coming), device),
    )
    more, less, there = (
        np.concatenate([one[:_TRIPLES], two[:_TRIPLES]])
        for one, two in zip(elsewhere, here, strict=True)
    )
    return more, less, there


def _after_recount(state: _State, more: IntArray, less: IntArray, there: IntArray) -> FloatArray:
    """Load over target of all devices after each change, `[changes, G]`."""
    lighter = state.load / (state.count + 1)
    heavier = state.load / np.maximum(state.count - 1, 1)
    added = (
        state.held[more] * (lighter - state.weight)[more][:, None]
        + state.held[less] * (heavier - state.weight)[less][:, None]
    )
    # `less` is gone from the device, so it carries neither its old weight nor its new one.
    added[np.arange(len(there)), there] += lighter[more] - heavier[less]
    after: FloatArray = state.carried + added / state.target
    return after


def _shake(state: _State, random: np.random.Generator) -> None:
    """Change a few things at random, the heaviest device among them."""
    for _ in range(_SHAKES):
        device = int(state.carried.argmax()) if random.random() < 0.5 else None
        more, less, there = _recounts(state, int(random.integers(len(state.target))))
        if len(more) and random.random() < 0.5:
            at = int(random.integers(len(more)))
            state.recount(int(more[at]), int(less[at]), int(there[at]))
            continue
        one = int(random.integers(len(state.target))) if device is None else device
        other = int(random.integers(len(state.target)))
        either = state.free[:, one] & state.free[:, other]
        mine = np.flatnonzero(either & state.held[:, one] & ~state.held[:, other])
        theirs = np.flatnonzero(either & state.held[:, other] & ~state.held[:, one])
        if len(mine) and len(theirs):
            state.exchange(one, random.choice(mine, 1), other, random.choice(theirs, 1))

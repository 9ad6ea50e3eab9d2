"""What expert parallelism sends while prompts are read: replayed from recorded routing.

In both modes prompts are shared out in equal blocks and their rows go to their experts and back,
layer by layer. At the end ranks learn the first new tokens, and in coherent mode every token's keys
and values, and where its row would go in the first MoE layer.

Knows prompts, placements and message sizes; neither links and seconds, nor decode steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from moe_runtime.placement.decode_steps import Holders, choices, in_lanes
from moe_runtime.placement.messages import COHERENT, MODES, MessageSizes, number_bytes
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.step_traffic import StepTraffic
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.walk import Walk, vanilla_layer

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace

__all__ = ["PrefillCalls", "prompts_in_lanes", "recorded_prefill", "replay_prefill"]

_GROUP = 8  # bytes: how many rows of a kind come, in the call that ends a coherent prefill


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefillCalls:
    """The rows of a trace as prefills, each of a batch of prompts in one call.

    Args:
        calls: int64 `[N]`, call of each row, numbered from 0 without gaps; never decreases.
        prompts: int64 `[N]`, place of each row's prompt in its call, from 0 without gaps.

    Raises:
        PlanError: no rows, or calls or prompts otherwise numbered.
    """

    calls: IntArray
    prompts: IntArray

    def __post_init__(self) -> None:
        if not len(self.calls):
            raise PlanError("no prefill: the recording has no tokens of prompts")
        if self.calls[0] != 0 or not set(np.unique(np.diff(self.calls))) <= {0, 1}:
            raise PlanError("calls must be numbered from 0 without gaps and never decrease")
        for call in range(self.count):
            found = np.unique(self.prompts[self.calls == call])
            if not np.array_equal(found, np.arange(len(found))):
                raise PlanError(f"prompts of call {call} must be numbered from 0 without gaps")

    @property
    def count(self) -> int:
        """Number of calls."""
        return int(self.calls[-1]) + 1

    def homes(self, devices: int) -> IntArray:
        """int64 `[N]`: the device that reads each row's prompt: prompts in equal blocks."""
        most = np.zeros(self.count, dtype=np.int64)
        np.maximum.at(most, self.calls, self.prompts + 1)
        homes: IntArray = self.prompts * devices // most[self.calls]
        return homes

    def firsts(self) -> IntArray:
        """int64: a row of each prompt."""
        pairs = np.stack([self.calls, self.prompts], 1)
        found: IntArray = np.unique(pairs, axis=0, return_index=True)[1].astype(np.int64)
        return found


def recorded_prefill(trace: RoutingTrace) -> PrefillCalls:
    """A trace's own calls, in which all rows are of prompts; prompts in the order of sequence ids.

    Args:
        trace: rows of prefill, in the order of its calls.
    """
    _, calls = np.unique(trace.step_ids, return_inverse=True)
    prompts = np.zeros(len(trace), dtype=np.int64)
    for call in range(int(calls.max()) + 1 if len(calls) else 0):
        rows = calls == call
        prompts[rows] = np.unique(trace.sequence_ids[rows], return_inverse=True)[1]
    return PrefillCalls(calls=calls.astype(np.int64), prompts=prompts)


def prompts_in_lanes(
    trace: RoutingTrace, prompts: int, tokens: int
) -> tuple[RoutingTrace, PrefillCalls]:
    """One batch of prompts out of any recording: the first tokens of each of its equal parts.

    Args:
        tokens: of each prompt; fewer where the parts are shorter.

    Raises:
        PlanError: the recording has fewer tokens than `prompts`.
    """
    mixed, steps = in_lanes(trace, prompts, most=tokens)
    return mixed, PrefillCalls(calls=np.zeros(len(mixed), dtype=np.int64), prompts=steps.lanes)


def replay_prefill(
    placement: Sequence[BoolArray],
    topology: Topology,
    trace: RoutingTrace,
    calls: PrefillCalls,
    sizes: MessageSizes,
    mode: str,
    *,
    steps_follow: bool = True,
    forms: int = 1,
) -> StepTraffic:
    """Send every row of prompts the way the engine would, and count the bytes: exact.

    Args:
        placement: for each MoE layer bool `[E, G]`, whether the device holds the expert.
        calls: of the trace's rows.
        mode: `"vanilla"` or `"coherent"`, of the steps that follow.
        steps_follow: whether any do: else nobody needs the keys and values.
        forms: of keys and values, which are sent by shape: 1 where all layers are alike.

    Returns:
        The traffic, a call in the place of a step; the kinds are `dispatch`, `combine` and
        `frames` of each MoE layer, and at the end `tokens`, `end_frames` and in coherent mode
        `homes` and `keys_values`. `stays` is the share of rows, over layers, that need no other
        device.

    Raises:
        PlanError: another number of layers, experts or rows; an unknown mode.
    """
    if mode not in MODES:
        raise PlanError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    shapes = [(experts, topology.devices) for experts in trace.experts]
    if [held.shape for held in placement] != shapes or len(calls.calls) != len(trace):
        raise PlanError(
            f"a placement of {[held.shape for held in placement]} and {len(calls.calls)} rows do "
            f"not fit a trace of {shapes} experts x devices and {len(trace)} rows"
        )
    home, everyone = calls.homes(topology.devices), np.arange(len(trace))
    walk = Walk(
        steps=calls.calls,
        count=calls.count,
        layers=len(placement),
        topology=topology,
        sizes=sizes,
    )
    held, uses, stays = walk.tally(everyone, home).max(1), [], 0.0
    for position, experts in enumerate(placement):
        holders = Holders.of(experts, topology)
        ids, chosen = choices(trace, slice(None), position)
        device = holders.computing(home, ids)
        rows, slots = np.nonzero(chosen)
        need = np.zeros((len(trace), topology.devices), dtype=bool)
        need[rows, device[rows, slots]] = True
        uses.append(walk.tally(rows, device[rows, slots]).max(1))
        own = need[everyone, home]
        stays += float((need.sum(1) == own).sum())
        vanilla_layer(walk, position, home, need)
    _end(walk, calls, home, mode, forms=forms * steps_follow)
    return StepTraffic(
        mode=mode,
        rows=len(trace) / calls.count,
        collectives=tuple(walk.collectives),
        kinds=walk.kinds,
        loads=np.stack(walk.loads, axis=1),
        present=np.stack(walk.present, axis=1),
        held=np.repeat(held[:, None], len(placement), 1),
        uses=np.stack(uses, axis=1),
        stays=stays / (len(placement) * len(trace)),
    )


def _end(walk: Walk, calls: PrefillCalls, home: IntArray, mode: str, *, forms: int) -> None:
    """All learn the first new tokens, and in coherent mode what steps anywhere need."""
    sizes, firsts = walk.sizes, calls.firsts()
    parts = {"tokens": walk.everywhere(walk.tally(firsts, home[firsts]) * sizes.token)}
    groups = 0
    if mode == COHERENT:
        tokens = walk.tally(np.arange(len(home)), home)
        parts["homes"] = walk.everywhere(tokens * number_bytes(walk.topology.devices))
        groups = 2 + forms
        if forms:
            parts["keys_values"] = walk.everywhere(tokens * sizes.layers * sizes.kept)
    parts["end_frames"] = walk.frames(sizes.frame + _GROUP * groups)
    walk.send("prefill end", parts, None)

"""`StepTraffic`: what expert-parallel decoding sends in each step, replayed from recorded routing.

Knows placements, routing and message sizes; neither links and seconds, nor how an engine does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from moe_runtime.placement.decode_steps import DecodeSteps, Holders, choices
from moe_runtime.placement.messages import COHERENT, MODES, VANILLA, MessageSizes
from moe_runtime.placement.plan import BoolArray
from moe_runtime.placement.topology import Topology
from moe_runtime.placement.walk import Walk, vanilla_layer

from moe_runtime.core import FloatArray, IntArray
from moe_runtime.errors import PlanError
from moe_runtime.trace import RoutingTrace

__all__ = ["StepTraffic", "replay"]

_CHUNK_CELLS = 1 << 21  # steps x devices x devices of one matrix: bounds the memory of a replay


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTraffic:
    """What S decode steps (or one expected step) send. C collectives a step, L MoE layers.

    Args:
        mode: `"vanilla"` or `"coherent"`.
        rows: rows (sequences) a step, the mean.
        collectives: name of each collective of a step, `[C]`, in order.
        kinds: bytes to other devices by kind, float64 `[S, L]` for what each MoE layer sends,
            `[S, 1]` for what a step sends at its end (`tokens`, `keys_values`, `end_frames`).
        loads: float64 `[S, C, 2]`, bytes over the most loaded link inside a node and between nodes.
        present: bool `[S, C]`, whether the collective takes place: partial sums that no row of a
            layer needs are left out.
        held: float64 `[S, L]`, rows on the device with most of them, at each layer's begin.
        uses: float64 `[S, L]`, (row, expert) pairs on the device with most of them.
        stays: share of rows that find their heaviest expert where they are; 0 to 1.
        matrices: float64 `[S, C, G, G]`, bytes from each device to each, if they were kept.
    """

    mode: str
    rows: float
    collectives: tuple[str, ...]
    kinds: Mapping[str, FloatArray]
    loads: FloatArray
    present: BoolArray
    held: FloatArray
    uses: FloatArray
    stays: float
    matrices: FloatArray | None = None

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.loads)

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes a step that cross from device to device, the mean, by kind."""
        return {kind: float(sent.sum(1).mean()) for kind, sent in self.kinds.items()}

    def totals(self) -> dict[str, list[int]]:
        """Bytes of all steps by kind, for each MoE layer (one number at a step's end)."""
        return {
            kind: np.rint(sent.sum(0)).astype(int).tolist() for kind, sent in self.kinds.items()
        }


def replay(
    placement: Sequence[BoolArray],
    topology: Topology,
    trace: RoutingTrace,
    steps: DecodeSteps,
    sizes: MessageSizes,
    mode: str,
    starts: IntArray | None = None,
    *,
    keep: bool = False,
) -> StepTraffic:
    """Send every row of a trace the way the engine would, step by step, and count the bytes.

    Exact: what the engine counts for the same routing, message for message. In vanilla mode a row
    goes from its home to each device that has one of its experts and back; in coherent mode it
    goes to its heaviest expert's device and stays, and the other experts' partial sums follow it.

    Args:
        placement: for each MoE layer bool `[E, G]`, whether the device holds the expert.
        steps: of the trace's rows.
        mode: `"vanilla"` or `"coherent"`.
        starts: int64 `[N]`, where coherent rows begin the step; their homes if not given.
        keep: keep the matrices too; C x G x G numbers a step.

    Raises:
        PlanError: another number of layers, experts, devices or rows; an unknown mode.
    """
    _check(placement, topology, trace, steps, mode)
    serving = [Holders.of(held, topology) for held in placement]
    bounds = np.searchsorted(steps.steps, np.arange(steps.count + 1))
    at_once = max(1, _CHUNK_CELLS // topology.devices**2)
    homes = steps.homes(topology.devices)
    start = homes if mode == VANILLA or starts is None else starts
    parts = []
    for first in range(0, steps.count, at_once):
        last = min(first + at_once, steps.count)
        rows = slice(int(bounds[first]), int(bounds[last]))
        walk = Walk(
            steps=steps.steps[rows] - first,
            count=last - first,
            layers=len(placement),
            topology=topology,
            sizes=sizes,
            matrices=[] if keep else None,
        )
        parts.append(_walked(walk, serving, trace[rows], start[rows], mode))
    return _joined(parts, len(trace) / steps.count)


def _walked(
    walk: Walk, serving: Sequence[Holders], trace: RoutingTrace, start: IntArray, mode: str
) -> StepTraffic:
    """Some steps through all layers; `start [N]` is where each row begins."""
    place, everyone = start, np.arange(len(start))
    held, uses, stays = [], [], 0.0
    kept = walk.tally(everyone, place) * walk.sizes.attended_at(trace.layer_ids, -1)
    for position, holders in enumerate(serving):
        ids, chosen = choices(trace, slice(None), position)
        target = holders.targets(place, ids, trace.topk_weights[:, position], chosen)
        device = holders.computing(place, ids, None if mode == VANILLA else target)
        rows, slots = np.nonzero(chosen)
        need = np.zeros((len(place), walk.topology.devices), dtype=bool)
        need[rows, device[rows, slots]] = True
        held.append(walk.tally(everyone, place).max(1))
        uses.append(walk.tally(rows, device[rows, slots]).max(1))
        stays += float((target == place).sum())
        if mode == VANILLA:
            vanilla_layer(walk, position, place, need)
        else:
            _coherent_layer(walk, position, place, target, need)
            place = target
        kept += walk.tally(everyone, place) * walk.sizes.attended_at(trace.layer_ids, position)
    _step_end(walk, walk.tally(everyone, place), kept, mode)
    return StepTraffic(
        mode=mode,
        rows=len(trace) / walk.count,
        collectives=tuple(walk.collectives),
        kinds=walk.kinds,
        loads=np.stack(walk.loads, axis=1),
        present=np.stack(walk.present, axis=1),
        held=np.stack(held, axis=1),
        uses=np.stack(uses, axis=1),
        stays=stays / (len(serving) * len(trace)),
        matrices=None if walk.matrices is None else np.stack(walk.matrices, axis=1),
    )


def _coherent_layer(
    walk: Walk, position: int, place: IntArray, target: IntArray, need: BoolArray
) -> None:
    """Rows to their heaviest experts' devices, and to the others that compute for them, whose sums
    follow in a second collective where there are any.
    """
    rest = need.copy()
    rest[np.arange(len(place)), target] = False
    need = need.copy()
    need[np.arange(len(place)), target] = True
    rows, devices = np.nonzero(need)
    moves = walk.messages(rows, place[rows], devices) * walk.sizes.move
    walk.send("move", {"move": moves}, position)
    if walk.sizes.top_k > 1:
        rows, devices = np.nonzero(rest)
        sums = walk.messages(rows, devices, target[rows]) * walk.sizes.partial_sums
        present = np.bincount(walk.steps[rows], minlength=walk.count) > 0
        walk.send("partial sums", {"partial_sums": sums}, position, present)


def _step_end(walk: Walk, ended: FloatArray, kept: FloatArray, mode: str) -> None:
    """All learn the new tokens, and in coherent mode the new keys and values.

    Args:
        ended: float64 `[S, G]`, rows that each device has at the end.
        kept: float64 `[S, G]`, (row, layer) pairs whose keys and values it has made.
    """
    sizes, coherent = walk.sizes, mode == COHERENT
    parts = {
        "tokens": walk.everywhere(ended * (sizes.token + sizes.row * coherent)),
        "end_frames": walk.frames(sizes.frame + sizes.group * coherent),
    }
    if coherent:
        parts["keys_values"] = walk.everywhere(kept * sizes.keys_values)
    walk.send("step end", parts, None)


def _joined(parts: Sequence[StepTraffic], rows: float) -> StepTraffic:
    """Chunks of steps, one after another."""
    if len(parts) == 1:
        return parts[0]
    counts = np.array([part.steps * part.rows for part in parts])
    return replace(
        parts[0],
        rows=rows,
        kinds={k: np.concatenate([part.kinds[k] for part in parts]) for k in parts[0].kinds},
        loads=np.concatenate([part.loads for part in parts]),
        present=np.concatenate([part.present for part in parts]),
        held=np.concatenate([part.held for part in parts]),
        uses=np.concatenate([part.uses for part in parts]),
        stays=float(counts @ [part.stays for part in parts] / counts.sum()),
        matrices=_stacked([part.matrices for part in parts if part.matrices is not None]),
    )


def _stacked(kept: Sequence[FloatArray]) -> FloatArray | None:
    return np.concatenate(kept) if kept else None


def _check(
    placement: Sequence[BoolArray],
    topology: Topology,
    trace: RoutingTrace,
    steps: DecodeSteps,
    mode: str,
) -> None:
    if mode not in MODES:
        raise PlanError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    if len(steps.steps) != len(trace):
        raise PlanError(f"the steps name {len(steps.steps)} rows, the trace has {len(trace)}")
    if len(placement) != len(trace.layer_ids):
        raise PlanError(
            f"the placement has {len(placement)} layers, the trace {len(trace.layer_ids)}"
        )
    for layer, experts, held in zip(trace.layer_ids, trace.experts, placement, strict=True):
        if held.shape != (experts, topology.devices):
            raise PlanError(
                f"layer {layer}: the placement is {held.shape[0]} experts x {held.shape[1]} "
                f"devices, the trace has {experts} and the topology {topology.devices}"
            )

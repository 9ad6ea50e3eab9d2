"""`compare_modes`: predicted time of a decode step in vanilla and in coherent expert parallelism.

Turns traffic and links into seconds, and says which mode to use; does not know where the traffic
comes from. The volumes to beat are those of ExFlow (arXiv 2401.08383, table I).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from moe_runtime.placement.links import Links
from moe_runtime.placement.messages import COHERENT, VANILLA
from moe_runtime.placement.step_traffic import StepTraffic
from moe_runtime.placement.topology import Topology

from moe_runtime.core import FloatArray
from moe_runtime.errors import PlanError

__all__ = ["Compute", "ModeTime", "ModesCompared", "compare_modes", "step_seconds", "step_time"]

_FACTORS = np.logspace(-5, 5, 401)  # of the bandwidth: where a crossover is looked for
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Seconds that devices compute in a step, given or measured; 0 leaves computing out.

    A layer is done when its slowest device is: the one that holds most rows, then the one whose
    experts have most to do.

    Args:
        step: what does not depend on rows: reading weights, starting kernels.
        row: of one row in one MoE layer's decoder layer, experts left out.
        use: of one row in one expert.
    """

    step: float = 0.0
    row: float = 0.0
    use: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (np.isfinite(value) and value >= 0):
                raise PlanError(f"compute seconds: {name} must be 0 or more, found {value}")

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)

    def seconds(self, traffic: StepTraffic) -> FloatArray:
        """Float64 `[S]`."""
        rows = self.row * traffic.held + self.use * traffic.uses
        taken: FloatArray = self.step + rows.sum(1)
        return taken


@dataclass(frozen=True, kw_only=True)
class ModeTime:
    """What a decode step takes in one mode; means over the steps.

    Args:
        mode: `"vanilla"` or `"coherent"`.
        rows: rows (sequences) a step.
        collectives: a step.
        bytes_by_kind: bytes a step from device to device, all devices together.
        slowest_bytes: bytes over the most loaded link of each collective, added up.
        stays: share of rows that find their heaviest expert where they are.
        latency_seconds, transfer_seconds, compute_seconds: a step.
        seconds: a step, their sum.
        slow_seconds: a step at the 95th percentile.
    """

    mode: str
    rows: float
    collectives: float
    bytes_by_kind: Mapping[str, float]
    slowest_bytes: float
    stays: float
    latency_seconds: float
    transfer_seconds: float
    compute_seconds: float
    seconds: float
    slow_seconds: float

    @property
    def cross_bytes(self) -> float:
        """Bytes a step from device to device, of all kinds."""
        return float(sum(self.bytes_by_kind.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "cross_bytes": self.cross_bytes}


@dataclass(frozen=True, kw_only=True)
class ModesCompared:
    """Both modes over the same links.

    Args:
        vanilla, coherent: their times.
        use: the mode with less time a step; vanilla where they are equal, which needs no
            replicated cache.
        bandwidth_factors: factors of the bandwidth at which the better mode changes, ascending;
            empty if it is the same from a 100,000th of the bandwidth to 100,000 times as much.
        rows: rows a step above or below which the better mode changes, if all that a step sends
            and computes grows in proportion to its rows; None if it never does.
        rows_coherent_above: whether coherent is the better one above `rows`.
    """

    vanilla: ModeTime
    coherent: ModeTime
    bandwidth_factors: tuple[float, ...] = ()
    rows: float | None = None
    rows_coherent_above: bool = False
    links: Links = field(repr=False)

    @property
    def use(self) -> str:
        """The mode with less time a step."""
        return COHERENT if self.coherent.seconds < self.vanilla.seconds else VANILLA

    @property
    def speedup(self) -> float:
        """Vanilla's time over coherent's; 1 where neither takes any."""
        if not self.coherent.seconds:
            return 1.0 if not self.vanilla.seconds else float("inf")
        return self.vanilla.seconds / self.coherent.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        speedup = self.speedup
        return {
            "vanilla": self.vanilla.to_dict(),
            "coherent": self.coherent.to_dict(),
            "use": self.use,
            "speedup": speedup if np.isfinite(speedup) else None,
            "bandwidth_factors": list(self.bandwidth_factors),
            "rows": self.rows,
            "rows_coherent_above": self.rows_coherent_above,
            "links": self.links.to_dict(),
        }


def step_seconds(
    traffic: StepTraffic, links: Links, topology: Topology, compute: Compute | None = None
) -> FloatArray:
    """Float64 `[S]`: seconds of every step."""
    computed = (compute or Compute()).seconds(traffic)
    latencies = links.latency(topology) * traffic.present.sum(1)
    taken: FloatArray = links.transfer_seconds(traffic.loads).sum(1) + latencies + computed
    return taken


def step_time(
    traffic: StepTraffic, links: Links, topology: Topology, compute: Compute | None = None
) -> ModeTime:
    """Of the traffic of one mode."""
    every = step_seconds(traffic, links, topology, compute)
    collectives = float(traffic.present.sum(1).mean()) if topology.devices > 1 else 0.0
    latency = links.latency(topology) * collectives
    computed = float((compute or Compute()).seconds(traffic).mean())
    mean = float(every.mean())
    return ModeTime(
        mode=traffic.mode,
        rows=traffic.rows,
        collectives=collectives,
        bytes_by_kind=traffic.bytes_by_kind(),
        slowest_bytes=float(traffic.loads.sum((1, 2)).mean()),
        stays=traffic.stays,
        latency_seconds=latency,
        transfer_seconds=max(0.0, mean - latency - computed),
        compute_seconds=computed,
        seconds=mean,
        slow_seconds=float(np.quantile(every, 0.95)),
    )


def compare_modes(
    vanilla: StepTraffic,
    coherent: StepTraffic,
    links: Links,
    topology: Topology,
    compute: Compute | None = None,
) -> ModesCompared:
    """Both modes' time a step, which to use, and where that changes.

    Args:
        vanilla, coherent: traffic of the same rows.
    """

    def coherent_leads(factor: float) -> bool:
        scaled = links.scaled(factor)
        times = (
            step_seconds(traffic, scaled, topology, compute).mean()
            for traffic in (coherent, vanilla)
        )
        return bool(next(times) < next(times))

    one = step_time(vanilla, links, topology, compute)
    other = step_time(coherent, links, topology, compute)
    rows, above = _rows_crossover(one, other, compute or Compute())
    return ModesCompared(
        vanilla=one,
        coherent=other,
        bandwidth_factors=_flips(coherent_leads),
        rows=rows,
        rows_coherent_above=above,
        links=links,
    )


def _flips(coherent_leads: Callable[[float], bool]) -> tuple[float, ...]:
    """Factors at which the better mode changes, ascending."""
    leads = [coherent_leads(float(factor)) for factor in _FACTORS]
    found = []
    for at in np.flatnonzero(np.diff(leads)):
        low, high = float(_FACTORS[at]), float(_FACTORS[at + 1])
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if coherent_leads(middle) == leads[at] else (low, middle)
        found.append((low * high) ** 0.5)
    return tuple(found)


def _rows_crossover(
    vanilla: ModeTime, coherent: ModeTime, compute: Compute
) -> tuple[float | None, bool]:
    """(rows at which both take the same time, whether coherent is better above).

    A step's time is what it takes without rows and so much a row: two lines that meet once.
    """
    fixed, slope = (
        np.array(pair)
        for pair in zip(
            *(
                (
                    mode.latency_seconds + compute.step,
                    (mode.seconds - mode.latency_seconds - compute.step) / mode.rows,
                )
                for mode in (vanilla, coherent)
            ),
            strict=True,
        )
    )
    saved_fixed, saved_row = fixed[0] - fixed[1], slope[0] - slope[1]
    if saved_fixed * saved_row >= 0:
        return None, False
    return float(-saved_fixed / saved_row), bool(saved_row > 0)

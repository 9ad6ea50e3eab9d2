"""The timed simulator: a trace through the runtime's own cache, loader, planner and forecaster.

Time is simulated, by a virtual clock and link.

Knows no tensors and no policy by name; what computing and moving cost is stated, not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from moe_runtime.access import Access
from moe_runtime.cache import ExpertCache
from moe_runtime.core import ExpertGrid, IntArray
from moe_runtime.errors import BudgetError, ConfigError
from moe_runtime.eviction import EvictionPolicy
from moe_runtime.forecast import Demand, Forecaster
from moe_runtime.loader import ExpertLoader, Prediction
from moe_runtime.payoff import Payoff
from moe_runtime.predictors.base import Predictor
from moe_runtime.predictors.replay import chosen_experts, require_replayable, steps_of
from moe_runtime.prefetch_planner import PlannerRules, PrefetchPlanner
from moe_runtime.profiler import Profiler
from moe_runtime.timed_result import TimedResult
from moe_runtime.trace import RoutingTrace
from moe_runtime.virtual_link import LinkModel, VirtualClock, VirtualLink

__all__ = ["ComputeModel", "Forecasting", "TimedResult", "simulate_timed", "slots_of"]


@dataclass(frozen=True, kw_only=True)
class ComputeModel:
    """What computing costs, in seconds.

    Args:
        layer: the rest of one decoder layer (attention, router, shared experts) in one call.
        layer_token: the same for each token of the call, in addition.
        expert: one expert in one call, whatever its tokens.
        expert_token: one token in one expert, in addition.
        call: what a forward call takes beside its MoE layers (embedding, head, sampling).
        forecast: one forecast of one layer; reads under way go on beside it.
    """

    layer: float = 0.0
    layer_token: float = 0.0
    expert: float = 0.0
    expert_token: float = 0.0
    call: float = 0.0
    forecast: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 <= getattr(self, item.name) < math.inf:
                raise ConfigError(
                    f"compute model: {item.name} must be 0 seconds or more, found "
                    f"{getattr(self, item.name)!r}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecasting:
    """What a simulated run predicts with.

    Args:
        predictor: made for the trace's layers; fresh, or reset.
        rules: of the planner.
        trial: whether the run finds out by itself if acting on forecasts pays, as the runtime does;
            else it always acts.
    """

    predictor: Predictor
    rules: PlannerRules = field(default_factory=PlannerRules)
    trial: bool = False


def slots_of(
    grid: ExpertGrid, share: float, expert_bytes: Sequence[int], *, per_layer: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pools for a share of all experts: one for each size of expert, or one for each layer.

    Args:
        share: 0 to 1, of the experts of each pool; `per_layer` has the slots of the one pool,
            divided evenly, the first layers taking what is left over.

    Returns:
        (pool number of each layer position, slots of each pool).

    Raises:
        BudgetError: a pool without a slot. ConfigError: sizes for another number of layers.
    """
    if len(expert_bytes) != len(grid.layers):
        raise ConfigError(
            f"expert_bytes need one entry for each of the {len(grid.layers)} layers, found "
            f"{len(expert_bytes)}"
        )
    sizes = sorted(set(expert_bytes))
    group_of = tuple(sizes.index(size) for size in expert_bytes)
    counts = [sum(n for n, g in zip(grid.experts, group_of, strict=True) if g == group)
              for group in range(len(sizes))]  # fmt: skip
    slots = tuple(min(round(share * count), count) for count in counts)
    if per_layer:
        slots = _even_slots(grid, group_of, slots)
        group_of = tuple(range(len(grid.layers)))
    if any(count < 1 for count in slots):
        raise BudgetError(
            f"{share:.1%} of {grid.size} experts leaves a pool without a slot ({list(slots)}); "
            "give a larger budget"
        )
    return group_of, slots


def _even_slots(grid: ExpertGrid, group_of: Sequence[int], slots: Sequence[int]) -> tuple[int, ...]:
    found = [0] * len(grid.layers)
    for group, count in enumerate(slots):
        layers = [at for at, its in enumerate(group_of) if its == group]
        left = count
        while left:
            open_ = [at for at in layers if found[at] < grid.experts[at]]
            for at in open_[:left]:
                found[at] += 1
            left -= min(left, len(open_))
    return tuple(found)


class _ChargedForecaster(Forecaster):
    """A forecaster whose forecasts take simulated time."""

    def charge(self, clock: VirtualClock, seconds: float) -> None:
        self._virtual, self._cost = clock, seconds

    def demand(self, position: int, ahead: int) -> Demand | None:
        if self.active:
            self._virtual.pass_(self._cost)
            self.seconds += self._cost
        return super().demand(position, ahead)


def simulate_timed(
    trace: RoutingTrace,
    policy: EvictionPolicy,
    pools: tuple[Sequence[int], Sequence[int]],
    *,
    expert_bytes: Sequence[int],
    link: LinkModel,
    compute: ComputeModel,
    forecasting: Forecasting | None = None,
    log: list[tuple[Any, ...]] | None = None,
) -> TimedResult:
    """Replay a trace from an empty cache; what a call costs follows from the two models.

    Calls of one token take the path that the runtime has for them; what the router of a layer
    chose is told to the predictor, and asked of the loader, after the layer's dense part.

    Args:
        trace: the run; each of its forward calls is one here.
        policy: fresh; takes in every access.
        pools: of `slots_of`.
        expert_bytes: bytes of one expert of each layer position.
        forecasting: None to load on demand only.
        log: gets the decisions, for `replay_log`.

    Raises:
        PredictorError: the predictor cannot be replayed on this trace.
        ConfigError: it was made for another model.
    """
    clock = VirtualClock()
    cache = ExpertCache(trace.grid, pools[0], pools[1], policy)
    transfers = VirtualLink(link, clock, expert_bytes)
    profiler = Profiler(len(trace.grid.layers), trace.grid.size)
    loader = ExpertLoader(cache, transfers, profiler, clock=clock)
    loader.log = log
    if forecasting is not None:
        require_replayable(forecasting.predictor, trace)
        loader.prediction = _prediction(forecasting, cache, clock, compute, expert_bytes)
    run = _Run(loader=loader, clock=clock, compute=compute)
    chosen = [chosen_experts(trace, position) for position in range(len(trace.layer_ids))]
    for rows, here in steps_of(trace):
        begin = clock.now
        loader.begin_call(rows, decode=rows.decode)
        for position, ids in enumerate(chosen):
            run.layer(position, ids[here])
        clock.pass_(compute.call)
        loader.end_call(clock.now - begin)
        run.seconds.append(clock.now - begin)
    return _result(run, transfers, cache, len(trace), expert_bytes)


def _prediction(
    forecasting: Forecasting,
    cache: ExpertCache,
    clock: VirtualClock,
    compute: ComputeModel,
    expert_bytes: Sequence[int],
) -> Prediction:
    rules = forecasting.rules
    forecasting.predictor.reset()
    forecaster = _ChargedForecaster(forecasting.predictor, cache.grid, rules.lookahead, clock)
    forecaster.charge(clock, compute.forecast)
    expect = getattr(cache.policy, "expect", None)
    planner = PrefetchPlanner(cache, forecaster, rules, expert_bytes, expect)
    return Prediction(forecaster, planner, Payoff(enabled=forecasting.trial))


@dataclass(kw_only=True, eq=False)
class _Run:
    """Stands in for the executor: lets the time of computing pass."""

    loader: ExpertLoader
    clock: VirtualClock
    compute: ComputeModel
    seconds: list[float] = field(default_factory=list)

    def layer(self, position: int, ids: IntArray) -> None:
        """One layer step: `ids [T, K]`."""
        experts, tokens = np.unique(ids[ids >= 0], return_counts=True)
        if not len(experts):
            return
        compute, loader = self.compute, self.loader
        self.clock.pass_(compute.layer + compute.layer_token * len(ids))
        if loader.follows:
            loader.observe(position, ids, None)
        access = Access(position=position, experts=experts, tokens=tokens.astype(np.int64))
        cost = compute.expert + compute.expert_token * tokens
        if len(ids) == 1 and loader.take_hits(access, experts.tolist()) is not None:
            self.clock.pass_(float(cost.sum()))
            return
        for group in loader.in_ready_order(access):
            self.clock.pass_(float(cost[np.searchsorted(experts, group)].sum()))


def _result(
    run: _Run,
    transfers: VirtualLink,
    cache: ExpertCache,
    tokens: int,
    expert_bytes: Sequence[int],
) -> TimedResult:
    counters, profiler = cache.counters, run.loader.profiler
    prediction = run.loader.prediction
    layers = range(len(cache.grid.layers))
    pending = np.array([len(cache.loading_ahead(position)) for position in layers], np.int64)
    ended = counters.in_time + counters.late + counters.withdrawn
    unused = counters.ahead - ended - pending
    ahead_bytes = int(profiler.ahead_bytes.sum())
    return TimedResult(
        slots=cache.slots,
        calls=len(run.seconds),
        tokens=tokens,
        seconds=run.clock.now,
        call_seconds=np.array(run.seconds),
        stall_seconds=np.array(profiler.stall_seconds),
        resident=counters.hits - counters.in_time,
        in_time=counters.in_time,
        late=counters.late,
        missed=counters.misses - counters.late,
        ahead=counters.ahead,
        unused=unused,
        withdrawn=counters.withdrawn,
        pending=pending,
        evictions=counters.evictions,
        bytes_needed=int(profiler.bytes_read.sum()) - ahead_bytes,
        bytes_ahead=ahead_bytes,
        bytes_wasted=int((unused * np.asarray(expert_bytes)).sum()) + profiler.withdrawn_bytes,
        link_seconds=transfers.busy_seconds,
        predictor_seconds=0.0 if prediction is None else prediction.forecaster.seconds,
        state="" if prediction is None else prediction.payoff.state,
    )

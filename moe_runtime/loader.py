"""`ExpertLoader`: brings experts into their slots, what a layer needs and what is forecast.

One layer step asks for its experts and gets them group by group as they are there. What the real
router disagrees with is called off, what it adds is read before everything that is only forecast.
Knows cache and transfers; computes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moe_runtime.access import Access
from moe_runtime.cache import ExpertCache
from moe_runtime.core import IntArray
from moe_runtime.forecast import Forecaster
from moe_runtime.payoff import Payoff
from moe_runtime.predictors.base import StepRows
from moe_runtime.prefetch_planner import PrefetchPlanner, Spare
from moe_runtime.profiler import Profiler

__all__ = ["Arrival", "ExpertLoader", "Prediction", "Transfers"]


class Arrival(Protocol):
    """A transfer that has ended."""

    position: int
    expert: int
    nbytes: int
    from_host: bool
    withdrawn: bool
    token: Any
    error: BaseException | None


class Transfers(Protocol):
    """What moves experts: threads and streams, or a simulator's clock."""

    @property
    def in_flight(self) -> int:
        """Transfers started and not yet taken."""
        ...

    @property
    def busy_bytes(self) -> int:
        """Their bytes."""
        ...

    @property
    def rate(self) -> float | None:
        """Bytes a second while busy; None before it is known."""
        ...

    def start(self, position: int, expert: int, *, ahead: bool) -> None:
        """Begin to bring an expert into its slot."""
        ...

    def next_finished(self) -> tuple[Arrival, float]:
        """The next to end, and the seconds waited for it."""
        ...

    def has_finished(self) -> bool:
        """Whether `next_finished` would return at once."""
        ...

    def promote(self, position: int, expert: int) -> None:
        """What is on its way ahead is needed now."""
        ...

    def withdraw(self, position: int, expert: int) -> bool:
        """Call it off; True if nothing of it had begun, so that it does not end."""
        ...

    def done(self, token: Any) -> bool:
        """Whether the device has the bytes."""
        ...

    def wait(self, token: Any) -> None:
        """Compute from now on sees them."""
        ...

    def cancel(self) -> None:
        """Drop and wait for everything."""
        ...


@dataclass(eq=False)
class Prediction:
    """What predicting adds to a loader."""

    forecaster: Forecaster
    planner: PrefetchPlanner
    payoff: Payoff
    spare: Spare = field(default_factory=Spare)
    decode: bool = False
    acting: bool = False
    following: bool = False
    seconds_before: float = 0.0  # in the predictor when the present call began


@dataclass(eq=False)
class _LayerStep:
    """Bookkeeping of one layer step under way. `coming` are needed and on their way."""

    position: int
    misses: int = 0
    waiting: deque[int] = field(default_factory=deque)
    coming: set[int] = field(default_factory=set)
    nbytes: int = 0
    host_bytes: int = 0
    stall: float = 0.0


class ExpertLoader:
    """Mutated under the executor's lock.

    Args:
        cache: residency.
        transfers: move the bytes.
        profiler: takes the counters.
        clock: seconds.

    Attributes:
        prediction: None without a predictor.
        log: if a list, gets everything that changes residency, in order; `decision_log.replay_log`
            says what and replays it.
    """

    def __init__(
        self,
        cache: ExpertCache,
        transfers: Transfers,
        profiler: Profiler,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cache = cache
        self.profiler = profiler
        self.prediction: Prediction | None = None
        self.log: list[tuple[Any, ...]] | None = None
        self._transfers = transfers
        self._clock = clock
        self._landing: dict[tuple[int, int], Arrival] = {}
        self._behind = False  # whether anything has ever been brought in behind its need
        self._free_since: float | None = None  # when the link had brought what was needed last

    # -- the forward call around the layers -----------------------------------------------------

    @property
    def busy_bytes(self) -> int:
        """Bytes that are on their way to the device."""
        # What the host has handed over and the device does not have yet is no longer in flight.
        landing = self._landing.values()
        return self._transfers.busy_bytes + sum(
            arrival.nbytes for arrival in landing if not self._transfers.done(arrival.token)
        )

    @property
    def follows(self) -> bool:
        """Whether it wants to be told what routers choose, by `observe`."""
        return self.prediction is not None and self.prediction.following

    def begin_call(self, rows: StepRows | None, *, decode: bool) -> None:
        """A forward call begins."""
        prediction = self.prediction
        self._free_since = None
        if prediction is None:
            return
        payoff = prediction.payoff
        following, prediction.decode = payoff.follows(decode=decode), decode
        if prediction.following and not following:
            prediction.forecaster.forget()
            prediction.planner.stop()
            self._note_expected()
        elif following and not prediction.following:
            prediction.forecaster.forget()
        prediction.following = following
        prediction.acting = payoff.acts(decode=decode)
        if not following:
            return
        prediction.seconds_before = prediction.forecaster.seconds
        self._free_since = self._clock()
        prediction.forecaster.begin(rows)
        if prediction.acting:
            self._load_ahead(-1)
        else:
            prediction.planner.stop()
            self._note_expected()

    def end_call(self, seconds: float) -> None:
        """A forward call ended well, after `seconds`."""
        prediction = self.prediction
        if prediction is None:
            return
        if prediction.forecaster.failure and prediction.payoff.state != "plain":
            prediction.payoff.fail(f"the predictor failed: {prediction.forecaster.failure}")
        else:
            payoff, spent = prediction.payoff, None
            if prediction.following:
                spent = prediction.forecaster.seconds - prediction.seconds_before
            (payoff.end_step if prediction.decode else payoff.end_prefill)(seconds, spent)

    def observe(self, position: int, topk_ids: IntArray, hidden: torch.Tensor | None) -> None:
        """A layer's router has chosen; before its experts are asked for."""
        if self.prediction is not None:
            self.prediction.forecaster.observe(position, topk_ids, hidden)

    def abandon(self) -> None:
        """After a failed step: nothing is on its way, nothing pinned."""
        self._transfers.cancel()
        for arrival in self._landing.values():
            self._transfers.wait(arrival.token)
        self._landing.clear()
        self.cache.abandon()
        self._note("abandon")
        if self.prediction is not None:
            self.prediction.forecaster.forget()

    # -- getting experts into slots -------------------------------------------------------------

    def take_hits(self, access: Access, experts: Sequence[int]) -> list[int] | None:
        """Slots of all the experts of a step, without pins, if they are there; see the cache."""
        self._land()
        slots = self.cache.take_hits(access, experts)
        if slots is not None:
            self._note("hits", access)
            self._began()
            self._correct(access)
            if self.prediction is not None and self.prediction.acting:
                # They are not computed yet: what is loaded ahead must not take their slots.
                for expert in experts:
                    self.cache.pin(access.position, expert)
                    self._note("pin", access.position, expert)
                self._load_ahead(access.position)
                self._release(access.position, list(experts))
            self.profiler.layer_step(access, 0, 0, 0.0)
        return slots

    def in_ready_order(
        self, access: Access, elsewhere: Callable[[list[int]], Sequence[int]] | None = None
    ) -> Iterator[list[int]]:
        """Groups of experts, each yielded once, while they are in their slots.

        First what is resident, with the reads of the rest under way; then as reads end.

        Args:
            elsewhere: told the misses, before any is asked for, takes those that it has computed
                without a slot: they are neither brought nor yielded.
        """
        position = access.position
        hits, step = self._request(access)
        if elsewhere is not None and step.waiting:
            taken = set(elsewhere(list(step.waiting)))
            step.waiting = deque(expert for expert in step.waiting if expert not in taken)
        self._request_more(step)
        self._load_ahead(position)
        # While some experts wait for a slot, each slot is handed on as soon as it is done with.
        for group in [[hit] for hit in hits] if step.waiting else [hits] if hits else []:
            yield group
            self._release(position, group)
            self._request_more(step)
        while step.waiting or step.coming:
            ready = self._take(step)
            while not step.waiting and step.coming and self._transfers.has_finished():
                ready += self._take(step)
            if ready:
                yield ready
                self._release(position, ready)
            self._request_more(step)
        self._end(step, access)

    def in_ascending_order(self, access: Access) -> Iterator[int]:
        """Every expert in ascending order, one at a time, while it is in its slot."""
        position = access.position
        hits, step = self._request(access)
        self._load_ahead(position)
        # With all of this layer's hits pinned there might be no slot for an earlier miss; those
        # that get evicted before their turn are read again.
        self._release(position, hits)
        step.waiting.clear()
        arrived: set[int] = set()
        unasked = deque(expert for expert in access.experts.tolist() if expert not in step.coming)
        for expert in access.experts.tolist():
            while True:
                self._ask_in_order(step, unasked, arrived)
                if expert in arrived:
                    break
                arrived.update(self._take(step))
            yield expert
            self._release(position, [expert])
        self._end(step, access)

    def bring_behind(self, position: int, expert: int) -> bool:
        """Start to bring in an absent expert for later steps, if nothing else is on its way.

        Not one that the policy would have leave first.

        Returns:
            Whether it is on its way now.
        """
        if self._transfers.in_flight or self._landing or self.cache.slot(position, expert) >= 0:
            return False
        if not self.cache.would_stay(position, expert):
            return False
        loading = self.cache.load_ahead(position, expert)
        self._note("ahead", position, expert, loading)
        if loading:
            self._behind = True
            self._transfers.start(position, expert, ahead=True)
        return loading

    def preload(self, wanted: Sequence[Sequence[int]] | None = None) -> None:
        """Fill free slots with experts, layer by layer, in order, as far as they go.

        Args:
            wanted: experts of each layer position; None for all.
        """
        for position, count in enumerate(self.cache.grid.experts):
            experts = range(count) if wanted is None else wanted[position]
            absent = [e for e in experts if self.cache.slot(position, e) < 0]
            step = _LayerStep(position, waiting=deque(absent[: self.cache.free_slots(position)]))
            self._request_more(step)
            while step.coming:
                self._release(position, self._take(step))
            self._count_bytes(step)

    def bring(self, position: int, expert: int) -> None:
        """Have an expert resident, between steps; another leaves if there is no free slot."""
        if self.cache.is_resident(position, expert):
            return
        if self.cache.slot(position, expert) >= 0:
            self.abandon()  # it was on its way ahead of need: begin anew, as for a needed one
        step = _LayerStep(position, waiting=deque([expert]))
        self._request_more(step)
        assert step.coming, "there is a slot that can be had"
        while step.coming:
            self._release(position, self._take(step))
        self._count_bytes(step)

    def _request(self, access: Access) -> tuple[list[int], _LayerStep]:
        self._land()
        self._began()
        hits, late, misses = self.cache.request(access)
        self._note("request", access, (hits, late, misses))
        step = _LayerStep(access.position, len(misses) + len(late), deque(misses), set(late))
        for expert in late:
            if (access.position, expert) not in self._landing:
                self._transfers.promote(access.position, expert)
        self._correct(access)
        return hits, step

    def _request_more(self, step: _LayerStep) -> None:
        if step.waiting:
            asked = list(step.waiting)
            granted = self.cache.grant(step.position, asked)
            self._note("grant", step.position, asked, granted)
            for expert in granted:
                self._transfers.start(step.position, expert, ahead=False)
                step.coming.add(expert)
                step.waiting.popleft()

    def _ask_in_order(self, step: _LayerStep, unasked: deque[int], arrived: set[int]) -> None:
        """Pin or start to fetch as many of `unasked` as there are slots for, in their order."""
        while unasked:
            if self.cache.is_resident(step.position, unasked[0]):
                self.cache.pin(step.position, unasked[0])
                self._note("pin", step.position, unasked[0])
                arrived.add(unasked[0])
            else:
                step.waiting.append(unasked[0])
                self._request_more(step)
                if step.waiting:
                    step.waiting.clear()
                    return
            unasked.popleft()

    def _take(self, step: _LayerStep) -> list[int]:
        """Wait for a transfer to end; the needed experts that are there by it."""
        for (position, expert), landing in list(self._landing.items()):
            if position == step.position and expert in step.coming:
                del self._landing[position, expert]
                return self._arrived(step, landing)
        assert self._transfers.in_flight, "an expert is waited for that is not on its way"
        arrival, waited = self._transfers.next_finished()
        step.stall += waited
        if arrival.position == step.position and arrival.expert in step.coming:
            if arrival.from_host:
                step.host_bytes += arrival.nbytes
            else:
                step.nbytes += arrival.nbytes
            if not arrival.withdrawn:
                return self._arrived(step, arrival)
            # Called off by an earlier step, when a part of it was there already.
            self._note("partial", arrival.position, arrival.expert, arrival.nbytes)
            self._transfers.start(arrival.position, arrival.expert, ahead=False)
            return []
        self._ended_ahead(arrival)
        return []

    def _arrived(self, step: _LayerStep, arrival: Arrival) -> list[int]:
        self._transfers.wait(arrival.token)
        self.cache.commit(arrival.position, arrival.expert)
        self._note("commit", arrival.position, arrival.expert)
        step.coming.discard(arrival.expert)
        if not step.coming and not step.waiting:
            self._free_since = self._clock()
        return [arrival.expert]

    def _end(self, step: _LayerStep, access: Access) -> None:
        self._count_bytes(step)
        self.profiler.stall_seconds[step.position] += step.stall
        self.profiler.layer_step(access, step.misses, step.nbytes, step.stall)

    def _count_bytes(self, step: _LayerStep) -> None:
        self.profiler.bytes_read[step.position] += step.nbytes
        self.profiler.host_bytes[step.position] += step.host_bytes

    # -- ahead of need --------------------------------------------------------------------------

    def _began(self) -> None:
        """A layer asks for its experts: so long the link was free of needed loads."""
        if self.prediction is not None and self.prediction.following:
            now = self._clock()
            if self._free_since is not None:
                self.prediction.spare.add(now - self._free_since, decode=self.prediction.decode)
            self._free_since = now

    def _correct(self, access: Access) -> None:
        """Call off what is on its way for this layer and not needed, now that the router spoke."""
        if self.prediction is None:
            return
        position = access.position
        for expert in self.cache.loading_ahead(position):
            if (position, expert) in self._landing:
                continue
            if self._transfers.withdraw(position, expert):
                self._drop(position, expert, 0)

    def _load_ahead(self, position: int) -> None:
        """Start the loads that the planner chooses, while layer `position` runs."""
        prediction = self.prediction
        if prediction is None or not prediction.acting or not prediction.forecaster.active:
            return
        rate, spare = self._transfers.rate, prediction.spare.of(decode=prediction.decode)
        room = 0.0 if rate is None or spare is None else rate * spare
        chosen = prediction.planner.choose(position, room)
        self._note_expected()
        for coming, expert in chosen:
            loading = self.cache.load_ahead(coming, expert)
            self._note("ahead", coming, expert, loading)
            if not loading:
                break
            self._transfers.start(coming, expert, ahead=True)

    def _land(self) -> None:
        """Take in what has arrived ahead of its need, without waiting."""
        if self.prediction is None and not self._behind:
            return
        while self._transfers.in_flight and self._transfers.has_finished():
            self._ended_ahead(self._transfers.next_finished()[0])
        for key, arrival in list(self._landing.items()):
            if self._transfers.done(arrival.token):
                del self._landing[key]
                self._settle(arrival)

    def _ended_ahead(self, arrival: Arrival) -> None:
        counter = self.profiler.host_bytes if arrival.from_host else self.profiler.bytes_read
        counter[arrival.position] += arrival.nbytes
        self.profiler.ahead_bytes[arrival.position] += arrival.nbytes
        if arrival.error is not None or arrival.withdrawn:
            # A read that failed is tried again when the expert is needed, and fails aloud then.
            self._drop(arrival.position, arrival.expert, arrival.nbytes)
        elif self._transfers.done(arrival.token):
            self._settle(arrival)
        else:
            self._landing[arrival.position, arrival.expert] = arrival

    def _settle(self, arrival: Arrival) -> None:
        self._transfers.wait(arrival.token)
        self.cache.settle_ahead(arrival.position, arrival.expert)
        self._note("landed", arrival.position, arrival.expert)

    def _drop(self, position: int, expert: int, nbytes: int) -> None:
        self.cache.drop_ahead(position, expert)
        self.profiler.withdrawn_bytes += nbytes
        self._note("dropped", position, expert, nbytes)

    # -- for whoever replays --------------------------------------------------------------------

    def _release(self, position: int, experts: list[int]) -> None:
        self.cache.release(position, experts)
        self._note("release", position, experts)

    def _note(self, *entry: Any) -> None:
        if self.log is not None:
            self.log.append(entry)

    def _note_expected(self) -> None:
        """What the planner told cache and policy to expect, which decides who leaves."""
        if self.log is not None and self.prediction is not None:
            planner = self.prediction.planner
            told = None if planner.expect is None else planner.forecasts
            self.log.append(("expected", self.cache.expected(), told))

"""The decode loop over many prompts: prefill, group, decode a token for each, again.

Knows the model's forward and the caches of groups; what a good grouping is, the scheduler knows.
"""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from transformers import PreTrainedModel

from moe_runtime.batch_counts import BatchCounts
from moe_runtime.batch_run import PhaseCounts
from moe_runtime.core import FloatArray, IntArray
from moe_runtime.path_forecast import PathForecast, RoutingListener
from moe_runtime.predictors.base import StepRows
from moe_runtime.prompt_state import Kept, LoopOptions, PromptState
from moe_runtime.runtime import Runtime
from moe_runtime.scheduler import Groups, active_experts, group_sequences, group_sizes
from moe_runtime.sequence_caches import GroupCache, gather, new_cache

__all__ = ["BatchLoop"]

_KEPT_LOGITS = 64


class BatchLoop:
    """Generates for all prompts; `run` once, then look at the counts.

    Args:
        model: a decoder-only model with a cache of keys and values.
        runtime: its runtime, None for a plain model.
        prompts: in order.
        forecast: of paths; used where `options.method` says how to group by them.
        progress: called after each round with finished prompts and new tokens so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        runtime: Runtime | None,
        prompts: Sequence[PromptState],
        options: LoopOptions,
        forecast: PathForecast,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._model, self._runtime, self._options = model, runtime, options
        self._forecast, self._progress = forecast, progress
        self._prompts = prompts
        self._waiting = deque(prompts)
        self._groups: list[list[int]] = []
        self._caches: list[GroupCache] = []
        self._listener = None if runtime is None else RoutingListener(runtime.spec.grid)
        self._names = frozenset(inspect.signature(model.forward).parameters)
        self._counts = BatchCounts(runtime)
        self.prefill = self.decode = PhaseCounts()
        self.rounds = self.regroupings = self.moved = 0
        self.schedule_seconds = self.gather_seconds = 0.0

    def run(self) -> None:
        """Everything, with the routing listened to where there is a runtime."""
        listeners = [] if self._runtime is None else self._runtime.executor.listeners
        if self._listener is not None:
            listeners.append(self._listener)
        try:
            with torch.no_grad():
                while self._waiting or self._groups:
                    self._admit()
                    self._arrange()
                    self._round()
                    if self._progress is not None:
                        done = [p for p in self._prompts if p.done]
                        self._progress(len(done), sum(len(p.tokens) for p in self._prompts))
        finally:
            if self._listener is not None:
                listeners.remove(self._listener)

    # -- prefill --------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting prompts while there are places; a prompt may end with its first token."""
        size = self._options.batch_size
        while self._waiting:
            room = size * self._options.window - sum(map(len, self._groups))
            count = min(room, size, len(self._waiting))
            if not count:
                return
            self._prefill([self._waiting.popleft() for _ in range(count)])

    def _prefill(self, prompts: list[PromptState]) -> None:
        longest = max(len(one.prompt) for one in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(prompts):
            ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
            mask[row, longest - len(one.prompt) :] = 1
        real = np.flatnonzero(mask.numpy().ravel())
        places = (mask.cumsum(1) - 1).clamp_min(0)
        numbers = np.array([one.number for one in prompts])
        self._forecast.begin(
            StepRows(
                token_ids=ids.numpy().ravel()[real],
                sequence_ids=numbers.repeat(longest)[real],
                positions=places.numpy().ravel()[real],
                decode=False,
            )
        )
        group = GroupCache(
            members=[one.number for one in prompts],
            lengths=[len(one.prompt) for one in prompts],
            cache=new_cache(self._model),
        )
        with self._counts.phase() as counted:
            self._forward(group, prompts, ids, mask, places, real)
        self.prefill = counted.added_to(self.prefill, len(real), self._active())
        if self._listener is not None:
            self._forecast.observe(self._listener.chosen)
        left = [one.number for one in prompts if not one.done]
        if left:
            self._caches.append(group)
            self._seat(left)

    def _seat(self, numbers: list[int]) -> None:
        """Newcomers take the free places of present groups, then a group of their own."""
        for number in numbers:
            free = (g for g in self._groups if len(g) < self._options.batch_size)
            group = next(free, None)
            if group is None:
                self._groups.append(group := [])
            group.append(number)

    # -- which sequence in which batch ------------------------------------------------------------

    def _arrange(self) -> None:
        """Regroup if it is time, and have a cache for each group."""
        if not self._groups:
            self._caches = []
            return
        began = time.perf_counter()
        sizes = group_sizes(sum(map(len, self._groups)), self._options.batch_size)
        fits = len(self._groups) == len(sizes)
        if not fits:  # sequences have ended: fewer batches do
            flat = [number for group in self._groups for number in group]
            ends = np.cumsum(sizes)
            self._groups = [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self._announce()
        method = self._options.method
        if method and len(sizes) > 1 and (not fits or not self.rounds % self._options.every):
            paths = self._forecast.paths(sum(sizes))
            if paths is not None:
                self._regroup(paths, method)
        # What ran last runs first: its experts are the likeliest to be resident still.
        self._groups.sort(key=self._last_call, reverse=True)
        middle = time.perf_counter()
        caches = []
        for group in self._groups:
            same = (one for one in self._caches if sorted(one.members) == sorted(group))
            cache = next(same, None)
            if cache is None:
                cache = gather(self._caches, group)
                self.moved += len(group)
            caches.append(cache)
        self._caches = caches
        self.schedule_seconds += middle - began
        self.gather_seconds += time.perf_counter() - middle

    def _announce(self) -> None:
        """Tell the forecast which tokens come next: rows in the order of the present groups."""
        self._order = [number for group in self._groups for number in group]
        states = [self._prompts[number] for number in self._order]
        self._forecast.begin(
            StepRows(
                token_ids=np.array([one.tokens[-1] for one in states]),
                sequence_ids=np.array(self._order),
                positions=np.array([one.fed for one in states]),
                decode=True,
            )
        )

    def _regroup(self, paths: FloatArray, method: str) -> None:
        """Another grouping, if it promises enough fewer experts than the present one."""
        present: list[list[int]] = []  # as rows of `paths`
        for group in self._groups:
            first = len(present) and present[-1][-1] + 1
            present.append(list(range(first, first + len(group))))
        sizes = group_sizes(len(paths), self._options.batch_size)
        same_sizes = sorted(map(len, present)) == sorted(sizes)
        start: Groups | None = tuple(map(tuple, present)) if same_sizes else None
        found = group_sequences(
            paths,
            self._options.batch_size,
            method=method,
            start=start,
            seed=self._options.seed + self.rounds,
        )
        if start is not None:
            now = active_experts(paths, start).sum()
            if active_experts(paths, found).sum() > now * (1.0 - self._options.least_gain):
                return
        regrouped = [[self._order[row] for row in group] for group in found]
        if {frozenset(group) for group in regrouped} != {frozenset(g) for g in self._groups}:
            self.regroupings += 1
        self._groups = regrouped

    # -- decode ---------------------------------------------------------------------------------

    def _round(self) -> None:
        """A token for each sequence, batch by batch."""
        if not self._groups:
            return
        rows: dict[int, tuple[dict[int, IntArray], int]] = {}
        for group in self._caches:
            states = [self._prompts[number] for number in group.members]
            ids = torch.tensor([[one.tokens[-1]] for one in states])
            mask = group.mask(self._model.device)
            places = torch.tensor(group.lengths)[:, None]
            with self._counts.phase() as counted:
                self._forward(group, states, ids, mask, places, None)
            group.advance()
            self.decode = counted.added_to(self.decode, len(states), self._active())
            if self._listener is not None:
                heard = self._listener.chosen
                rows.update({number: (heard, row) for row, number in enumerate(group.members)})
        if rows:
            told = [rows[number] for number in self._order]
            self._forecast.observe(
                {
                    position: np.stack([chosen[position][row] for chosen, row in told])
                    for position in set.intersection(*(set(chosen) for chosen, _ in told))
                }
            )
        self.rounds += 1
        self._groups = [
            left for group in self._groups if (left := [n for n in group if not self._done(n)])
        ]

    def _last_call(self, group: list[int]) -> float:
        """Mean number of the calls that a group's sequences were in last."""
        return sum(self._prompts[number].last_call for number in group) / len(group)

    def _done(self, number: int) -> bool:
        return self._prompts[number].done

    def _active(self) -> IntArray | None:
        return None if self._listener is None else self._listener.active()

    # -- one call -------------------------------------------------------------------------------

    def _forward(
        self,
        group: GroupCache,
        states: list[PromptState],
        ids: torch.Tensor,
        mask: torch.Tensor,
        places: torch.Tensor,
        real: IntArray | None,
    ) -> None:
        """One forward call, and the next token of each of its sequences."""
        device = self._model.device
        arguments = {"position_ids": places.to(device), "logits_to_keep": 1}
        if self._listener is not None:
            self._listener.begin(ids.numel(), real)
        runtime = self._runtime
        with nullcontext() if runtime is None else runtime.sequences(group.members):
            output = self._model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=group.cache,
                use_cache=True,
                **{name: value for name, value in arguments.items() if name in self._names},
            )
        calls = self.prefill.calls + self.decode.calls
        logits = output.logits[:, -1].float().to("cpu")
        for row, state in enumerate(states):
            state.last_call = calls
            self._take(state, logits[row])

    def _take(self, state: PromptState, logits: torch.Tensor) -> None:
        if self._options.keep_logits:
            largest = logits.topk(min(_KEPT_LOGITS, len(logits)))
            state.kept.append(Kept(values=largest.values, ids=largest.indices))
        token = int(state.choice.scores(logits).argmax())
        state.tokens.append(token)
        ended = token in self._options.stop_tokens
        state.done = ended or len(state.tokens) >= self._options.max_new_tokens

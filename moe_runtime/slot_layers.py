"""MoE layers on a device, by kernels over slots: residents at once, the others as they come.

Where a layer may miss, its residents are computed before the host knows the routing, which comes by
one small copy; then what is missing is fetched, or computed on the host beside the device. Each
contribution goes to its (token, choice) place and all are summed in one order, so that the bits do
not depend on what was resident or came first. The place of an expert does change its last bits:
one expert's outputs differ by no more than 2e-5 (float32), 4e-3 (float16) or 3e-2 (bfloat16) of the
largest of them, or of 1 where they are smaller.

Knows cache, loader and kernels; not how a place is chosen, nor models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from moe_runtime.cache import ExpertCache
from moe_runtime.device import Device
from moe_runtime.ending import end_with
from moe_runtime.host_experts import HostBatch, HostExpert, HostExperts
from moe_runtime.hosting import Hosting, Miss
from moe_runtime.kernels import (
    ExpertForm,
    combined,
    contributions,
    slot_experts,
    triton_takes,
)
from moe_runtime.loader import ExpertLoader
from moe_runtime.prefetch import Fetcher
from moe_runtime.routing import LayerRouting, sort_routing
from moe_runtime.slot_transfers import SlotTransfers
from moe_runtime.slots import SlotPool

__all__ = ["SlotLayers"]


@dataclass(eq=False)
class _Hosted:
    """What the host computes of a layer step: pairs `[n]` in the order of its outputs.

    `alone` if nothing was fetched beside it.
    """

    experts: list[int]
    pairs: torch.Tensor
    batch: HostBatch
    alone: bool = False


class SlotLayers:
    """Computes layers over slots; called under the executor's lock.

    Attributes:
        kernel: how layers are computed over slots, see `kernels.slot_experts`. `"auto"` leaves what
            is no GPU its own way.
        hosting: how the place of a miss is chosen; None to fetch them all.
    """

    def __init__(
        self,
        cache: ExpertCache,
        pools: Sequence[SlotPool],
        loader: ExpertLoader,
        transfers: SlotTransfers,
        fetcher: Fetcher,
        device: Device,
    ) -> None:
        self.kernel = "auto"
        self.hosting: Hosting | None = None
        self._cache, self._pools, self._loader = cache, pools, loader
        self._transfers, self._fetcher, self._device = transfers, fetcher, device
        self._host = HostExperts()

    def take(self, position: int, hidden: torch.Tensor, form: ExpertForm) -> bool:
        """Whether kernels over slots compute this layer, whatever is resident."""
        if self.kernel == "auto" and not hidden.is_cuda:
            return False
        if self.kernel == "plain":
            return form.gate is not None
        return triton_takes(hidden, self._pool(position), form)

    def resident(
        self,
        position: int,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        form: ExpertForm,
    ) -> torch.Tensor:
        """A layer whose experts are all resident: the host is not told what was chosen."""
        return slot_experts(
            hidden,
            self._held(position, top_k_index),
            top_k_weights,
            self._pool(position),
            form,
            distinct=self._experts(position),
            kernel=self.kernel,
        )

    def arriving(
        self,
        position: int,
        hidden: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        form: ExpertForm,
        real: torch.Tensor | None,
        told: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """A layer of which some experts may be missing.

        Args:
            hidden: `[T, D]`.
            top_k_index, top_k_weights: `[T, K]`.
            real: bool `[T]` in host memory, False for padding; None if there is none.
            told: called with `top_k_index` once it is in host memory, before anything is asked for.
        """
        tokens, choices = top_k_index.shape
        before = self._device.fence()
        asked, copied = self._device.to_host(top_k_index, before)
        here = self._cache.resident_slots(position)
        parts: torch.Tensor | None = None
        if max(here) >= 0:
            slots = self._held(position, top_k_index)
            if real is not None:
                slots = slots.masked_fill(~self._device.to_device(real).unsqueeze(1), -1)
            parts = self._contributions(position, hidden, slots, form)
        self._device.finish(copied)
        if told is not None:
            told(asked)
        routing = sort_routing(position, asked, self._experts(position), real)
        found = torch.full((choices * tokens,), -1)
        hosted: list[_Hosted] = []

        def elsewhere(misses: list[int]) -> list[int]:
            chosen = self._chosen(position, routing, misses, hidden)
            if chosen:
                hosted.append(self._submit(position, routing, chosen, hidden, form, before))
                hosted[-1].alone = len(chosen) == len(misses)
            return list(chosen)

        try:
            asks = elsewhere if self.hosting is not None else None
            # The residents that compute now are pinned: whoever leaves is read by no later compute.
            self._transfers.after = before
            for experts in self._loader.in_ready_order(routing.access, asks):
                self._transfers.after = None
                pairs, counts = routing.of(experts)
                slots = torch.tensor(self._cache.slots_of(position, experts))
                found[pairs] = slots.repeat_interleave(torch.tensor(counts))
                late = [expert for expert in experts if here[expert] < 0]
                if late:
                    pairs, _ = routing.of(late)
                    now = torch.full_like(found, -1)
                    now[pairs] = found[pairs]
                    slots = self._device.to_device(now.view(choices, tokens).t().contiguous())
                    parts = self._contributions(position, hidden, slots, form, parts)
            for one in hosted:
                found[one.pairs] = 0  # computed, in no slot
                parts = self._merged(parts, one, tokens, choices)
                self._count(position, one)
        except BaseException:
            for one in hosted:
                one.batch.drop()
                one.batch.wait()
            raise
        finally:
            self._transfers.after = None
        if parts is None:
            return torch.zeros_like(hidden)
        slots = self._device.to_device(found.view(choices, tokens).t().contiguous())
        output = combined(parts, slots, top_k_weights, form, hidden.dtype, kernel=self.kernel)
        self._bring_behind(position, routing, hosted)
        return output

    def end_with(self, owner: object) -> None:
        """End the host's thread with its owner."""
        end_with(owner, self._host)

    # -- on the device --------------------------------------------------------------------------

    def _held(self, position: int, top_k_index: torch.Tensor) -> torch.Tensor:
        """Slots `[T, K]` on the device, -1 where an expert's bytes are not there."""
        experts = self._experts(position)
        table = self._cache.slot_table(position, self._device.to_device)
        held = table[top_k_index.clamp_max(experts - 1)]
        return held.masked_fill(top_k_index >= experts, -1)

    def _contributions(
        self,
        position: int,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        form: ExpertForm,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return contributions(
            hidden,
            slots,
            self._pool(position),
            form,
            into,
            distinct=self._experts(position),
            kernel=self.kernel,
        )

    def _merged(
        self, parts: torch.Tensor | None, one: _Hosted, tokens: int, choices: int
    ) -> torch.Tensor:
        """The host's outputs put at their places; waits for them."""
        rows = self._device.to_device(one.batch.outputs())
        if parts is None:
            parts = rows.new_empty(1, tokens * choices, rows.shape[1])
        # Pairs are counted choice by choice, places of contributions token by token.
        places = one.pairs % tokens * choices + one.pairs // tokens
        places = self._device.to_device(places)
        parts[0].index_copy_(0, places, rows.to(parts.dtype))
        if len(parts) > 1:
            parts[1:].index_fill_(1, places, 0)
        return parts

    # -- on the host ----------------------------------------------------------------------------

    def _chosen(
        self, position: int, routing: LayerRouting, misses: Sequence[int], hidden: torch.Tensor
    ) -> dict[int, tuple[torch.Tensor, ...]]:
        """The misses that go to the host, with their weights there."""
        assert self.hosting is not None
        tokens = dict(
            zip(routing.access.experts.tolist(), routing.access.tokens.tolist(), strict=True)
        )
        able, weights = [], {}
        for expert in misses:
            held = self._fetcher.in_host(position, expert)
            if held is not None:
                weights[expert] = held
                able.append(
                    Miss(
                        expert=expert,
                        tokens=tokens[expert],
                        nbytes=sum(tensor.nbytes for tensor in held),
                        pinned=all(tensor.is_pinned() for tensor in held),
                    )
                )
        missing = set(misses)
        chosen = self.hosting.choose(
            able,
            residents=[count for expert, count in tokens.items() if expert not in missing],
            row_bytes=hidden.shape[1] * hidden.element_size(),
            link_bytes=self._loader.busy_bytes,
        )
        return {expert: weights[expert] for expert in chosen}

    def _submit(
        self,
        position: int,
        routing: LayerRouting,
        chosen: dict[int, tuple[torch.Tensor, ...]],
        hidden: torch.Tensor,
        form: ExpertForm,
        before: object,
    ) -> _Hosted:
        experts = list(chosen)
        pairs, counts = routing.of(experts)
        rows, copied = self._device.to_host(hidden, before)

        def arrived() -> torch.Tensor:
            self._device.finish(copied)
            return rows

        rows_of = (pairs % len(hidden)).split(counts)
        work = [
            HostExpert(tensors=tensors, rows=own)
            for tensors, own in zip(chosen.values(), rows_of, strict=True)
        ]
        # What follows the products is done where all contributions are.
        bare = replace(form, activation=form.gate or form.activation, finish=None)
        batch = self._host.submit(work, bare, arrived)
        for expert in experts:
            self._fetcher.keep_in_host(position, expert, batch)
        return _Hosted(experts, pairs, batch)

    def _bring_behind(
        self, position: int, routing: LayerRouting, hosted: Sequence[_Hosted]
    ) -> None:
        """What is used often is to become resident: the link, if idle, brings the busiest.

        Where something was fetched the cache moves on anyway, and the next layer's copies must not
        wait for this one; `bench/host_execution.py` has the rules that were tried.
        """
        for one in hosted:
            if one.alone:
                busiest = max(one.experts, key=lambda expert: len(routing.of([expert])[0]))
                self._loader.bring_behind(position, busiest)

    def _count(self, position: int, one: _Hosted) -> None:
        profiler = self._loader.profiler
        profiler.hosted[position] += len(one.experts)
        profiler.hosted_rows += len(one.pairs)
        profiler.hosted_seconds += one.batch.seconds

    # -- what there is --------------------------------------------------------------------------

    def _pool(self, position: int) -> tuple[torch.Tensor, ...]:
        return self._pools[self._cache.group(position)].stacked

    def _experts(self, position: int) -> int:
        return self._cache.grid.experts[position]

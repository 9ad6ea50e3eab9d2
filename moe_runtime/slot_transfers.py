"""`SlotTransfers`: the transfers of the real runtime, from the slow tiers into slots.

Joins fetcher, pools and device for the loader; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_runtime.cache import ExpertCache
from moe_runtime.device import Device
from moe_runtime.prefetch import Fetch, Fetcher
from moe_runtime.slots import SlotPool

__all__ = ["SlotTransfers"]


class SlotTransfers:
    """Implements `moe_runtime.loader.Transfers`."""

    def __init__(
        self, cache: ExpertCache, pools: Sequence[SlotPool], fetcher: Fetcher, device: Device
    ) -> None:
        self._cache = cache
        self._pools = pools
        self._fetcher = fetcher
        self._device = device
        # What the slots that are given away now were last read before; None for all compute so far.
        self.after: Any = None

    @property
    def in_flight(self) -> int:
        """Transfers started and not yet taken."""
        return self._fetcher.in_flight

    @property
    def busy_bytes(self) -> int:
        """Their bytes."""
        return self._fetcher.busy_bytes

    @property
    def rate(self) -> float | None:
        """Bytes a second while busy; None before it is known."""
        return self._fetcher.rate

    def start(self, position: int, expert: int, *, ahead: bool) -> None:
        """Begin to bring an expert into its slot, after the compute that still reads the slot."""
        pool = self._pools[self._cache.group(position)]
        target = pool.targets(self._cache.slot(position, expert))
        after = self._device.fence() if self.after is None else self.after
        self._fetcher.submit(position, expert, target, after=after, ahead=ahead)

    def next_finished(self) -> tuple[Fetch, float]:
        """The next to end, and the seconds waited for it."""
        return self._fetcher.next_finished()

    def has_finished(self) -> bool:
        """Whether `next_finished` would return at once."""
        return self._fetcher.has_finished()

    def promote(self, position: int, expert: int) -> None:
        """What is on its way ahead is needed now."""
        self._fetcher.promote(position, expert)

    def withdraw(self, position: int, expert: int) -> bool:
        """Call it off; True if nothing of it had begun, so that it does not end."""
        return self._fetcher.withdraw(position, expert)

    def cancel(self) -> None:
        """Drop what has not begun, wait for the rest."""
        self._fetcher.cancel()
        self.after = None

    def done(self, token: Any) -> bool:
        """Whether the device has the bytes."""
        return self._device.done(token)

    def wait(self, token: Any) -> None:
        """Compute from now on sees them."""
        self._device.wait(token)

"""Which missing experts of a layer step are computed on the host, where their weights lie.

Puts the profile's times and what is on its way into `places.choose_place`. Moves nothing, computes
nothing and knows no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moe_runtime.hardware.values import HardwareProfile
from moe_runtime.places import Busy, MissCost, choose_place, miss_cost

__all__ = ["Hosting", "Miss", "make_hosting"]


# The host's seconds count so many times, since what is fetched stays for later steps. On the shared
# traces this, with one expert brought in behind where none was fetched, is the rule that is never
# slower than fetching all (modelled: bench/host_execution.py).
_STAYS = 1.25


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A missing expert whose weights lie in host memory.

    Args:
        tokens: rows that were routed to it.
        nbytes: of its weights.
        pinned: whether they lie in page-locked memory, from which copies are faster.
    """

    expert: int
    tokens: int
    nbytes: int
    pinned: bool = True


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """How the place of a miss is chosen.

    Args:
        device: PyTorch's name of it.
        profile: None where every miss goes to the host without a look at times.
    """

    device: str
    profile: HardwareProfile | None
    # A layer decides in a fraction of a millisecond only if times need not be interpolated anew.
    _costs: dict[tuple[int, int, int, bool], MissCost | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def choose(
        self,
        misses: Sequence[Miss],
        *,
        residents: Sequence[int],
        row_bytes: int,
        link_bytes: int,
    ) -> list[int]:
        """The experts to compute on the host, in the order of `misses`.

        Args:
            residents: tokens of each expert of this step that the device computes anyway.
            row_bytes: of one row of hidden states.
            link_bytes: that are on their way to the device already.
        """
        profile = self.profile
        if profile is None or not misses:
            return [miss.expert for miss in misses]
        first = misses[0]
        costs = [
            self._cost(miss.nbytes, miss.tokens, row_bytes, pinned=miss.pinned) for miss in misses
        ]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            return []
        computing = [
            self._cost(first.nbytes, tokens, row_bytes, pinned=first.pinned) for tokens in residents
        ]
        device = sum(cost.device for cost in computing if cost is not None)
        link = profile.copy_seconds(self.device, link_bytes) if link_bytes else 0.0
        placing = choose_place(known, Busy(link=link or 0.0, device=device), thorough=False)
        return [misses[i].expert for i in placing.host]

    def _cost(self, nbytes: int, tokens: int, row_bytes: int, *, pinned: bool) -> MissCost | None:
        key = (nbytes, tokens, row_bytes, pinned)
        if key not in self._costs:
            assert self.profile is not None, "without a profile nothing is weighed"
            cost = miss_cost(
                self.profile, self.device, nbytes=nbytes, tokens=tokens, row_bytes=row_bytes,
                pinned=pinned,
            )  # fmt: skip
            self._costs[key] = cost and replace(cost, host=cost.host * _STAYS)
        return self._costs[key]


def make_hosting(mode: str, profile: HardwareProfile | None, device: str) -> Hosting | None:
    """The rule for `RuntimeConfig.host_execution`; None if nothing is computed on the host."""
    if mode == "always":
        return Hosting(device=device, profile=None)
    if mode == "never" or profile is None or profile.copy_seconds(device, 1 << 20) is None:
        return None
    return Hosting(device=device, profile=profile)

"""A device on CPU memory whose copies happen late, and which notices what must not be.

It stands where a GPU would: `copy` returns at once and the bytes arrive only when somebody waits.
Knows the device protocol and the names of the executor's kernel, nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moe_runtime import executor
from moe_runtime.store import DiskStore

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(eq=False)
class Copy:
    """A copy under way. Arrived: compute sees it. Done: its source may be written again."""

    pairs: Pairs
    ahead: bool = False
    arrived: bool = False
    done: bool = False
    asked: int = 0


@dataclass(eq=False)
class Back:
    """A copy to the host under way."""

    held: torch.Tensor
    source: torch.Tensor


@dataclass(frozen=True)
class Fence:
    """All compute up to this time."""

    time: int


@dataclass(eq=False)
class LaterDevice:
    """Implements `moe_runtime.device.Device`.

    Memory holds NaN until it is written, and a slot holds NaN from the moment its copy is asked
    for until it is waited for: whatever is computed too early is NaN. `faults` names everything
    else that a real device would punish.
    """

    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_cpu: bool = False
    copies: list[Copy] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    time: int = 0
    last_use: dict[int, int] = field(default_factory=dict)  # address of a slot -> time
    waits: int = 0
    finishes: int = 0  # times that the host waited for something from the device

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((max(nbytes, 1),), 0xFF, dtype=torch.uint8)

    allocate_host = allocate

    def fence(self) -> Fence:
        return Fence(self.time)

    def copy(self, pairs: Pairs, after: Any, *, ahead: bool = False) -> Copy:
        for target, _ in pairs:
            used = self.last_use.get(target.data_ptr(), -1)
            if not isinstance(after, Fence) or after.time < used:
                self.faults.append(f"a slot last used at {used} is overwritten after {after}")
            if any(target.data_ptr() == t.data_ptr() for c in self.pending() for t, _ in c.pairs):
                self.faults.append("two copies into one slot at once")
            target.view(torch.uint8).fill_(0xFF)  # NaN in every float type
        self.copies = [copy for copy in self.copies if not copy.done]
        self.copies.append(Copy(pairs, ahead))
        return self.copies[-1]

    def to_host(self, tensor: torch.Tensor, after: Any) -> tuple[torch.Tensor, Any]:
        if not isinstance(after, Fence):
            self.faults.append(f"what goes to the host does not wait for compute but for {after}")
        held = torch.full_like(tensor, -1)
        return held, Back(held, tensor.clone())

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def wait(self, token: Any) -> None:
        self.waits += 1
        if token is not None and not token.arrived:
            for target, source in token.pairs:
                target.copy_(source)
            token.arrived = True

    def done(self, token: Any) -> bool:
        """Copies that nobody waits for are done when they are asked about a third time."""
        if token is None or token.arrived:
            return True
        token.asked += 1
        return token.asked > 2  # the bytes arrive with `wait`, which has to follow

    def finish(self, token: Any) -> None:
        if isinstance(token, Back):
            self.finishes += 1
            token.held.copy_(token.source)
            return
        self.wait(token)
        if token is not None and not token.done:
            # Two streams: what was asked for earlier on the same one is done too.
            for copy in self.copies[: self.copies.index(token) + 1]:
                copy.done = copy.done or copy.ahead == token.ahead

    # -- looking --------------------------------------------------------------------------------

    def pending(self) -> list[Copy]:
        """Copies that nobody has waited for."""
        return [copy for copy in self.copies if not copy.arrived]

    def compute(self, slots: torch.Tensor, stacked: Sequence[torch.Tensor]) -> None:
        """A kernel that reads these slots is issued."""
        self.time += 1
        for slot in set(slots.tolist()):
            for tensors in stacked:
                address = tensors[slot].data_ptr()
                self.last_use[address] = self.time
                if any(address == t.data_ptr() for c in self.pending() for t, _ in c.pairs):
                    self.faults.append(f"slot {slot} is used before its copy was waited for")

    def write(self, tensors: Sequence[torch.Tensor]) -> None:
        """A reader thread writes host memory."""
        written = {tensor.data_ptr() for tensor in tensors}
        for copy in list(self.copies):
            if not copy.done and any(source.data_ptr() in written for _, source in copy.pairs):
                self.faults.append("host memory is written while a copy from it is under way")


def install(monkeypatch: pytest.MonkeyPatch) -> LaterDevice:
    """Make `device="cuda"` mean a new device of this kind, and let it see every kernel and read."""
    device = LaterDevice()
    kernel, read = executor.grouped_experts, DiskStore.read
    lock = threading.Lock()

    def compute(hidden: Any, slots: Any, pool: Any, form: Any) -> torch.Tensor:
        device.compute(slots, pool)
        return kernel(hidden, slots, pool, form)

    def write(self: Any, position: int, expert: int, piece: Any, target: Any, bounce: Any) -> int:
        with lock:
            device.write(target)
        return read(self, position, expert, piece, target, bounce)

    monkeypatch.setattr(executor, "grouped_experts", compute)
    monkeypatch.setattr(DiskStore, "read", write)
    monkeypatch.setattr("moe_runtime.lifecycle.open_device", lambda name: device)
    return device

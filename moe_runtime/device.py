"""The device layer: memory, pinned memory, copies and their order, for CPU and CUDA alike.

The only place that knows streams and events; does not know experts.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any, Protocol

import torch

from moe_runtime.errors import ConfigError

__all__ = ["CpuDevice", "CudaDevice", "Device", "open_device"]

_HUGE = 2 << 20


class Device(Protocol):
    """What the cache and the executor need of a device.

    Copies run beside compute; `copy` returns a token, `wait` makes later compute see the copy, and
    `fence` returns a token that orders a later copy after the compute issued so far. `to_host` and
    `to_device` carry what is small: routing, rows, numbers of slots.
    """

    torch_device: torch.device
    is_cpu: bool

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Uninitialised fast memory, uint8 `[nbytes]`, page-aligned."""
        ...

    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """Uninitialised host memory that copies reach fastest (pinned), uint8 `[nbytes]`."""
        ...

    def fence(self) -> Any:
        """A token for all compute issued so far."""
        ...

    def copy(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: Any, *, ahead: bool = False
    ) -> Any:
        """Copy each (destination, source) once the token `after` has passed; a token for it.

        Args:
            ahead: it is not needed yet, and need not go before copies that are.
        """
        ...

    def to_host(self, tensor: torch.Tensor, after: Any) -> tuple[torch.Tensor, Any]:
        """Start to copy a device tensor once the token `after` has passed.

        Returns:
            The copy in host memory, which is not to be read before `finish` of the token.
        """
        ...

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor for compute issued from now on; nothing waits."""
        ...

    def done(self, token: Any) -> bool:
        """Whether the copy is done."""
        ...

    def wait(self, token: Any) -> None:
        """Compute issued from now on runs after the copy; the host does not block."""
        ...

    def finish(self, token: Any) -> None:
        """Block the calling thread until the copy is done."""
        ...


class CpuDevice:
    """RAM is the fast tier; copies are done by whoever asks for them, at once."""

    is_cpu = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Anonymous mapping: pages cost nothing until used and go back to the system when freed."""
        region = mmap.mmap(-1, max(nbytes, 1))
        if nbytes >= 16 * _HUGE:
            # Weights are read in long runs: huge pages spare most of the address translation.
            with contextlib.suppress(OSError, AttributeError):
                region.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(region, dtype=torch.uint8, count=max(nbytes, 1))

    allocate_host = allocate

    def fence(self) -> None:
        """Compute on the CPU is never behind."""

    def copy(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: Any, *, ahead: bool = False
    ) -> None:
        """Copy now."""
        for destination, source in pairs:
            destination.copy_(source)

    def to_host(self, tensor: torch.Tensor, after: Any) -> tuple[torch.Tensor, None]:
        """It is there."""
        return tensor, None

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """It is there."""
        return tensor

    def done(self, token: Any) -> bool:
        """Copies are already done."""
        return True

    def wait(self, token: Any) -> None:
        """Copies are already done."""

    def finish(self, token: Any) -> None:
        """Copies are already done."""


class CudaDevice:
    """A GPU: copy streams beside the current compute stream, events between them.

    Copies ahead of need have a stream of their own, of lower priority, and so has the way back.
    """

    is_cpu = False

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise ConfigError(f"device={name!r}, but this PyTorch sees no GPU; use device='cpu'")
        index = torch.device(name).index
        self.torch_device = torch.device(
            "cuda", torch.cuda.current_device() if index is None else index
        )
        self._needed = torch.cuda.Stream(self.torch_device, priority=-1)
        self._ahead = torch.cuda.Stream(self.torch_device)
        self._back = torch.cuda.Stream(self.torch_device, priority=-1)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory from PyTorch's allocator."""
        memory = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self.torch_device)
        for stream in (self._needed, self._ahead):
            memory.record_stream(stream)  # once let go, it is not given away under a copy into it
        return memory

    def allocate_host(self, nbytes: int) -> torch.Tensor:
        """Page-locked host memory."""
        return torch.empty(max(nbytes, 1), dtype=torch.uint8, pin_memory=True)

    def fence(self) -> torch.cuda.Event:
        """An event on the compute stream."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return event

    def copy(
        self,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        after: torch.cuda.Event | None,
        *,
        ahead: bool = False,
    ) -> torch.cuda.Event:
        """Enqueue on a copy stream; nothing blocks."""
        stream = self._ahead if ahead else self._needed
        if after is not None:
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
        return done

    def to_host(
        self, tensor: torch.Tensor, after: torch.cuda.Event | None
    ) -> tuple[torch.Tensor, torch.cuda.Event]:
        """Enqueue on the stream of the way back, into page-locked memory; nothing blocks."""
        if after is not None:
            self._back.wait_event(after)
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(self._back):
            held.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._back)  # its memory is not given away before the copy is done
        done = torch.cuda.Event()
        done.record(self._back)
        return held, done

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Enqueue on the compute stream, from page-locked memory."""
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def done(self, token: torch.cuda.Event | None) -> bool:
        """Whether the event has passed."""
        return token is None or bool(token.query())

    def wait(self, token: torch.cuda.Event | None) -> None:
        """The compute stream waits for the event; the host goes on."""
        if token is not None:
            torch.cuda.current_stream(self.torch_device).wait_event(token)

    def finish(self, token: torch.cuda.Event | None) -> None:
        """Wait on the host."""
        if token is not None:
            token.synchronize()


def open_device(name: str) -> Device:
    """The device of this name; `"auto"` is the GPU if there is one.

    Raises:
        ConfigError: unknown device, or one that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device: {error}") from error
    if kind == "cpu":
        return CpuDevice()
    if kind == "cuda":
        return CudaDevice(name)
    raise ConfigError(f"device={name!r}: the runtime computes on 'cpu' or 'cuda'")

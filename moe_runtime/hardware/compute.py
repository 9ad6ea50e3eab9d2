"""How long an expert takes on a place, how fast a device is reached and reads its own memory.

Does not know drivers or disks. The device's side runs on any torch device; it has not yet been
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812  as PyTorch's own documentation has it

from moe_runtime.hardware.samples import sample, spread
from moe_runtime.hardware.values import CopyTime, ExpertShape, ExpertTime, MemoryRate
from moe_runtime.memory import free_memory

__all__ = ["COPY_SIZES", "TOKENS", "copy_times", "device_memory_rates", "expert_times"]

TOKENS = (1, 4, 16, 64)
COPY_SIZES = (64 << 10, 1 << 20, 16 << 20, 64 << 20)

_POOL_BYTES = 256 << 20
_BURST = 8  # experts or copies issued before the host waits for a device, as in a layer
_SEED = 0


def expert_times(
    device: torch.device,
    shape: ExpertShape,
    *,
    tokens: tuple[int, ...] = TOKENS,
    pool_bytes: int = _POOL_BYTES,
) -> Iterator[ExpertTime]:
    """Time of one gated MLP (SiLU) on 1, 4, ... tokens, each call with another expert's weights.

    Weights go around a pool that is larger than most caches, so that they come from memory, as
    those of a model do. On a device several experts are issued before the host waits, so that a
    kernel's launch is counted as it is in a layer.

    Args:
        pool_bytes: of all experts of the pool; a quarter of free memory at most.

    Raises:
        MemoryError: free memory does not hold two experts.
        RuntimeError: PyTorch cannot compute in this dtype on this device.
    """
    dtype: torch.dtype = getattr(torch, shape.dtype)
    room = min(pool_bytes, free_memory(device) // 4)
    experts = max(2, room // shape.nbytes)
    if experts * shape.nbytes > free_memory(device):
        raise MemoryError(f"two experts of {shape.nbytes} bytes do not fit in free memory")
    generator = torch.Generator().manual_seed(_SEED)
    first = torch.randn(2 * shape.intermediate, shape.hidden, generator=generator) / 32
    second = torch.randn(shape.hidden, shape.intermediate, generator=generator) / 32
    gate_up = first.to(device, dtype).expand(experts, -1, -1).clone()
    down = second.to(device, dtype).expand(experts, -1, -1).clone()
    burst = 1 if device.type == "cpu" else _BURST
    at = 0
    for count in tokens:
        hidden = torch.randn(count, shape.hidden, generator=generator).to(device, dtype)

        def once(hidden: torch.Tensor = hidden) -> None:
            nonlocal at
            with torch.no_grad():
                for _ in range(burst):
                    gate, up = F.linear(hidden, gate_up[at]).chunk(2, dim=-1)
                    F.linear(F.silu(gate) * up, down[at])
                    at = (at + 1) % experts
            _finish(device)

        times = sample(once)
        yield ExpertTime(
            place=_place(device),
            tokens=count,
            seconds=spread([seconds / burst for seconds in times]),
        )


def copy_times(
    device: torch.device, *, pinned: bool, sizes: tuple[int, ...] = COPY_SIZES
) -> Iterator[CopyTime]:
    """Time of copies from host memory to a device, by size.

    Raises:
        RuntimeError: no memory, or none that can be page-locked.
    """
    largest = max(sizes)
    source = torch.empty(largest, dtype=torch.uint8, pin_memory=pinned).fill_(1)
    target = torch.empty(largest, dtype=torch.uint8, device=device)
    for nbytes in sizes:

        def once(nbytes: int = nbytes) -> None:
            for _ in range(_BURST):
                target[:nbytes].copy_(source[:nbytes], non_blocking=True)
            _finish(device)

        times = sample(once)
        yield CopyTime(
            place=_place(device),
            nbytes=nbytes,
            pinned=pinned,
            seconds=spread([seconds / _BURST for seconds in times]),
        )


def device_memory_rates(device: torch.device, *, nbytes: int = _POOL_BYTES) -> Iterator[MemoryRate]:
    """Rates at which a device reads and copies its own memory.

    Raises:
        RuntimeError: no memory.
    """
    nbytes = min(nbytes, free_memory(device) // 8)
    source = torch.ones(max(nbytes // 4, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    work: tuple[tuple[str, int, Callable[[], object]], ...] = (
        ("read", 1, source.max),
        ("copy", 2, lambda: target.copy_(source)),
    )
    for kind, moved, step in work:

        def once(step: Callable[[], object] = step) -> None:
            step()
            _finish(device)

        yield MemoryRate(
            place=_place(device),
            kind="read" if kind == "read" else "copy",
            threads=1,
            rate=spread([moved * 4 * source.numel() / seconds for seconds in sample(once)]),
        )


def _place(device: torch.device) -> str:
    return "host" if device.type == "cpu" else str(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

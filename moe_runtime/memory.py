"""How much memory this process may still take, and has taken: the machine's and its cgroup's.

Readings only; what to do with them is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import textwrap
from pathlib import Path

import psutil
import torch

__all__ = ["free_memory", "hand_back", "mapped_bytes", "peak_rss", "refusal", "resident_set"]

_REFUSED = ("out of memory", "can't allocate memory", "cannot allocate memory")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, a memory cgroup's limit respected."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    free = int(psutil.virtual_memory().available)
    for limit, used in _cgroups():
        if limit < 1 << 60:  # "unlimited" is a huge number in version 1
            free = min(free, max(limit - used, 0))
    return free


def refusal(error: BaseException) -> str:
    """What an error says in short, if it is that there is no memory; else empty.

    Devices, pinned memory, PyTorch on the CPU and the system each say it by an error of their own.
    """
    lines = str(error).strip().splitlines() or [""]
    kinds = (torch.OutOfMemoryError, MemoryError)
    known = isinstance(error, kinds) or getattr(error, "errno", None) == errno.ENOMEM
    if not known and isinstance(error, RuntimeError):
        found = [line for line in lines if any(word in line.lower() for word in _REFUSED)]
        known, lines = bool(found), found or lines
    if not known:
        return ""
    return textwrap.shorten(lines[0] or type(error).__name__, 100, placeholder=" ...")


def hand_back(device: torch.device) -> None:
    """Give the device the memory that PyTorch keeps for later, so that it counts as free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def resident_set() -> int:
    """Bytes of physical memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def mapped_bytes(suffix: str) -> int:
    """Bytes of files of this ending that this process has mapped; 0 where the system does not say.

    Their pages count as free memory, although whoever computes with them wants them to stay.
    """
    found = 0
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            if line.endswith(suffix):
                first, last = line.split(" ", 1)[0].split("-")
                found += int(last, 16) - int(first, 16)
    return found


def peak_rss() -> int:
    """The most physical memory that this process has had, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_set()


def _cgroups() -> list[tuple[int, int]]:
    """(limit, use without reclaimable cache) of the memory cgroups that this process is in."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                folder = Path("/sys/fs/cgroup" + path)
                names = ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                folder = Path("/sys/fs/cgroup/memory" + path)
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / names[0]).read_text())
                used = int((folder / names[1]).read_text())
                found.append((limit, used - _statistic(folder / "memory.stat", names[2])))
    return found


def _statistic(path: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, value = line.split()
            if key == name:
                return int(value)
    return 0

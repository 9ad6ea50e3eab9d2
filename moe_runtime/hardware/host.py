"""The host: what the system says of it, and how fast its memory is read and copied by threads.

Does not know devices or disks.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch

from moe_runtime.core import IntArray
from moe_runtime.hardware.samples import sample, spread
from moe_runtime.hardware.values import HostFacts, MemoryRate
from moe_runtime.memory import free_memory

__all__ = ["cache_bytes", "host_facts", "memory_rates", "processor_name", "usable_cores"]

_CPUS = Path("/sys/devices/system/cpu")
_LEAST, _MOST = 64 << 20, 1 << 30  # bytes of each of the two arrays
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def host_facts() -> HostFacts:
    """Processor, cores, memory and caches."""
    return HostFacts(
        processor=processor_name(),
        cores=usable_cores(),
        compute_threads=torch.get_num_threads(),
        memory_bytes=int(psutil.virtual_memory().total),
        cache_bytes=cache_bytes(),
        version=str(torch.__version__),
    )


def processor_name() -> str:
    """The processor's model; its architecture where the system says no more."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return int(psutil.cpu_count() or 1)


def cache_bytes() -> int:
    """Bytes of all last-level caches together; 0 where the system does not say."""
    found: dict[str, tuple[int, int]] = {}
    with suppress(OSError, ValueError, KeyError):
        for index in _CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
            level = int((index / "level").read_text())
            text = (index / "size").read_text().strip()
            nbytes = int(text[:-1]) * _UNITS[text[-1]]
            found[(index / "shared_cpu_list").read_text().strip() + f"/{level}"] = (level, nbytes)
    last = max((level for level, _ in found.values()), default=0)
    return sum(nbytes for level, nbytes in found.values() if level == last)


def memory_rates(*, nbytes: int | None = None, most_threads: int = 16) -> Iterator[MemoryRate]:
    """Read and copy rates of host memory by 1, 2, 4, ... threads, each with its own part.

    Args:
        nbytes: bytes read; by default four times the last-level caches, so that they cannot hold
            it, but 64 MiB to 1 GiB and an eighth of free memory at most.

    Raises:
        MemoryError: less than 1 MiB could be had.
    """
    wanted = min(max(4 * cache_bytes(), _LEAST), _MOST) if nbytes is None else nbytes
    wanted = min(wanted, free_memory(torch.device("cpu")) // 8)
    if wanted < 1 << 20:
        raise MemoryError(f"only {wanted} bytes of memory can be spared")
    source = np.arange(wanted // 8, dtype=np.int64)
    target = np.zeros_like(source)
    target.fill(1)  # pages of zeros are only made when written
    counts = [1 << power for power in range(most_threads.bit_length())]
    for threads in [
        count for count in counts if count <= max(1, min(usable_cores(), most_threads))
    ]:
        with ThreadPoolExecutor(threads) as pool:
            halves = (np.array_split(one, threads) for one in (source, target))
            parts = list(zip(*halves, strict=True))
            read = sample(partial(_each, pool, _read, parts), least=5)
            copy = sample(partial(_each, pool, _copy, parts), least=5)
        for kind, times, moved in (("read", read, 1), ("copy", copy, 2)):
            yield MemoryRate(
                place="host",
                kind="read" if kind == "read" else "copy",
                threads=threads,
                rate=spread([moved * source.nbytes / seconds for seconds in times]),
            )


_Part = tuple[IntArray, IntArray]


def _each(pool: ThreadPoolExecutor, work: Callable[[_Part], None], parts: list[_Part]) -> None:
    list(pool.map(work, parts))


def _read(part: _Part) -> None:
    # A reduction touches each byte once and writes none; numpy lets other threads run meanwhile.
    np.maximum.reduce(part[0])


def _copy(part: _Part) -> None:
    np.copyto(part[1], part[0])

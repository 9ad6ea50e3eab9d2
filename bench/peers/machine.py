"""Owns describing the machine a measurement ran on, and its disk's rate while it ran.

Does not know what is measured.
"""

from __future__ import annotations

import mmap
import os
import platform
import random
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def _first(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return "unknown"


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory in bytes, kernel, instruction sets that decide bf16 speed, time."""
    flags = _first("/proc/cpuinfo", "flags").split()
    return {
        "processor": _first("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(_first("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        "kernel": platform.release(),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
        "load_average": [round(v, 2) for v in os.getloadavg()],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def direct_read_rate(path: Path, *, size: int = 1 << 20, reads: int = 256, threads: int = 2,
                     seed: int = 0) -> float:  # fmt: skip
    """GB/s of random aligned direct reads of `size` bytes of `path` by `threads` threads."""
    blocks = path.stat().st_size // size
    order = random.Random(seed).sample(range(blocks), min(reads, blocks))

    def read(share: list[int]) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, size) as page_aligned:
            for block in share:
                os.preadv(descriptor, [page_aligned], block * size)
        os.close(descriptor)

    workers = [threading.Thread(target=read, args=(order[i::threads],)) for i in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return len(order) * size / (time.perf_counter() - began) / 1e9

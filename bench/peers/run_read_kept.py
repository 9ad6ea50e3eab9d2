"""Runner: reads from the shards as many bytes as a loaded model keeps, and loads nothing.

Does not know the runtime. Option `bytes`: every tensor outside the experts, then experts in file
order up to this many. Direct reads of 4 MB by two threads, copied into the memory that keeps them.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from peers.protocol import write_json

CHUNK = 4 << 20
ALIGNED = 4096
Range = tuple[Path, int, int]  # file, first byte, bytes


def kept_ranges(folder: Path, wanted: int) -> list[Range]:
    """Byte ranges of the dense tensors, then of experts, `wanted` bytes in all."""
    dense: list[Range] = []
    experts: list[Range] = []
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                kind = experts if ".mlp.experts." in name else dense
                kind.append((shard, 8 + length + begin, end - begin))
    kept = list(dense)
    left = wanted - sum(size for _, _, size in dense)
    for path, begin, size in experts:
        if left < size:
            break
        kept.append((path, begin, size))
        left -= size
    return kept


def read(ranges: list[Range], into: list[np.ndarray[tuple[int], np.dtype[np.uint8]]]) -> None:
    """Reads each range's aligned superset directly and copies the range out of it."""
    opened: dict[Path, int] = {}
    with mmap.mmap(-1, CHUNK + 2 * ALIGNED) as bounce:
        view = np.frombuffer(bounce, dtype=np.uint8)
        for (path, begin, size), target in zip(ranges, into, strict=True):
            if path not in opened:
                opened[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
            for at in range(0, size, CHUNK):
                part = min(CHUNK, size - at)
                low = (begin + at) // ALIGNED * ALIGNED
                high = -(-(begin + at + part) // ALIGNED) * ALIGNED
                window = memoryview(bounce)[: high - low]
                os.preadv(opened[path], [window], low)
                window.release()
                shift = begin + at - low
                target[at : at + part] = view[shift : shift + part]
        del view
    for descriptor in opened.values():
        os.close(descriptor)


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    ranges = kept_ranges(Path(task["checkpoint"]), task["options"]["bytes"])
    began = time.perf_counter()
    targets = [np.empty(size, dtype=np.uint8) for _, _, size in ranges]
    workers = [threading.Thread(target=read, args=(ranges[i::2], targets[i::2])) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - began
    read_bytes = sum(size for _, _, size in ranges)
    write_json(Path(task["out"]), {"seconds": seconds, "bytes": read_bytes})


if __name__ == "__main__":
    main()

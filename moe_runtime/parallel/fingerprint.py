"""By what ranks tell checkpoints apart that are alike in structure, without reading them whole.

Knows safetensors files; no models, and not who compares.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from moe_runtime.errors import CheckpointError
from moe_runtime.safetensors_index import CheckpointFiles, StoredTensor

__all__ = ["BLOCK", "MOST_BLOCKS", "checkpoint_fingerprint", "sampled_blocks"]

BLOCK = 4096  # bytes: what a disk reads at least
MOST_BLOCKS = 1 << 15  # of tensors, 128 MiB in all
_SPREAD = 64  # further blocks of each shard
_READERS = 8  # shards at once: disks answer many small reads side by side


def checkpoint_fingerprint(files: CheckpointFiles, structure: str) -> str:
    """16 hex digits of a checkpoint.

    Of each shard its size and its whole header count (names, types, shapes, offsets, metadata); of
    each tensor a block of 4 KiB, in a place that its name decides (all of it, if it is no longer),
    of one that holds all experts of a layer such a block of each; and 64 blocks of each shard,
    evenly spaced. Where tensors have more than 32768 blocks, as many, evenly spaced, are looked at.
    So another training of the same structure is told apart, also where few tensors were trained; a
    single changed weight of a longer tensor need not be.

    Args:
        structure: of the model, which counts too.

    Raises:
        CheckpointError: a shard has become shorter since its header was read.
        OSError: a shard cannot be read.
    """
    ordered = sorted(
        (one.file, *at) for one in files.tensors.values() for at in sampled_blocks(one)
    )
    step = -(-len(ordered) // MOST_BLOCKS) or 1
    by_file: list[list[tuple[int, int]]] = [[] for _ in files.paths]
    for number, offset, count in ordered[::step]:
        by_file[number].append((offset, count))
    with ThreadPoolExecutor(_READERS) as readers:
        digests = list(readers.map(_shard, files.paths, by_file))
    whole = hashlib.sha256(structure.encode())
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()[:16]


def sampled_blocks(tensor: StoredTensor) -> list[tuple[int, int]]:
    """(absolute offset, length) of the bytes of a tensor that count."""
    if not tensor.nbytes:
        return []
    parts = tensor.shape[0] if len(tensor.shape) == 3 else 1  # stacked experts
    each = tensor.nbytes // parts
    drawn = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:8])
    place = tensor.offset + drawn % (max(each - BLOCK, 0) + 1)
    return [(place + each * part, min(BLOCK, each)) for part in range(parts)]


def _shard(path: str, blocks: Sequence[tuple[int, int]]) -> bytes:
    """Digest of one shard."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        header = 8 + int.from_bytes(_read(file.fileno(), path, 0, 8), "little")
        digest.update(_read(file.fileno(), path, 0, header))
        length = min(BLOCK, size)
        spread = [((size - length) * number // (_SPREAD - 1), length) for number in range(_SPREAD)]
        for offset, count in sorted({*blocks, *spread}):
            digest.update(_read(file.fileno(), path, offset, count))
    return digest.digest()


def _read(file: int, path: str, offset: int, count: int) -> bytes:
    found = os.pread(file, count, offset)
    if len(found) != count:
        raise CheckpointError(
            f"{path}: {len(found)} of {count} bytes at offset {offset}; the file was cut off since "
            "it was opened. Fetch it again."
        )
    return found

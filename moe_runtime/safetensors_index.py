"""Where each tensor's bytes lie: safetensors headers read and checked without loading a tensor.

Knows the safetensors file form and the hub's shard index; knows nothing of experts.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from moe_runtime.errors import CheckpointError

__all__ = ["HUB_OPTIONS", "CheckpointFiles", "StoredTensor", "open_checkpoint", "resolve_shards"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_MAX_HEADER = 100_000_000  # the format's own limit
HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a shard: `offset` and `nbytes` are absolute in file number `file`."""

    name: str
    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The shards of a checkpoint and every tensor in them."""

    paths: tuple[str, ...]
    tensors: dict[str, StoredTensor]


def resolve_shards(path_or_id: str, *, variant: str | None, **options: Any) -> list[str]:
    """Local paths of a checkpoint's safetensors shards, fetched by the usual hub options.

    Raises:
        CheckpointError: no safetensors file, or a shard that the index names is missing.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    infix = f".{variant}" if variant else ""
    single = _find(path_or_id, f"model{infix}.safetensors", hub)
    if single is not None:
        return [single]
    index = _find(path_or_id, f"model.safetensors.index{infix}.json", hub)
    if index is None:
        raise CheckpointError(_no_safetensors(path_or_id, infix, hub))
    try:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index ({error!r}); fetch it again") from error
    if not names:
        raise CheckpointError(f"{index}: the shard index names no tensor; fetch it again")
    shards = []
    for name in names:
        shard = _find(path_or_id, name, hub) if _is_plain_name(name) else None
        if shard is None:
            raise CheckpointError(
                f"{index} names the shard {name!r}, which is missing; fetch the checkpoint again"
            )
        shards.append(shard)
    return shards


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and ".." not in Path(name).parts and not os.path.isabs(name)


def _find(path_or_id: str, name: str, hub: dict[str, Any]) -> str | None:
    if os.path.isdir(path_or_id):
        path = os.path.join(path_or_id, hub.get("subfolder", "") or "", name)
        return path if os.path.isfile(path) else None
    found = cached_file(
        path_or_id,
        name,
        _raise_exceptions_for_missing_entries=False,
        **hub,
    )
    return None if found is None else str(found)


def _no_safetensors(path_or_id: str, infix: str, hub: dict[str, Any]) -> str:
    message = (
        f"{path_or_id}: no model{infix}.safetensors and no model.safetensors.index{infix}.json"
    )
    if os.path.isdir(path_or_id):
        folder = Path(path_or_id, hub.get("subfolder", "") or "")
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".gguf"))
        if others:
            return (
                f"{message}; found {others[0]}. Experts are read in place from safetensors only: "
                "load it once with plain transformers and save_pretrained it."
            )
    return message


def open_checkpoint(paths: Sequence[str]) -> CheckpointFiles:
    """Read the headers of these shards.

    Raises:
        CheckpointError: a header is damaged, or a tensor's bytes do not lie inside its file.
    """
    tensors: dict[str, StoredTensor] = {}
    for number, path in enumerate(paths):
        for entry in _read_header(path, number):
            if entry.name in tensors:
                other = paths[tensors[entry.name].file]
                raise CheckpointError(f"tensor {entry.name} stands in both {other} and {path}")
            tensors[entry.name] = entry
    return CheckpointFiles(paths=tuple(paths), tensors=tensors)


def _read_header(path: str, number: int) -> list[StoredTensor]:
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: header length {length} in a file of {size} bytes; "
                    "the file is truncated or no safetensors file. Fetch it again."
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged safetensors header (it is no object)")
    start = 8 + length
    entries = []
    for name, fields in header.items():
        if name != "__metadata__":
            entries.append(_check_entry(path, number, name, fields, start, size))
    return entries


def _check_entry(
    path: str, number: int, name: str, fields: Any, start: int, size: int
) -> StoredTensor:
    try:
        kind = str(fields["dtype"])
        shape = tuple(int(n) for n in fields["shape"])
        begin, end = (int(n) for n in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name} has a damaged entry ({error!r})") from error
    if any(length < 0 for length in shape):
        raise CheckpointError(f"{path}: tensor {name} has the damaged shape {shape}")
    if start + end > size or begin > end or begin < 0:
        raise CheckpointError(
            f"{path}: tensor {name} ends at byte {start + end} of a file of {size} bytes; "
            "the file is truncated. Fetch it again."
        )
    dtype = _DTYPES.get(kind)
    if dtype is None:
        # Never needed unless it is an expert; `checkpoint` then says so by this placeholder.
        dtype = torch.uint8
        shape = (end - begin,)
    count = 1
    for length in shape:
        count *= length
    if count * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {shape} and dtype {kind} has {end - begin} bytes"
        )
    return StoredTensor(name, number, dtype, shape, start + begin, end - begin)

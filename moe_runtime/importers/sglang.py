"""SGLang's recordings: dumps of its expert distribution recorder, and `routed_experts` of requests.

Knows the recorder's modes `stat`, `stat_approx`, `per_pass` and `per_token`, not other engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.core import FloatArray
from moe_runtime.errors import TraceError
from moe_runtime.importers import routed_arrays
from moe_runtime.importers.facts import (
    MOST_LAYERS,
    Facts,
    Note,
    Piece,
    choose_layers,
    experts_of,
)
from moe_runtime.importers.sglang_dump import Dump, array_of, load_dump
from moe_runtime.importers.sglang_tokens import read_tokens
from moe_runtime.routing_counts import RoutingCounts

__all__ = ["read"]


def read(paths: Sequence[Path], facts: Facts, note: Note) -> Iterator[Piece] | RoutingCounts:
    """A trace from `per_token` dumps and requests' arrays; counts from the other modes.

    Raises:
        TraceError: a damaged file, or files of different modes or models.
    """
    dumped = [path.suffix in {".pt", ".pth"} or _is_zip(path) for path in paths]
    if not any(dumped):
        return routed_arrays.read(paths, facts, note)
    if not all(dumped):
        raise TraceError(
            f"{paths[dumped.index(False)]}: is no .pt dump of the recorder, but other files are; "
            "import them separately"
        )
    first = load_dump(paths[0])
    if first.mode == "per_token":
        return read_tokens(paths, facts, note)
    return _read_counts(paths, facts, note, first)


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False  # said better where the file is read


def _read_counts(paths: Sequence[Path], facts: Facts, note: Note, first: Dump) -> RoutingCounts:
    """Counts of `stat` and `per_pass` dumps, summed over steps, files and ranks."""
    total: FloatArray | None = None
    seen: dict[bytes, Path] = {}
    for path in paths:
        dump = load_dump(path)
        if dump.mode != first.mode:
            raise TraceError(
                f"{path}: a dump of mode {dump.mode}, the first is of {first.mode}; import them "
                "separately"
            )
        digest = dump.digest()
        if digest in seen:
            note(f"{path}: the same passes as {seen[digest].name}, counted once")
            continue
        seen[digest] = path
        counts = _stat(dump) if dump.mode == "stat" else _per_pass(dump)
        if total is not None and counts.shape != total.shape:
            raise TraceError(
                f"{path}: has [layers, experts] {list(counts.shape)}, the first file "
                f"{list(total.shape)}; import recordings of one model together"
            )
        total = counts if total is None else total + counts
    assert total is not None
    path = paths[0]
    used = np.asarray((total > 0).any(axis=1))
    positions, layer_ids = choose_layers(path, len(total), used, facts)
    experts = experts_of(path, layer_ids, facts, total.shape[1])
    k = facts.top_k
    if any(k > count for count in experts):
        raise TraceError(f"{path}: top-k {k} is said, but a layer has {min(experts)} experts")
    note("ranks of tensor parallelism may have counted a token several times: shares are right")
    return RoutingCounts(
        counts=tuple(total[positions]),
        layer_ids=layer_ids,
        experts=experts,
        top_k=(k,) * len(layer_ids),
        model_id=facts.model_id,
        fingerprint=facts.fingerprint,
        source=f"SGLang recorder, {first.mode}",
    )


def _stat(dump: Dump) -> FloatArray:
    """`[L, E]` of a `stat` dump: `logical_count` `[L, E]` or `[steps, L, E]`."""
    where = f"{dump.path}: logical_count"
    counts = array_of(dump.data["logical_count"], "iuf", (2, 3), where)
    _check_counts(counts, where)
    summed = counts.sum(axis=0, dtype=np.float64) if counts.ndim == 3 else counts
    return summed.astype(np.float64)


def _per_pass(dump: Dump) -> FloatArray:
    """`[L, E]` of a `per_pass` dump: the counts of physical slots, added up by expert."""
    table = dump.physical_to_logical()
    total = np.zeros(table.shape, np.float64)
    for number, record in enumerate(dump.records()):
        where = f"{dump.path}: record {number}: global_physical_count"
        counts = array_of(record.get("global_physical_count"), "iuf", (2,), where)
        if counts.shape != table.shape:
            raise TraceError(
                f"{where} has [layers, slots] {list(counts.shape)}, the map of physical to logical "
                f"experts {list(table.shape)}"
            )
        _check_counts(counts, where)
        total += counts
    result = np.zeros((len(table), int(table.max()) + 1), np.float64)
    np.add.at(result, (np.arange(len(table))[:, None], table), total)
    return result


def _check_counts(counts: NDArray[Any], where: str) -> None:
    """TraceError unless all are finite and 0 or more; names the layer."""
    wrong = ~(np.isfinite(counts) & (counts >= 0))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise TraceError(f"{where}: layer {at[-2]} expert {at[-1]} has count {counts[at]}")
    if counts.shape[-2] > MOST_LAYERS or 0 in counts.shape:
        raise TraceError(f"{where} has shape {list(counts.shape)}; the recording is empty")

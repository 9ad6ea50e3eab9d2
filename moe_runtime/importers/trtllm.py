"""TensorRT-LLM's expert statistics: a folder with `meta_info.json` and `rank*.safetensors`.

Knows nothing of the other engines; gives `RoutingCounts`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_runtime.core import FloatArray
from moe_runtime.errors import TraceError
from moe_runtime.importers.documents import field, parse_json, read_text, whole_number
from moe_runtime.importers.facts import MOST_LAYERS, Facts, Note, experts_of, recorded_top_k
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import UNUSED

__all__ = ["FORM", "read"]

FORM = "TensorRT-LLM statistics"
_RANK = re.compile(r"rank(\d{1,6})\.safetensors")
_KEY = re.compile(r"(\d{1,9})_(\d{1,9})")


def read(paths: Sequence[Path], facts: Facts, note: Note) -> RoutingCounts:
    """The counts of one or more folders, summed over iterations and ranks.

    Raises:
        TraceError: a file is missing, damaged or does not fit the others; names it.
    """
    return RoutingCounts.total([_read_folder(path, facts, note) for path in paths])


def _read_folder(path: Path, facts: Facts, note: Note) -> RoutingCounts:
    folder = path if path.is_dir() else path.parent
    meta_path = folder / "meta_info.json"
    meta = parse_json(read_text(meta_path), str(meta_path))
    experts, top_k = (
        whole_number(field(meta, name, int, str(meta_path)), 1, most, f"{meta_path}: {name}")
        for name, most in (("num_experts", UNUSED - 1), ("num_experts_per_token", UNUSED - 1))
    )
    ranks = _rank_files(folder)
    sums: dict[int, FloatArray] = {}
    keys: set[tuple[int, int]] | None = None
    for file in ranks:
        found = _add(file, experts, sums)
        if keys is not None and found != keys:
            iteration, layer = sorted(found ^ keys)[0]
            raise TraceError(
                f"{file}: iteration {iteration} layer {layer} is not in all ranks; copy the "
                "statistics of one run"
            )
        keys = found
    layer_ids = tuple(sorted(sums))
    if facts.first_dense is not None:
        expected = tuple(range(facts.first_dense, (layer_ids[-1] if layer_ids else 0) + 1))
    else:
        expected = facts.moe_layers or layer_ids
    if expected != layer_ids:
        lacking = sorted(set(expected) ^ set(layer_ids))
        raise TraceError(
            f"{folder}: layer {lacking[0]} is missing or too many: statistics of layers "
            f"{list(layer_ids)}, MoE layers given {list(expected)}"
        )
    note(f"{folder}: {len(ranks)} ranks, {len({step for step, _ in keys or ()})} iterations")
    k = recorded_top_k(folder, facts, top_k)
    totals = {float(sums[layer].sum()) for layer in layer_ids}
    tokens = totals.pop() / k if len(totals) == 1 else 0.5
    return RoutingCounts(
        counts=tuple(sums[layer] for layer in layer_ids),
        layer_ids=layer_ids,
        experts=experts_of(folder, layer_ids, facts, experts),
        top_k=(k,) * len(layer_ids),
        tokens=int(tokens) if tokens.is_integer() else 0,
        model_id=facts.model_id,
        fingerprint=facts.fingerprint,
        source=FORM,
    )


def _rank_files(folder: Path) -> list[Path]:
    """`rank0.safetensors`, `rank1...` in order; the raw ones beside them are left out."""
    found = {
        int(match[1]): path
        for path in sorted(folder.iterdir())
        if (match := _RANK.fullmatch(path.name))
    }
    if not found:
        raise TraceError(f"{folder}: no rank*.safetensors; copy the statistics of all ranks")
    for number in range(len(found)):
        if number not in found:
            raise TraceError(
                f"{folder}: rank{number}.safetensors is missing among {len(found)} ranks; counts "
                "without it would be wrong"
            )
    return [found[number] for number in range(len(found))]


def _add(path: Path, experts: int, sums: dict[int, FloatArray]) -> set[tuple[int, int]]:
    """Add one rank's counts to `sums`, by layer.

    Returns:
        The (iteration, layer) pairs that it has.
    """
    keys: set[tuple[int, int]] = set()
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  a safetensors file is no mapping
                match = _KEY.fullmatch(name)
                if match is None or int(match[2]) >= MOST_LAYERS:
                    raise TraceError(f"{path}: tensor {name!r:.80} is not named iteration_layer")
                pair = (int(match[1]), int(match[2]))
                values = _counts(file.get_tensor(name), f"{path}: tensor {name!r}", pair[1])
                if values.shape != (experts,):
                    raise TraceError(
                        f"{path}: tensor {name!r} (layer {pair[1]}) has shape {values.shape}, "
                        f"but meta_info.json says {experts} experts"
                    )
                sums[pair[1]] = sums.get(pair[1], 0.0) + values
                keys.add(pair)
    except (SafetensorError, OSError, TypeError) as error:
        raise TraceError(
            f"{path}: not a complete safetensors file of numbers ({error}); copy it again"
        ) from error
    if not keys:
        raise TraceError(f"{path}: holds no counts; record some iterations")
    if len(keys) != len({step for step, _ in keys}) * len({layer for _, layer in keys}):
        steps, layers = {step for step, _ in keys}, {layer for _, layer in keys}
        step, layer = next((s, at) for s in sorted(steps) for at in sorted(layers)
                           if (s, at) not in keys)  # fmt: skip
        raise TraceError(f"{path}: layer {layer} is missing in iteration {step}; copy it again")
    return keys


def _counts(values: Any, where: str, layer: int) -> FloatArray:
    """Counts of one layer as float64; TraceError if they are no counts."""
    if values.dtype.kind not in "iuf":
        raise TraceError(f"{where} (layer {layer}) holds {values.dtype}, not counts")
    result: FloatArray = values.astype(np.float64)
    wrong = ~(np.isfinite(result) & (result >= 0))
    if wrong.any():
        raise TraceError(
            f"{where} (layer {layer}) has count {result[wrong].flat[0]}; counts are 0 or more"
        )
    return result

"""Readers of other engines' routing recordings, in the two forms of the shared traces folder.

Knows nothing of policies; gives `RoutingTrace` objects. See NOTICE.md of that folder for sources.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from moe_runtime.errors import TraceError
from moe_runtime.trace import DECODE, PREFILL, UNUSED, RoutingTrace

__all__ = ["TRACE_NAMES", "load_shared_traces", "read_route_csv", "read_route_json"]

TRACE_NAMES = ("qwen1.5-moe-a2.7b", "qwen3.6-35b-a3b", "gemma-4-26b-a4b", "gpt-oss-120b")


def load_shared_traces(folder: Path) -> dict[str, list[RoutingTrace]]:
    """All runs of the four models, by model; TraceError if the folder is not the shared one."""
    runs: dict[str, list[RoutingTrace]] = {}
    for name in TRACE_NAMES:
        files = sorted((folder / name).glob("*.json")) + sorted((folder / name).glob("*.csv"))
        if not files:
            raise TraceError(f"{folder / name}: no recordings (*.json, *.csv); name another folder")
        runs[name] = [
            (read_route_json if file.suffix == ".json" else read_route_csv)(file) for file in files
        ]
    return runs


def read_route_json(path: Path) -> RoutingTrace:
    """One run in the JSON form: `meta` and `routes`, one entry a token."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        meta, routes = document["meta"], document["routes"]
        layers = sorted(int(layer) for layer in routes[0]["layers"])
        shape = (len(routes), len(layers), int(meta["top_k"]))
        ids, weights = np.full(shape, UNUSED, np.uint16), np.zeros(shape, np.float16)
        for row, route in enumerate(routes):
            for at, layer in enumerate(layers):
                chosen = route["layers"][str(layer)]
                ids[row, at, : len(chosen["experts"])] = chosen["experts"]
                weights[row, at, : len(chosen["weights"])] = chosen["weights"]
        decoding = np.array([route["phase"] == "decode" for route in routes])
        positions = [route["token_pos"] for route in routes]
        tokens = [route["token_id"] for route in routes]
        experts, model = int(meta["num_experts"]), str(meta["model_id"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TraceError(f"{path}: not the JSON form of a routing recording: {error!r}") from error
    return _one_sequence(
        ids, weights, decoding, np.array(tokens), np.array(positions), layers, experts, model
    )


def read_route_csv(path: Path) -> RoutingTrace:
    """One run in the CSV form: `# key=value` comments, then one line a selected expert."""
    facts: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(file)
    for line in lines:
        if line.startswith("# model="):
            facts = dict(word.split("=", 1) for word in line[2:].split() if "=" in word)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    try:
        experts, model = int(facts["n_expert"]), facts["model"]
        table = np.array(
            [[int(row[c]) for c in ("phase", "step", "layer", "slot", "expert")] for row in rows]
        )
        weight = np.array([float(row["weight"]) for row in rows])
        if len({row["turn"] for row in rows}) != 1:
            raise ValueError("more than one turn")
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}: not the CSV form of a routing recording: {error!r}") from error
    phase, step, layer, slot, expert = table.T
    layers = sorted(set(layer.tolist()))
    steps, row_of = np.unique(step, return_inverse=True)
    shape = (len(steps), len(layers), int(slot.max()) + 1)
    ids, weights = np.full(shape, UNUSED, np.uint16), np.zeros(shape, np.float16)
    place = (row_of, np.searchsorted(layers, layer), slot)
    ids[place], weights[place] = expert, weight
    decoding = np.zeros(len(steps), dtype=bool)
    decoding[row_of] = phase == 1
    unknown = np.full(len(steps), -1)
    return _one_sequence(ids, weights, decoding, unknown, steps, layers, experts, model)


def _one_sequence(
    ids: np.ndarray,
    weights: np.ndarray,
    decoding: np.ndarray,
    tokens: np.ndarray,
    positions: np.ndarray,
    layers: list[int],
    experts: int,
    model: str,
) -> RoutingTrace:
    """A trace of one sequence whose prompt was one forward call, and each later token another."""
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=weights,
        token_ids=tokens.astype(np.int32),
        sequence_ids=np.zeros(len(ids), np.int32),
        positions=positions.astype(np.int32),
        phase=np.where(decoding, DECODE, PREFILL).astype(np.uint8),
        step_ids=np.cumsum(decoding).astype(np.int32),
        layer_ids=tuple(layers),
        experts=(experts,) * len(layers),
        model_id=model,
    )

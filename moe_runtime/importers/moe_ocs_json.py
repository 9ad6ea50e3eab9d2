"""The JSON form of moe_ocs_learning: `meta` and `routes`, one entry a token, one run a file.

Knows nothing of other forms; gives rows of a `RoutingTrace`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import TraceError
from moe_runtime.importers.documents import field, parse_json, read_text, whole_number
from moe_runtime.importers.facts import (
    MOST_LAYERS,
    Facts,
    Note,
    Piece,
    choose_layers,
    experts_of,
    recorded_top_k,
)
from moe_runtime.importers.rows import Layers, sequence_rows
from moe_runtime.trace import UNUSED

__all__ = ["read"]

_LARGEST_INT = np.iinfo(np.int32).max


def read(paths: Sequence[Path], facts: Facts, note: Note) -> Iterator[Piece]:
    """Each file as a sequence of its own.

    Raises:
        TraceError: not this form, or numbers that do not fit; names file, token and layer.
    """
    if len(paths) > 1:
        note(f"{len(paths)} runs, each a sequence of its own")
    for sequence, path in enumerate(paths):
        yield _read_file(path, sequence, facts)


def _read_file(path: Path, sequence: int, facts: Facts) -> Piece:
    document = parse_json(read_text(path), f"{path}: not the JSON form of a routing recording")
    form = f"{path}: not the JSON form of a routing recording"
    meta = field(document, "meta", dict, form)
    routes = field(document, "routes", list, form)
    experts = whole_number(meta.get("num_experts"), 1, UNUSED - 1, f"{path}: meta num_experts")
    top_k = whole_number(meta.get("top_k"), 1, experts, f"{path}: meta top_k")
    recorded_top_k(path, facts, top_k)
    if not routes:
        raise TraceError(f"{path}: 'routes' is empty; the recording has no tokens")
    names = _layer_names(path, routes[0])
    found = np.array(sorted(names))
    used = np.zeros(int(found[-1]) + 1, np.bool_)
    used[found] = True
    positions, layer_ids = choose_layers(path, len(used), used, facts)
    layers = Layers(
        layer_ids=layer_ids,
        experts=experts_of(path, layer_ids, facts, experts),
        top_k=(top_k,) * len(layer_ids),
    )
    ids, weights = _chosen(path, routes, [names.get(at, str(at)) for at in positions], top_k)
    decoding, places, tokens = _columns(path, routes)
    prompt = int(np.argmax(decoding)) if decoding.any() else len(routes)
    if not decoding[prompt:].all():
        raise TraceError(f"{path}: token {prompt + int(np.argmin(decoding[prompt:]))} is of the "
                         "prompt, but comes after decoded ones")  # fmt: skip
    rows = sequence_rows(
        str(path),
        ids,
        layers,
        facts,
        sequence=sequence,
        prompt_tokens=prompt,
        positions=places,
        token_ids=tokens,
        weights=weights,
        model_id=str(meta.get("model_id", "")),
    )
    return Piece(path, rows)


def _layer_names(path: Path, route: Any) -> dict[int, str]:
    """The name of each layer in the file, by its index."""
    names: dict[int, str] = {}
    for name in field(route, "layers", dict, f"{path}: token 0"):
        if not (name.isascii() and name.isdigit() and len(name) <= 6 and int(name) < MOST_LAYERS):
            raise TraceError(f"{path}: token 0: {name!r:.40} is no layer index")
        if int(name) in names:
            raise TraceError(f"{path}: token 0: layer {int(name)} is there twice")
        names[int(name)] = name
    if not names:
        raise TraceError(f"{path}: token 0 has no layers; the recording is empty")
    return names


def _chosen(
    path: Path, routes: list[Any], names: list[str], top_k: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Experts and weights `[N, L, K]`, -1 and 0 where a token has fewer than K."""
    chosen: list[list[int]] = []
    given: list[list[float]] = []
    for row, route in enumerate(routes):
        layers = field(route, "layers", dict, f"{path}: token {row}")
        if len(layers) != len(names):
            raise TraceError(
                f"{path}: token {row} has {len(layers)} layers, the first token {len(names)}"
            )
        for name in names:
            where = f"{path}: token {row} layer {name}"
            entry = layers.get(name)
            if entry is None:
                raise TraceError(f"{where} is missing; every token needs all layers")
            experts = field(entry, "experts", list, where)
            weights = field(entry, "weights", list, where)
            if len(experts) != len(weights) or len(experts) > top_k:
                raise TraceError(
                    f"{where}: {len(experts)} experts and {len(weights)} weights, top_k is {top_k}"
                )
            if any(type(value) is not int or abs(value) > UNUSED for value in experts):
                raise TraceError(f"{where}: experts must be numbers of experts: {experts!r:.60}")
            if any(type(value) not in {int, float} for value in weights):
                raise TraceError(f"{where}: weights must be numbers: {weights!r:.60}")
            if -1 in experts:
                raise TraceError(f"{where}: expert -1 is out of range")
            chosen.append(experts)
            given.append(weights)
    width = max(map(len, chosen))
    if width < top_k:
        raise TraceError(f"{path}: top_k is {top_k}, but no token has more than {width} experts")
    shape = (len(routes), len(names), width)
    ids = np.array([row + [-1] * (width - len(row)) for row in chosen], np.int64)
    try:
        weight = np.array([row + [0.0] * (width - len(row)) for row in given], np.float64)
    except OverflowError as error:
        raise TraceError(f"{path}: a weight is no finite number ({error})") from error
    return ids.reshape(shape), weight.reshape(shape)


def _columns(
    path: Path, routes: list[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Whether each token was decoded, its place and its id."""
    decoding, places, tokens = [], [], []
    for row, route in enumerate(routes):
        where = f"{path}: token {row}"
        phase = route.get("phase")
        if phase not in ("prefill", "decode"):
            raise TraceError(f"{where}: phase must be prefill or decode, found {phase!r:.40}")
        decoding.append(phase == "decode")
        places.append(whole_number(route.get("token_pos"), 0, _LARGEST_INT, f"{where}: token_pos"))
        tokens.append(whole_number(route.get("token_id"), -1, _LARGEST_INT, f"{where}: token_id"))
    return np.array(decoding), np.array(places, np.int64), np.array(tokens, np.int64)

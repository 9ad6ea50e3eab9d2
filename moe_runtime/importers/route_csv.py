"""The CSV form of BigMoeOnEdge's route traces: `#` comments, then one line a chosen expert.

Knows nothing of other forms; gives rows of a `RoutingTrace`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import TraceError
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
_NEEDED = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
_LIMITS = {"phase": 1, "step": _LARGEST_INT, "layer": MOST_LAYERS - 1, "slot": 1023}
Table = dict[str, NDArray[Any]]


def read(paths: Sequence[Path], facts: Facts, note: Note) -> Iterator[Piece]:
    """Each file as a sequence of its own; token ids are unknown.

    Raises:
        TraceError: not this form, or numbers that do not fit; names file, step and layer.
    """
    note("the recording has no token ids")
    for sequence, path in enumerate(paths):
        yield _read_file(path, sequence, facts)


def _read_file(path: Path, sequence: int, facts: Facts) -> Piece:
    said, table = _parse(path)
    layers_found, at = np.unique(table["layer"], return_inverse=True)
    steps, row = np.unique(table["step"], return_inverse=True)
    width = int(table["slot"].max()) + 1
    if "n_layer" in said and layers_found[-1] >= (
        deep := _header_number(path, said, "n_layer", MOST_LAYERS)
    ):
        raise TraceError(f"{path}: layer {layers_found[-1]}, but the model has {deep} layers")
    _check_complete(path, table, steps, layers_found, width)
    shape = (len(steps), len(layers_found), width)
    experts = _header_number(path, said, "n_expert", UNUSED - 1)
    k = _header_number(path, said, "n_expert_used", 1024) if "n_expert_used" in said else width
    if k != width:
        raise TraceError(f"{path}: n_expert_used is {k}, but a token has {width} experts")
    used = np.zeros(int(layers_found[-1]) + 1, np.bool_)
    used[layers_found] = True
    positions, layer_ids = choose_layers(path, len(used), used, facts)
    if len(positions) != len(layers_found):
        missing = sorted(set(positions.tolist()) - set(layers_found.tolist()))
        raise TraceError(f"{path}: layer {missing[0]} is missing in the file")
    ids, weights = np.full(shape, -1, np.int64), np.zeros(shape, np.float64)
    ids[row, at, table["slot"]] = table["expert"]
    weights[row, at, table["slot"]] = table["weight"]
    decoding = np.zeros(len(steps), np.bool_)
    decoding[row] = table["phase"] == 1
    prompt = int(np.argmax(decoding)) if decoding.any() else len(steps)
    if not decoding[prompt:].all():
        step = steps[prompt + int(np.argmin(decoding[prompt:]))]
        raise TraceError(f"{path}: step {step} is of the prompt, but comes after decoded ones")
    order = np.searchsorted(layers_found, positions)
    rows = sequence_rows(
        str(path),
        ids[:, order],
        Layers(
            layer_ids=layer_ids,
            experts=experts_of(path, layer_ids, facts, experts),
            top_k=(recorded_top_k(path, facts, width),) * len(layer_ids),
        ),
        facts,
        sequence=sequence,
        prompt_tokens=prompt,
        positions=steps,
        weights=weights[:, order],
        model_id=said.get("model", ""),
    )
    return Piece(path, rows)


def _parse(path: Path) -> tuple[dict[str, str], Table]:
    """The facts of the comment that names the model, and the columns."""
    said: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8") as file:
            header = ""
            for line in file:
                if not line.startswith("#"):
                    header = line
                    break
                if line.startswith("# model="):
                    said = dict(word.split("=", 1) for word in line[2:].split() if "=" in word)
            names = header.strip().split(",")
            missing = [name for name in _NEEDED if name not in names]
            if missing or len(set(names)) != len(names):
                raise TraceError(
                    f"{path}: not the CSV form of a routing recording: no column "
                    f"{missing[0] if missing else names!r:.60}"
                )
            values = _numbers(path, file, [names.index(name) for name in _NEEDED])
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a UTF-8 text ({error.reason}); copy it again") from error
    columns: Table = dict(zip(_NEEDED, values.T, strict=True))
    return said, {
        name: column if name == "weight" else _whole(path, name, column)
        for name, column in columns.items()
    }


def _numbers(path: Path, lines: Any, columns: list[int]) -> NDArray[np.float64]:
    """The chosen columns `[lines, columns]`."""
    first = next(lines, "")
    if not first.strip():
        raise TraceError(f"{path}: has no lines of routing; the recording is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = np.loadtxt(
                chain([first], lines), delimiter=",", usecols=columns, ndmin=2, dtype=np.float64
            )
    except UnicodeDecodeError:
        raise
    except (ValueError, IndexError, TypeError, OverflowError, Warning) as error:
        raise TraceError(
            f"{path}: not the CSV form of a routing recording: {str(error)[:120]}"
        ) from error
    return values


def _whole(path: Path, name: str, column: NDArray[np.float64]) -> NDArray[np.int64]:
    """A column of whole numbers in its range."""
    high = _LIMITS.get(name, _LARGEST_INT)
    wrong = ~((column >= 0) & (column <= high) & (column == np.floor(column)))
    if wrong.any():
        line = int(np.argmax(wrong))
        raise TraceError(
            f"{path}: line {line + 1} of routing: {name} is {column[line]:g}, not a whole number "
            f"from 0 to {high}"
        )
    return column.astype(np.int64)


def _check_complete(
    path: Path, table: Table, steps: NDArray[Any], layers: NDArray[Any], width: int
) -> None:
    """Every decoded step has every layer, and every layer each of its slots once."""
    if len(np.unique(table["turn"])) != 1:
        raise TraceError(
            f"{path}: not the CSV form of a routing recording of one run: turns "
            f"{np.unique(table['turn'])[:4].tolist()}; split it by turn"
        )
    lines = len(table["step"])
    pairs, counts = np.unique(table["step"] * MOST_LAYERS + table["layer"], return_counts=True)
    absent = len(steps) * len(layers) - len(pairs)
    decoded = np.unique(table["step"][table["phase"] == 1])
    # llama.cpp leaves out the last layer of prompt tokens whose output nobody asks for.
    of_decoded = pairs[np.isin(pairs // MOST_LAYERS, decoded)]
    if absent > len(pairs) or len(of_decoded) != len(decoded) * len(layers):
        looked = of_decoded if absent <= len(pairs) else pairs
        seen, of_step = np.unique(looked // MOST_LAYERS, return_counts=True)
        step = seen[int(np.argmax(of_step != len(layers)))]
        there = looked[looked // MOST_LAYERS == step] % MOST_LAYERS
        missing = sorted(set(layers.tolist()) - set(there.tolist()))
        raise TraceError(f"{path}: step {step}: layer {missing[0]} is missing; is it cut off?")
    if (counts != width).any():
        pair = pairs[int(np.argmax(counts != width))]
        raise TraceError(
            f"{path}: step {pair // MOST_LAYERS} layer {pair % MOST_LAYERS} has "
            f"{counts[int(np.argmax(counts != width))]} experts, others {width}; is it cut off?"
        )
    triples = (table["step"] * MOST_LAYERS + table["layer"]) * 1024 + table["slot"]
    if len(np.unique(triples)) != lines:
        values, times = np.unique(triples, return_counts=True)
        twice = int(values[int(np.argmax(times > 1))])
        raise TraceError(
            f"{path}: step {twice // 1024 // MOST_LAYERS} layer {twice // 1024 % MOST_LAYERS}: "
            f"slot {twice % 1024} is there twice"
        )


def _header_number(path: Path, said: dict[str, str], name: str, high: int) -> int:
    """A number of the comment that names the model."""
    text = said.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 8 and 1 <= int(text) <= high):
        raise TraceError(
            f"{path}: not the CSV form of a routing recording: {name} in '# model=' is {text!r:.40}"
        )
    return int(text)

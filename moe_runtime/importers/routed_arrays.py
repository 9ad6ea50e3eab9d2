"""`routed_experts` arrays of single requests, as vLLM and SGLang return them.

Three forms: `.npy` files, base64 in a text file, and whole responses as JSON or JSON lines. Knows
the arrays' two encodings, not which engine a file is from.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.errors import TraceError
from moe_runtime.importers.documents import read_documents, read_text, whole_number
from moe_runtime.importers.facts import (
    MOST_LAYERS,
    Facts,
    Note,
    Piece,
    choose_layers,
    experts_of,
    recorded_top_k,
)
from moe_runtime.importers.npy import MAGIC, map_npy, parse_npy
from moe_runtime.importers.rows import CALL_ROWS, Layers, sequence_rows

__all__ = ["NPY_BASE64", "read"]

Array = NDArray[Any]
_LARGEST_INT = np.iinfo(np.int32).max
NPY_BASE64 = base64.b64encode(MAGIC).decode()  # "k05VTVBZ": how an array begins in base64
_NO_WEIGHTS = "the recording has no routing weights: what is weighted by them cannot be worked out"
_NO_PHASE = "some files do not say where the prompt ends: all their tokens count as prompt"


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One request's array `[tokens, layers, k]` and what its response says of the tokens."""

    path: Path
    name: str
    array: Array
    prompt_tokens: int | None = None
    token_ids: tuple[int, ...] | None = None
    start: int = 0


def read(paths: Sequence[Path], facts: Facts, note: Note) -> Iterator[Piece]:
    """The requests of all files, each a sequence of its own, in pieces of a few thousand rows.

    The rows of an array are all hidden layers; dense ones are zero throughout and are left out,
    unless `facts` says which have experts.

    Raises:
        TraceError: a damaged file, arrays of different models, or facts that are lacking.
    """
    layers, positions = _layers(paths, facts)
    note(_NO_WEIGHTS)
    unknown = False
    for number, request in enumerate(_requests(paths, facts)):
        unknown |= request.prompt_tokens is None
        # One copy of the chosen layers at a time; the array itself may be a mapped file.
        for first in range(0, len(request.array), CALL_ROWS):
            rows = request.array[first : first + CALL_ROWS, positions]
            ids = None if request.token_ids is None else request.token_ids[first:]
            yield Piece(
                request.path,
                sequence_rows(
                    request.name,
                    rows,
                    layers,
                    facts,
                    sequence=number,
                    first_row=first,
                    first_position=request.start,
                    prompt_tokens=request.prompt_tokens,
                    token_ids=None if ids is None else np.array(ids[: len(rows)], np.int64),
                ),
            )
    if unknown:
        note(_NO_PHASE)


def _layers(paths: Sequence[Path], facts: Facts) -> tuple[Layers, NDArray[np.int64]]:
    """The layers with experts and their rows in the arrays: a first pass over the files."""
    shape: tuple[int, int] | None = None
    used = np.zeros(0, np.bool_)
    said = facts.first_dense is not None or bool(facts.moe_layers)
    for request in _requests(paths, facts):
        if shape is None:
            shape = (request.array.shape[1], request.array.shape[2])
            used = np.zeros(shape[0], np.bool_)
        if request.array.shape[1:] != shape:
            raise TraceError(
                f"{request.name}: [layers, experts a token] is {list(request.array.shape[1:])}, in "
                f"the first array {list(shape)}; import recordings of one model together"
            )
        # Only the layers that no earlier array settled are looked at.
        for layer in np.flatnonzero(~used).tolist():
            used[layer] = bool((request.array[:, layer] > 0).any())
    if shape is None:
        raise TraceError(f"{paths[0]}: no array of routed experts; the recording is empty")
    path = paths[0]
    positions, layer_ids = choose_layers(path, shape[0], used, facts, sure=said or shape[1] > 1)
    k = recorded_top_k(path, facts, shape[1])
    experts = experts_of(path, layer_ids, facts)
    for layer, count in zip(layer_ids, experts, strict=True):
        if k > count:
            raise TraceError(f"{path}: {k} experts a token, but layer {layer} has {count}")
    return Layers(layer_ids=layer_ids, experts=experts, top_k=(k,) * len(layer_ids)), positions


def _requests(paths: Sequence[Path], facts: Facts) -> Iterator[_Request]:
    for path in paths:
        count = 0
        for request in _requests_of(path, facts):
            count += 1
            _check(request)
            yield request
        if not count:
            raise TraceError(
                f"{path}: no 'routed_experts' in it; ask the engine to return them (vLLM: "
                "enable_return_routed_experts, SGLang: return_routed_experts)"
            )


def _check(request: _Request) -> None:
    """An integer array of three dimensions that has something in it."""
    array = request.array
    if array.dtype.kind not in "iu":
        raise TraceError(f"{request.name}: routed experts are integers, found {array.dtype}")
    if array.ndim != 3 or 0 in array.shape:
        raise TraceError(
            f"{request.name}: routed experts have the shape [tokens, layers, experts a token], "
            f"found {list(array.shape)}"
        )
    if array.shape[1] > MOST_LAYERS or array.shape[2] > 1024:
        raise TraceError(f"{request.name}: shape {list(array.shape)} is of no model")


def _requests_of(path: Path, facts: Facts) -> Iterator[_Request]:
    start = _first_bytes(path)
    if start.startswith(MAGIC) or path.suffix == ".npy":
        yield _Request(path=path, name=str(path), array=map_npy(path))
    elif start.lstrip()[:1] in {b"{", b"["}:
        for name, document in read_documents(path):
            yield from _in_document(path, name, document, facts)
    else:
        yield _Request(
            path=path, name=str(path), array=_decode(read_text(path).strip(), facts, str(path))
        )


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def _in_document(path: Path, name: str, document: Any, facts: Facts) -> Iterator[_Request]:
    """The requests of one response, or of a list of responses."""
    responses = document if isinstance(document, list) else [document]
    for response in responses:
        if not isinstance(response, dict):
            raise TraceError(f"{name}: a response is an object, found {response!r:.60}")
        choices = response.get("choices")
        if isinstance(choices, list):  # vLLM
            usage = response.get("usage")
            for choice in choices:
                counted = usage if len(choices) == 1 else None
                yield from _request(path, name, response, choice, counted, facts)
        else:  # SGLang
            meta = response.get("meta_info")
            yield from _request(path, name, response, meta, meta, facts)


def _request(
    path: Path, name: str, response: dict[str, Any], holder: Any, counted: Any, facts: Facts
) -> Iterator[_Request]:
    """The request whose array `holder` has, if it has one."""
    text = holder.get("routed_experts") if isinstance(holder, dict) else None
    if text is None:
        return
    if not isinstance(text, str):
        raise TraceError(f"{name}: 'routed_experts' must be base64, found {text!r:.60}")
    counts = counted if isinstance(counted, dict) else {}
    prompt, total = (
        None
        if counts.get(key) is None
        else whole_number(counts[key], 0, _LARGEST_INT, f"{name}: {key}")
        for key in ("prompt_tokens", "completion_tokens")
    )
    array = _decode(text, facts, f"{name}: routed_experts")
    start = 0
    if prompt is not None and total is not None and array.ndim == 3:
        # SGLang leaves out what its cache of prefixes had: the array ends with the last token fed.
        start = max(0, min(prompt + total - 1 - len(array), prompt))
    yield _Request(
        path=path,
        name=f"{name}: routed_experts",
        array=array,
        prompt_tokens=None if prompt is None else max(0, prompt - start),
        token_ids=_token_ids(response, holder, start, len(array) if array.ndim else 0),
        start=start,
    )


def _token_ids(
    response: dict[str, Any], holder: dict[str, Any], start: int, rows: int
) -> tuple[int, ...] | None:
    """The tokens of the rows, where a response has those of prompt and answer."""
    prompt = holder.get("prompt_token_ids", response.get("prompt_token_ids"))
    answer = holder.get("token_ids", response.get("output_ids"))
    if not isinstance(prompt, list) or not isinstance(answer, list):
        return None
    tokens = [*prompt, *answer][start : start + rows]
    if len(tokens) != rows or any(type(token) is not int or abs(token) >> 31 for token in tokens):
        return None
    return tuple(tokens)


def _decode(text: str, facts: Facts, name: str) -> Array:
    """An array from base64: of a `.npy` file (vLLM), or of bare int32 numbers (SGLang)."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TraceError(f"{name}: not base64 ({error}); is it cut off?") from error
    if content.startswith(MAGIC):
        return parse_npy(content, name)
    if not facts.hidden_layers or not facts.top_k:
        raise TraceError(
            f"{name}: bare numbers do not say their shape; give the number of hidden layers and "
            "the experts a token (--layers and --top-k, or --model)"
        )
    row = 4 * facts.hidden_layers * facts.top_k
    if not content or len(content) % row:
        raise TraceError(
            f"{name}: {len(content)} bytes are no whole number of tokens of {facts.hidden_layers} "
            f"layers x {facts.top_k} experts x 4 bytes; correct --layers or --top-k"
        )
    numbers = np.frombuffer(content, "<i4")
    return numbers.reshape(-1, facts.hidden_layers, facts.top_k)

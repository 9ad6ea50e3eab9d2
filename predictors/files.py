"""Predictor files, `*.predictor.safetensors`: written, read, and refused when they do not fit.

Knows the header and that a predictor is arrays and constants, not what they mean.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np
from moe_runtime.predictors.base import Predictor
from moe_runtime.predictors.origin import Origin
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_runtime.core import ExpertGrid
from moe_runtime.errors import PredictorError
from moe_runtime.files import replacing

__all__ = [
    "KINDS",
    "StoredPredictor",
    "load_predictor",
    "predictor_class",
    "save_predictor",
    "take_array",
]

FORMAT, VERSION = "moe-runtime.predictor", 1
FITTED_ON = "origin.fitted_on"  # the one array that is not the predictor's own

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
PathLike: TypeAlias = str | os.PathLike[str]

KINDS = {  # kind -> module in this package, class; imported when a file of the kind is read
    "popularity": ("frequency", "PopularityPredictor"),
    "previous-token": ("previous", "PreviousTokenPredictor"),
    "token-table": ("token_table", "TokenTablePredictor"),
    "pair-counts": ("transition", "PairCountPredictor"),
    "transition": ("transition", "TransitionPredictor"),
    "gate-lookahead": ("gate_lookahead", "GateLookaheadPredictor"),
    "routing-path": ("routing_path", "RoutingPathPredictor"),
}


class StoredPredictor(Predictor, Protocol):
    """A predictor that can be saved: arrays and constants make it again.

    Attributes:
        kind: its key in `KINDS`.
        origin: the model that it was made for.
    """

    kind: ClassVar[str]
    origin: Origin

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """What was fitted: arrays by name, and constants that JSON can hold."""
        ...

    @classmethod
    def from_arrays(cls, origin: Origin, arrays: Arrays, constants: Mapping[str, Any]) -> Self:
        """Made again. Raises PredictorError, KeyError, TypeError or ValueError if these are not
        arrays and constants of this kind for this model; floats are known to be finite.
        """
        ...


def save_predictor(predictor: StoredPredictor, path: PathLike) -> Path:
    """Write one file (`*.predictor.safetensors` by custom), whole or not at all; gives its path."""
    arrays, constants = predictor.to_arrays()
    origin = predictor.origin
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": predictor.kind,
        "model_id": origin.model_id,
        "fingerprint": origin.fingerprint,
        "tokenizer_id": origin.tokenizer_id,
        "layer_ids": json.dumps(origin.layer_ids),
        "experts": json.dumps(origin.experts),
        "top_k": json.dumps(origin.top_k),
        "constants": json.dumps(constants, allow_nan=False),
        "figures": json.dumps(dict(origin.figures), allow_nan=False),
    }
    assert FITTED_ON not in arrays
    held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    held[FITTED_ON] = origin.fitted_on
    with replacing(path) as temporary:
        save_file(held, temporary, metadata=header)
    return Path(path)


def load_predictor(
    path: PathLike, *, fingerprint: str = "", grid: ExpertGrid | None = None
) -> StoredPredictor:
    """Read a predictor file of any kind.

    Args:
        path: of the file.
        fingerprint: of the model that it shall serve; "" if that does not matter.
        grid: the model's layers and experts; None if they do not matter.

    Raises:
        PredictorError: no such file, a damaged one, one of another version or kind, or made for
            another model; names the file, the field and the remedy.
    """
    path = Path(path)
    header, arrays = _read(path)
    try:
        origin = _origin(header, arrays.pop(FITTED_ON, np.zeros(0, np.uint64)))
        constants = _object(header, "constants")
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorError(f"{path}: {_words(error)}; {_AGAIN}") from error
    _require_fit(path, origin, fingerprint, grid)
    _require_finite(path, arrays)
    kind = _kind_of(path, header)
    try:
        return kind.from_arrays(origin, arrays, constants)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PredictorError(
            f"{path}: no whole {kind.kind} predictor ({_words(error)}); {_AGAIN}"
        ) from error


def take_array(
    arrays: Arrays, name: str, shape: tuple[int | None, ...], dtype: type[np.generic]
) -> NDArray[Any]:
    """The array of this name; PredictorError unless it has this shape (None: any) and type."""
    if name not in arrays:
        raise PredictorError(f"array {name!r} is missing, found {sorted(arrays)}")
    array = arrays[name]
    fits = array.ndim == len(shape) and all(
        wanted is None or found == wanted for found, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        wanted = "x".join("any" if size is None else str(size) for size in shape)
        raise PredictorError(
            f"array {name!r} must be {np.dtype(dtype).name} {wanted}, "
            f"found {array.dtype} {'x'.join(map(str, array.shape))}"
        )
    return array


_AGAIN = "copy the file again, or fit the predictor again"


def _read(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise PredictorError(
                    f"{path}: header field 'format' is {header.get('format')!r}, not {FORMAT!r}; "
                    "this is no predictor"
                )
            if header.get("version") != str(VERSION):
                raise PredictorError(
                    f"{path}: header field 'version' is {header.get('version')!r}, this release "
                    f"reads {VERSION}; read it with the release that wrote it, or fit it again"
                )
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise PredictorError(f"{path}: no such predictor; check the path") from error
    except (SafetensorError, OSError, TypeError) as error:
        raise PredictorError(
            f"{path}: not a complete safetensors file ({error}); {_AGAIN}"
        ) from error


def _origin(header: Mapping[str, str], fitted_on: NDArray[Any]) -> Origin:
    numbers = {}
    for name in ("layer_ids", "experts", "top_k"):
        value = json.loads(header[name])
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise PredictorError(f"header field {name!r} is no list of integers: {header[name]!r}")
        numbers[name] = tuple(value)
    if fitted_on.ndim != 1 or fitted_on.dtype != np.uint64:
        raise PredictorError(f"array {FITTED_ON!r} must be uint64 [n], found {fitted_on.dtype}")
    return Origin(
        **numbers,
        model_id=header["model_id"],
        fingerprint=header["fingerprint"],
        tokenizer_id=header["tokenizer_id"],
        fitted_on=np.sort(fitted_on),
        figures=_object(header, "figures"),
    )


def _object(header: Mapping[str, str], name: str) -> dict[str, Any]:
    value = json.loads(header[name])
    if not isinstance(value, dict):
        raise PredictorError(f"header field {name!r} is no JSON object: {header[name]!r}")
    return value


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return str(error)


def _require_fit(path: Path, origin: Origin, fingerprint: str, grid: ExpertGrid | None) -> None:
    if fingerprint and origin.fingerprint and origin.fingerprint != fingerprint:
        raise PredictorError(
            f"{path}: made for the model {origin.model_id!r} with fingerprint "
            f"{origin.fingerprint!r}, the model at hand has {fingerprint!r}; fit a predictor to "
            "traces of this model"
        )
    if grid is not None and grid != origin.grid:
        raise PredictorError(
            f"{path}: made for layers {origin.layer_ids} with {origin.experts} experts, the model "
            f"at hand has layers {grid.layers} with {grid.experts}; fit a predictor to traces of "
            "this model"
        )


def _require_finite(path: Path, arrays: Arrays) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise PredictorError(f"{path}: array {name!r} holds {array[at]} at {at}; {_AGAIN}")


def predictor_class(kind: str) -> type[StoredPredictor]:
    """The class of a kind; PredictorError lists those that there are."""
    if kind not in KINDS:
        raise PredictorError(
            f"a predictor of the kind {kind!r}, this release knows {', '.join(KINDS)}"
        )
    module, name = KINDS[kind]
    found: type[StoredPredictor] = getattr(
        importlib.import_module(f"moe_runtime.predictors.{module}"), name
    )
    return found


def _kind_of(path: Path, header: Mapping[str, str]) -> type[StoredPredictor]:
    try:
        return predictor_class(header.get("kind", ""))
    except PredictorError as error:
        raise PredictorError(f"{path}: {error}; read it with the release that wrote it") from error

"""`Evaluation`: how good predictors are, as a value and as a file, `*.evaluation.json`.

Knows no predictor; measures nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from moe_runtime.errors import PredictorError
from moe_runtime.files import write_text

__all__ = ["Domain", "Evaluation", "Figures", "Score", "Settings"]

FORMAT, VERSION = "moe-runtime.evaluation", 1

PerLayer = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How predictors are measured.

    Args:
        lookahead: layers ahead, 1 to this.
        batch_sizes: sequences that are put together; a prompt's rows are taken so many at a time.
        token_by_token: every row becomes a forward call of its own, as if it had been decoded.
        max_tokens: of each domain, whole calls; 0: all.
    """

    lookahead: int = 4
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    token_by_token: bool = False
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.lookahead < 1 or not self.batch_sizes or min(self.batch_sizes) < 1:
            raise PredictorError(
                "lookahead and batch sizes must be 1 or more, found lookahead "
                f"{self.lookahead} and batch sizes {self.batch_sizes}"
            )
        if self.max_tokens < 0:
            raise PredictorError(f"max_tokens must be 0 or more, found {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Text of one kind, as it was measured on.

    Args:
        name: of the domain.
        tokens, decoded, sequences: rows measured, those of them in decoding calls, sequences.
        entropy: for each layer the entropy of the experts' popularity over its maximum; near 1
            the router is even, and harder to forecast.
    """

    name: str
    tokens: int
    decoded: int
    sequences: int
    entropy: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Recall and precision of the experts of so many rows together, layers so far ahead.

    The forecast at k is the union of each row's k likeliest experts (k: the layer's top-k), the
    truth the union of what the rows chose. Columns have an entry for each layer, None where
    nothing was forecast at this distance.
    """

    phase: str
    batch_size: int
    distance: int
    batches: int
    recall_k: PerLayer
    precision_k: PerLayer
    recall_2k: PerLayer
    precision_2k: PerLayer
    experts: PerLayer  # mean size of the truth

    def mean(self, column: str) -> float | None:
        """Mean over the layers of a column, `recall_k` for one."""
        values = [value for value in getattr(self, column) if value is not None]
        return math.fsum(values) / len(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One predictor on one domain.

    Args:
        predictor, domain: names.
        microseconds: a token's share of the time spent in the predictor, batch of one, each layer
            forecast once; None without decoding calls.
        calibration_error: mean over all forecasts of |said - came true|, in 20 bins of what was
            said (expected calibration error), next layer, one row.
        calibration_error_top: the same over each row's 2k likeliest experts.
        said, came_true, count: the reliability curve: for each bin that was used the mean
            probability, the share that came true, the number of forecasts.
        scores: one for each phase, batch size and distance.
    """

    predictor: str
    domain: str
    microseconds: float | None
    calibration_error: float
    calibration_error_top: float
    said: tuple[float, ...]
    came_true: tuple[float, ...]
    count: tuple[int, ...]
    scores: tuple[Score, ...]

    def score(self, *, phase: str, batch_size: int, distance: int) -> Score | None:
        """The score of this phase, batch size and distance; None if there is none."""
        wanted = (phase, batch_size, distance)
        return next((s for s in self.scores if (s.phase, s.batch_size, s.distance) == wanted), None)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Predictors measured on the same rows.

    Args:
        model_id, fingerprint: of the model; "" if unknown.
        layer_ids, experts, top_k: of its MoE layers.
        settings: how it was measured.
        domains: what it was measured on.
        figures: of each predictor on each domain.
        held_out: no predictor was fitted to any of it, as far as their files say.
    """

    model_id: str
    fingerprint: str
    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    settings: Settings
    domains: tuple[Domain, ...]
    figures: tuple[Figures, ...]
    held_out: bool = field(default=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with format and version."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Again. PredictorError if it is no evaluation, of another version, or damaged."""
        if data.get("format") != FORMAT:
            raise PredictorError(
                f"field 'format' is {data.get('format')!r}, not {FORMAT!r}; this is no evaluation"
            )
        if data.get("version") != VERSION:
            raise PredictorError(
                f"field 'version' is {data.get('version')!r}, this release reads {VERSION}; "
                "evaluate again"
            )
        try:
            plain = {name: _frozen(data[name]) for name in _names(cls)}
            plain["settings"] = _made(Settings, data["settings"])
            plain["domains"] = tuple(_made(Domain, one) for one in data["domains"])
            plain["figures"] = tuple(_figures(one) for one in data["figures"])
            found = _typed(cls, plain)
        except (KeyError, TypeError, AttributeError) as error:
            raise PredictorError(
                f"the evaluation is damaged ({type(error).__name__}: {error}); evaluate again"
            ) from error
        _check(found)
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `*.evaluation.json`, whole or not at all; gives its path."""
        return write_text(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read a file. PredictorError names the file, what was found and what to do."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise PredictorError(f"{path}: no such evaluation; check the path") from error
        except (OSError, ValueError) as error:
            raise PredictorError(f"{path}: no JSON text ({error}); evaluate again") from error
        if not isinstance(data, dict):
            raise PredictorError(f"{path}: no JSON object; this is no evaluation")
        try:
            return cls.from_dict(data)
        except PredictorError as error:
            raise PredictorError(f"{path}: {error}") from error


_T = TypeVar("_T")


def _names(kind: type[Any]) -> list[str]:
    return [one.name for one in fields(kind)]


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _made(kind: type[_T], data: Mapping[str, Any]) -> _T:
    return _typed(kind, {name: _frozen(data[name]) for name in _names(kind)})


def _typed(kind: type[_T], plain: Mapping[str, Any]) -> _T:
    """The value of these fields, if each is what its annotation says."""
    for one in fields(kind):  # type: ignore[arg-type]
        if not _fits(str(one.type), plain[one.name]):
            raise PredictorError(
                f"field {one.name!r} of the {kind.__name__.lower()} is {plain[one.name]!r}, not "
                f"{one.type} of 0 or more; evaluate again"
            )
    return kind(**plain)


def _fits(kind: str, value: Any) -> bool:
    """Whether a value has the annotated type; numbers are finite and not negative here."""
    kind = "tuple[float | None, ...]" if kind == "PerLayer" else kind
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return isinstance(value, tuple) and all(_fits(inner, item) for item in value)
    if kind.endswith(" | None") and value is None:
        return True
    if kind.removesuffix(" | None") in {"int", "float"}:
        numbers = int if kind == "int" else int | float
        known = isinstance(value, numbers) and not isinstance(value, bool)
        return known and math.isfinite(value) and value >= 0
    return isinstance(value, {"str": str, "bool": bool}.get(kind, object))


def _figures(data: Mapping[str, Any]) -> Figures:
    scores = tuple(_made(Score, one) for one in data["scores"])
    plain = {name: _frozen(data[name]) for name in _names(Figures) if name != "scores"}
    return _typed(Figures, {**plain, "scores": scores})


def _check(found: Evaluation) -> None:
    """Columns are as long as there are layers, and shares are shares."""
    layers = len(found.layer_ids)
    for name in ("experts", "top_k"):
        _require(f"field {name!r}", getattr(found, name), layers, shares=False)
    domains = {one.name for one in found.domains}
    for domain in found.domains:
        _require(f"domain {domain.name!r}: entropy", domain.entropy, layers)
    for one in found.figures:
        where = f"figures of {one.predictor!r} on {one.domain!r}"
        if one.domain not in domains:
            raise PredictorError(f"{where}: no such domain, there are {sorted(domains)}")
        if not len(one.said) == len(one.came_true) == len(one.count):
            raise PredictorError(f"{where}: the reliability curve's columns differ in length")
        for name in ("said", "came_true"):
            _require(f"{where}: {name}", getattr(one, name), len(one.count))
        for score in one.scores:
            for column in ("recall_k", "precision_k", "recall_2k", "precision_2k"):
                _require(f"{where}: {column}", getattr(score, column), layers)
            _require(f"{where}: experts", score.experts, layers, shares=False)


_SLACK = 1e-5  # figures are rounded


def _require(where: str, values: PerLayer, length: int, *, shares: bool = True) -> None:
    if len(values) != length:
        raise PredictorError(f"{where} has {len(values)} entries for {length} layers")
    for value in values:
        if shares and value is not None and value > 1 + _SLACK:
            raise PredictorError(f"{where} holds {value}, no share; evaluate again")

"""`Identification`: which experts go with which marker tokens, as a value and as plain data.

Knows no trace, no tokenizer and no file; counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from moe_runtime.core import FloatArray
from moe_runtime.errors import ConfigError
from moe_runtime.steering import fields

__all__ = ["Identification", "Interval", "RankedExpert", "TokenClass"]

Interval: TypeAlias = tuple[float, float]
LayerMap: TypeAlias = tuple[tuple[float | None, ...], ...]  # layers x experts


@dataclass(frozen=True, kw_only=True)
class TokenClass:
    """A marker as it was counted.

    Args:
        text: of the marker.
        coefficient: what its nPMI weighs in the score.
        variants: the token id sequences that count as the marker (plain, after a space, ...).
        occurrences: rows that end a marker; the last token of a marker stands for all of it.
        sequences: sequences with at least one.
    """

    text: str
    coefficient: float
    variants: tuple[tuple[int, ...], ...]
    occurrences: int
    sequences: int


@dataclass(frozen=True, kw_only=True)
class RankedExpert:
    """One expert and what it rests on.

    Args:
        layer, expert: absolute Hugging Face layer index, number of the expert.
        score: sum over the markers of coefficient x nPMI.
        npmi: of each marker, -1 to 1.
        joint: rows of each marker that chose the expert.
        uses: rows of any kind that chose the expert.
        tied: experts of exactly this score, itself included; 1 where it stands alone.
        interval: percentile bootstrap interval of the score; None without bootstrap.
        stability: share of the bootstrap's replicates in which it was among the top; None without.
        ranks: the same interval of its rank, from 1; None without.
    """

    layer: int
    expert: int
    score: float
    npmi: tuple[float, ...]
    joint: tuple[int, ...]
    uses: int
    tied: int
    interval: Interval | None = None
    stability: float | None = None
    ranks: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Identification:
    """Experts ranked by how their choice goes with marker tokens.

    Args:
        tokens: the markers.
        top: how many of `ranked` are the choice, from the first.
        ranked: the best experts, best first: the choice and those behind it.
        layer_ids, experts: absolute index and number of experts of each MoE layer.
        scores: `[layers][experts]`, rounded; None where an expert has too few events to be ranked.
        npmi: `[tokens][layers][experts]`, rounded; None where the marker has no row in the layer.
        rows, sequences: that were counted.
        unknown_rows: rows left out because their token is not known.
        prompt: whether rows of the prompt (prefill) were counted, or those of decoding alone.
        least_joint, least_uses: events that an expert needed to be ranked.
        rankable: how many experts had them.
        tied_out: experts behind the choice of exactly the score of its last.
        bootstrap: replicates (0: none), each of as many sequences, drawn with replacement.
        redrawn: draws thrown away because a marker did not occur in them.
        level: of the intervals.
        smoothing: marker rows that were added for nPMI; 0: none, the paper's.
        seed: of the draws.
        model_id, fingerprint, tokenizer_id: of the traces; "" if unknown.
        traces: names of the recordings.
    """

    tokens: tuple[TokenClass, ...]
    top: int
    ranked: tuple[RankedExpert, ...]
    layer_ids: tuple[int, ...]
    experts: tuple[int, ...]
    scores: LayerMap
    npmi: tuple[LayerMap, ...]
    rows: int
    sequences: int
    unknown_rows: int
    prompt: bool
    least_joint: int
    least_uses: int
    rankable: int
    tied_out: int
    bootstrap: int
    redrawn: int
    level: float
    seed: int
    smoothing: float = 0.0
    model_id: str = ""
    fingerprint: str = ""
    tokenizer_id: str = ""
    traces: tuple[str, ...] = ()

    @property
    def chosen(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of the top, best first."""
        return tuple((one.layer, one.expert) for one in self.ranked[: self.top])

    def score_map(self) -> FloatArray:
        """float64 `[layers, most experts of a layer]`; NaN where there is no score."""
        return _as_array(self.scores, self.experts)

    def npmi_map(self, token: int) -> FloatArray:
        """float64 `[layers, most experts of a layer]` of one of the tokens; NaN as above."""
        return _as_array(self.npmi[token], self.experts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every field by its name."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Identification:
        """Again.

        Raises:
            ConfigError: a field is missing, of another kind, or does not fit the others; names it.
        """
        experts = fields.whole_list(data, "experts")
        tokens = tuple(_token(item) for item in fields.objects(data, "tokens"))
        maps = fields.items(data, "npmi")
        if len(maps) != len(tokens):
            raise ConfigError(f"field 'npmi' has {len(maps)} maps for {len(tokens)} tokens")
        layer_ids = fields.whole_list(data, "layer_ids")
        if len(layer_ids) != len(experts):
            raise ConfigError(
                f"field 'experts' names {len(experts)} layers, 'layer_ids' {len(layer_ids)}"
            )
        traces = fields.items(data, "traces")
        whole: dict[str, Any] = {
            name: fields.whole(data, name)
            for name in (
                *("top", "rows", "sequences", "unknown_rows", "least_joint", "least_uses"),
                *("rankable", "tied_out", "bootstrap", "redrawn", "seed"),
            )
        }
        ranked = tuple(_ranked(item, len(tokens)) for item in fields.objects(data, "ranked"))
        _require_there(ranked, whole["top"], dict(zip(layer_ids, experts, strict=True)))
        return cls(
            tokens=tokens,
            ranked=ranked,
            layer_ids=layer_ids,
            experts=experts,
            scores=_map(fields.items(data, "scores"), "scores", experts),
            npmi=tuple(_map(one, "npmi", experts) for one in maps),
            prompt=fields.flag(data, "prompt"),
            level=fields.number(data, "level"),
            smoothing=fields.number(data, "smoothing") if "smoothing" in data else 0.0,
            traces=tuple(str(one) for one in traces),
            model_id=fields.text(data, "model_id"),
            fingerprint=fields.text(data, "fingerprint"),
            tokenizer_id=fields.text(data, "tokenizer_id"),
            **whole,
        )


def _as_array(rows: LayerMap, experts: tuple[int, ...]) -> FloatArray:
    found = np.full((len(rows), max(experts, default=0)), np.nan)
    for at, row in enumerate(rows):
        found[at, : len(row)] = [np.nan if value is None else value for value in row]
    return found


def _token(data: Mapping[str, Any]) -> TokenClass:
    variants = fields.items(data, "variants")
    return TokenClass(
        text=fields.text(data, "text"),
        coefficient=fields.number(data, "coefficient"),
        variants=tuple(fields.whole_list({"variants": one}, "variants") for one in variants),
        occurrences=fields.whole(data, "occurrences"),
        sequences=fields.whole(data, "sequences"),
    )


def _ranked(data: Mapping[str, Any], tokens: int) -> RankedExpert:
    npmi = fields.items(data, "npmi")
    joint = fields.whole_list(data, "joint")
    if len(npmi) != tokens or len(joint) != tokens:
        raise ConfigError(
            f"fields 'npmi' and 'joint' of a ranked expert need a number for each of {tokens} "
            f"tokens, found {len(npmi)} and {len(joint)}"
        )
    share = data.get("stability")
    return RankedExpert(
        layer=fields.whole(data, "layer"),
        expert=fields.whole(data, "expert"),
        score=fields.number(data, "score"),
        npmi=tuple(fields.finite(value, "npmi") for value in npmi),
        joint=joint,
        uses=fields.whole(data, "uses"),
        tied=fields.whole(data, "tied", least=1),
        interval=_interval(data, "interval"),
        stability=None if share is None else fields.finite(share, "stability"),
        ranks=_ranks(data),
    )


def _require_there(ranked: tuple[RankedExpert, ...], top: int, counts: Mapping[int, int]) -> None:
    """ConfigError unless the choice is among the ranked and all of these are the model's."""
    if not 1 <= top <= len(ranked):
        raise ConfigError(f"field 'top' is {top}, but {len(ranked)} experts are ranked")
    for one in ranked:
        if one.expert >= counts.get(one.layer, 0):
            raise ConfigError(
                f"field 'ranked' names expert {one.expert} of layer {one.layer}, which has "
                f"{counts.get(one.layer, 0)}"
            )


def _interval(data: Mapping[str, Any], name: str) -> Interval | None:
    if data.get(name) is None:
        return None
    ends = fields.items(data, name)
    if len(ends) != 2:
        raise ConfigError(f"field {name!r} has to be null or two numbers, found {ends!r:.80}")
    return fields.finite(ends[0], name), fields.finite(ends[1], name)


def _ranks(data: Mapping[str, Any]) -> tuple[int, int] | None:
    if data.get("ranks") is None:
        return None
    ends = fields.whole_list(data, "ranks")
    if len(ends) != 2:
        raise ConfigError(f"field 'ranks' has to be null or two ranks, found {ends!r:.80}")
    return ends[0], ends[1]


def _map(rows: Any, name: str, experts: tuple[int, ...]) -> LayerMap:
    """Layers x experts of numbers or null."""
    if not isinstance(rows, list | tuple) or len(rows) != len(experts):
        raise ConfigError(f"field {name!r} has to be a list for each of {len(experts)} layers")
    for at, (row, count) in enumerate(zip(rows, experts, strict=True)):
        if not isinstance(row, list | tuple) or len(row) != count:
            raise ConfigError(f"field {name!r}: row {at} has to have {count} numbers")
    return tuple(
        tuple(None if value is None else fields.finite(value, name) for value in row)
        for row in rows
    )

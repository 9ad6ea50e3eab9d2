"""What came of a parallel run: tokens, exact counts of what was sent, and what the plan foretold.

A value with a file form (`docs/formats.md`, section Parallel run). Knows no models and no links.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text
from moe_runtime.parallel.traffic import Traffic
from moe_runtime.trace import RoutingTrace

__all__ = ["FORMAT", "VERSION", "LayerStays", "ParallelRun", "SelfCheck"]

FORMAT, VERSION = "moe-runtime.parallel-run", 1
_ROUTING = frozenset({"dispatch", "combine", "move", "partial_sums"})


@dataclass(frozen=True, kw_only=True)
class LayerStays:
    """One MoE layer's decode rows on all ranks together; coherent mode only.

    Args:
        layer: absolute layer index.
        rows: rows that came through.
        stayed: of them, those whose heaviest expert was where they were.
        split: of them, those some of whose experts were not on their new home.
        pieces: partial sums that were sent for these.
    """

    layer: int
    rows: int
    stayed: int
    split: int
    pieces: int


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Coherent beside vanilla logits, at the start, on the same tokens.

    Args:
        steps: steps compared.
        largest: the largest difference of logits at a step, relative to the step's largest.
        limit: more is refused.
        passed: whether it was not more; `reason` says why it did not pass.
    """

    steps: int
    largest: float
    limit: float
    passed: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class ParallelRun:
    """One run, the same value on every rank.

    Args:
        outputs: new tokens of each prompt.
        mode: as it ran; `asked` as it was asked for.
        ranks: number of ranks.
        steps: decode steps, one token for each prompt that goes on.
        traffic: what ranks sent, all together, by kind and layer; kinds of the prefill begin with
            `prefill.`. Calls and rounds are those in which every rank took part.
        sent: bytes that each rank sent to others in decode steps.
        stays: of each MoE layer in decode steps; empty in vanilla mode.
        lean: layers whose rows moved with nothing but their residual stream.
        kv_row_bytes: keys and values of one token, all layers; 0 in vanilla mode.
        cache_bytes: the most that keys and values took on each rank.
        idle_seconds: of each rank, waiting for others and for bytes on their way.
        slept_seconds: of each rank, for the link's stated latency.
        seconds: of the slowest rank, prefill and steps.
        prefill_seconds: of them, of the slowest rank, prefills.
        prefill_wait_seconds: of each rank in prefills, waiting for others and for bytes on their
            way, stated latency included. What links take is no more than the least of them.
        check: the self-check; None where there was none.
        predicted: what was foretold for the same tokens; empty without routing.
        routing: what each token was routed to; not in the file.
    """

    outputs: tuple[tuple[int, ...], ...]
    mode: str
    asked: str
    ranks: int
    steps: int
    traffic: tuple[Traffic, ...]
    sent: tuple[int, ...]
    stays: tuple[LayerStays, ...] = ()
    lean: tuple[int, ...] = ()
    kv_row_bytes: int = 0
    cache_bytes: tuple[int, ...] = ()
    idle_seconds: tuple[float, ...] = ()
    slept_seconds: tuple[float, ...] = ()
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    prefill_wait_seconds: tuple[float, ...] = ()
    check: SelfCheck | None = None
    predicted: Mapping[str, Any] = field(default_factory=dict)
    routing: RoutingTrace | None = field(default=None, compare=False, repr=False)

    # -- asked ----------------------------------------------------------------------------------

    @property
    def cross_bytes(self) -> int:
        """Bytes between ranks in decode steps: routing, keys and values, tokens, sizes."""
        return sum(one.cross_bytes for one in self.decode_traffic)

    @property
    def routing_bytes(self) -> int:
        """Of them those of rows on their way to experts and back, with what goes with a row."""
        return sum(one.cross_bytes for one in self.decode_traffic if one.kind in _ROUTING)

    @property
    def keys_values_bytes(self) -> int:
        """Of them those of keys and values handed round, with layer and sequence of each."""
        return self.bytes_of("keys_values")

    @property
    def decode_traffic(self) -> tuple[Traffic, ...]:
        """What was sent in decode steps."""
        return tuple(one for one in self.traffic if not one.kind.startswith("prefill."))

    @property
    def stayed_share(self) -> float | None:
        """Share of decode rows, over MoE layers, that stayed; None in vanilla mode."""
        rows = sum(one.rows for one in self.stays)
        return sum(one.stayed for one in self.stays) / rows if rows else None

    def bytes_of(self, kind: str) -> int:
        """Bytes between ranks of one kind."""
        return sum(one.cross_bytes for one in self.traffic if one.kind == kind)

    def calls_of(self, kind: str) -> int:
        """Collectives of one kind."""
        return sum(one.calls for one in self.traffic if one.kind == kind)

    # -- file ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the form of a file, with the derived figures."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "mode": self.mode,
            "asked": self.asked,
            "ranks": self.ranks,
            "steps": self.steps,
            "outputs": [list(tokens) for tokens in self.outputs],
            "cross_bytes": self.cross_bytes,
            "routing_bytes": self.routing_bytes,
            "keys_values_bytes": self.keys_values_bytes,
            "stayed_share": self.stayed_share,
            "traffic": [one.to_dict() for one in self.traffic],
            "sent": list(self.sent),
            "stays": [vars(one) | {} for one in self.stays],
            "lean_layers": list(self.lean),
            "kv_row_bytes": self.kv_row_bytes,
            "cache_bytes": list(self.cache_bytes),
            "idle_seconds": [round(one, 6) for one in self.idle_seconds],
            "slept_seconds": [round(one, 6) for one in self.slept_seconds],
            "seconds": round(self.seconds, 6),
            "prefill_seconds": round(self.prefill_seconds, 6),
            "prefill_wait_seconds": [round(one, 6) for one in self.prefill_wait_seconds],
            "check": None if self.check is None else vars(self.check) | {},
            "predicted": dict(self.predicted),
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file, whole or not at all."""
        return write_text(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ParallelRun:
        """Read a file.

        Raises:
            ConfigError: no such file, another format or version, or damaged; names file and field.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: no readable JSON file ({error}); check the path") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f"{path}: field 'format' is not {FORMAT!r}; this is no parallel run")
        if data.get("version") != VERSION:
            raise ConfigError(
                f"{path}: field 'version' is {data.get('version')!r}, this release reads "
                f"{VERSION}; run again"
            )
        try:
            return cls._read(data)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: damaged at {error}; run again") from error

    @classmethod
    def _read(cls, data: dict[str, Any]) -> ParallelRun:
        plain = ("mode", "asked", "ranks", "steps", "kv_row_bytes", "seconds", "predicted")
        rows = ("sent", "cache_bytes", "idle_seconds", "slept_seconds")
        check = data["check"]
        given: dict[str, Any] = {name: data[name] for name in plain}
        given |= {name: tuple(data[name]) for name in rows}
        return cls(
            **given,
            outputs=tuple(tuple(int(token) for token in tokens) for tokens in data["outputs"]),
            traffic=tuple(Traffic(**entry) for entry in data["traffic"]),
            stays=tuple(LayerStays(**entry) for entry in data["stays"]),
            lean=tuple(data["lean_layers"]),
            prefill_seconds=data.get("prefill_seconds", 0.0),  # older files have none
            prefill_wait_seconds=tuple(data.get("prefill_wait_seconds", ())),
            check=None if check is None else SelfCheck(**check),
        )

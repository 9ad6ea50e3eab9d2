"""`ParallelReport`: what ranks sent each other in a parallel run, as text and as one HTML page.

Does not know how ranks run; all it shows is in the run's file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.report.base import FactsReport
from moe_runtime.report.layout import Tile, template
from moe_runtime.report.run import RunError
from moe_runtime.report.summary import NONE, count, duration, percent, size

__all__ = ["PARALLEL_FORMAT", "ParallelReport"]

PARALLEL_FORMAT, _VERSION = "moe-runtime.parallel-run", 1
_NUMBERS = ("ranks", "steps", "cross_bytes", "routing_bytes", "keys_values_bytes", "seconds")
_LISTS = ("outputs", "traffic", "sent", "stays", "cache_bytes", "idle_seconds")
_COUNTS = ("calls", "rows", "bytes", "frame_bytes", "kept_rows")
_TITLES = ("Kind", "Layer", "Calls", "Rows sent", "Bytes sent", "Sizes and notes", "Rows kept")


class ParallelReport(FactsReport):
    """A parallel run and its renderings: `str(report)`, `facts()`, `to_html()`.

    Args:
        data: plain data of `ParallelRun.to_dict`.

    Raises:
        RunError: no parallel run, another version, or a field is missing or damaged.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = _checked(data)

    @classmethod
    def load(cls, path: str | Path) -> ParallelReport:
        """The report of a file of `generate --expert-parallel ... --run-file`.

        Raises:
            RunError: it cannot be read or holds no parallel run; names the field.
        """
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{path}: {error}") from error

    @property
    def outcome(self) -> str:
        """The run in one line."""
        data = self._data
        tokens = sum(len(one) for one in data["outputs"])
        asked = "" if data["mode"] == data["asked"] else f" (asked for {data['asked']})"
        return (
            f"{data['mode']}{asked} on {count(data['ranks'])} ranks: {count(tokens)} tokens in "
            f"{count(data['steps'])} steps, {size(data['cross_bytes'])} between ranks"
        )

    def facts(self) -> dict[str, Any]:
        """Plain data: everything but the tokens and the list by layer."""
        left = {"outputs", "traffic", "stays", "format", "version"}
        kinds = {row[0]: {"calls": row[2], "bytes": row[4] + row[5]} for row in self._by_kind()}
        return {name: v for name, v in self._data.items() if name not in left} | {"kinds": kinds}

    def to_html(self) -> str:
        return template("parallel.html.j2").render(
            kind="parallel run",
            title=f"{count(self._data['ranks'])} ranks, {self._data['mode']}",
            outcome=self.outcome,
            refused=self._refused(),
            tiles=self._tiles(),
            predicted=self._predicted(),
            titles=_TITLES,
            kinds=[_cells(row) for row in self._by_kind()],
            layers=[_cells(_row(one)) for one in self._data["traffic"] if one["layer"] is not None],
            stays=self._stays(),
            ranks=self._ranks(),
        )

    def __str__(self) -> str:
        rows = [_TITLES, *(_cells(row) for row in self._by_kind())]
        table = ["".join(f"{c:>17}" if n else f"{c:<22}" for n, c in enumerate(r)) for r in rows]
        told = [
            f"  {name:<42}{foretold:>10}{seen:>10}" for name, foretold, seen in self._predicted()
        ]
        head = [f"  {'':<42}{'foretold':>10}{'as run':>10}"] if told else []
        ranks = [
            f"  rank {r[0]}: sent {r[1]}, keys and values {r[2]}, waited {r[3]}"
            for r in self._ranks()
        ]
        refused = [f"not coherent: {self._refused()}"] if self._refused() else []
        return "\n".join([self.outcome, *refused, "", *table, "", *head, *told, *ranks])

    # -- parts ----------------------------------------------------------------------------------

    def _refused(self) -> str:
        check = self._data.get("check")
        return str(check.get("reason", "")) if isinstance(check, Mapping) else ""

    def _by_kind(self) -> list[tuple[Any, ...]]:
        """Rows of `_TITLES`, layers added up."""
        found: dict[str, list[int]] = {}
        for one in self._data["traffic"]:
            sums = found.setdefault(one["kind"], [0] * len(_COUNTS))
            for at, name in enumerate(_COUNTS):
                sums[at] += one[name]
        return [(kind, None, *sums) for kind, sums in found.items()]

    def _tiles(self) -> list[Tile]:
        data = self._data
        steps = max(data["steps"], 1)
        return [
            Tile(
                label="Between ranks",
                value=size(data["cross_bytes"]),
                note=f"{size(data['cross_bytes'] / steps)} a decode step",
            ),
            Tile(
                label="Of it routing",
                value=size(data["routing_bytes"]),
                note="rows on their way to experts and back",
            ),
            Tile(
                label="Keys and values",
                value=size(data["keys_values_bytes"]),
                note="handed round at the end of each step",
            ),
            Tile(
                label="Rows that stayed",
                value=percent(data.get("stayed_share")),
                note="where they were, over MoE layers",
            ),
            Tile(
                label="Cache on a rank",
                value=size(max(data["cache_bytes"], default=None)),
                note="keys and values, at most",
            ),
            Tile(
                label="Waiting",
                value=duration(max(data["idle_seconds"], default=None)),
                note=f"the longest of the ranks, of {duration(data['seconds'])}",
            ),
        ]

    def _predicted(self) -> list[tuple[str, str, str]]:
        """(what, foretold by the plan for the same tokens, as run)."""
        told = self._data.get("predicted")
        told = told if isinstance(told, Mapping) else {}
        later = self._data["stays"][1:]  # into the first MoE layer there is no pair of experts
        rows = sum(one["rows"] for one in later)
        moved = 1 - sum(one["stayed"] for one in later) / rows if rows else None
        names = (
            ("Rows that move, after the first MoE layer", "heaviest_crossing", moved),
            ("Crossing of all pairs of experts", "crossing", None),
        )
        shown = [
            (name, percent(told.get(key)), percent(seen))
            for name, key, seen in names
            if key in told
        ]
        shown += self._prefill(told.get("prefill"))
        distinct = told.get("distinct_ranks")
        if isinstance(distinct, int | float):
            shown.append(("Ranks that a token needs in a layer", f"{distinct:.2f}", NONE))
        return shown

    def _prefill(self, told: Any) -> list[tuple[str, str, str]]:
        """Bytes of prefill, and its time on the links beside the least that a rank waited."""
        if not isinstance(told, Mapping):
            return []
        sent = sum(
            one["bytes"] + one["frame_bytes"]
            for one in self._data["traffic"]
            if one["kind"].startswith("prefill.")
        )
        waits = self._data.get("prefill_wait_seconds")
        least = min(waits) if isinstance(waits, list) and waits else None
        shown = []
        if isinstance(foretold := told.get("cross_bytes"), int):
            shown.append(("Bytes between ranks in prefill", size(foretold), size(sent)))
        if isinstance(seconds := told.get("seconds"), int | float):
            shown.append(("Prefill on the links", duration(seconds), duration(least)))
        return shown

    def _stays(self) -> list[tuple[str, ...]]:
        return [
            (
                str(one["layer"]),
                count(one["rows"]),
                percent(one["stayed"] / one["rows"] if one["rows"] else None),
                count(one["split"]),
                count(one["pieces"]),
            )
            for one in self._data["stays"]
        ]

    def _ranks(self) -> list[tuple[str, ...]]:
        data = self._data
        each = zip(data["sent"], data["cache_bytes"], data["idle_seconds"], strict=True)
        return [
            (str(rank), size(sent), size(cache), duration(idle))
            for rank, (sent, cache, idle) in enumerate(each)
        ]


def _row(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return (one["kind"], one["layer"], *(one[name] for name in _COUNTS))


def _cells(row: tuple[Any, ...]) -> tuple[str, ...]:
    kind, layer, calls, rows, nbytes, frame, kept = row
    where = "all" if layer is None else str(layer)
    return (kind, where, count(calls), count(rows), size(nbytes), size(frame), count(kept))


def _checked(data: Any) -> Mapping[str, Any]:
    """The data, every field that is shown being there and of its kind."""
    if not isinstance(data, Mapping) or data.get("format") != PARALLEL_FORMAT:
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        raise RunError(f"field 'format' is {found!r}, not {PARALLEL_FORMAT!r}: no parallel run")
    if data.get("version") != _VERSION:
        raise RunError(
            f"field 'version' is {data.get('version')!r}, this release reads {_VERSION}; run again"
        )
    kinds: dict[str, type | tuple[type, ...]] = {"mode": str, "asked": str}
    kinds |= dict.fromkeys(_NUMBERS, (int, float)) | dict.fromkeys(_LISTS, list)
    for name, kind in kinds.items():
        if not isinstance(data.get(name), kind) or isinstance(data[name], bool):
            raise RunError(f"field {name!r} is missing or damaged: {data.get(name)!r:.80}")
    for name, keys in (
        ("traffic", ("kind", "layer", *_COUNTS)),
        ("stays", ("layer", "rows", "stayed", "split", "pieces")),
    ):
        for at, one in enumerate(data[name]):
            lacking = [k for k in keys if not isinstance(one, Mapping) or k not in one]
            wrong = lacking or [k for k in keys[2:] if type(one[k]) is not int]
            if wrong:
                raise RunError(f"field '{name}[{at}].{wrong[0]}' is missing or damaged")
    lengths = {len(data[name]) for name in ("sent", "cache_bytes", "idle_seconds")}
    if lengths != {data["ranks"]}:
        raise RunError(f"fields by rank have {sorted(lengths)} entries, ranks are {data['ranks']}")
    return data

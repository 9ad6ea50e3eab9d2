"""The journal of an evaluation under way: outcomes as they come, so that it can go on later.

Knows the file's form; not how outcomes come about.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.steering.outcomes import Outcome
from moe_runtime.steering.plain import from_plain

__all__ = ["Journal"]

FORMAT, VERSION = "moe-runtime.steer-eval-journal", 1
_NAMES = tuple(Outcome.__dataclass_fields__)


class Journal:
    """JSON lines: first what is evaluated, then one line for each batch, written as it ends.

    Args:
        path: of the file; one that is there is gone on with. None: nothing is kept.
        subject: plain data of what is evaluated and how; a journal of another subject is refused.

    Raises:
        ConfigError: the file is no journal, is damaged before its last line, or is of an
            evaluation with other settings; names the file and the setting.
    """

    def __init__(self, path: str | os.PathLike[str] | None, subject: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._outcomes: dict[str, dict[tuple[str, int], Outcome]] = defaultdict(dict)
        self._seconds: dict[str, float] = defaultdict(float)
        # As it will be read again: tuples become lists.
        self._subject = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **subject}))
        if self._path is None:
            return
        if self._path.exists():
            self._read(self._path)
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write(self._subject)

    def outcomes(self, arm: str) -> dict[tuple[str, int], Outcome]:
        """`{(problem, sample): outcome}` of an arm so far."""
        return dict(self._outcomes[arm])

    def seconds(self, arm: str) -> float:
        """What the arm's batches took."""
        return self._seconds[arm]

    @property
    def count(self) -> int:
        """Outcomes of all arms."""
        return sum(map(len, self._outcomes.values()))

    def add(self, arm: str, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Keep what a batch brought; it is on the disk when this returns."""
        line = {
            "arm": arm,
            "seconds": round(seconds, 4),
            "outcomes": [astuple(o) for o in outcomes],
        }
        self._take(line, "the new line")
        if self._path is not None:
            self._write(line)

    def remove(self) -> None:
        """The evaluation is written; the journal is not needed any more."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            # Interrupted before the first line was whole.
            path.unlink()
            self._write(self._subject)
            return
        self._require_same(path, self._parsed(lines[0], f"{path} line 1"))
        for number, line in enumerate(lines[1:], 2):
            where = f"{path} line {number}"
            self._take(self._parsed(line, where), where)
        if len(whole) < len(text):
            # A line that was being written when the run was killed; its batch comes again.
            os.truncate(path, len(whole))

    def _parsed(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{where}: no JSON ({error}); remove the file to begin anew"
            ) from error
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: no JSON object; remove the file to begin anew")
        return data

    def _require_same(self, path: Path, found: Mapping[str, Any]) -> None:
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise ConfigError(
                f"{path}: no journal of this release (format {found.get('format')!r}, version "
                f"{found.get('version')!r}); remove the file to begin anew"
            )
        different = [
            f"{name} was {_short(before)}, now {_short(now)}"
            for name, before, now in _differences(found, self._subject, "")
        ]
        if different:
            raise ConfigError(
                f"{path}: begun with other settings: {'; '.join(different[:3])}; give the same to "
                "go on, or remove the file to begin anew"
            )

    def _take(self, line: Mapping[str, Any], where: str) -> None:
        try:
            arm, seconds = line["arm"], float(line["seconds"])
            found = [
                from_plain(Outcome, dict(zip(_NAMES, one, strict=True)), "outcome")
                for one in line["outcomes"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: damaged ({type(error).__name__}: {error}); remove the file to begin anew"
            ) from error
        self._seconds[arm] += seconds
        self._outcomes[arm].update({(one.problem, one.sample): one for one in found})


def _differences(before: Any, now: Any, name: str) -> list[tuple[str, Any, Any]]:
    """Places at which two pieces of plain data differ, with what is there."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in {**before, **now}
            for difference in _differences(
                before.get(key), now.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if before == now else [(name, before, now)]


def _short(data: Any) -> str:
    text = json.dumps(data, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

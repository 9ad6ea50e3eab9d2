"""`Report`: one run's record, its counters, and its renderings.

Does not know how a record is made.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_runtime.files import write_text
from moe_runtime.report.predicted_words import prediction_summary
from moe_runtime.report.run import Counters, Run, RunError, read_run
from moe_runtime.report.summary import Summary, outcome, summarise
from moe_runtime.report.text import render_text

__all__ = ["Report"]


class Report:
    """A run's record and its renderings: `str(report)`, `to_html()`, `to_dict()`."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @classmethod
    def from_run(cls, data: Mapping[str, Any]) -> Report:
        """A report of a run record (plain data as `docs/formats.md` describes).

        Raises:
            RunError: the record is damaged, incomplete or of another version.
        """
        return cls(read_run(copy.deepcopy(dict(data)) if isinstance(data, Mapping) else data))

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report of a `run.json` file; RunError if it holds no run record."""
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RunError(f"{path} is not JSON ({error}); give a run.json") from None
        try:
            return cls.from_run(data)
        except RunError as error:
            raise RunError(f"{path}: {error}") from None

    @property
    def counters(self) -> Counters:
        """Totals: hits, misses, evictions, rereads, bytes_read, ...; `hit_rate`."""
        return self._run.counters

    @cached_property
    def summary(self) -> Summary:
        """The figures to compare: tokens/s, hit rate, bytes a token, stall share, memory."""
        return summarise(self._run)

    @property
    def prediction(self) -> dict[str, Any] | None:
        """What prediction did, in a few figures; None if the run had no predictor."""
        found = self._run.predicted
        return None if found is None else prediction_summary(self._run, found)

    @property
    def outcome(self) -> str:
        """The run in one line."""
        return outcome(self.summary)

    def to_dict(self) -> dict[str, Any]:
        """The run record: a copy of the plain data that the report was made from."""
        return copy.deepcopy(dict(self._run.data))

    def to_html(self) -> str:
        """One self-contained page: styles and figures inside, nothing fetched."""
        from moe_runtime.report.page import render_page

        return render_page(self._run, self.summary)

    def save(self, path: str | Path) -> Path:
        """Write the page (`.html`) or the record (`.json`), whole or not at all.

        Raises:
            RunError: the name ends in neither.
        """
        target = Path(path)
        if target.suffix in {".html", ".htm"}:
            text = self.to_html()
        elif target.suffix == ".json":
            text = self._json()
        else:
            raise RunError(f"{target}: a report is saved as .html or .json; choose such a name")
        return write_text(target, text)

    def _json(self) -> str:
        try:
            return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise RunError(f"the run record is not plain JSON data: {error}") from None

    def __str__(self) -> str:
        return render_text(self._run, self.summary)

    def __repr__(self) -> str:
        return f"Report({self.outcome})"

"""`SimulationReport`: a simulation of caching as text, plain data, and one HTML page.

Does not know how it was simulated; all it shows is in the simulation's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.report import simulated_words as words
from moe_runtime.report.base import FactsReport
from moe_runtime.report.simulated import Simulated, read_simulated

__all__ = ["SimulationReport"]


class SimulationReport(FactsReport):
    """A simulation and its renderings: `str(report)`, `facts()`, `to_html()`."""

    def __init__(self, found: Simulated) -> None:
        self._found = found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SimulationReport:
        """Of plain data, as `docs/formats.md` describes; RunError if it is damaged."""
        return cls(read_simulated(data))

    @classmethod
    def load(cls, path: str | Path) -> SimulationReport:
        """The report of a file of `simulate -o`; RunError if it holds no simulation."""
        return cls(Simulated.load(path))

    @property
    def outcome(self) -> str:
        """The simulation in one line."""
        return words.headline(self._found)

    def facts(self) -> dict[str, Any]:
        """Plain data: the setting in short, and each contender, the fastest first."""
        return words.facts_of(self._found)

    def to_html(self) -> str:
        from moe_runtime.report.simulated_page import render_simulated

        return render_simulated(self._found)

    def __str__(self) -> str:
        rows = words.ranked(self._found)
        width = max((len(one.title) for one in rows), default=0) + 2
        return "\n".join(
            [
                self.outcome,
                f"  {'model':<14}{self._found.model_id or 'unknown model'}",
                f"  {'setting':<14}{words.setting_line(self._found)}",
                *(f"  {'without':<14}{title}: {why}" for title, why in self._found.left_out),
                "",
                " " * width + "".join(f"{title:>11}" for title in words.TITLES),
                *(
                    f"{one.title:<{width}}" + "".join(f"{cell:>11}" for cell in words.cells(one))
                    for one in rows
                ),
            ]
        )

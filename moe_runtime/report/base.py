"""`FactsReport`: what every report does that is made of facts, whatever they are about.

Does not know any of them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.files import write_text

__all__ = ["FactsReport"]


class FactsReport(ABC):
    """One thing as a line, as text (`str(report)`), as plain data and as an HTML page."""

    @property
    @abstractmethod
    def outcome(self) -> str:
        """All of it in one line."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Plain data: what the text and the page say."""

    @abstractmethod
    def to_html(self) -> str:
        """One self-contained page: styles and figures inside, nothing fetched."""

    @abstractmethod
    def __str__(self) -> str: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.outcome})"

    def save(self, path: str | Path) -> Path:
        """Write the page (`.html`) or the facts (`.json`), whole or not at all.

        Raises:
            ConfigError: another ending.
        """
        target = Path(path)
        if target.suffix == ".html":
            return write_text(target, self.to_html())
        if target.suffix == ".json":
            return write_text(target, json.dumps(self.facts(), indent=1, allow_nan=False) + "\n")
        raise ConfigError(f"{target}: a report is saved as .html or .json; choose such a name")

"""The room that an automatic budget leaves for keys and values: as much as the prompts will take.

Knows numbers of tokens; no model and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AskedRoom", "budget_line"]


@dataclass(frozen=True, kw_only=True)
class AskedRoom:
    """What the command line says of it; None where it says nothing.

    Args:
        max_batch: sequences at once.
        max_length: tokens of each.
    """

    max_batch: int | None = None
    max_length: int | None = None

    def for_prompts(
        self, lengths: Iterable[int], *, new_tokens: int, at_once: int = 1
    ) -> dict[str, Any]:
        """`max_batch` and `max_length` as `from_pretrained` takes them.

        Args:
            lengths: tokens of each prompt.
            new_tokens: that each may get.
            at_once: sequences whose keys and values are held at once.
        """
        longest = max(lengths, default=0)
        return {
            "max_batch": at_once if self.max_batch is None else self.max_batch,
            "max_length": max(longest + new_tokens, 1)
            if self.max_length is None
            else self.max_length,
        }


def budget_line(record: Mapping[str, Any]) -> str:
    """How a run's budget came about, where nobody asked for just that many bytes; else empty."""
    budget = record["budget"]
    text = str(budget["explanation"])
    return f"budget {text}" if text.startswith("auto: ") or budget.get("shrunk") else ""

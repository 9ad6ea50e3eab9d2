"""The kinds of text that the bundled model's routing is recorded on.

Knows no model.
"""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from pathlib import Path

__all__ = ["corpora"]


def corpora() -> dict[str, list[str]]:
    """Texts that every Python installation has, and the bundled model's own puzzles."""
    from bundled_model.puzzles import held_out

    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[:60]]
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    solved = [one.prompt + one.solution for one in held_out(600)]
    return {"english": topics[:60], "python": sources, "puzzles": solved}

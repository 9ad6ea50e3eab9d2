"""Reading the texts that a recording is made of: a prompt a line, a whole file, or JSON lines.

Knows nothing of tokenizers or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moe_runtime.errors import ConfigError

__all__ = ["SPLITS", "read_corpus"]

SPLITS = ("auto", "lines", "whole", "jsonl")
_FIELDS = ("prompt", "text")


def read_corpus(source: Path | TextIO, *, split: str = "auto") -> Iterator[str]:
    """The documents of a file or stream, blank ones left out; lines are read as they are needed.

    Args:
        source: a UTF-8 file, or a stream such as standard input.
        split: `"lines"`, one document a line; `"whole"`, one in all; `"jsonl"`, a JSON object a
            line with the field `"prompt"` or `"text"`; `"auto"`, jsonl for `*.jsonl` and for what
            begins with such an object, else lines.

    Raises:
        ConfigError: an unknown split, a file that cannot be read, a line that is not JSON or has
            no document; names file and line.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    name = str(source) if isinstance(source, Path) else "standard input"
    try:
        if not isinstance(source, Path):
            yield from _documents(source, name, split)
            return
        with source.open(encoding="utf-8") as file:
            if split == "auto" and source.suffix == ".jsonl":
                split = "jsonl"
            yield from _documents(file, name, split)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: not a UTF-8 text ({error.reason})") from error


def _documents(lines: Iterable[str], name: str, split: str) -> Iterator[str]:
    if split == "whole":
        text = "".join(lines)
        if text.strip():
            yield text
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if split == "auto":  # the first line that says something decides
            split = "jsonl" if _parse(line) is not None else "lines"
        if split == "lines":
            yield line.rstrip("\r\n")
            continue
        found = _parse(line)
        if found is None:
            raise ConfigError(
                f"{name} line {number}: no JSON object with a text {' or '.join(_FIELDS)}: "
                f"{line.strip()!r:.60}; correct it, or read plain lines (--split lines)"
            )
        if found.strip():
            yield found


def _parse(line: str) -> str | None:
    """The document of a JSON line, None if it is none."""
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    return next((data[key] for key in _FIELDS if isinstance(data.get(key), str)), None)

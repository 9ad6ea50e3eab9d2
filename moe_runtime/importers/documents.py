"""Reading a recording's text: JSON and JSON lines, with errors that name file and field.

Knows nothing of what the fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_runtime.errors import TraceError

__all__ = ["field", "parse_json", "read_documents", "read_text", "whole_number"]


def read_text(path: Path) -> str:
    """A UTF-8 text file; TraceError if it cannot be read or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a UTF-8 text ({error.reason}); copy it again") from error


def parse_json(text: str, name: str) -> Any:
    """Plain data; TraceError, which starts with `name`, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{name}: not JSON ({error}); is it cut off?") from error


def read_documents(path: Path) -> Iterator[tuple[str, Any]]:
    """`(name, data)` of each JSON document: the file as a whole, or line by line.

    Lines are read one at a time, so a long file of many responses needs little memory.
    """
    if path.suffix != ".jsonl":
        text = read_text(path)
        try:
            yield str(path), json.loads(text)
            return
        except RecursionError as error:
            raise TraceError(f"{path}: not JSON ({error})") from error
        except ValueError as error:
            first = next((line for line in text.splitlines() if line.strip()), "")
            try:
                json.loads(first)
            except (ValueError, RecursionError):
                raise TraceError(f"{path}: not JSON ({error}); is it cut off?") from error
        del text
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", parse_json(line, f"{path} line {number}")
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a UTF-8 text ({error.reason}); copy it again") from error


def field(data: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a mapping, of the right kind (a bool is no number); TraceError otherwise."""
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TraceError(f"{where}: field {name!r} is missing or of another type: {value!r:.80}")
    return value


def whole_number(value: Any, low: int, high: int, where: str) -> int:
    """An integer from `low` to `high`; TraceError otherwise."""
    if type(value) is not int or not low <= value <= high:
        raise TraceError(f"{where} must be a whole number, {low} to {high}, found {value!r:.80}")
    return value

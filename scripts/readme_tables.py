"""Writes the README's measured tables and numbers from `bench/results/*.json`.

Does not know what was measured: markers in the README say which fields to show and how.

A table stands between two comments. The first names the file, the list (or object of objects) that
gives the rows, and the columns as `heading = path : format`; a path goes down by `/`, `@key` is a
row's key in an object, and without a format the value is shown as it is:

    <!-- table peers.json runners | runner = @key | tokens/s = tokens_per_second : .2f -->
    <!-- /table -->

One number in a sentence:

    <!-- value peers.json speedup : .1f -->12.3<!-- /value -->

Formats are Python's, and `bytes` (1.2 GB), `MB` (of a number of bytes), `percent` (of a share).
`python scripts/readme_tables.py` rewrites the README, `--check` says whether it is current.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

_TABLE = re.compile(r"(<!-- table\s(?P<spec>.*?)-->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)
_VALUE = re.compile(r"(<!-- value\s(?P<spec>.*?)-->)(?P<body>.*?)(<!-- /value -->)", re.DOTALL)


class TableError(ValueError):
    """A marker or a results file does not fit; the message names both."""


def look_up(data: Any, path: str, where: str) -> Any:
    """The value at a `/`-separated path; TableError naming what is there instead.

    A `//` is a slash inside a name.
    """
    for part in filter(None, path.replace("//", "\0").split("/")):
        step = part.replace("\0", "/")
        if isinstance(data, dict) and step in data:
            data = data[step]
        elif isinstance(data, list) and re.fullmatch(r"-?\d+", step) and abs(int(step)) < len(data):
            data = data[int(step)]
        else:
            found = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise TableError(f"{where}: no {step!r} of path {path!r}; there is {found}")
    return data


def show(value: Any, spec: str) -> str:
    """A value as text; None is a dash, a truth value yes or no."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value.replace("|", "\\|")
    if spec == "bytes":
        for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
            if abs(value) >= size:
                return (
                    f"{value / size:.3g} {unit}"
                    if value < 1000 * size
                    else f"{value / size:,.0f} {unit}"
                )
        return f"{value:.0f} B"
    if spec == "MB":
        return f"{value / 10**6:,.0f}"
    if spec == "percent":
        return f"{100 * value:.1f} %"
    return format(value, spec)


def split_format(text: str) -> tuple[str, str]:
    """`path : format` as two parts, the second empty where there is none."""
    path, _, spec = text.partition(":")
    return path.strip(), spec.strip()


def load(name: str, results: Path) -> Any:
    """A results file; TableError names those that there are."""
    path = results / name
    if not path.is_file():
        there = sorted(file.name for file in results.glob("*.json"))
        raise TableError(f"no {name} in {results}; there are {there}")
    return json.loads(path.read_text(encoding="utf-8"))


def column(rows: list[tuple[str, Any]], path: str, form: str, name: str) -> list[str]:
    """One column's cells. A row without the field (a runner that failed) has a dash in it; a field
    that no row has is a TableError.
    """
    if path == "@key":
        return [key for key, _ in rows]
    cells: list[str] = []
    errors: list[TableError] = []
    for key, row in rows:
        try:
            cells.append(show(look_up(row, path, f"{name} row {key}"), form))
        except TableError as error:
            cells.append("-")
            errors.append(error)
    if rows and len(errors) == len(rows):
        raise errors[0]
    return cells


def render_table(spec: str, results: Path) -> str:
    """The Markdown lines of a table, and under it its machine and command if the file has them."""
    source, *columns = (part.strip() for part in spec.replace("\n", " ").split("|"))
    name, _, rows_path = source.partition(" ")
    data = load(name, results)
    rows = look_up(data, rows_path.strip(), name)
    if isinstance(rows, dict):
        keyed: Iterable[tuple[str, Any]] = rows.items()
    elif isinstance(rows, list):
        keyed = ((str(number), row) for number, row in enumerate(rows))
    else:
        raise TableError(f"{name}: {rows_path!r} is neither a list nor an object")
    if not columns or any("=" not in column for column in columns):
        raise TableError(
            f"{name}: columns are written '| heading = path : format', found {columns}"
        )
    pairs = [
        (heading.strip(), split_format(path))
        for heading, path in (c.split("=", 1) for c in columns)
    ]
    keyed = list(keyed)
    texts = [column(keyed, path, form, name) for _, (path, form) in pairs]
    lines = [
        "| " + " | ".join(heading for heading, _ in pairs) + " |",
        "|" + "|".join("---" for _ in pairs) + "|",
        *("| " + " | ".join(cells) + " |" for cells in zip(*texts, strict=True)),
    ]
    return "\n".join([*lines, *source_lines(data), ""])


def source_lines(data: Any) -> list[str]:
    """Where a table's numbers come from: `machine`, `command` and `date` of its file."""
    if not isinstance(data, dict):
        return []
    machine = data.get("machine") or {}
    if isinstance(machine, str):
        machine = {"processor": machine}
    names = [
        str(machine[key]) for key in ("device", "device_name", "processor") if machine.get(key)
    ]
    if machine.get("cores"):
        names.append(f"{machine['cores']} cores")
    if machine.get("memory_bytes"):
        names.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB of memory")
    date = str(data.get("date") or machine.get("when") or "")[:10]
    parts = [
        f"Machine: {', '.join(names)}." if names else "",
        f"Command: `{data['command']}`." if data.get("command") else "",
        f"Measured {date}." if date else "",
    ]
    text = " ".join(filter(None, parts))
    return ["", text] if text else []


def render(text: str, results: Path = RESULTS) -> str:
    """A README with all its tables and values written anew; pure, apart from reading `results`."""

    def value(match: re.Match[str]) -> str:
        source, form = split_format(match["spec"])
        name, _, path = source.partition(" ")
        return match[1] + show(look_up(load(name, results), path.strip(), name), form) + match[4]

    text = _TABLE.sub(lambda m: m[1] + render_table(m["spec"].strip(), results) + m[4], text)
    return _VALUE.sub(value, text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the README, or with `--check` exit 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if not current"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    old = options.readme.read_text(encoding="utf-8")
    try:
        new = render(old)
    except TableError as error:
        print(f"{options.readme.name}: {error}", file=sys.stderr)
        return 2
    if new == old:
        return 0
    if options.check:
        print(f"{options.readme.name} is out of date; run python scripts/readme_tables.py")
        return 1
    temporary = options.readme.with_suffix(".tmp")
    temporary.write_text(new, encoding="utf-8")
    os.replace(temporary, options.readme)
    print(f"{options.readme.name} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())

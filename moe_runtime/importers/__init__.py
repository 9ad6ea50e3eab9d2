"""Routing recorded by other engines, read into `RoutingTrace` and `RoutingCounts`.

One module for each engine or form, found by name; knows no command.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.errors import ConfigError, TraceError
from moe_runtime.importers.facts import Facts, Note, Piece
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.trace import PathLike, RoutingTrace
from moe_runtime.trace_writer import TraceWriter

__all__ = ["FORMS", "Facts", "Imported", "detect", "import_recording", "read_recording"]

# name -> module with `read(paths, facts, note) -> Iterator[Piece] | RoutingCounts`
_MODULES = {
    "sglang": "sglang",
    "trtllm": "trtllm",
    "vllm": "vllm",
    "moe-ocs-json": "moe_ocs_json",
    "route-csv": "route_csv",
}
FORMS = tuple(_MODULES)
_ROWS_PER_PART = 65536
TRACE, COUNTS = ".trace.safetensors", ".counts.safetensors"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import wrote.

    Args:
        path: the file.
        form: which engine's form was read.
        tokens: rows of the trace, or tokens counted (0 if unknown).
        counts: the counts, if the recording had no tokens.
        description: the model's layers and names, as in the file.
        notes: what its user should know, a sentence each.
    """

    path: Path
    form: str
    tokens: int
    counts: RoutingCounts | None
    description: dict[str, object]
    notes: tuple[str, ...]

    def grid_text(self) -> str:
        """`26 layers (1 to 26) of 64 experts`."""
        layers, experts = self.description["layer_ids"], self.description["experts"]
        assert isinstance(layers, tuple)
        assert isinstance(experts, tuple)
        sizes = sorted(set(experts))
        of = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        return f"{len(layers)} layers ({min(layers)} to {max(layers)}) of {of} experts"


def detect(path: PathLike) -> str:
    """The form of a file or folder, by its name and its first bytes; nothing is loaded.

    Raises:
        TraceError: it cannot be read, or looks like none of the forms.
    """
    path = Path(path)
    if path.is_dir() or path.name == "meta_info.json":
        return "trtllm"
    try:
        with path.open("rb") as file:
            start = file.read(1 << 20)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not start:
        raise TraceError(f"{path}: is empty")
    if start.startswith(b"PK\x03\x04") or path.suffix in {".pt", ".pth"}:
        return "sglang"
    if start.startswith((b"\x93NUMPY", b"k05VTVBZ")) or path.suffix == ".npy":
        return "vllm"
    text = start.lstrip()
    if text.startswith((b"{", b"[")):
        for name, form in ((b'"choices"', "vllm"), (b'"meta_info"', "sglang")):
            if name in start:
                return form
        return "moe-ocs-json"
    if text.startswith(b"#") or b"step,layer" in start:
        return "route-csv"
    if all(32 < byte < 127 for byte in text[:4096].strip()):  # a word without end: base64
        return "sglang"
    raise TraceError(
        f"{path}: of no known form; say which it is (--from {'|'.join(FORMS)}). A trace of this "
        "library needs no import"
    )


def read_recording(
    paths: PathLike | Sequence[PathLike],
    *,
    form: str = "auto",
    facts: Facts | None = None,
    note: Note | None = None,
) -> RoutingTrace | RoutingCounts:
    """A recording, of one or more files of one model, in memory.

    Args:
        paths: files, or folders of TensorRT-LLM.
        form: one of `FORMS`, or `"auto"`.
        facts: what the files do not say.
        note: takes sentences about what was left out or is unknown.

    Raises:
        TraceError: damaged, incomplete, or not of one model; names file, layer and value.
        ConfigError: an unknown form.
    """
    _, found = _open(paths, form, facts, note or (lambda _: None))
    if isinstance(found, RoutingCounts):
        return found
    pieces = list(found)
    for piece in pieces:
        piece.rows.require_like(pieces[0].rows, str(piece.path))
    return RoutingTrace.concat([piece.rows for piece in pieces])


def import_recording(
    paths: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    form: str = "auto",
    facts: Facts | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
) -> Imported:
    """Read a recording and write it as a trace, or as counts if it has no tokens.

    Memory is bounded by one piece of some thousand tokens, whatever the recording's length (for
    the JSON and CSV forms by one file). Nothing is left if it fails; an existing file is replaced.

    Args:
        paths, form, facts: see `read_recording`.
        out: the file to write; `.trace.safetensors` or `.counts.safetensors` is added to a name
            without `.safetensors`.
        on_rows: told the tokens read so far.

    Raises:
        As `read_recording`.
    """
    notes: list[str] = []
    form, found = _open(paths, form, facts, notes.append)
    if isinstance(found, RoutingCounts):
        path = found.save(_named(out, COUNTS))
        tokens, description = found.tokens, found.description()
        return Imported(
            path=path,
            form=form,
            tokens=tokens,
            counts=found,
            description=description,
            notes=tuple(dict.fromkeys(notes)),
        )
    path = _named(out, TRACE)
    parts = path.with_name(f".{path.stem}.{os.getpid()}.parts")
    writer = TraceWriter(parts, rows_per_part=_ROWS_PER_PART, path=path)
    description = {}
    try:
        first: RoutingTrace | None = None
        for piece in found:
            if first is None:
                first = piece.rows[:0]
                description = first.description()
            piece.rows.require_like(first, str(piece.path))
            writer.append(piece.rows)
            on_rows(writer.rows)
        tokens = writer.rows
        if writer.close() is None:
            raise TraceError(f"{paths}: the recording has no tokens")
    finally:
        writer.discard()
    return Imported(
        path=path,
        form=form,
        tokens=tokens,
        counts=None,
        description=description,
        notes=tuple(dict.fromkeys(notes)),
    )


def _named(out: PathLike, ending: str) -> Path:
    """The file to write, with the ending that says what it holds."""
    path = Path(out)
    other = COUNTS if ending == TRACE else TRACE
    if path.name.endswith(other):
        what = "tokens, so it becomes a trace" if ending == TRACE else "counts without tokens"
        raise TraceError(f"{path}: the recording has {what}; name it *{ending}")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ending)


def _open(
    paths: PathLike | Sequence[PathLike], form: str, facts: Facts | None, note: Note
) -> tuple[str, Iterator[Piece] | RoutingCounts]:
    """The form, and the reader's answer for these files."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    files = [Path(path) for path in paths]
    if not files:
        raise TraceError("nothing to import: give one file at least")
    if form == "auto":
        forms = {path: detect(path) for path in files}
        form = forms[files[0]]
        for path, other in forms.items():
            if other != form:
                raise TraceError(
                    f"{path}: is of the form {other}, {files[0]} is of {form}; import them "
                    "separately"
                )
    if form not in _MODULES:
        raise ConfigError(f"unknown form {form!r}; known: auto, {', '.join(FORMS)}")
    module = importlib.import_module(f"moe_runtime.importers.{_MODULES[form]}")
    return form, module.read(files, facts or Facts(), note)

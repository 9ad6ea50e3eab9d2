"""What every command does around its work: where output goes, errors, exit codes.

Knows no command.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from moe_runtime.errors import MoERuntimeError, PlanError, PredictorError, TraceError

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "INTERRUPTED",
    "emit_json",
    "quiet_libraries",
    "session",
    "to_stderr",
]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

# What users can cause, through a file, a hub or an option; anything else is a fault of ours and
# shows its traceback.
_EXPECTED = (MoERuntimeError, OSError, ValueError, MemoryError)


def to_stderr() -> Console:
    """The console for progress and messages; standard output is for results."""
    return Console(stderr=True, highlight=False)


def emit_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(data, ensure_ascii=False, allow_nan=False))


@contextmanager
def session(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Turn errors into a message and an exit code; with `debug` show the traceback too."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): nothing is left to say, and to nobody.
        sys.stdout = None
        raise typer.Exit(FAILED) from None
    except _EXPECTED as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        if as_json:
            emit_json({"error": type(error).__name__, "message": str(error)})
        bad_input = isinstance(error, PlanError | PredictorError | TraceError)
        raise typer.Exit(BAD_INPUT if bad_input else FAILED) from None


def quiet_libraries(*, debug: bool) -> None:
    """Keep transformers' progress bars and advice away from our own, unless debugging."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not debug:
        logging.set_verbosity_error()

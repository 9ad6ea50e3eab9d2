"""A program for ranks of tests: joins the others, exchanges until it is ended or they are.

Run with what torchrun sets in the environment.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import typer

from moe_runtime.cli import app
from moe_runtime.cli.session import session
from moe_runtime.parallel.agreement import require_same, together
from moe_runtime.parallel.launch import die_with_parent, process_group, say_when_terminated

_MEETING = 60.0  # seconds to come together in: on a busy machine processes start far apart


def main(action: str, timeout: float) -> None:
    """Exchange rows in rounds; rank 1 differs or fails as `action` says."""
    die_with_parent()
    with (
        session(as_json=False, debug=False),
        say_when_terminated(),
        process_group(timeout=max(timeout, _MEETING)) as link,
    ):
        other = action == "differ" and link.rank == 1
        require_same(link, {"plan file": "b" if other else "a"})

        def load() -> None:
            if action == "fail" and link.rank == 1:
                raise OSError("the disk is gone")

        together(link, "loading", load)
        link.timeout = timeout
        print("ready", flush=True)
        began = time.monotonic()
        while time.monotonic() - began < 60 and action != "end":
            to = torch.arange(4) % link.size
            link.exchange("move", 0, [torch.zeros(4, 8)], to)
            time.sleep(0.02)


def command(folder: str, _timeout: float) -> None:
    """The command line, with the arguments that lie in `folder`."""
    app(json.loads((Path(folder) / "arguments.json").read_text()))


if __name__ == "__main__":
    try:
        main(sys.argv[1], float(sys.argv[2]))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)

"""`moe-runtime topology`: the cost of a hop between each two of this machine's GPUs, as a file.

Does not know what a plan makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer

from moe_runtime.cli.options import DebugOption, JsonOption, outcome_place
from moe_runtime.cli.session import emit_json, session
from moe_runtime.core import FloatArray
from moe_runtime.errors import PlanError
from moe_runtime.placement.topology import Topology

__all__ = ["copy_seconds", "hop_seconds", "topology"]

_ROUNDS = 5


def topology(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.yaml", help="The topology file to write.")
    ],
    hidden: Annotated[
        int, typer.Option("--hidden", min=1, help="Width of the model's hidden state.")
    ] = 4096,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens that move together in a step.")
    ] = 256,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what it costs to move a token between each two GPUs of this machine.

    The file is for plan --topology, with --objective time. Not yet run on a machine with GPUs.

    Example:  [bold]moe-runtime topology --hidden 7168 -o node.yaml[/bold]
    """
    with session(as_json=as_json, debug=debug):
        import torch

        count = torch.cuda.device_count()
        if count < 2:
            raise PlanError(
                f"this machine has {count} GPUs; a topology is measured between two at least. "
                "Write the file by hand (docs/formats.md), or give --devices and --nodes to plan"
            )
        nbytes = 2 * hidden * tokens
        seconds = hop_seconds(count, lambda a, b: copy_seconds(a, b, nbytes)) / tokens
        memory = tuple(torch.cuda.mem_get_info(device)[0] for device in range(count))
        found = Topology.measured(seconds, memory=memory)
        path = found.save(outcome_place(out))
        if as_json:
            emit_json({**found.to_dict(), "file": str(path)})
        else:
            typer.echo(f"{count} devices in {found.node_count} nodes, costs in {found.unit}")
            typer.echo(f"wrote {path}")


def hop_seconds(count: int, once: Callable[[int, int], float]) -> FloatArray:
    """float64 `[G, G]`: median seconds of a copy between each two devices, both ways.

    Args:
        once: times one copy from a device to another; called once more than it counts.
    """
    seconds = np.zeros((count, count))
    for a in range(count):
        for b in range(count):
            if a != b:
                once(a, b)
                seconds[a, b] = median(once(a, b) for _ in range(_ROUNDS))
    return seconds


def copy_seconds(a: int, b: int, nbytes: int) -> float:
    """Seconds of one copy of so many bytes from GPU a to GPU b."""
    import torch

    source = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{a}")
    target = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{b}")
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(a):
        torch.cuda.synchronize(a)
        torch.cuda.synchronize(b)
        began.record()
        target.copy_(source, non_blocking=True)
        ended.record()
        ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3

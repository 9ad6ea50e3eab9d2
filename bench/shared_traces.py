"""The shared traces folder: which models it has, and all their runs as `RoutingTrace` objects.

Knows nothing of policies; the forms are read by `moe_runtime.importers`. See NOTICE.md of that
folder for sources.
"""

from __future__ import annotations

from pathlib import Path

from moe_runtime.errors import TraceError
from moe_runtime.importers import read_recording
from moe_runtime.trace import RoutingTrace

__all__ = ["TRACE_NAMES", "load_shared_traces"]

TRACE_NAMES = ("qwen1.5-moe-a2.7b", "qwen3.6-35b-a3b", "gemma-4-26b-a4b", "gpt-oss-120b")


def load_shared_traces(folder: Path) -> dict[str, list[RoutingTrace]]:
    """All runs of the four models, by model; TraceError if the folder is not the shared one."""
    runs: dict[str, list[RoutingTrace]] = {}
    for name in TRACE_NAMES:
        files = sorted((folder / name).glob("*.json")) + sorted((folder / name).glob("*.csv"))
        if not files:
            raise TraceError(f"{folder / name}: no recordings (*.json, *.csv); name another folder")
        runs[name] = [_one_run(file) for file in files]
    return runs


def _one_run(file: Path) -> RoutingTrace:
    trace = read_recording(file, form="moe-ocs-json" if file.suffix == ".json" else "route-csv")
    assert isinstance(trace, RoutingTrace)  # both forms have tokens
    return trace

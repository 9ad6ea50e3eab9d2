"""Running a placement plan across processes: expert parallelism, context-coherent or vanilla.

Exports; computes nothing.
"""

from __future__ import annotations

from moe_runtime.parallel.generate import generate
from moe_runtime.parallel.group_link import GroupLink
from moe_runtime.parallel.link import Link
from moe_runtime.parallel.options import ParallelOptions
from moe_runtime.parallel.run import ParallelRun
from moe_runtime.parallel.shares import contiguous_plan
from moe_runtime.parallel.thread_link import run_ranks, thread_links
from moe_runtime.parallel.traffic import Traffic

__all__ = [
    "GroupLink",
    "Link",
    "ParallelOptions",
    "ParallelRun",
    "Traffic",
    "contiguous_plan",
    "generate",
    "run_ranks",
    "thread_links",
]

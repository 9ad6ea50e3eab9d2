"""What ranks must agree on before they start, and failing together where one of them fails.

Knows links and plain data; not what the data is about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moe_runtime.errors import ParallelError
from moe_runtime.parallel.link import Link

__all__ = ["require_same", "together"]

_Result = TypeVar("_Result")


def require_same(link: Link, facts: Mapping[str, Any]) -> None:
    """Compare facts with all other ranks.

    Args:
        facts: plain data by name, in words that an error can use ("plan file").

    Raises:
        ParallelError: ranks differ, on every rank in the same words: what differs, which ranks
            have which value.
    """
    known = link.agree("setup", dict(facts))
    names = sorted({name for one in known for name in one})
    faults = []
    for name in names:
        groups: dict[str, list[int]] = {}
        for rank, one in enumerate(known):
            groups.setdefault(json.dumps(one.get(name), sort_keys=True), []).append(rank)
        if len(groups) > 1:
            told = "; ".join(f"{_ranks(ranks)}: {value:.200}" for value, ranks in groups.items())
            faults.append(f"{name} ({told})")
    if faults:
        raise link.agreed(
            ParallelError(
                f"the ranks differ in {', '.join(faults)}; give every rank the same checkpoint, "
                "plan, release and options"
            )
        )


def together(link: Link, what: str, work: Callable[[], _Result]) -> _Result:
    """Do something that may fail on one rank alone; if it does, all fail at once, and the link
    stays of use.

    Args:
        what: in words, for the error: "loading its experts".

    Raises:
        ParallelError: on ranks that were well, names those that were not and their reasons.
        Exception: on a rank that failed, its own error.
    """
    error: Exception | None = None
    result: _Result | None = None
    try:
        result = work()
    except Exception as caught:
        if link.over:  # nothing can be agreed on
            raise
        error = caught
    told = link.agree(what, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise link.agreed(error)
    failed = {rank: text for rank, text in enumerate(told) if text is not None}
    if failed:
        reasons: dict[str, list[int]] = {}
        for rank, text in failed.items():
            reasons.setdefault(text, []).append(rank)
        raise link.agreed(
            ParallelError(
                f"rank {link.rank} stops, because {what} failed elsewhere: "
                + "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in reasons.items())
            )
        )
    return result  # type: ignore[return-value]


def _ranks(ranks: list[int]) -> str:
    """`rank 1`, `ranks 0, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

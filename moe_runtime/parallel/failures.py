"""What ranks tell each other when one of them can go no further.

Knows errors and plain data; no links, and not how the telling is done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moe_runtime.errors import ParallelError

__all__ = [
    "Failure",
    "OthersFailedError",
    "RankLostError",
    "failure_of",
    "failures_as_bytes",
    "failures_from_bytes",
]

_LONGEST = 2000  # characters of an error's text: what is told fits into one short message


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One rank's own error.

    Args:
        rank: that failed.
        text: the error's type and message.
    """

    rank: int
    text: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.text}"


class OthersFailedError(ParallelError):
    """This rank was well, others were not: `failures` says which and why, the first one first.

    Empty where a rank went without a word.
    """

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = tuple(failures)


class RankLostError(ParallelError):
    """A call did not come to its end, and no rank has said why: one is dead, or late."""


def failure_of(rank: int, error: BaseException) -> Failure:
    """A rank's error as what others are told."""
    said = str(error)
    said = said if len(said) <= _LONGEST else said[:_LONGEST] + " ..."
    return Failure(
        rank=rank, text=f"{type(error).__name__}: {said}" if said else type(error).__name__
    )


def failures_as_bytes(failures: Sequence[Failure]) -> bytes:
    """JSON in UTF-8."""
    return json.dumps([asdict(one) for one in failures]).encode()


def failures_from_bytes(data: bytes) -> tuple[Failure, ...]:
    """What `failures_as_bytes` made; empty of anything else."""
    try:
        return tuple(
            Failure(rank=int(one["rank"]), text=str(one["text"])) for one in json.loads(data)
        )
    except (ValueError, TypeError, KeyError):
        return ()

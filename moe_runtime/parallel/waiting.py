"""Waiting for a collective of torch.distributed for a while, and going on if it has not ended.

Knows backends' ways; not what is sent, nor what is done meanwhile.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

__all__ = ["came_gloo", "came_other"]

_POLLS = (2e-5, 1e-3)  # seconds between looks at a call, in the beginning and at last


def came_gloo(work: Any, seconds: float) -> bool:
    """Whether a collective has ended in time; raises its error. Gloo's waits may be given up."""
    try:
        work.wait(timedelta(seconds=max(seconds, 0.001)))
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


def came_other(work: Any, seconds: float) -> bool:
    """The same of other backends: NCCL breaks a communicator off whose wait is given up."""
    until = time.monotonic() + seconds
    pause, longest = _POLLS
    while not work.is_completed():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True

"""The process group of a run that torchrun started: joined, watched and left.

Knows torch.distributed and processes; not what ranks compute. The rank and the address come from
torch.distributed's own `env://`, which reads what torchrun sets; nothing is read here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_runtime.errors import ConfigError, ParallelError
from moe_runtime.parallel.group_link import GroupLink

__all__ = ["TERMINATED", "TIMEOUT", "die_with_parent", "process_group", "say_when_terminated"]

TIMEOUT = 120.0  # seconds that a rank waits for the others in one call
TERMINATED = 143  # exit code after SIGTERM, as shells give it
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def process_group(
    *,
    timeout: float = TIMEOUT,
    latency: float = 0.0,
    example: str = "torchrun --nproc-per-node 2 -m moe_runtime generate MODEL --prompts FILE "
    "--expert-parallel coherent --plan x.plan.json",
) -> Iterator[GroupLink]:
    """Join the process group that torchrun describes: NCCL where GPUs are, else gloo.

    Args:
        timeout: seconds; a rank that fails or is dead is noticed at once, one that hangs after
            these.
        latency: as `Link` takes it.
        example: the command to start ranks with, for the error.

    Raises:
        ConfigError: nothing started this process as one of several ranks.
        ParallelError: the ranks did not come together, or one failed later.
    """
    if not timeout > 0.0:
        raise ConfigError(f"timeout is seconds, more than 0, found {timeout}")
    gpu = torch.cuda.is_available()
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo", init_method="env://", timeout=timedelta(seconds=timeout)
        )
    except ValueError as error:
        raise ConfigError(
            f"this process was not started as one of several ranks ({error}). Start it so: "
            f"{example}"
        ) from error
    except (RuntimeError, dist.DistError) as error:
        raise ParallelError(
            f"the ranks did not come together within {timeout:g} s: one did not start, or another "
            f"program has the address ({error})"
        ) from error
    link: GroupLink | None = None
    try:
        with _translated():
            link = GroupLink(device=_device(), timeout=timeout, latency=latency)
            with link.telling():
                yield link
    finally:
        if link is not None:
            link.leave()
        # Where a rank is lost there is nobody to say goodbye to.
        with contextlib.suppress(RuntimeError, dist.DistError):
            dist.destroy_process_group()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """torch.distributed's own errors as ours."""
    try:
        yield
    except dist.DistError as error:
        raise ParallelError(f"a rank was lost: {error}") from error


def _device() -> torch.device:
    """The GPU of this rank, the CPU without one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = dist.get_node_local_rank(fallback_rank=dist.get_rank())
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {dist.get_rank()} is number {number} on this machine, which has "
            f"{torch.cuda.device_count()} GPUs; start as many ranks"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def die_with_parent() -> None:
    """Let the kernel end this process when the launcher that started it is gone (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went before the kernel knew
            os._exit(TERMINATED)


@contextlib.contextmanager
def say_when_terminated() -> Iterator[None]:
    """Inside, a SIGTERM ends the process with a message, also while it waits for other ranks.

    torchrun ends all ranks so when one has failed. A thread waits for the signal, since Python's
    own handlers run only when the call that waits has come back. Call it from the main thread,
    before other threads are started.
    """

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        sys.stderr.write(
            "error: stopped by the launcher: another rank has failed or was ended; see its "
            "message\n"
        )
        sys.stderr.flush()
        os._exit(TERMINATED)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, name="moe-runtime-sigterm", daemon=True).start()
    try:
        yield
    finally:
        # The thread goes on waiting; the signal may go to whoever takes it first.
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

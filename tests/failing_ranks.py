"""Ranks of which some fail at a chosen place, what each of them then says, and when.

Knows links and tiny models; processes that are forked import it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moe_runtime import bundled_model, store
from moe_runtime.parallel import GroupLink, Link, generate
from parallel_models import random_plan, some_prompts, tiny

RANKS = 3
READ_RANGE = store.read_range
# At which call of a layer it fails: one looks at the structure, a self-check is a prefill and three
# steps in each mode.
PLACES = {"structure": 0, "prefill": 1, "self-check": 7, "decode": 4, "between calls": None}
ERRORS = {
    "memory": torch.OutOfMemoryError("no memory for 3 GiB"),
    "assertion": AssertionError("rows have sequences"),
    "interrupt": KeyboardInterrupt(),
}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What came of one rank: error, when it was raised, and errors of later uses."""

    rank: int
    kind: str
    text: str
    at: float
    later: list[str]


def run_failing(link: Link, model: PreTrainedModel, place: str, failing: dict[int, str]) -> None:
    """A coherent run on one rank of three, in which `failing` ranks raise at `place`."""
    with contextlib.ExitStack() as stack:
        if link.rank in failing:
            stack.enter_context(raising(model, place, ERRORS[failing[link.rank]]))
        generate(
            model,
            some_prompts(),
            plan=random_plan(model, RANKS, seed=2),
            link=link,
            max_new_tokens=6,
            stop_tokens=(),
            check="stop" if place == "self-check" else "off",
            keep=keep_failing(link, failing) if place == "between calls" else None,
        )


def keep_failing(link: Link, failing: dict[int, str]) -> Any:
    """Raises on its rank when a token is chosen, in no layer and in no call."""

    def keep(_: int, step: int, __: torch.Tensor) -> None:
        if link.rank in failing and step == 3:
            raise ERRORS[failing[link.rank]]

    return keep


@contextlib.contextmanager
def raising(model: PreTrainedModel, place: str, error: BaseException) -> Iterator[None]:
    """Let the model's third layer raise at a place."""
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls - 1 == PLACES[place]:
            raise error

    handle = model.model.layers[2].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def said_of(link: Link, work: Callable[[], Any], later: list[Callable[[], Any]]) -> Said:
    """Do the work and catch what it raises, as a user's script does that goes on living."""
    kind, text = "none", ""
    try:
        work()
    except BaseException as error:  # noqa: BLE001  whatever it is, it is told of
        kind, text = type(error).__name__, str(error)
    at = time.time()
    after = []
    for one in later:
        try:
            one()
            after.append("fine")
        except Exception as error:  # noqa: BLE001  the same
            after.append(f"{type(error).__name__}: {error}")
    return Said(rank=link.rank, kind=kind, text=text, at=at, later=after)


def amid_a_call(link: GroupLink, failing: int) -> None:
    """Long rows in rounds; one rank runs out of memory when it has sent its own and not received
    the others'.
    """
    rows = torch.zeros(3 * 30_000, 8)
    to = torch.arange(len(rows)) % RANKS
    for turn in range(4):
        if turn == 2 and link.rank == failing:
            name = "_finish" if link.framing == "eager" else "_watched"

            def fail(*_: Any) -> None:
                raise MemoryError("no room for what arrives")

            setattr(link, name, fail)
        with link.telling():
            link.exchange("move", turn, [rows], to)


def unreachable(link: GroupLink, work: Callable[[Link], Any]) -> None:
    """The work, in which rank 1 can send its last word to nobody."""

    def fail(*_: Any) -> None:
        raise RuntimeError("connection closed")

    tell = link._tell

    def telling(failure: Any) -> None:
        link._send = fail  # type: ignore[method-assign, assignment]
        tell(failure)

    link._tell = telling  # type: ignore[method-assign]
    work(link)


def failing_read(link: Link, error: BaseException) -> None:
    """Rank 1 cannot read its experts."""

    def fail(*_: Any) -> int:
        raise error

    if link.rank == 1:
        store.read_range = fail  # type: ignore[assignment]
    try:
        generate(bundled_model(), [[5, 6]], link=link, max_new_tokens=1)
    finally:
        store.read_range = READ_RANGE


def scenarios(model: PreTrainedModel) -> Iterator[tuple[str, str | None, Callable[[Any], Any]]]:
    """(name, framing, work) of each."""

    def run(place: str, failing: dict[int, str]) -> Callable[[Link], Any]:
        return lambda link: run_failing(link, model, place, failing)

    for place in PLACES:
        yield place, None, run(place, {1: "memory"})
    yield "assertion", None, run("decode", {1: "assertion"})
    yield "interrupt", None, run("decode", {1: "interrupt"})
    yield "two at once", None, run("decode", {0: "memory", 2: "assertion"})
    yield "sizes", "sizes", run("decode", {1: "memory"})
    for framing in ("eager", "sizes"):
        yield f"amid a call, {framing}", framing, lambda link: amid_a_call(link, 1)
    yield "no last word", None, lambda link: unreachable(link, run("decode", {1: "memory"}))
    yield "unread shard", None, lambda link: failing_read(link, OSError("the disk is gone"))
    yield "interrupted read", None, lambda link: failing_read(link, KeyboardInterrupt())
    yield "alike", None, lambda link: generate(model, [[4000]], link=link)


def main(_: str, timeout: float) -> None:
    """All scenarios, each on a process group of its own; a JSON line of each on standard output."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    for name, framing, work in scenarios(tiny(4)):
        group = dist.new_group(timeout=timedelta(seconds=timeout))
        link = GroupLink(group, timeout=timeout, framing=framing)
        later = [lambda link=link: link.agree("anything", 1), lambda group=group: GroupLink(group)]
        said = said_of(link, lambda link=link, work=work: work(link), later)
        print(json.dumps({"scenario": name, **asdict(said)}), flush=True)
        dist.barrier()
    dist.destroy_process_group()

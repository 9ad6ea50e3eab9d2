"""Owns network namespaces whose links are shaped in rate: one for each rank, one for the switch.

Needs root. Does not know what ranks do there. Latency is not shaped: netem is not in every kernel.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

_PREFIX = "moert"  # of the names of our own namespaces; the process id follows
_MTU = 9000
# Packets that may pass at once after a pause: few, or small messages would not be shaped; one alone
# leaves a fast link idle while the timer for the next one is late (measured: 0.77 of 1 Gbit/s).
_BURST_PACKETS, _SLOW_BURST_PACKETS, _SLOW = 2, 1, 200e6
_QUEUE = 16 << 20  # bytes that wait for their turn; more than a step sends, so nothing is dropped


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one rank runs: a namespace with one interface and one address."""

    namespace: str
    interface: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `arguments` there."""
        return ["ip", "netns", "exec", self.namespace, *arguments]


@contextmanager
def shaped_network(ranks: int, bits_per_second: float) -> Iterator[list[Place]]:
    """`ranks` namespaces around a switch in a further one, gone afterwards whatever happens.

    Each rank sends and receives at that rate at the same time (a token bucket at both ends of its
    cable). An interrupt or a termination signal cleans up too; what an earlier process left behind
    when it was killed is removed at the start.
    """
    _remove_orphans()
    owner = f"{_PREFIX}{os.getpid()}"
    switch = f"{owner}x"
    places = [
        Place(namespace=f"{owner}r{rank}", interface=f"eth{rank}", address=f"10.99.0.{rank + 1}")
        for rank in range(ranks)
    ]
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        _ip("netns", "add", switch)
        _inside(switch, "link", "add", "switch", "type", "bridge")
        _inside(switch, "link", "set", "switch", "up")
        for place in places:
            _connect(place, switch, bits_per_second)
        yield places
    finally:
        for name in (*(place.namespace for place in places), switch):
            _remove(name)
        signal.signal(signal.SIGTERM, before)


def run_ranks(script: str, ranks: int, rate: float, task: dict[str, Any], folder: Path) -> Any:
    """What rank 0 left in `folder / "out.json"`, of ranks in places of a fresh network.

    Args:
        script: in this folder, run as `SCRIPT TASK.json RANK ADDRESS`.
        rate: bits a second.
        task: told to every rank, with `ranks` and `folder`.

    Raises:
        RuntimeError: a rank ended with an error.
    """
    told = folder / "task.json"
    told.write_text(json.dumps({**task, "ranks": ranks, "folder": str(folder)}))
    path = str(Path(__file__).with_name(script))
    with shaped_network(ranks, rate) as places:
        started = [
            subprocess.Popen(
                place.command([sys.executable, path, str(told), str(rank), places[0].address]),
                env={
                    **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": place.interface,
                    "TORCH_CPP_LOG_LEVEL": "ERROR",
                },
            )
            for rank, place in enumerate(places)
        ]  # fmt: skip
        try:
            codes = [one.wait(timeout=900) for one in started]
        finally:
            for one in started:
                if one.poll() is None:
                    one.kill()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    return json.loads((folder / "out.json").read_text())


def burst_bytes(bits_per_second: float) -> int:
    """Bytes that may pass a link at once after a pause."""
    packets = _SLOW_BURST_PACKETS if bits_per_second <= _SLOW else _BURST_PACKETS
    return packets * _MTU + 100


def _connect(place: Place, switch: str, bits_per_second: float) -> None:
    """A namespace with a shaped cable to the switch."""
    port = f"port{place.interface}"
    _ip("netns", "add", place.namespace)
    _inside(
        place.namespace, "link", "add", place.interface, "mtu", str(_MTU), "type", "veth",
        "peer", "name", port, "mtu", str(_MTU), "netns", switch,
    )  # fmt: skip
    _inside(switch, "link", "set", port, "master", "switch")
    _inside(place.namespace, "addr", "add", f"{place.address}/24", "dev", place.interface)
    for namespace, interface in (
        (place.namespace, "lo"), (place.namespace, place.interface), (switch, port),
    ):  # fmt: skip
        _inside(namespace, "link", "set", interface, "up")
    for namespace, interface in ((place.namespace, place.interface), (switch, port)):
        _run(
            "tc", "-netns", namespace, "qdisc", "add", "dev", interface, "root", "tbf",
            "rate", f"{bits_per_second:.0f}bit", "burst", str(burst_bytes(bits_per_second)),
            "limit", str(_QUEUE),
        )  # fmt: skip


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit("terminated")


def _remove_orphans() -> None:
    """Our namespaces of processes that are no more."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    for name in (line.split()[0] for line in listed.stdout.splitlines() if line.strip()):
        digits = name.removeprefix(_PREFIX).split("r")[0].split("x")[0]
        if name.startswith(_PREFIX) and digits.isdigit() and not _alive(int(digits)):
            _remove(name)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(namespace: str) -> None:
    """With it go its interfaces and their other ends; silent where it was never made."""
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _inside(namespace: str, *arguments: str) -> None:
    _ip("-netns", namespace, *arguments)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(arguments)}: {done.stderr.strip()}; this needs root")

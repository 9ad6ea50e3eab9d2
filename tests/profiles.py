"""Hardware profiles made up for tests: a host, and a GPU beside it."""

from __future__ import annotations

from dataclasses import replace

from moe_runtime.hardware import ExpertShape, HardwareProfile
from moe_runtime.hardware.cache import machine_key
from moe_runtime.hardware.values import (
    CopyTime,
    DeviceFacts,
    DiskFacts,
    DiskRead,
    ExpertTime,
    HostFacts,
    MemoryRate,
    Note,
    Spread,
)


def around(value: float) -> Spread:
    return Spread(median=value, low=value / 2, high=value * 2, samples=5)


def host_profile() -> HardwareProfile:
    """A host whose disk gives 1 GB/s to each thread up to two, and whose memory gives 20 GB/s."""
    sizes = (4096, 1 << 20, 4 << 20)
    return HardwareProfile(
        machine=machine_key(),
        measured="2026-11-24T20:00:00+00:00",
        seconds=4.5,
        load_average=0.25,
        host=HostFacts(
            processor="Processor [bold]",
            cores=2,
            compute_threads=2,
            memory_bytes=16 << 30,
            cache_bytes=32 << 20,
            version="2.13.0",
        ),
        devices=(),
        disk=DiskFacts(
            path="/data",
            mount="/",
            filesystem="ext4",
            file_bytes=128 << 20,
            existing=False,
            direct=True,
        ),
        expert=ExpertShape(),
        memory=(MemoryRate(place="host", kind="read", threads=2, rate=around(20e9)),),
        reads=tuple(
            DiskRead(
                nbytes=nbytes,
                threads=threads,
                seconds=around(nbytes / 1e9),
                rate=around(threads * 1e9),
            )
            for threads in (1, 2)
            for nbytes in sizes
        ),
        copies=(),
        experts=tuple(
            ExpertTime(place="host", tokens=tokens, seconds=around(seconds))
            for tokens, seconds in ((1, 1e-3), (4, 2e-3), (16, 5e-3))
        ),
        notes=(Note(what="GPUs", why="there is none"),),
    )


def gpu_profile() -> HardwareProfile:
    """The host with a GPU behind a link of 25 GB/s (16 lanes of generation 4)."""
    plain = host_profile()
    device = DeviceFacts(
        name="GPU",
        cuda="cuda:0",
        memory_bytes=24 << 30,
        free_bytes=23 << 30,
        driver="600.1",
        link_generation=4,
        link_width=16,
        peer_links=None,
    )
    return replace(
        plain,
        devices=(device,),
        copies=tuple(
            CopyTime(place="cuda:0", nbytes=n, pinned=pinned, seconds=around(1e-5 + n / rate))
            for pinned, rate in ((True, 25e9), (False, 6e9))
            for n in (64 << 10, 1 << 20, 16 << 20)
        ),
        experts=(
            *plain.experts,
            *(ExpertTime(place="cuda:0", tokens=n, seconds=around(5e-5)) for n in (1, 4, 16)),
        ),
    )

"""The hardware profile: as a value, as a file, and as it is measured on whatever there is."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import ConfigError
from moe_runtime.hardware import (
    ExpertShape,
    HardwareProfile,
    cached_path,
    cached_profile,
    disk,
    load_profile,
    measure,
    measure_hardware,
    profile_from_dict,
    profile_to_dict,
    save_profile,
)
from moe_runtime.hardware import cache as profile_cache
from moe_runtime.hardware.compute import copy_times, device_memory_rates, expert_times
from moe_runtime.hardware.curves import seconds_at
from moe_runtime.hardware.host import cache_bytes, memory_rates
from moe_runtime.hardware.measure import doubts
from moe_runtime.hardware.values import DeviceFacts, ExpertTime, Note, Spread
from moe_runtime.places import MissCost, miss_cost
from profiles import around, gpu_profile, host_profile

SMALL = ExpertShape(hidden=64, intermediate=32, dtype="float32")
MIB = 1 << 20

# -- the value -----------------------------------------------------------------------------------


@given(
    points=st.dictionaries(st.integers(1, 1 << 30), st.floats(1e-6, 10), min_size=1, max_size=6),
    sizes=st.lists(st.integers(1, 1 << 32), min_size=2, max_size=2).map(sorted),
)
def test_more_work_never_takes_less_time(points: dict[int, float], sizes: list[int]) -> None:
    measured = [(float(size), seconds) for size, seconds in points.items()]
    less, more = (seconds_at(measured, size) for size in sizes)
    assert 0 < less <= more * (1 + 1e-12)


def test_times_are_read_between_the_points() -> None:
    profile = gpu_profile()
    assert profile.expert_seconds("host", 1) == 1e-3
    assert profile.expert_seconds("host", 10) == pytest.approx(3.5e-3)
    assert profile.expert_seconds("host", 32) == pytest.approx(10e-3)
    half = profile.expert.nbytes // 2
    assert profile.expert_seconds("host", 1, nbytes=half) == pytest.approx(0.5e-3)
    copied = profile.copy_seconds("cuda:0", 8 * MIB)
    assert copied == pytest.approx(1e-5 + 8 * MIB / 25e9)
    assert profile.copy_seconds("cuda:1", 8) is None
    assert profile.read_seconds(8 * MIB, threads=1) == pytest.approx(8 * MIB / 1e9)
    assert profile.read_seconds(8 * MIB, threads=7) == pytest.approx(8 * MIB / 2e9)
    assert profile.memory_rate("host") == 20e9
    assert profile.memory_rate("host", "copy") is None
    assert profile.devices[0].link_bytes_per_second == pytest.approx(31.5e9, rel=0.01)


def test_a_miss_costs_what_the_profile_says() -> None:
    profile = gpu_profile()
    found = miss_cost(profile, "cuda:0", nbytes=profile.expert.nbytes, tokens=4, row_bytes=4096)
    there = profile.copy_seconds("cuda:0", 4 * 4096)
    assert there is not None
    assert found == MissCost(
        fetch=profile.copy_seconds("cuda:0", profile.expert.nbytes) or 0,
        device=5e-5,
        host=2e-3 + 2 * there,
    )
    assert miss_cost(host_profile(), "cuda:0", nbytes=1, tokens=1, row_bytes=1) is None


@pytest.mark.parametrize("values", [(0.0, 1.0, 2.0), (2.0, 1.0, 3.0), (1.0, 2.0, float("inf"))])
def test_measurements_that_cannot_be_are_refused(values: tuple[float, float, float]) -> None:
    low, median, high = values
    with pytest.raises(ConfigError, match="measure again"):
        Spread(low=low, median=median, high=high, samples=3)


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"intermediate": -1}, {"dtype": "int3"}])
def test_an_expert_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expert"):
        ExpertShape(**wrong)


# -- the file ------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    for profile in (host_profile(), gpu_profile(), replace(host_profile(), disk=None)):
        assert load_profile(save_profile(profile, tmp_path / "p.json")) == profile
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return [
        leaf
        for key, value in items
        for leaf in (
            _leaves(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]
        )
    ]


@given(data=st.data())
def test_any_damaged_field_is_named(data: st.DataObject) -> None:
    plain = profile_to_dict(gpu_profile())
    path = data.draw(st.sampled_from(_leaves(plain)))
    inner = plain
    for key in path[:-1]:
        inner = inner[key]
    damage = data.draw(st.sampled_from(["type", "missing", "extra"]))
    if damage == "type":
        inner[path[-1]] = {"no": "value"}
    elif damage == "missing":
        del inner[path[-1]]
    else:
        inner["unheard_of"] = 1
    with pytest.raises(ConfigError) as caught:
        profile_from_dict(json.loads(json.dumps(plain)))
    assert ("unheard_of" if damage == "extra" else str(path[-1])) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "JSON"),
        ("[1]", "format"),
        ('{"format": "moe-runtime.hardware", "version": 99}', "--refresh"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_files_that_are_no_profiles(tmp_path: Path, text: str, hint: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=hint) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "none.json")


@pytest.mark.parametrize("number", [-1.0, float("inf"), float("nan"), True, "4"])
def test_numbers_that_are_none(number: object) -> None:
    plain = profile_to_dict(host_profile()) | {"seconds": number}
    with pytest.raises(ConfigError, match=r"profile\.seconds"):
        profile_from_dict(plain)


def test_each_kind_of_machine_has_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached_profile(tmp_path) is None
    save_profile(host_profile(), cached_path(tmp_path))
    assert cached_profile(tmp_path) == host_profile()
    monkeypatch.setattr(profile_cache, "usable_cores", lambda: 64)
    assert cached_profile(tmp_path) is None


def test_the_cache_is_where_the_platform_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, inside in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(sys, "platform", platform)
        assert cached_path().parent == Path.home() / inside / "moe-runtime"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ConfigError, match="--cache-dir"):
        cached_path()


def test_only_a_profile_that_was_asked_for_must_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(profile_cache, "cache_folder", lambda: tmp_path)
    assert profile_cache.known_profile(None) is None
    assert profile_cache.known_profile("auto") is None
    kept = save_profile(host_profile(), cached_path())
    assert profile_cache.known_profile("auto") == host_profile()
    other = save_profile(replace(host_profile(), machine="other"), tmp_path / "other.json")
    assert profile_cache.known_profile(str(other)) is not None
    assert "another kind of machine" in caplog.text

    def forbidden(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", forbidden)
        assert profile_cache.known_profile("auto") is None
    assert "Permission denied" in caplog.text
    kept.write_text("{")
    assert profile_cache.known_profile("auto") is None
    assert "not used" in caplog.text
    with pytest.raises(ConfigError, match="not a JSON file"):
        profile_cache.known_profile(str(kept))


def reasons(notes: list[Note]) -> str:
    return "\n".join(f"{note.what}: {note.why}" for note in notes)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "READ_SIZES", (4096, MIB))
    monkeypatch.setattr(disk, "READ_THREADS", (1, 2))
    monkeypatch.setattr(disk, "_WINDOW_SECONDS", 0.002)


# -- memory and compute --------------------------------------------------------------------------


def test_memory_is_measured_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_runtime.hardware.host.usable_cores", lambda: 3)
    rates = list(memory_rates(nbytes=2 * MIB))
    assert [(r.threads, r.kind) for r in rates] == [
        (1, "read"),
        (1, "copy"),
        (2, "read"),
        (2, "copy"),
    ]
    assert all(1e6 < rate.rate.median < 1e13 for rate in rates)
    assert cache_bytes() >= 0
    monkeypatch.setattr("moe_runtime.hardware.host.free_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="125 bytes"):
        next(memory_rates())


def test_experts_and_copies_are_timed_on_any_device() -> None:
    for device, place in ((torch.device("cpu"), "host"), (torch.device("meta"), "meta")):
        times = list(expert_times(device, SMALL, tokens=(1, 8), pool_bytes=8 * SMALL.nbytes))
        assert [(time.place, time.tokens) for time in times] == [(place, 1), (place, 8)]
        copies = list(copy_times(device, pinned=False, sizes=(64, 4096)))
        assert [(c.place, c.nbytes, c.pinned) for c in copies] == [
            (place, 64, False),
            (place, 4096, False),
        ]
        assert [rate.kind for rate in device_memory_rates(device, nbytes=4096)] == ["read", "copy"]


def test_no_room_for_two_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_runtime.hardware.compute.free_memory", lambda device: SMALL.nbytes)
    with pytest.raises(MemoryError, match="two experts"):
        next(expert_times(torch.device("cpu"), SMALL))


# -- all of it -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_machine_is_measured_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that cannot page-lock memory and runs out of it: notes, and the rest is there."""
    fake = DeviceFacts(
        name="meta",
        cuda="meta",
        memory_bytes=1,
        free_bytes=1,
        driver="",
        link_generation=None,
        link_width=None,
        peer_links=None,
    )

    def exhausted(device: torch.device) -> Any:
        raise torch.OutOfMemoryError(f"{device} out of memory\nlong advice")

    def unpinned(device: torch.device, *, pinned: bool) -> Any:
        if pinned:
            raise RuntimeError("cannot page-lock")
        return copy_times(device, pinned=False, sizes=(4096,))

    monkeypatch.setattr(measure, "find_devices", lambda: ([fake], []))
    monkeypatch.setattr(measure, "memory_rates", lambda: memory_rates(nbytes=MIB, most_threads=1))
    monkeypatch.setattr(measure, "device_memory_rates", exhausted)
    monkeypatch.setattr(measure, "copy_times", unpinned)
    told: list[tuple[str, float]] = []
    profile = measure_hardware(
        path=tmp_path,
        expert=SMALL,
        file_bytes=8 * MIB,
        progress=lambda what, share: told.append((what, share)),
    )
    assert profile_from_dict(profile_to_dict(profile)) == profile
    assert {time.place for time in profile.experts} == {"host", "meta"}
    assert {time.tokens for time in profile.experts} == {1, 4, 16, 64}
    assert [copy.pinned for copy in profile.copies] == [False]
    notes = [note for note in profile.notes if not note.what.startswith("doubtful")]
    assert reasons(notes) == (
        "copies from pinned memory to meta: cannot page-lock\nmemory of meta: meta out of memory"
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    with pytest.raises(ConfigError, match="no such file"):
        measure_hardware(path=tmp_path / "nowhere")


def test_what_cannot_be_right_is_doubted() -> None:
    sound = gpu_profile()
    assert doubts(sound) == []

    def faster(profile: HardwareProfile) -> HardwareProfile:
        fast = replace(profile.copies[2], seconds=around(profile.copies[2].nbytes / 90e9))
        return replace(profile, copies=(*profile.copies[:2], fast, *profile.copies[3:]))

    found = reasons(doubts(faster(sound)))
    assert "90.0 GB/s measured, but the link carries 31.5" in found
    experts = (*sound.experts, ExpertTime(place="host", tokens=64, seconds=around(1e-3)))
    found = reasons(doubts(replace(sound, experts=experts)))
    assert "64 tokens took less time than 16 tokens" in found
    reads = (*sound.reads[:2], replace(sound.reads[2], seconds=around(1e-6)), *sound.reads[3:])
    assert "4.00 MiB took less time" in reasons(doubts(replace(sound, reads=reads)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    profile = measure_hardware(path=tmp_path)
    name = profile.devices[0].cuda
    assert name is not None
    assert profile.memory_rate(name)
    assert profile.copy_seconds(name, 9 * MIB)
    assert profile.expert_seconds(name, 1)

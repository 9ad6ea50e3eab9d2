"""Devices as the driver tells of them, or does not: a pynvml that is absent, old, or made up."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime.hardware.devices import find_devices
from moe_runtime.hardware.values import Note


class FakeNvml(ModuleType):
    """pynvml of a machine with one GPU; what is in `broken` raises that code."""

    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    class NVMLError(Exception):
        """As in pynvml: a code and a text."""

        def __init__(self, value: int) -> None:
            super().__init__(f"code {value}")
            self.value = value

    def __init__(self, broken: dict[str, int] | None = None, *, older: bool = False) -> None:
        super().__init__("pynvml")
        self.shut = False
        broken = broken or {}
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: b"470.1" if older else "600.1",
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
            "nvmlDeviceGetUUID": lambda handle: "GPU-aa",
            "nvmlDeviceGetName": lambda handle: b"Fake GPU" if older else "Fake GPU",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=24, free=23, used=1),
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 4,
            "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
            "nvmlDeviceGetNvLinkState": lambda handle, link: int(link < 2),
        }
        if older:
            del answers["nvmlDeviceGetNvLinkState"]
            del answers["nvmlDeviceGetMaxPcieLinkWidth"]
        for name, answer in answers.items():
            setattr(self, name, self._failing(broken[name]) if name in broken else answer)

    def _failing(self, code: int) -> Callable[..., Any]:
        def fail(*arguments: Any) -> Any:
            raise self.NVMLError(code)

        return fail

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shut = True


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def reasons(notes: list[Note]) -> str:
    return "\n".join(f"{note.what}: {note.why}" for note in notes)


@pytest.mark.usefixtures("no_cuda")
def test_without_pynvml_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    devices, notes = find_devices()
    assert devices == []
    assert "pip install 'moe-runtime[gpu]'" in reasons(notes)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("broken", "hint"),
    [
        ({"nvmlInit": 12}, "no NVIDIA driver"),
        ({"nvmlInit": 9}, "no NVIDIA driver"),
        ({"nvmlInit": 18}, "restart"),
        ({"nvmlInit": 999}, "does not start: code 999"),
        ({"nvmlDeviceGetCount": 4}, "the driver answered: code 4"),
    ],
)
def test_a_driver_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, broken: dict[str, int], hint: str
) -> None:
    nvml = FakeNvml(broken)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    devices, notes = find_devices()
    assert devices == []
    assert hint in reasons(notes)
    assert nvml.shut == ("nvmlInit" not in broken)


@pytest.mark.usefixtures("no_cuda")
def test_an_old_driver_leaves_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"nvmlDeviceGetMaxPcieLinkGeneration": 13, "nvmlDeviceGetMemoryInfo": 4}
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(broken, older=True))
    (device,), notes = find_devices()
    assert (device.name, device.driver, device.cuda) == ("Fake GPU", "470.1", None)
    assert (device.link_generation, device.link_width, device.peer_links) == (None, None, None)
    assert device.link_bytes_per_second is None
    assert "link generation (code 13)" in reasons(notes)
    assert "PyTorch cannot use it" in reasons(notes)


def test_driver_and_pytorch_speak_of_the_same_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch sees two, the driver's second is its first, and one the driver does not tell of."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    uuids = ["bb", "aa"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda at: SimpleNamespace(uuid=uuids[at])
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: (5, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: f"number {at}")
    devices, notes = find_devices()
    assert [(d.name, d.cuda, d.memory_bytes) for d in devices] == [
        ("Fake GPU", "cuda:1", 24),
        ("number 0", "cuda:0", 6),
    ]
    assert devices[0].peer_links == 2
    assert notes == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    devices, notes = find_devices()
    assert [d.cuda for d in devices] == ["cuda:0", "cuda:1"]
    assert "links and driver" in reasons(notes)


def test_what_pytorch_says_of_an_old_driver_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    _, notes = find_devices()
    assert reasons(notes) == ("computing on a GPU: The NVIDIA driver on your system is too old")

"""GPUs and their links as the driver describes them, through pynvml (nvidia-ml-py).

Measures nothing. Whatever driver or package is missing becomes a note.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from moe_runtime.hardware.values import DeviceFacts, Note

__all__ = ["find_devices"]

_MOST_LINKS = 18  # NVLinks of one device


def find_devices() -> tuple[list[DeviceFacts], list[Note]]:
    """Devices that the driver or PyTorch knows, and what could not be learned, with the reason."""
    notes: list[Note] = []
    names = _cuda_names(notes)
    devices = _from_driver(names, notes)
    known = {device.cuda for device in devices}
    # Without pynvml PyTorch still knows name and memory.
    devices += [_from_torch(cuda) for cuda in names.values() if cuda not in known]
    return devices, notes


def _cuda_names(notes: list[Note]) -> dict[str, str]:
    """Uuid of each device that PyTorch can use -> its name there."""
    with warnings.catch_warnings(record=True) as caught:
        # PyTorch says by a warning that a driver is too old for it.
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            names = {
                str(getattr(torch.cuda.get_device_properties(at), "uuid", at)): f"cuda:{at}"
                for at in range(count)
            }
        except RuntimeError as error:
            names = {}
            notes.append(Note(what="computing on a GPU", why=_first_line(error)))
    notes += [Note(what="computing on a GPU", why=_first_line(w.message)) for w in caught]
    return names


def _from_driver(names: dict[str, str], notes: list[Note]) -> list[DeviceFacts]:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        if names:
            why = "pynvml is not installed: pip install 'moe-runtime[gpu]'"
            notes.append(Note(what="links and driver of the GPUs", why=why))
        elif not notes:
            why = "PyTorch sees none, and pynvml is not installed to look further"
            notes.append(Note(what="GPUs", why=f"{why}: pip install 'moe-runtime[gpu]'"))
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        notes.append(Note(what="GPUs", why=_no_driver(nvml, error)))
        return []
    try:
        return list(_each(nvml, names, notes))
    except nvml.NVMLError as error:
        notes.append(Note(what="GPUs", why=f"the driver answered: {error}"))
        return []
    finally:
        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlShutdown()


def _no_driver(nvml: Any, error: Exception) -> str:
    code = getattr(error, "value", None)
    if code in (
        getattr(nvml, "NVML_ERROR_LIBRARY_NOT_FOUND", "none"),
        getattr(nvml, "NVML_ERROR_DRIVER_NOT_LOADED", "none"),
    ):
        return f"no NVIDIA driver is running ({error})"
    if code == getattr(nvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", "none"):
        return f"driver and library are of different versions ({error}): restart the machine"
    return f"the driver does not start: {error}"


def _each(nvml: Any, names: dict[str, str], notes: list[Note]) -> Iterator[DeviceFacts]:
    silent: set[str] = set()

    def ask(what: str, function: str, *arguments: Any) -> Any:
        """The driver's answer; None where it is too old, or may not, or cannot give one."""
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError, AttributeError) as error:
            silent.add(f"{what} ({error})")
            return None

    driver = _text(ask("driver version", "nvmlSystemGetDriverVersion") or "")
    for index in range(int(nvml.nvmlDeviceGetCount())):
        handle = ask(f"GPU {index}", "nvmlDeviceGetHandleByIndex", index)
        if handle is None:
            continue
        uuid = _text(ask("uuid", "nvmlDeviceGetUUID", handle) or "")
        memory = ask("memory", "nvmlDeviceGetMemoryInfo", handle)
        cuda = names.get(uuid.removeprefix("GPU-"))
        if cuda is None:
            why = "PyTorch cannot use it (built without CUDA, hidden, or an old driver)"
            notes.append(Note(what=f"speed of GPU {index}", why=why))
        yield DeviceFacts(
            name=_text(ask("name", "nvmlDeviceGetName", handle) or "unknown GPU"),
            cuda=cuda,
            memory_bytes=0 if memory is None else int(memory.total),
            free_bytes=0 if memory is None else int(memory.free),
            driver=driver,
            link_generation=ask("link generation", "nvmlDeviceGetMaxPcieLinkGeneration", handle),
            link_width=ask("link width", "nvmlDeviceGetMaxPcieLinkWidth", handle),
            peer_links=_peer_links(nvml, handle),
        )
    if silent:
        notes.append(Note(what="from the driver", why="; ".join(sorted(silent))))


def _peer_links(nvml: Any, handle: Any) -> int | None:
    """Active NVLinks; a device without any refuses to be asked."""
    active = 0
    for link in range(_MOST_LINKS):
        try:
            active += int(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except (nvml.NVMLError, AttributeError):
            return active or None
    return active


def _from_torch(cuda: str) -> DeviceFacts:
    index = int(cuda.removeprefix("cuda:"))
    free, total = torch.cuda.mem_get_info(index)
    return DeviceFacts(
        name=torch.cuda.get_device_name(index),
        cuda=cuda,
        memory_bytes=int(total),
        free_bytes=int(free),
        driver="",
        link_generation=None,
        link_width=None,
        peer_links=None,
    )


def _text(value: Any) -> str:
    """Older bindings answer with bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _first_line(message: object) -> str:
    return str(message).strip().split("\n", 1)[0]

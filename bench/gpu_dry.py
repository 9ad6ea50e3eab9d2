"""Owns what stands where a GPU would in a dry run: a device over CPU memory.

Does not know what is measured.
"""

from __future__ import annotations

from moe_runtime import lifecycle
from moe_runtime.device import CpuDevice, Device

__all__ = ["HostAsDevice", "stand_in"]


class HostAsDevice(CpuDevice):
    """CPU memory taken for a device's: the runtime goes the ways that it goes on a GPU.

    Copies are done at once, so that it finds no wrong order of copies (`tests/later_device.py`
    does that).
    """

    is_cpu = False


def stand_in() -> None:
    """Let `device="cuda"` mean a `HostAsDevice` from now on, in this process."""

    def opened(name: str) -> Device:
        del name
        return HostAsDevice()

    lifecycle.open_device = opened

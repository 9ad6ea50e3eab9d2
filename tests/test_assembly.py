"""A runtime's parts are made from one reading of what they depend on."""

from __future__ import annotations

import pytest

import later_device
import moe_runtime
from moe_runtime.hardware.values import HardwareProfile
from tiny import tiny_model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("budget", ["auto", "50%"])
def test_the_hardware_profile_is_read_once(
    monkeypatch: pytest.MonkeyPatch, device: str, budget: str
) -> None:
    """Budget and host execution go by one profile, and its warnings are said once."""
    asked: list[str | None] = []

    def known(named: str | None) -> HardwareProfile | None:
        asked.append(named)
        return None

    monkeypatch.setattr("moe_runtime.assembly.known_profile", known)
    if device == "cuda":
        later_device.install(monkeypatch)
    moe_runtime.attach(tiny_model(), expert_budget=budget, device=device, hardware="x.json")
    assert asked == ["x.json"]

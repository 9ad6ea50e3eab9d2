"""The hardware as measured: a profile of this machine, made, kept and asked.

Knows no model and no routing.
"""

from moe_runtime.hardware.cache import (
    cached_path,
    cached_profile,
    known_profile,
    load_profile,
    profile_from_dict,
    profile_to_dict,
    save_profile,
)
from moe_runtime.hardware.measure import measure_hardware
from moe_runtime.hardware.values import ExpertShape, HardwareProfile

__all__ = [
    "ExpertShape",
    "HardwareProfile",
    "cached_path",
    "cached_profile",
    "known_profile",
    "load_profile",
    "measure_hardware",
    "profile_from_dict",
    "profile_to_dict",
    "save_profile",
]

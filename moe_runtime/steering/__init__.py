"""Find cognitive experts, reinforce them while a model runs, and tell whether it helped (RICE).

Owns the names that users import; the parts are in its modules.
"""

from moe_runtime.steering.attach import SteeringHandle, steer
from moe_runtime.steering.files import (
    SteeredModel,
    SteeringFile,
    read_steering,
    write_steering,
)
from moe_runtime.steering.identification import Identification
from moe_runtime.steering.identify import identify
from moe_runtime.steering.values import Method, Steering

__all__ = [
    "Identification",
    "Method",
    "SteeredModel",
    "Steering",
    "SteeringFile",
    "SteeringHandle",
    "identify",
    "read_steering",
    "steer",
    "write_steering",
]

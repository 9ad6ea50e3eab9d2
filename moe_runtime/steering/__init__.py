"""Find cognitive experts, reinforce them while a model runs, and tell whether it helped (RICE).

Owns the names that users import; the parts are in its modules.
"""

from moe_runtime.steering.values import Method, Steering

__all__ = ["Method", "Steering"]

"""The expert MLP over slots: `reference` is the specification, the others compute the same faster.

Imports nothing of this project.
"""

from moe_runtime.kernels.cpu import bags_are_fast, decode_bags, decode_loop
from moe_runtime.kernels.grouped import grouped_experts
from moe_runtime.kernels.reference import ExpertForm, expert_mlp

__all__ = [
    "ExpertForm",
    "bags_are_fast",
    "decode_bags",
    "decode_loop",
    "expert_mlp",
    "grouped_experts",
]

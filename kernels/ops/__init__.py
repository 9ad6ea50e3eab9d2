"""The expert MLP over slots: `reference` is the specification, the others compute the same faster.

`slot_experts` is the whole layer. Imports nothing of this project.
"""

from moe_runtime.kernels.cpu import bags_are_fast, decode_bags, decode_loop, rows_of_experts
from moe_runtime.kernels.dispatch import combined, contributions, slot_experts, triton_takes
from moe_runtime.kernels.gate import Gate, recognise
from moe_runtime.kernels.grouped import grouped_experts
from moe_runtime.kernels.reference import ExpertForm, combine, expert_mlp, slot_mlp

__all__ = [
    "ExpertForm",
    "Gate",
    "bags_are_fast",
    "combine",
    "combined",
    "contributions",
    "decode_bags",
    "decode_loop",
    "expert_mlp",
    "grouped_experts",
    "recognise",
    "rows_of_experts",
    "slot_experts",
    "slot_mlp",
    "triton_takes",
]

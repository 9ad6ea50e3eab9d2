"""Expert placement (`moe_runtime.placement`): which expert lies on which device, and the proof.

Takes routing traces or counts, gives plans. Does not know the cache; its solvers do not import
torch.
"""

from moe_runtime.placement.plan import Certificate, LayerPlan, Plan
from moe_runtime.placement.topology import Topology

__all__ = ["Certificate", "LayerPlan", "Plan", "Topology"]

"""Expert placement (`moe_runtime.placement`): which expert lies on which device, and the proof.

What will live here: the placement problem and plan files, inter-layer affinity, costs and bounds,
the sweep and the integer-program solvers, topologies, exporters and checkpoint baking. Nothing of
it exists yet. It will not know the cache, and its solvers will not import torch.
"""

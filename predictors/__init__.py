"""Routing predictors (`moe_runtime.predictors`): which experts a token will need next.

What will live here: frequency, transition, gate look-ahead and routing-path predictors, their
training and their evaluation on recorded traces. Nothing of it exists yet. It will not know the
cache, the executor or placement.
"""

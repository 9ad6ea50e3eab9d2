"""How experts lie in slots: as the model has them, or in blocks of rows, for sums of rows.

Chosen once from the spec, the device and the options, never from what is measured, so that results
do not depend on the run. Knows no cache.
"""

from __future__ import annotations

import itertools

from moe_runtime.checkpoint import ExpertMap
from moe_runtime.errors import UnsupportedModelError
from moe_runtime.kernels import bags_are_fast
from moe_runtime.model_spec import MoESpec
from moe_runtime.slots import RowBlocks

__all__ = ["largest_whole_row", "lies_by_rows", "row_blocks"]


def lies_by_rows(spec: MoESpec, layout: str, *, on_cpu: bool, exact: bool, fits: bool) -> bool:
    """Whether all weights are to lie in blocks of rows.

    Args:
        layout: `"native"`, `"rows"` or `"auto"`.
        fits: whether the budget holds every expert.
    """
    if any(layer.modules for layer in spec.layers):
        return False  # each expert computes for itself, with its weights as it knows them
    if not on_cpu or exact or layout == "native" or (layout == "auto" and not fits):
        return False
    dtypes = {param.dtype for params in spec.groups for param in params}
    return all(bags_are_fast(dtype) for dtype in dtypes)


def row_blocks(spec: MoESpec, *, by_rows: bool) -> tuple[RowBlocks | None, ...]:
    """For each expert shape how its slots hold weights."""
    found: dict[int, bool] = {}
    for position, layer in enumerate(spec.layers):
        if found.setdefault(spec.group_of(position), layer.transposed) != layer.transposed:
            raise UnsupportedModelError(
                f"{layer.path}: experts of one shape, but weights in two orientations"
            )
    if not by_rows:
        return (None,) * len(spec.groups)
    return tuple(RowBlocks(transposed=found[group]) for group in range(len(spec.groups)))


def largest_whole_row(spec: MoESpec, experts: ExpertMap, *, by_rows: bool) -> int:
    """Bytes of the largest row (or pair of rows) that must be read whole to be converted."""
    largest = 0
    for position, layer in enumerate(spec.layers):
        for segment in itertools.chain.from_iterable(experts.segments[position]):
            row = segment.nbytes // segment.shape[0] * (2 if segment.interleaved else 1)
            converted = segment.dtype != layer.params[segment.param].dtype
            if converted or segment.transposed or segment.interleaved or by_rows:
                largest = max(largest, row)
    return largest

"""KTransformers: counts made up so that its choice of GPU experts is the plan's.

Rules of kt-kernel under SGLang as of November 2026. Does not know how a plan was made.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import numpy as np
from moe_runtime.placement.export_base import Advice, Exporter, Extras, Target, read_data
from moe_runtime.placement.export_sglang import read_counts, write_counts
from moe_runtime.placement.plan import Plan
from numpy.typing import NDArray

from moe_runtime.core import IntArray
from moe_runtime.errors import PlanError

__all__ = ["KTRANSFORMERS", "VERSION", "gpu_share", "read_gpu_experts", "validate_gpu_experts"]

VERSION = "kt-kernel of November 2026"
# The engine sums counts as float32, which is exact far above this; no measured count is carried.
_CHOSEN = 1_000_000


def _wanted(plan: Plan) -> NDArray[np.bool_]:
    return np.array([[tier == "device" for tier in layer.tiers] for layer in plan.layers])


def _write(plan: Plan, path: Path, extras: Extras) -> None:
    target = Target.of(plan, extras, whole_model=True)
    counts: IntArray = _wanted(plan).astype(np.int64) * _CHOSEN
    write_counts(path, counts, target, steps=True)


def read_gpu_experts(path: Path, target: Target, number: int) -> NDArray[np.bool_]:
    """Bool `[L, E]`: the `number` experts of the highest counts over all layers.

    Raises:
        PlanError: the engine would refuse the file, or choose among equal counts.
    """
    data = read_data(path)
    value = data.get("logical_count") if isinstance(data, dict) else data
    if isinstance(value, np.ndarray) and value.ndim != 3:
        raise PlanError(
            f"logical_count must have 3 dimensions [steps, layers, experts], found {value.ndim}"
        )
    counts = read_counts(path, target)
    order = np.sort(counts, axis=None)[::-1]
    if not 0 <= number <= len(order):
        raise PlanError(f"{number} experts on the GPU, but there are {len(order)}")
    if 0 < number < len(order) and order[number - 1] == order[number]:
        raise PlanError(
            f"the {number} highest counts are not {number} experts: several have "
            f"{order[number]}, and the engine would take any of them"
        )
    least = order[number - 1] if number else order[0] + 1
    chosen: NDArray[np.bool_] = counts >= least
    return chosen


def validate_gpu_experts(path: Path, target: Target, number: int) -> None:
    """PlanError unless KTransformers takes `number` GPU experts from the file without a tie."""
    read_gpu_experts(path, target, number)


def _check(plan: Plan, path: Path, extras: Extras) -> None:
    wanted = _wanted(plan)
    target = Target.of(plan, extras, whole_model=True)
    found = read_gpu_experts(path, target, int(wanted.sum()))
    different = np.argwhere(found != wanted)
    if len(different):
        at, expert = (int(i) for i in different[0])
        raise PlanError(
            f"layer {plan.layer_ids[at]} expert {expert}: tier {plan.layers[at].tiers[expert]!r} "
            "in the plan, but not so in the file; export the plan again"
        )


def gpu_share(number: int, experts: int) -> str:
    """A ratio, as text, of which the engine makes exactly `number` of `experts` by truncation."""
    for digits in range(2, 17):
        text = f"{math.ceil(number * 10**digits / experts) / 10**digits:.{digits}f}"
        if int(experts * float(text)) == number:
            return text
    raise AssertionError((number, experts))


def _advise(plan: Plan, path: Path) -> Advice:
    wanted = _wanted(plan)
    number, layers = int(wanted.sum()), len(plan.layers)
    amount = (
        f"--kt-num-gpu-experts {number // layers}"
        if number % layers == 0
        else f"--kt-gpu-experts-ratio {gpu_share(number, wanted.size)}"
    )
    return Advice(
        flags=(
            (
                f"--kt-expert-placement-strategy frequency {amount} "
                f"--init-expert-location {shlex.quote(str(path))}"
            ),
        ),
        notes=(
            (
                f"{number} of {wanted.size} experts go to the GPU, the plan's device tier; the "
                "engine takes the highest counts over all layers, so the number must be this one"
            ),
            (
                "host and disk tiers are the same to the engine (CPU), and which device holds an "
                "expert is not carried"
            ),
            "counts in this file are made up; do not use it as statistics",
        ),
    )


KTRANSFORMERS = Exporter(
    name="ktransformers",
    engine="KTransformers",
    version=VERSION,
    suffixes=(".pt",),
    write=_write,
    check=_check,
    advise=_advise,
)

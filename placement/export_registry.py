"""The exporters by name, and writing a file that its engine will accept.

Does not know what is in a file.
"""

from __future__ import annotations

from pathlib import Path

from moe_runtime.placement.export_base import Advice, Exporter, Extras
from moe_runtime.placement.export_ktransformers import KTRANSFORMERS
from moe_runtime.placement.export_sglang import COUNTS, MAP
from moe_runtime.placement.export_trtllm import TRTLLM
from moe_runtime.placement.export_vllm_ascend import VLLM_ASCEND
from moe_runtime.placement.plan import Plan

from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.files import replacing

__all__ = ["EXPORTERS", "check_export", "exporter", "write_export"]

EXPORTERS = {each.name: each for each in (MAP, TRTLLM, VLLM_ASCEND, KTRANSFORMERS, COUNTS)}

# Engines that people ask for and that read no placement from a file.
_WITHOUT_A_FILE = {
    "vllm": "vLLM 0.33.0",
    "transformers": "transformers 5.23",
    "deepspeed": "DeepSpeed",
    "megatron": "Megatron",
}


def exporter(name: str) -> Exporter:
    """The exporter of this name; ConfigError lists the known ones, or says what to do instead."""
    if name in _WITHOUT_A_FILE:
        raise ConfigError(
            f"{_WITHOUT_A_FILE[name]} reads no placement from a file: it places experts "
            "contiguously. `moe-runtime bake MODEL --plan PLAN -o OUT` permutes the checkpoint so "
            "that contiguous placement is the plan"
        )
    if name not in EXPORTERS:
        raise ConfigError(f"no exporter {name!r}; known: {', '.join(EXPORTERS)}")
    return EXPORTERS[name]


def write_export(plan: Plan, to: Exporter, path: Path, extras: Extras) -> Advice:
    """Write the file, check it by the engine's rules, and only then give it its name.

    Raises:
        PlanError: the plan cannot be said in this form; the message says why. Nothing is written.
    """
    _require_suffix(to, path)
    with replacing(path) as temporary:  # the ending stays: engines go by it
        try:
            to.write(plan, temporary, extras)
            to.check(plan, temporary, extras)
        except PlanError as error:
            raise PlanError(f"no file for {to.engine}: {error}") from error
    return to.advise(plan, path)


def check_export(plan: Plan, to: Exporter, path: Path, extras: Extras) -> Advice:
    """Check a file by the engine's rules and against the plan.

    Raises:
        PlanError: the engine would refuse it, or it means another placement; names file and field.
    """
    _require_suffix(to, path)
    try:
        to.check(plan, path, extras)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    return to.advise(plan, path)


def _require_suffix(to: Exporter, path: Path) -> None:
    if path.suffix not in to.suffixes:
        raise PlanError(
            f"{path}: {to.engine} goes by the ending; name it {' or '.join(to.suffixes)}"
        )

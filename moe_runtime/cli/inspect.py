"""`moe-runtime inspect`: a checkpoint's experts and what budgets hold, without loading a weight.

Does not know how a budget is cut into slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.markup import escape

from moe_runtime.cli.options import (
    DebugOption,
    DtypeOption,
    ExpertBudgetOption,
    HardwareOption,
    JsonOption,
    LocalOption,
    MaxBatchOption,
    MaxLengthOption,
    ModelArgument,
    ReaderThreadsOption,
    RevisionOption,
    SubfolderOption,
    VariantOption,
    hub_options,
    tokenizer_options,
)
from moe_runtime.cli.session import emit_json, quiet_libraries, session
from moe_runtime.core import format_bytes
from moe_runtime.errors import BudgetError
from moe_runtime.hardware import known_profile

__all__ = ["inspect"]

_SHARES = ("12.5%", "25%", "50%", "100%")


def inspect(  # noqa: PLR0913, PLR0917  one parameter for each option
    model: ModelArgument,
    expert_budget: ExpertBudgetOption = "auto",
    max_batch: MaxBatchOption = 1,
    max_length: MaxLengthOption = 4096,
    hardware: HardwareOption = "auto",
    reader_threads: ReaderThreadsOption = 3,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    variant: VariantOption = None,
    local_files_only: LocalOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a checkpoint's MoE layers, experts and bytes, and what budgets hold of them.

    Reads the configuration and the safetensors headers; loads no weights.

    Example:  [bold]moe-runtime inspect ./olmoe --expert-budget 2GiB[/bold]
    """
    with session(as_json=as_json, debug=debug):
        quiet_libraries(debug=debug)
        hub = hub_options(
            dtype=dtype,
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            local_files_only=local_files_only,
        )
        room = {"batch": max_batch, "length": max_length, "profile": known_profile(hardware)}
        facts = _facts(model, hub, expert_budget, reader_threads, room)
        if as_json:
            emit_json(facts)
        else:
            _print(facts)


def _facts(
    path: str, hub: dict[str, Any], budget: str, threads: int, room: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the command shows, as plain data; `room` as `resolve_budget` takes it."""
    import torch
    from transformers import AutoConfig

    import moe_runtime
    from moe_runtime.budget import least_budget, plan_budget, resolve_budget
    from moe_runtime.layout import largest_whole_row

    spec, experts = moe_runtime.inspect_checkpoint(path, **hub)
    named = tokenizer_options(hub)
    config = AutoConfig.from_pretrained(path, **named)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    floor = largest_whole_row(spec, experts, by_rows=False)
    budgets = []
    for asked in dict.fromkeys((*_SHARES, budget)):
        total, text = resolve_budget(
            asked, spec, config, device, threads=threads, dense=spec.dense_bytes, **room
        )
        row: dict[str, Any] = {"budget": asked, "bytes": total, "works": True}
        try:
            plan = plan_budget(spec, total, text, threads=threads, floor=floor, disk=True)
        except BudgetError as error:
            row |= {"works": False, "slots": 0, "share": 0.0, "explanation": str(error)}
        else:
            row |= {
                "slots": sum(plan.slots),
                "share": round(sum(plan.slots) / spec.grid.size, 6),
                "staging_bytes": plan.staging,
                "explanation": plan.explanation,
            }
        budgets.append(row)
    return {
        "model": spec.model_id,
        "class": spec.model_class,
        "fingerprint": spec.fingerprint,
        "dtype": str(spec.layers[0].params[0].dtype).removeprefix("torch."),
        "layers": [
            {
                "layer": layer.layer,
                "experts": layer.num_experts,
                "top_k": layer.top_k,
                "expert_bytes": layer.expert_bytes,
            }
            for layer in spec.layers
        ],
        "experts": spec.grid.size,
        "total_expert_bytes": spec.total_expert_bytes,
        "active_expert_bytes": sum(layer.top_k * layer.expert_bytes for layer in spec.layers),
        "dense_bytes": spec.dense_bytes,
        "least_budget": least_budget(spec, threads=threads, floor=floor, disk=True),
        "budgets": budgets,
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(facts['model'])}[/bold]  {facts['class']}, {facts['dtype']}")
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_row("MoE layers", _layers(facts["layers"]))
    grid.add_row("bytes an expert", _distinct(facts["layers"], "expert_bytes", format_bytes))
    all_experts = format_bytes(facts["total_expert_bytes"])
    grid.add_row("experts", f"{facts['experts']:,} in all, {all_experts}")
    grid.add_row("active a token", format_bytes(facts["active_expert_bytes"]))
    grid.add_row("everything else", format_bytes(facts["dense_bytes"]))
    least = facts["least_budget"]
    grid.add_row("least budget", f"{format_bytes(least)} ({least:,} bytes)")
    console.print(grid)
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("expert budget")
    for name in ("bytes", "slots", "of the experts", "slots a layer"):
        table.add_column(name, justify="right")
    for row in facts["budgets"]:
        if row["works"]:
            per_layer = row["slots"] / len(facts["layers"])
            held = (f"{row['slots']:,}", f"{100 * row['share']:.1f} %", f"{per_layer:.1f}")
        else:
            held = ("[red]too small[/red]", "", "")
        table.add_row(row["budget"], format_bytes(row["bytes"]), *held)
    console.print(table)
    asked = facts["budgets"][-1]
    if asked["budget"] not in _SHARES:
        console.print(f"\n{escape(asked['explanation'])}", soft_wrap=True)


def _layers(layers: list[dict[str, Any]]) -> str:
    numbers = [layer["layer"] for layer in layers]
    run = numbers == list(range(numbers[0], numbers[-1] + 1))
    which = f"{numbers[0]} to {numbers[-1]}" if run and len(numbers) > 1 else _listed(numbers)
    experts, top_k = _distinct(layers, "experts", str), _distinct(layers, "top_k", str)
    return f"{len(layers)} (layer {which}), {experts} experts each, top-{top_k}"


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:8])
    return f"{shown}, ..." if len(numbers) > 8 else shown


def _distinct(layers: list[dict[str, Any]], key: str, write: Callable[[int], str]) -> str:
    return " or ".join(write(value) for value in sorted({layer[key] for layer in layers}))

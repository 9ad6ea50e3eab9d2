"""`moe-runtime bake`: a checkpoint with its experts in a plan's order.

Does not know what goes with the order of the experts.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_runtime.cli.options import (
    DebugOption,
    ExpertBudgetOption,
    JsonOption,
    LocalOption,
    ModelArgument,
    RevisionOption,
    SubfolderOption,
    VariantOption,
    hub_options,
)
from moe_runtime.cli.session import emit_json, quiet_libraries, session, to_stderr
from moe_runtime.core import format_bytes
from moe_runtime.errors import BudgetError, PlanError, UnsupportedModelError

if TYPE_CHECKING:
    from moe_runtime.placement.bake import Bake
    from moe_runtime.placement.bake_check import Agreement
    from moe_runtime.placement.bake_source import BakeSource

__all__ = ["bake"]


def bake(
    model: ModelArgument,
    plan: Annotated[
        Path, typer.Option("--plan", "-p", metavar="PLAN.json", help="The plan to realise.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="The folder to make; new or empty."),
    ],
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare both models on a few random tokens before the result is kept.",
        ),
    ] = True,
    expert_budget: ExpertBudgetOption = "auto",
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    variant: VariantOption = None,
    local_files_only: LocalOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint whose experts stand in a plan's order, and whose routers know it.

    It computes the same as MODEL, and any engine that gives each of the plan's devices a contiguous
    block of experts runs the plan. The plan needs equal counts and no replicas. Weights are copied
    from file to file, never loaded; the check loads them, in --expert-budget if they are too many.

    Example:  [bold]moe-runtime bake ./olmoe --plan olmoe.plan.json -o ./olmoe-baked[/bold]
    """
    with session(as_json=as_json, debug=debug):
        quiet_libraries(debug=debug)
        hub = hub_options(
            revision=revision,
            subfolder=subfolder,
            variant=variant,
            local_files_only=local_files_only,
        )
        facts = _bake(model, plan, out, hub, expert_budget if check else None)
        if as_json:
            emit_json(facts)
        else:
            _print(facts)


def _bake(
    model: str, plan_path: Path, out: Path, hub: dict[str, Any], budget: str | None
) -> dict[str, Any]:
    """Bake, and check unless there is no budget for that; what came of it as plain data."""
    from moe_runtime.placement import Plan
    from moe_runtime.placement.bake import bake as bake_checkpoint
    from moe_runtime.placement.bake_source import open_source

    plan = Plan.load(plan_path)
    source = open_source(model, **hub)
    console = to_stderr()
    checks: list[Agreement] = []
    skipped = "not asked for" if budget is None else ""

    def check(folder: Path) -> None:
        nonlocal skipped
        console.print("comparing both models on random tokens ...")
        try:
            checks.extend(_checks(source, folder, budget or "auto"))
        except BudgetError as error:
            skipped = f"the model does not fit in memory ({error})"
        except UnsupportedModelError as error:
            skipped = str(error)  # of the original: nothing is wrong with what was baked
        for agreement in checks:
            agreement.require()

    began = time.perf_counter()
    with _Bar(console, f"baking {model}") as bar:
        try:
            result = bake_checkpoint(
                source, plan, out, progress=bar.show, check=None if budget is None else check
            )
        except PlanError as error:
            raise PlanError(f"{plan_path}: {error}") from error
    return {
        **_facts(source, result),
        "devices": plan.devices,
        "seconds": round(time.perf_counter() - began, 3),
        "check": [agreement.to_dict() for agreement in checks],
        "check_skipped": skipped,
    }


def _checks(source: BakeSource, folder: Path, budget: str) -> list[Agreement]:
    """In plain transformers in each dtype that fits in memory, else by the runtime in a budget."""
    import moe_runtime
    from moe_runtime.placement.bake_check import check_in_budget, check_plain, fitting_dtypes

    dtypes = fitting_dtypes(source)
    if dtypes:
        return [check_plain(source, folder, dtype) for dtype in dtypes]

    def load(path: str, exact: bool) -> Any:
        return moe_runtime.from_pretrained(
            path, expert_budget=budget, exact=exact, variant=source.variant
        )

    return [check_in_budget(source, folder, load)]


def _facts(source: BakeSource, result: Bake) -> dict[str, Any]:
    return {
        "model": source.path_or_id,
        "folder": str(result.folder),
        "layers": len(source.spec.layers),
        "experts": result.experts,
        "experts_moved": result.experts_moved,
        "tensors_rewritten": result.tensors,
        "shards": result.shards,
        "bytes": result.nbytes,
        "bakes": len(result.record.bakes),
        "left_behind": list(result.left_behind),
    }


class _Bar:
    """Bytes written so far, on standard error."""

    def __init__(self, console: Any, text: str) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), DownloadColumn(binary_units=True))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._progress.add_task(text, total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """So many bytes of so many are written."""
        self._progress.update(self._task, completed=done, total=total)


def _print(facts: dict[str, Any]) -> None:
    typer.echo(
        f"{facts['experts_moved']:,} of {facts['experts']:,} experts in {facts['layers']} layers "
        f"stand at other places, {facts['tensors_rewritten']} tensors of routers go with them; "
        f"contiguous blocks are now the plan's {facts['devices']} devices"
    )
    for row in facts["check"]:
        line = (
            f"{row['dtype']}: logits differ by {row['difference']:.1e} of the largest at most, "
            f"{100 * row['same_choice']:.1f} % of {row['tokens']} tokens have the same likeliest "
            "next one"
        )
        if row["yardstick"]:
            line += (
                f" ({row['yardstick']}, the model as it was: {row['yardstick_difference']:.1e}, "
                f"{100 * row['yardstick_same_choice']:.1f} %)"
            )
        typer.echo(line)
    if facts["check_skipped"]:
        typer.echo(f"not checked: {facts['check_skipped']}")
    if facts["left_behind"]:
        typer.echo(f"left behind, weights in other forms: {', '.join(facts['left_behind'])}")
    if facts["bakes"] > 1:
        typer.echo(
            f"this checkpoint has been baked {facts['bakes']} times; each plan was taken to number "
            "the experts as the checkpoint that it was baked into does"
        )
    typer.echo(
        f"wrote {facts['folder']} ({format_bytes(facts['bytes'])} in {facts['shards']} "
        f"{'shard' if facts['shards'] == 1 else 'shards'}, {facts['seconds']:.1f} s)"
    )

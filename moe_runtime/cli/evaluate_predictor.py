"""`moe-runtime evaluate-predictor`: how good predictors are on held-out traces.

Does not know how it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.options import DebugOption, JsonOption
from moe_runtime.cli.session import emit_json, session, to_stderr
from moe_runtime.trace import RoutingTrace

__all__ = ["evaluate_predictor"]

FITTED = ("popularity", "previous-token", "token-table", "pair-counts", "transition")


def evaluate_predictor(
    predictors: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PRED...]", help="Files *.predictor.safetensors, if any."),
    ] = None,
    trace: Annotated[
        list[str] | None,
        typer.Option(
            "--trace",
            metavar="TRACE",
            help="A held-out trace; NAME=TRACE names its domain. May be repeated.",
        ),
    ] = None,
    fit: Annotated[
        list[Path] | None,
        typer.Option(
            "--fit",
            metavar="TRACE",
            help="Fit the cheap predictors to this first. May be repeated.",
        ),
    ] = None,
    lookahead: Annotated[
        int, typer.Option("--lookahead", min=1, max=16, help="Layers ahead, 1 to this.")
    ] = 4,
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", help="Sequences put together, as 1,4,16.")
    ] = "1,4,16",
    token_by_token: Annotated[
        bool,
        typer.Option("--token-by-token", help="Take prompts too as if they had been decoded."),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="Of each domain at most; 0: all.")
    ] = 2048,
    allow_fitted: Annotated[
        bool,
        typer.Option("--allow-fitted", help="Measure on what a predictor was fitted to, too."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="EVAL", help="Also write an *.evaluation.json file."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure predictors on traces that they were not fitted to.

    Recall and precision at k and 2k for each layer, layers ahead and batch size, calibration, and
    time a token, beside repeating the token's or the layer's before. Without PRED and --fit the
    cheap predictors learn from the traces alone, as they go.

    Example:  [bold]moe-runtime evaluate-predictor p.predictor.safetensors
    --trace english=a.trace.safetensors --trace code=b.trace.safetensors[/bold]
    """
    sizes = _sizes(batch_sizes)
    if not trace:
        raise typer.BadParameter("--trace is needed: a trace to measure on")
    with session(as_json=as_json, debug=debug):
        from moe_runtime.predictors.evaluate import evaluate
        from moe_runtime.predictors.evaluation import Settings

        console = to_stderr()
        domains = _domains(trace)
        measured = _predictors(predictors or [], fit or [], next(iter(domains.values()))[0])
        result = evaluate(
            measured,
            domains,
            Settings(
                lookahead=lookahead,
                batch_sizes=sizes,
                token_by_token=token_by_token,
                max_tokens=max_tokens,
            ),
            allow_fitted=allow_fitted,
            progress=lambda what: console.print(f"measuring {what}", style="dim"),
        )
        if out is not None:
            result.save(out)
        if as_json:
            emit_json({**result.to_dict(), "file": None if out is None else str(out)})
        else:
            _print(result)
            if out is not None:
                typer.echo(f"written to {out}")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"--batch-sizes is numbers with commas, not {text!r}")
    return sizes


def _domains(named: Sequence[str]) -> dict[str, list[RoutingTrace]]:
    """The traces by domain; those without a name are `held out`."""
    domains: dict[str, list[RoutingTrace]] = {}
    for text in named:
        name, mark, path = text.partition("=")
        if not mark or Path(text).exists():
            name, path = "held out", text
        domains.setdefault(name, []).append(RoutingTrace.load(path))
    return domains


def _predictors(files: Sequence[Path], fit: Sequence[Path], first: RoutingTrace) -> dict[str, Any]:
    """What is measured, by name: files, fitted here, and the two baselines."""
    from moe_runtime.predictors.baselines import AsLayerBefore, AsTokenBefore
    from moe_runtime.predictors.files import load_predictor, predictor_class
    from moe_runtime.predictors.origin import Origin

    found: dict[str, Any] = {
        path.name.removesuffix(".safetensors").removesuffix(".predictor"): load_predictor(
            path, fingerprint=first.fingerprint, grid=first.grid
        )
        for path in files
    }
    if fit or not files:
        traces = [RoutingTrace.load(path) for path in fit]
        tokens_known = all((one.token_ids >= 0).all() for one in traces or [first])
        for kind in FITTED:
            made: Any = predictor_class(kind)
            if made.needs_token_ids and not tokens_known:
                continue
            found[made.name] = made.fit(traces) if fit else made.unfitted(Origin.empty(first))
    for baseline in (AsTokenBefore, AsLayerBefore):
        found[baseline.name] = baseline(first.grid)
    return found


def _print(result: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not result.held_out:
        console.print("[bold]not held out[/bold]: predictors were fitted to some of these rows")
    for domain in result.domains:
        even = sum(domain.entropy) / len(domain.entropy)
        console.print(
            f"[bold]{escape(domain.name)}[/bold]: {domain.tokens:,} tokens ({domain.decoded:,} "
            f"decoded) in {domain.sequences:,} sequences; evenness of routing {even:.3f}"
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("predictor", "phase", "batch", "ahead"):
            table.add_column(name, justify="left" if name in {"predictor", "phase"} else "right")
        for name in ("recall k", "precision k", "recall 2k", "precision 2k", "calibr. err", "us"):
            table.add_column(name, justify="right")
        for figures in result.figures:
            if figures.domain != domain.name:
                continue
            for score in figures.scores:
                first = (score.batch_size, score.distance) == (result.settings.batch_sizes[0], 1)
                columns = ("recall_k", "precision_k", "recall_2k", "precision_2k")
                time = figures.microseconds
                table.add_row(
                    escape(figures.predictor) if first else "",
                    score.phase,
                    str(score.batch_size),
                    str(score.distance),
                    *(f"{score.mean(column):.3f}" for column in columns),
                    f"{figures.calibration_error:.4f}" if first else "",
                    "" if not first or time is None else f"{time:.0f}",
                )
        console.print(table)

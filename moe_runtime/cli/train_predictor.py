"""`moe-runtime train-predictor`: a routing-path predictor from routing traces.

Knows options and output; training is `moe_runtime.predictors.train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_runtime.cli.options import DebugOption, JsonOption, outcome_place
from moe_runtime.cli.session import emit_json, session, to_stderr
from moe_runtime.core import format_bytes, parse_share
from moe_runtime.errors import ConfigError
from moe_runtime.trace import RoutingTrace

if TYPE_CHECKING:
    from moe_runtime.predictors.train import TrainedPredictor

__all__ = ["train_predictor"]

EPOCHS = 12  # where neither --epochs nor --minutes is given
ANY = 100_000


def train_predictor(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="Traces of one model, with token ids.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The predictor's file, X.predictor.safetensors.")
    ],
    preset: Annotated[
        str, typer.Option("--preset", help="Sizes: compact (ours) or expertflow (the paper's).")
    ] = "compact",
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help=f"Passes over the traces, at most; {EPOCHS} if none."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.01, help="Time at most, over all starts.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out",
            metavar="TRACE|SHARE",
            help="Traces to stop by and measure on (again for more), or a share of the sequences.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was interrupted.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a predictor of whole routing paths on traces of one model.

    The predictor reads token ids and says before the first layer which experts a token will need.
    Training stops early once held-out recall at 2k no longer rises; what an interrupted training
    needs to go on lies beside the output, in X.training.safetensors.

    Example: moe-runtime train-predictor chat.trace.safetensors -o chat.predictor.safetensors
    --minutes 10
    """
    with session(as_json=as_json, debug=debug):
        from moe_runtime.predictors.files import save_predictor
        from moe_runtime.predictors.path_config import preset as sizes
        from moe_runtime.predictors.path_training import TrainOptions
        from moe_runtime.predictors.train import train_predictor as train

        config = sizes(preset)
        state = _state_of(outcome_place(out))
        options = TrainOptions(
            epochs=epochs or (ANY if minutes else EPOCHS), minutes=minutes or 0.0, seed=seed
        )
        loaded = [RoutingTrace.load(path) for path in traces]
        training, held = _split(loaded, held_out or ["5%"], seed)
        bar = _Bar()
        try:
            with bar.shown:
                made = train(
                    training, held, config=config, options=options,
                    state=state, resume=resume, progress=bar.tell,
                )  # fmt: skip
        except KeyboardInterrupt:
            if state.exists():
                typer.echo(f"{state}: what was trained; go on with --resume", err=True)
            raise
        save_predictor(made.predictor, out)
        state.unlink(missing_ok=True)
        facts = _facts(made, out, preset)
        if as_json:
            emit_json(facts)
        else:
            _print(facts)


def _state_of(out: Path) -> Path:
    name = out.name.removesuffix(".safetensors").removesuffix(".predictor")
    return out.with_name(f"{name}.training.safetensors")


def _split(
    traces: list[RoutingTrace], held_out: list[str], seed: int
) -> tuple[list[RoutingTrace], list[RoutingTrace]]:
    """Training and held-out traces; ConfigError if files and shares are mixed."""
    from moe_runtime.predictors.train import split_traces

    shares = [parse_share(text) for text in held_out]
    if len(shares) == 1 and shares[0] is not None:
        return split_traces(traces, shares[0], seed)
    if any(share is not None for share in shares):
        raise ConfigError(
            f"--held-out takes traces, or one share like 5%; found {' '.join(held_out)}"
        )
    return traces, [RoutingTrace.load(path) for path in held_out]


class _Bar:
    """Progress on standard error; lines where it is no terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = to_stderr()
        self.shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self.shown.add_task("training", total=1.0)

    def tell(self, now: Any) -> None:
        """After each measurement."""
        text = (
            f"step {now.step}, pass {now.epoch + 1}, held-out recall at 2k {now.recall_2k:.4f} "
            f"(best {now.best_2k:.4f})"
        )
        self.shown.update(self._task, completed=now.share, description=text)
        if not self._console.is_terminal:
            self._console.print(text)


def _facts(made: TrainedPredictor, out: Path, preset: str) -> dict[str, Any]:
    trained = made.trained
    return {
        "predictor": str(out),
        "bytes": out.stat().st_size,
        "preset": preset,
        "steps": trained.steps,
        "epochs": trained.epochs,
        "seconds": round(trained.seconds, 1),
        "stopped": trained.stopped,
        **made.predictor.origin.figures,
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    reasons = {"epochs": "all passes done", "minutes": "time up", "recall": "recall rose no more"}
    console.print(
        f"{escape(facts['predictor'])}: {format_bytes(facts['bytes'])}, {facts['steps']:,} steps "
        f"in {facts['seconds']:.0f} s ({reasons[facts['stopped']]})"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(f"on {facts['held_out_rows']:,} held-out tokens")
    columns = {
        "recall at k": "recall_k",
        "at 2k": "recall_2k",
        "precision at k": "precision_k",
        "at 2k ": "precision_2k",
    }
    for name in columns:
        table.add_column(name, justify="right")
    rows = {
        "routing path": "routing_path",
        "with earlier layers known": "earlier_layers_known",
        "token-id table": "token_table",
    }
    for name, key in rows.items():
        if key in facts:
            table.add_row(name, *(f"{facts[key][column]:.4f}" for column in columns.values()))
    console.print(table)

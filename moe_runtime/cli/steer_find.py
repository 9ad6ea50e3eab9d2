"""`moe-runtime steer find`: the experts to reinforce, from recorded routing.

Knows options and output; does not know how experts are found, or files written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.options import (
    DebugOption,
    JsonOption,
    LocalOption,
    RevisionOption,
    SubfolderOption,
    hub_options,
    outcome_place,
    tokenizer_options,
)
from moe_runtime.cli.session import emit_json, quiet_libraries, session, to_stderr
from moe_runtime.errors import ConfigError
from moe_runtime.steering.files import write_steering
from moe_runtime.steering.identification import Identification, RankedExpert
from moe_runtime.steering.identify import PAPER_TOKENS, Progress, identify
from moe_runtime.steering.values import Steering

__all__ = ["find"]

PAPER_BETA = 64.0
_SHOWN = 10
_FEW = 20  # sequences


def _token(text: str) -> tuple[str, float]:
    """`TEXT=COEFFICIENT`, split at the last `=`; wrong usage otherwise."""
    marker, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not equals or not marker or not math.isfinite(weight) or weight == 0:
        raise typer.BadParameter(
            f"{text!r}: write MARKER=COEFFICIENT, the coefficient a number other than 0, "
            "for example '<think>=1'"
        )
    return marker, weight


def _beta(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise typer.BadParameter(f"{value!r}: beta is a finite number of at least 0")
    return value


def find(  # noqa: PLR0913, PLR0917  the command's options
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="*.trace.safetensors or a recording's folder; several of one model add up.",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="The model's folder or hub id, for its tokenizer.")
    ],
    token: Annotated[
        list[str] | None,
        typer.Option(
            "--token",
            metavar="MARKER=COEFFICIENT",
            help="A marker and its weight, again for more; "
            + ", ".join(f"{text}={weight:g}" for text, weight in PAPER_TOKENS.items())
            + " if none is given.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Experts to choose.")] = 2,
    beta: Annotated[
        float,
        typer.Option("--beta", callback=_beta, help="Factor of their weights in the steer file."),
    ] = PAPER_BETA,
    prompt: Annotated[
        bool,
        typer.Option(
            "--prompt/--no-prompt",
            help="Count the prompt's rows too (templates may put <think> there), or those of "
            "decoding alone.",
        ),
    ] = True,
    least_joint: Annotated[
        int, typer.Option("--least-joint", min=1, help="Marker rows an expert needs to be ranked.")
    ] = 5,
    least_uses: Annotated[
        int, typer.Option("--least-uses", min=1, help="Rows of any kind it needs.")
    ] = 20,
    smoothing: Annotated[
        float,
        typer.Option(
            "--smoothing",
            min=0,
            help="Marker rows added at the experts' overall shares, so that a pair that never came "
            "together is not -1 outright; 0: the paper's.",
        ),
    ] = 0.0,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, help="Resamples of the sequences; 0: no intervals.")
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the resampling.")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE.png", help="A heat map, layers x experts."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE.steer.json", help="The steer file to write."),
    ] = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    local_files_only: LocalOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rank experts by how their choice goes with thinking tokens (nPMI), as RICE does.

    Every expert's score is the sum over the markers of coefficient x nPMI. Intervals are 95 %,
    from a bootstrap over sequences; "in top" is the share of its resamples in which the expert is
    among the chosen.

    Example:  [bold]moe-runtime steer find probe.trace.safetensors --tokenizer ./model
    --token '<think>=1' --token '</think>=-1' -o think.steer.json[/bold]
    """
    chosen = dict(_token(text) for text in token) if token else dict(PAPER_TOKENS)
    if token and len(chosen) < len(token):
        raise typer.BadParameter("a marker is given twice; give each once", param_hint="--token")
    with session(as_json=as_json, debug=debug):
        from transformers import AutoTokenizer

        quiet_libraries(debug=debug)
        places = [outcome_place(path) for path in (out, picture) if path is not None]
        if len(set(places)) < len(places):
            raise ConfigError(f"{out}: the steer file and the picture need different names")
        hub = hub_options(
            revision=revision,
            subfolder=subfolder,
            variant=None,
            local_files_only=local_files_only,
        )
        words = AutoTokenizer.from_pretrained(tokenizer, **tokenizer_options(hub))
        with _progress() as told:
            found = identify(
                list(traces),
                chosen,
                top,
                tokenizer=words,
                prompt=prompt,
                least_joint=least_joint,
                least_uses=least_uses,
                smoothing=smoothing,
                bootstrap=bootstrap,
                seed=seed,
                progress=told,
            )
        steering = Steering(betas=dict.fromkeys(found.chosen, beta))
        if out is not None:
            write_steering(out, steering, identification=found)
        if picture is not None:
            from moe_runtime.steering.picture import save_picture

            save_picture(found, picture)
        if as_json:
            emit_json(
                {
                    "steering": None if out is None else str(out),
                    "picture": None if picture is None else str(picture),
                    "beta": beta,
                    "chosen": [{"layer": at, "expert": one} for at, one in found.chosen],
                    "identification": found.to_dict(),
                }
            )
        else:
            _print(found, tokenizer, beta=beta, out=out, picture=picture)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error, where that is a terminal."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = to_stderr()
    with Bar(
        TextColumn("counting"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("counting", total=1)
        tell: Callable[[int, int], None] = lambda done, total: bar.update(  # noqa: E731
            task, completed=done, total=total
        )
        yield tell


def _print(
    found: Identification,
    tokenizer: str,
    *,
    beta: float,
    out: Path | None,
    picture: Path | None,
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(found.model_id or 'unnamed model')}[/bold]")
    which = "prompt and decoding" if found.prompt else "decoding only"
    console.print(
        f"{found.rows:,} rows ({which}) of {found.sequences:,} sequences"
        + (f"; {found.unknown_rows:,} rows of unknown tokens left out" * bool(found.unknown_rows))
    )
    for one in found.tokens:
        console.print(
            f"{one.coefficient:+g} x nPMI({escape(one.text)}): {one.occurrences:,} times in "
            f"{one.sequences:,} sequences"
        )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    names = ["#", "layer", "expert", "score"]
    if found.bootstrap:
        names += [f"{found.level:.0%} interval", "in top", "ranks"]
    names += [*(escape(one.text) for one in found.tokens), "uses"]
    for name in names:
        table.add_column(name, justify="right")
    shown = found.ranked[: max(found.top, _SHOWN)]
    for rank, expert in enumerate(shown, 1):
        cells = _cells(expert, rank, bootstrap=bool(found.bootstrap))
        table.add_row(*cells, style="bold" if rank <= found.top else "")
    console.print(table)
    for line in _remarks(found, tokenizer):
        console.print(line)
    if out is not None:
        console.print(f"wrote {escape(str(out))}: the first {found.top} with beta {beta:g}")
    if picture is not None:
        console.print(f"wrote {escape(str(picture))}")


def _cells(one: RankedExpert, rank: int, *, bootstrap: bool) -> list[str]:
    cells = [str(rank), str(one.layer), str(one.expert), f"{one.score:.3f}"]
    if one.tied > 1:
        cells[3] += f" ({one.tied} tie)"
    if bootstrap and one.interval is not None and one.ranks is not None:
        cells += [
            f"{one.interval[0]:.2f} to {one.interval[1]:.2f}",
            f"{one.stability:.0%}",
            f"{one.ranks[0]}-{one.ranks[1]}",
        ]
    pairs = zip(one.npmi, one.joint, strict=True)
    return [*cells, *(f"{value:.3f} ({rows:,})" for value, rows in pairs), f"{one.uses:,}"]


def _remarks(found: Identification, tokenizer: str) -> list[str]:
    """What to know about the ranking."""
    from rich.markup import escape

    # What the markers' columns hold is said here, since their headers are the markers.
    bar = f"at least {found.least_joint} marker rows and {found.least_uses} uses"
    lines = []
    given = Path(tokenizer).name
    if found.tokenizer_id and Path(found.tokenizer_id).name != given:
        lines.append(
            f"recorded with the tokenizer {escape(found.tokenizer_id)}, read with {escape(given)}: "
            "see that they are one"
        )
    ranked = f"{found.rankable:,} of {sum(found.experts):,} experts ranked ({bar})"
    lines.append(f"{ranked}; under a marker: nPMI (rows with both)")
    never = sum(0 in one.joint for one in found.ranked[: found.top])
    if never and not found.smoothing:
        lines.append(
            f"{never} of the {found.top} chosen never came with some marker, which counts as nPMI "
            "-1 outright, also in every resample; see what --smoothing 1 ranks first"
        )
    if found.tied_out:
        lines.append(
            f"{found.tied_out} experts more have the score of the last chosen one; chosen by joint "
            "counts, then layer, then number"
        )
    if not found.bootstrap:
        lines.append("no intervals: no bootstrap" + (", one sequence" * (found.sequences < 2)))
    elif found.sequences < _FEW:
        lines.append(f"{found.sequences} sequences are few: intervals and ranks are rough")
    if found.redrawn:
        lines.append(
            f"{found.redrawn} resamples lacked a marker and were drawn again: its count is small"
        )
    return lines

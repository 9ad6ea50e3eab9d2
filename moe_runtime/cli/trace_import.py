"""`moe-runtime trace import`: other engines' recordings become a trace, or counts.

Does not know their forms.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.options import DebugOption, JsonOption, outcome_place
from moe_runtime.cli.session import emit_json, quiet_libraries, session, to_stderr
from moe_runtime.importers import FORMS, Facts, Imported, import_recording

__all__ = ["import_command"]

_COUNTS_LIMITS = (
    "no token is known: counts say popularity and load, so placements can be balanced by them; "
    "affinity between layers, co-activation and distinct devices per token cannot be worked out"
)


def import_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Files of one model, or folders.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The file to write; its ending is added if it has none."),
    ],
    form: Annotated[
        str, typer.Option("--from", help=f"auto, {', '.join(FORMS)}.", metavar="FORM")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option("--model", help="The checkpoint, which says all that the files do not."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Hidden layers, dense ones included.")
    ] = None,
    first_dense: Annotated[
        int | None,
        typer.Option("--first-dense", min=0, help="So many layers at the beginning are dense."),
    ] = None,
    moe_layers: Annotated[
        str | None,
        typer.Option("--moe-layers", help="Layers with experts, absolute: 1-26 or 1,3,5-7."),
    ] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", min=1, help="Routed experts of a layer.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Experts that a token chooses.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The model's name in the trace.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Import routing that another engine recorded.

    SGLang: dumps of the recorder (.pt; stat, per_pass, per_token) and returned routed_experts;
    vLLM: routed_experts as .npy, base64 or responses in JSON; TensorRT-LLM: the statistics folder;
    and two per-token forms in JSON and CSV. Dense layers are left out, indices stay absolute.

    Example:  [bold]moe-runtime trace import run.jsonl --from vllm --experts 64 -o run[/bold]
    """
    if form not in ("auto", *FORMS):
        raise typer.BadParameter(f"--from is one of auto, {', '.join(FORMS)}, not {form!r}")
    listed = () if moe_layers is None else _layer_list(moe_layers)
    with session(as_json=as_json, debug=debug):
        place = outcome_place(out)
        given: dict[str, Any] = {
            "hidden_layers": layers,
            "first_dense": first_dense,
            "moe_layers": listed or None,
            "experts": None if experts is None else (experts,),
            "top_k": top_k,
            "model_id": name,
        }
        given = {key: value for key, value in given.items() if value is not None}
        if model is not None:
            quiet_libraries(debug=debug)
            given = {**_facts_of(model), **given}
            if first_dense is not None:
                del given["moe_layers"]
        console = to_stderr()
        began = time.perf_counter()
        with console.status("importing") as status:
            done = import_recording(
                files,
                place,
                form=form,
                facts=Facts(**given),
                on_rows=lambda rows: status.update(f"importing, {rows:,} tokens"),
            )
        _show(done, time.perf_counter() - began, as_json=as_json)


def _facts_of(model: str) -> dict[str, Any]:
    """What a checkpoint says, without its weights."""
    from transformers import AutoConfig

    import moe_runtime

    spec, _ = moe_runtime.inspect_checkpoint(model)
    text = AutoConfig.from_pretrained(model).get_text_config()
    top_k = {layer.top_k for layer in spec.layers}
    return {
        "hidden_layers": int(getattr(text, "num_hidden_layers", 0)),
        "moe_layers": spec.grid.layers,
        "experts": spec.grid.experts,
        "top_k": top_k.pop() if len(top_k) == 1 else 0,
        "model_id": spec.model_id,
        "fingerprint": spec.fingerprint,
    }


def _layer_list(text: str) -> tuple[int, ...]:
    """`1,3,5-7` as indices; wrong usage if it is none."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (not dash or last.isdecimal()) and len(first + last) < 10):
            raise typer.BadParameter(f"--moe-layers is a list like 1-26 or 1,3,5-7, not {text!r}")
        if int(last or first) - int(first) >= 65536:
            raise typer.BadParameter(f"--moe-layers {text!r} is longer than any model")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def _show(done: Imported, seconds: float, *, as_json: bool) -> None:
    notes = [*done.notes, *([_COUNTS_LIMITS] if done.counts is not None else [])]
    description = done.description
    if as_json:
        emit_json(
            {
                "kind": "trace" if done.counts is None else "counts",
                "file": str(done.path),
                "from": done.form,
                "tokens": done.tokens or None,
                "layers": description["layer_ids"],
                "experts": description["experts"],
                "top_k": description["top_k"],
                "model_id": description["model_id"],
                "fingerprint": description["fingerprint"],
                "seconds": round(seconds, 3),
                "notes": notes,
            }
        )
        return
    layer_ids = done.grid_text()
    what = f"{done.tokens:,} tokens" if done.tokens else "counts without tokens"
    typer.echo(f"{done.path}: {what}, {layer_ids} ({done.form}, {seconds:.1f} s)")
    for note in notes:
        typer.echo(f"note: {note}", err=True)

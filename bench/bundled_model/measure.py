"""Measures the finished bundled model, beside the recorded routing of large ones.

    python -m bundled_model.measure --traces FOLDER_OF_SHARED_TRACES

Writes bench/results/bundled_model.json. Does not know training; it reads its log.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors import safe_open
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from bundled_model.card import write_card
from bundled_model.data import DOMAINS, Corpus
from bundled_model.evaluate import grade, held_out_losses, solve
from bundled_model.finish import BUNDLED
from bundled_model.puzzles import held_out
from bundled_model.record import record_domains
from bundled_model.routing import domain_information, measure
from bundled_model.train import LOG, STATE, TOKENS
from moe_runtime.trace import RoutingTrace
from peers.machine import describe_machine
from shared_traces import load_shared_traces

RESULT = Path(__file__).resolve().parents[1] / "results" / "bundled_model.json"
PUZZLE_SEED = 0


def _rounded(values: Any) -> list[float]:
    return [round(float(v), 4) for v in values]


def quality(model: Any, corpus: Corpus, tokenizer: Tokenizer, puzzles: int) -> dict[str, Any]:
    """Held-out loss by domain, and greedy accuracy on held-out puzzles."""
    found = held_out_losses(model, corpus, rows=64)
    asked = held_out(puzzles, PUZZLE_SEED)
    accuracy = grade(asked, solve(model, tokenizer, asked))
    return {
        "held_out_loss_nats": {domain: round(loss, 4) for domain, loss in found.items()},
        "puzzles": {
            "seed": PUZZLE_SEED,
            "count": accuracy.count,
            "right": accuracy.right,
            "share": round(accuracy.share, 4),
            "wilson_95": _rounded(accuracy.interval),
            "families": {k: {"right": r, "count": n} for k, (r, n) in accuracy.families.items()},
        },
    }


def spread(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """About so many tokens of a trace: the same number of leading ones of each of six sequences.

    Two sequences a domain, so that a small trace can be set beside the small real ones.
    """
    names = np.unique(trace.sequence_ids)
    chosen = names[np.linspace(0, len(names) - 1, 6).astype(int)]
    keep = np.isin(trace.sequence_ids, chosen) & (trace.positions < tokens // len(chosen))
    return trace.select(rows=keep)


def routing(model: Any, corpus: Corpus, traces: Path | None, rows: int) -> dict[str, Any]:
    """Routing figures of the bundled model, whole, small and by domain, and of the real traces."""
    trace, domains = record_domains(model, corpus, rows=rows)
    told, by_chance = domain_information(trace, domains)
    found: dict[str, Any] = {
        "bundled": measure(trace).as_json(),
        "bundled, 1,100 tokens": measure(spread(trace, 1100)).as_json(),
        "bundled, 160 tokens": measure(
            trace.select(rows=(trace.sequence_ids == 0) & (trace.positions < 160))
        ).as_json(),
    }
    for number, domain in enumerate(DOMAINS):
        found[f"bundled, {domain}"] = measure(trace.select(rows=domains == number)).as_json()
    if traces is not None:
        for name, runs in load_shared_traces(traces).items():
            renumbered = [_numbered(run, number) for number, run in enumerate(runs)]
            found[name] = measure(RoutingTrace.concat(renumbered)).as_json()
    return {
        "figures": found,
        "domain_information_bits": _rounded(told),
        "domain_information_bits_shuffled": _rounded(by_chance),
    }


def _numbered(run: RoutingTrace, number: int) -> RoutingTrace:
    return replace(run, sequence_ids=np.full(len(run), number, np.int32), model_id="")


def training(trained: Path) -> dict[str, Any]:
    """What the state and the log of training say: settings, steps, seconds, learning curve."""
    with safe_open(trained / STATE, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["facts"])
    lines = [json.loads(line) for line in (trained / LOG).read_text().splitlines()]
    mixture = facts["settings"]["mixture"]
    return {
        "settings": facts["settings"],
        "steps": facts["step"],
        "tokens": facts["step"] * len(mixture["rows"]) * mixture["context"],
        "seconds": round(facts["elapsed"], 1),
        "corpus": facts["corpus"],
        "curve": [line for line in lines if "held_out" in line],
    }


def main(
    trained: Annotated[Path, typer.Option(help="The --out of training.")] = Path(
        "work/bundled_model"
    ),
    folder: Annotated[Path, typer.Option(help="The finished model.")] = BUNDLED,
    traces: Annotated[
        Path | None, typer.Option(help="Recorded routing of real models, for the table.")
    ] = None,
    puzzles: Annotated[int, typer.Option()] = 1000,
    rows: Annotated[int, typer.Option(help="Rows of 256 tokens a domain.")] = 32,
    threads: Annotated[int, typer.Option()] = 2,
    result: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULT,
) -> None:
    """Measures the finished model and writes the figures and the model card."""
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    corpus = Corpus(tokenizer, load_file(trained / TOKENS))
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="grouped_mm").eval()
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    found = {
        "machine": describe_machine(),
        "versions": {n: metadata.version(n) for n in names} | {"python": platform.python_version()},
        "model": {
            "dtype": str(model.dtype),
            "parameters": model.num_parameters(),
            "weight_bytes": (folder / "model.safetensors").stat().st_size,
            "folder_bytes": sum(f.stat().st_size for f in folder.iterdir()),
            "vocabulary": tokenizer.get_vocab_size(),
        },
        "training": {
            **training(trained),
            "text_tokens": {name: len(ids) for name, ids in corpus.tokens.items()},
        },
        **quality(model, corpus, tokenizer, puzzles),
        "routing": routing(model, corpus, traces, rows),
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    temporary = result.with_name(result.name + ".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, result)
    write_card(found, folder)
    typer.echo(json.dumps(found["puzzles"]["share"]))


if __name__ == "__main__":
    typer.run(main)

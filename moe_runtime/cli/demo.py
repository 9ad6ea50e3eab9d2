"""`moe-runtime demo`: the bundled model inside a budget, beside plain transformers.

Does not know how the budget is kept.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.options import (
    DebugOption,
    JsonOption,
    PlanOption,
    PolicyOption,
    checked_budget,
    outcome_place,
)
from moe_runtime.cli.room import AskedRoom
from moe_runtime.cli.session import emit_json, quiet_libraries, session, to_stderr
from moe_runtime.errors import ConfigError
from moe_runtime.report import Report

__all__ = ["demo"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of the bundled model and the domain that it is from."""

    domain: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one model made of one prompt: new token ids `[N]`, their logits `[N, vocabulary]`."""

    tokens: Any
    logits: Any
    seconds: float


def demo(
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            callback=checked_budget,
            metavar="SIZE",
            help="Memory for experts: bytes, 8MiB, 25% (of all experts) or auto.",
        ),
    ] = "25%",
    out_dir: Annotated[
        Path, typer.Option("--out-dir", help="Folder for report.html and run.json.")
    ] = Path(),
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", "-n", min=1, help="Tokens for each prompt.")
    ] = 64,
    policy: PolicyOption = "lru",
    plan: PlanOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run the bundled model inside a budget and compare it with plain transformers.

    It runs in exact mode, which computes as transformers' eager experts do, bit for bit, so that
    every token and logit can be compared. report.html and run.json are written.

    Example:  [bold]moe-runtime demo --budget 25% --out-dir out[/bold]
    """
    with session(as_json=as_json, debug=debug):
        page = outcome_place(out_dir / "report.html")
        quiet_libraries(debug=debug)
        with resources.as_file(bundled_model()) as folder:
            report = _run(folder, budget, policy, plan, new_tokens)
        report.save(page)
        record = report.save(out_dir / "run.json")
        if as_json:
            emit_json(
                {
                    "outcome": report.outcome,
                    "summary": report.summary.to_dict(),
                    "comparison": report.to_dict()["comparison"],
                    "report": str(page),
                    "run": str(record),
                }
            )
        else:
            typer.echo(f"{report}\n\nwrote {page} and {record}")
        summary = report.summary
        if summary.tokens_equal != summary.tokens_compared:
            typer.echo("error: the tokens differ from plain transformers", err=True)
            raise typer.Exit(1)


def bundled_model() -> Traversable:
    """Where the package keeps its model."""
    return resources.files("moe_runtime") / "data" / "bundled"


def _run(folder: Path, budget: str, policy: str, plan: Path | None, new_tokens: int) -> Report:
    """Generate in the budget, then plainly, and compare."""
    from transformers import AutoTokenizer

    import moe_runtime
    from moe_runtime.cli.progress import LiveRun

    prompts = read_prompts(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [_encode(tokenizer, prompt.text) for prompt in prompts]
    lengths = [inputs["input_ids"].shape[1] for inputs in encoded]
    model = moe_runtime.from_pretrained(
        str(folder),
        expert_budget=budget,
        policy=policy,
        plan=plan,
        device="cpu",
        exact=True,
        **AskedRoom().for_prompts(lengths, new_tokens=new_tokens),
    )
    console = to_stderr()
    answers = []
    totals = Counter(prompt.domain for prompt in prompts)
    limits = {domain: prompts_of * new_tokens for domain, prompts_of in totals.items()}
    with LiveRun(model, limits, console) as live:
        for prompt, inputs in zip(prompts, encoded, strict=True):
            live.start(prompt.domain)
            answers.append(_answer(model, inputs, new_tokens, live))
    record = moe_runtime.report(model).to_dict()
    with (
        console.status("the same with plain transformers") if console.is_terminal else nullcontext()
    ):
        plain = _plain_answers(folder, encoded, new_tokens)
    record["model"]["name"] = folder.name if folder.name != "bundled" else "bundled model"
    record["comparison"] = compare(answers, plain)
    record["generated"] = [
        {
            "prompt": prompt.text,
            "text": tokenizer.decode(answer.tokens),
            "new_tokens": len(answer.tokens),
            "seconds": round(answer.seconds, 6),
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Report.from_run(record)


def read_prompts(folder: Path) -> list[Prompt]:
    """The prompts that come with the bundled model.

    Raises:
        ConfigError: the model or its prompts are not there.
    """
    path = folder / "prompts.json"
    if not path.is_file():
        raise ConfigError(
            f"no bundled model: {path} is missing; install moe-runtime again, or run "
            "`moe-runtime generate` on a checkpoint of yours"
        )
    by_domain = json.loads(path.read_text(encoding="utf-8"))
    return [
        Prompt(domain=domain, text=entry["prompt"])
        for domain, entries in by_domain.items()
        for entry in entries
    ]


def compare(answers: list[Answer], plain: list[Answer]) -> dict[str, Any]:
    """Token by token, each answer up to where it first differs; logits over the same positions."""
    equal = total = 0
    largest = 0.0
    for ours, theirs in zip(answers, plain, strict=True):
        count = min(len(ours.tokens), len(theirs.tokens))
        same = (ours.tokens[:count] == theirs.tokens[:count]).long().cumprod(0)
        shared = int(same.sum())
        equal += shared
        total += max(len(ours.tokens), len(theirs.tokens))
        # The first differing token still had the same tokens before it.
        rows = slice(0, min(shared + 1, count))
        if count:
            gap = (ours.logits[rows].double() - theirs.logits[rows].double()).abs().max()
            largest = max(largest, float(gap))
    return {
        "reference": "plain transformers (eager)",
        "tokens": total,
        "equal_tokens": equal,
        "max_abs_logit_difference": largest,
        "reference_seconds": round(sum(answer.seconds for answer in plain), 6),
    }


def _plain_answers(folder: Path, encoded: list[Any], new_tokens: int) -> list[Answer]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    return [_answer(model, inputs, new_tokens, None) for inputs in encoded]


def _encode(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, return_tensors="pt", return_token_type_ids=False)


def _answer(model: Any, inputs: Any, new_tokens: int, streamer: Any) -> Answer:
    import torch

    began = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        streamer=streamer,
    )
    seconds = time.perf_counter() - began
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(tokens=tokens, logits=torch.cat(output.logits), seconds=seconds)

"""What steering costs a decode step at batch 1, on the bundled model and on one of OLMoE's shape.

A model and a twin of it that shares its weights take the same tokens in turn, one of them steered;
pairs of steps are compared. Run:

    python bench/steering_overhead.py             # to bench/results/steering_overhead.json
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peers.machine import describe_machine
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, OlmoeConfig

import moe_runtime
from moe_runtime.core import FloatArray
from moe_runtime.model_spec import read_spec
from moe_runtime.version import __version__

RESULTS = Path(__file__).parent / "results" / "steering_overhead.json"
SEED = 5
BETA = 1.5
TARGET = 0.02
WARM_UP = 12  # pairs left out
LONGEST = 96  # steps of one text; then the prompt is run again
PROMPT = "Question: What is 17 plus 25?\nAnswer:<think>"
# OLMoE has hidden 2048 and intermediate 1024; with half of both it fits in 4 GB.
SHAPE = {
    "num_hidden_layers": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
}


def bundled() -> Any:
    """The bundled model as it is stored."""
    return AutoModelForCausalLM.from_pretrained(moe_runtime.bundled_model()).eval()


def olmoe_like() -> Any:
    """A random model in bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OlmoeConfig(**SHAPE, eos_token_id=None))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.uniform_(-0.05, 0.05, generator=generator)
    rotary = model.model.rotary_emb
    rotary.__init__(model.config)  # its buffers are computed, not stored
    return model.eval()


def twin_of(model: Any) -> Any:
    """Modules of its own around the same tensors (and the same runtime, if there is one)."""
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def attached(model: Any) -> Iterator[None]:
    """A runtime that computes with the model's own Parameters."""
    moe_runtime.attach(model, device="cpu")
    try:
        yield
    finally:
        moe_runtime.detach(model)


class Text:
    """One model decoding a text whose tokens are given."""

    def __init__(self, model: Any, prompt: torch.Tensor) -> None:
        self._model, self._prompt = model, prompt
        self._cache: Any = None
        self._steps = 0

    def step(self, token: int) -> tuple[float, float]:
        """Wall and processor seconds of one step; the prompt, where it is run, is not timed."""
        if self._cache is None or self._steps >= LONGEST:
            self._cache, self._steps = DynamicCache(config=self._model.config), 0
            self._model(self._prompt, past_key_values=self._cache)
        self._steps += 1
        ids = torch.tensor([[token]])
        wall, processor = time.perf_counter(), time.thread_time()
        self._model(input_ids=ids, past_key_values=self._cache)
        return time.perf_counter() - wall, time.thread_time() - processor


def steered_experts(model: Any, count: int) -> dict[tuple[int, int], float]:
    """So many experts, spread over the layers as far as these go."""
    grid = read_spec(model).grid
    places = np.linspace(0, len(grid.layers) - 1, count).round().astype(int)
    return {(grid.layers[at], number): BETA for number, at in enumerate(places.tolist())}


def interval(ratios: FloatArray) -> list[float]:
    """95 % bootstrap interval of the median."""
    generator = np.random.default_rng(SEED)
    drawn = generator.choice(ratios, (2000, len(ratios)))
    return [round(float(v), 5) for v in np.quantile(np.median(drawn, axis=1), [0.025, 0.975])]


def measure(
    model: Any, tokenizer: Any, *, experts: int, thinking: bool, pairs: int
) -> dict[str, Any]:
    """Pairs of steps of a model and its steered twin, which of them comes first alternating.

    With no experts the twin is not steered: what the method itself finds where there is nothing.
    """
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens = np.random.default_rng(SEED).integers(100, 4000, pairs + WARM_UP).tolist()
    twin = twin_of(model)
    betas = steered_experts(model, experts) if experts else {}
    options: dict[str, Any] = {}
    if thinking:
        options = {"thinking": ("<think>", "</think>"), "tokenizer": tokenizer}
    rows = []
    block = moe_runtime.steer(twin, betas, **options) if betas else nullcontext()
    with torch.no_grad(), block as handle:
        plain, steered = Text(model, prompt), Text(twin, prompt)
        for number, token in enumerate(tokens):
            if number % 2:
                second, first = steered.step(token), plain.step(token)
            else:
                first, second = plain.step(token), steered.step(token)
            rows.append((*first, *second))
    if thinking and handle is not None:
        assert handle.steered_positions[0] > 0, "the text is inside a span"
    times = np.array(rows[WARM_UP:])
    ratios = times[:, 3] / times[:, 1]
    wall = times[:, 2] / times[:, 0]
    return {
        "experts": experts,
        "layers_hooked": len({layer for layer, _ in betas}),
        "thinking": thinking,
        "uses": sum(handle.uses.values()) if handle is not None else 0,
        "pairs": pairs,
        "step_ms": round(1e3 * float(np.median(times[:, 0])), 4),
        "overhead": round(float(np.median(ratios)) - 1, 5),
        "overhead_interval": [round(v - 1, 5) for v in interval(ratios)],
        "overhead_wall": round(float(np.median(wall)) - 1, 5),
        "overhead_wall_interval": [round(v - 1, 5) for v in interval(wall)],
        "overhead_us": round(1e6 * float(np.median(times[:, 3] - times[:, 1])), 1),
    }


def run(models: dict[str, tuple[Callable[[], Any], int]], console: Console) -> list[dict[str, Any]]:
    """All settings of all models."""
    tokenizer = AutoTokenizer.from_pretrained(moe_runtime.bundled_model())
    found = []
    for name, (build, pairs) in models.items():
        model = build()
        for runtime in (False, True):
            with attached(model) if runtime else nullcontext():
                for experts, thinking in ((0, False), (2, False), (8, False), (2, True), (8, True)):
                    row = measure(model, tokenizer, experts=experts, thinking=thinking, pairs=pairs)
                    found.append({"model": name, "runtime": runtime, **row})
                    console.print(
                        f"{name}, runtime {runtime}, {experts} experts, thinking {thinking}: "
                        f"{row['overhead']:+.2%} {row['overhead_interval']} of {row['step_ms']} ms"
                    )
    return found


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("model", "runtime", "experts", "thinking", "step ms", "overhead", "interval")
    for row in rows:
        low, high = row["overhead_interval"]
        table.add_row(
            row["model"],
            "yes" if row["runtime"] else "no",
            str(row["experts"]),
            "yes" if row["thinking"] else "no",
            f"{row['step_ms']:.2f}",
            f"{row['overhead']:+.2%}",
            f"{low:+.2%} to {high:+.2%}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=600, help="pairs of steps, bundled model")
    parser.add_argument("--large-pairs", type=int, default=60, help="the same, the larger model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    console = Console(stderr=True)
    torch.set_num_threads(1)
    models = {
        "bundled": (bundled, given.pairs),
        "olmoe-half-width": (olmoe_like, given.large_pairs),
    }
    before = describe_machine()
    rows = run(models, console)
    show(rows, Console())
    record = {
        "benchmark": "steering_overhead",
        "machine": before,
        "versions": {
            "moe_runtime": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "batch": 1,
            "threads": 1,
            "beta": BETA,
            "seed": SEED,
            "warm_up_pairs": WARM_UP,
            "longest": LONGEST,
            "shape": SHAPE,
            "target": TARGET,
            "overhead": "median ratio of processor time of paired steps, less 1",
            "interval": "95 % bootstrap of that median",
            "overhead_wall": "the same of wall-clock time",
        },
        "rows": rows,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The token scheduler on the bundled model: sequences regrouped by predicted paths, and in order.

Many prompts of three kinds, shuffled, none of them in the model's training data nor in what the
predictors were fitted to. Everything but the replay runs for real, in a quarter of the experts'
memory: active experts and misses are what the runtime counted. Run:

    python bench/token_scheduler.py                  # to bench/results/token_scheduler.json
    python bench/token_scheduler.py --only timing    # one part; the others are kept
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from moe_runtime.predictors.base import Predictor, Probabilities, StepRows
from moe_runtime.predictors.decayed_path import DecayedPath
from moe_runtime.predictors.token_path import TokenPath
from rich.console import Console

import moe_runtime
from bundled_model.data import read_python
from bundled_model.puzzles import held_out
from moe_runtime.batch_run import BatchRun
from moe_runtime.core import ExpertGrid, FloatArray, IntArray
from moe_runtime.scheduler import METHODS, active_experts, group_sequences, in_order
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "token_scheduler.json"
SAY = Console(stderr=True, highlight=False)
KINDS = ("english", "python", "puzzles")
SEED = 7
NEW_TOKENS = 24
PROMPT_TOKENS = (16, 48)  # shortest and longest prompt
BUDGET = "25%"
PARTS = ("cost", "counts", "timing", "switch")


# -- prompts and what predictors are fitted to ---------------------------------------------------


def documents() -> dict[str, dict[str, list[str]]]:
    """Texts by use ("fit", "test") and kind. The model was trained on none of the test texts.

    Python modules: those that the model's training held out, halved. English: Python's topics of
    help, which the training left out, halved. Puzzles: held out, of two seeds.
    """
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    modules = read_python()["held_out"]
    puzzles = {
        use: [one.prompt for one in held_out(400, seed=seed)]
        for use, seed in (("fit", 101), ("test", 202))
    }
    puzzles["fit"] = [text for text in puzzles["fit"] if text not in set(puzzles["test"])]
    return {
        use: {"english": topics[at::2], "python": modules[at::2], "puzzles": puzzles[use]}
        for at, use in enumerate(("fit", "test"))
    }


def prompts_of(tokenizer: Any, texts: dict[str, list[str]], count: int, seed: int) -> Any:
    """Token ids of `count` prompts, the kinds in equal shares and shuffled; pieces of the texts."""
    rng = random.Random(seed)
    prompts = []
    for at in range(count):
        kind = KINDS[at % len(KINDS)]
        ids = tokenizer(rng.choice(texts[kind])[:4000])["input_ids"]
        if kind == "puzzles":  # whole, so that the model answers it and stops
            prompts.append(ids)
            continue
        length = rng.randint(*PROMPT_TOKENS)
        start = rng.randrange(max(1, len(ids) - length))
        prompts.append(ids[start : start + length])
    rng.shuffle(prompts)
    return prompts


# -- predictors of the next token's path ---------------------------------------------------------


class OraclePath:
    """The path that the token will take: looked up in a recording of the same run."""

    name: ClassVar[str] = "oracle"
    needs_token_ids: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False

    def __init__(self, trace: RoutingTrace) -> None:
        self.grid = trace.grid
        keys = zip(trace.sequence_ids.tolist(), trace.positions.tolist(), strict=True)
        self._row = {key: row for row, key in enumerate(keys)}
        self._chosen = trace.topk_ids.astype(np.int64)
        self._rows: list[int] = []

    def begin_step(self, rows: StepRows) -> None:
        keys = zip(rows.sequence_ids.tolist(), rows.positions.tolist(), strict=True)
        self._rows = [self._row[key] for key in keys]

    def observe(self, position: int, topk_ids: IntArray, hidden: Any = None) -> None:
        found = np.sort(self._chosen[self._rows, position])
        assert np.array_equal(found, np.sort(topk_ids)), "the recording is of another run"

    def predict(self, position: int) -> Probabilities:
        path = np.zeros((len(self._rows), self.grid.experts[position]), np.float32)
        np.put_along_axis(path, self._chosen[self._rows, position], 1.0, axis=1)
        return path

    def reset(self) -> None:
        self._rows = []


class TokenTable:
    """Shares of each expert among a token id's uses in the fitted texts, smoothed by popularity."""

    name: ClassVar[str] = "token table"
    needs_token_ids: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __init__(self, trace: RoutingTrace, vocabulary: int, strength: float = 2.0) -> None:
        self.grid = trace.grid
        tokens = trace.token_ids.astype(np.int64)
        uses = np.bincount(tokens, minlength=vocabulary)[:, None]
        self._shares = []
        for position, experts in enumerate(trace.experts):
            chosen = trace.topk_ids[:, position].astype(np.int64)
            flat = (tokens[:, None] * experts + chosen).ravel()
            counts = np.bincount(flat, minlength=vocabulary * experts).reshape(vocabulary, experts)
            popular = counts.sum(axis=0) / len(trace)
            shares = (counts + strength * popular) / (uses + strength)
            self._shares.append(shares.astype(np.float32))
        self._rows = np.zeros(0, np.int64)

    def begin_step(self, rows: StepRows) -> None:
        self._rows = rows.token_ids

    def observe(self, position: int, topk_ids: IntArray, hidden: Any = None) -> None:
        pass

    def predict(self, position: int) -> Probabilities:
        return self._shares[position][self._rows]

    def reset(self) -> None:
        pass


class Mean:
    """The mean of two predictors' probabilities."""

    name: ClassVar[str] = "token table and decayed path"
    needs_token_ids: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = False

    def __init__(self, first: Predictor, second: Predictor) -> None:
        self.grid = first.grid
        self._both = (first, second)

    def begin_step(self, rows: StepRows) -> None:
        for one in self._both:
            one.begin_step(rows)

    def observe(self, position: int, topk_ids: IntArray, hidden: Any = None) -> None:
        for one in self._both:
            one.observe(position, topk_ids)

    def predict(self, position: int) -> Probabilities:
        first, second = (one.predict(position) for one in self._both)
        return ((first + second) / 2).astype(np.float32)

    def reset(self) -> None:
        for one in self._both:
            one.reset()


# -- the parts -----------------------------------------------------------------------------------


class Setting:
    """Model, prompts and predictors; everything from seeds."""

    def __init__(self, count: int) -> None:
        from transformers import AutoTokenizer

        path = moe_runtime.bundled_model()
        tokenizer = AutoTokenizer.from_pretrained(path)
        texts = documents()
        self.prompts = prompts_of(tokenizer, texts["test"], count, SEED)
        self.model = moe_runtime.from_pretrained(
            path, expert_budget=BUDGET, device="cpu", dtype=torch.float32
        )
        whole = moe_runtime.from_pretrained(
            path, expert_budget="100%", device="cpu", dtype=torch.float32
        )
        fitted = prompts_of(tokenizer, texts["fit"], 400, SEED + 1)
        with moe_runtime.record(whole) as recorder:
            moe_runtime.generate_batches(
                whole, fitted, batch_size=16, max_new_tokens=NEW_TOKENS, schedule="order"
            )
        self.fit_tokens = len(recorder.trace)
        self.table = TokenTable(recorder.trace, len(tokenizer))
        with moe_runtime.record(whole) as recorder:
            self.reference = moe_runtime.generate_batches(
                whole, self.prompts, batch_size=16, max_new_tokens=NEW_TOKENS, schedule="order"
            )
        self.oracle = OraclePath(recorder.trace)
        self.grid: ExpertGrid = recorder.trace.grid

    def predictors(self) -> dict[str, Predictor]:
        """By name, fresh ones."""
        return {
            "oracle": self.oracle,
            "token table": self.table,
            "token path": TokenPath(self.grid),
            "previous token": DecayedPath(self.grid, decay=0.0),
            "decayed path": DecayedPath(self.grid),
            "token table and decayed path": Mean(self.table, DecayedPath(self.grid)),
        }

    def run(self, **options: Any) -> BatchRun:
        """One run from a cold cache of experts."""
        empty(self.model)
        return moe_runtime.generate_batches(
            self.model, self.prompts, max_new_tokens=NEW_TOKENS, **options
        )


def empty(model: Any) -> None:
    """Let a run begin like the one before it: the same prompt, so the same experts resident."""
    moe_runtime.generate_batches(
        model, [[1, 2, 3, 4]], batch_size=1, max_new_tokens=2, schedule="order", stop_tokens=()
    )


def figures(run: BatchRun, layers: int) -> dict[str, Any]:
    """What the tables show of a run."""
    decode = run.decode
    assert decode.active_per_call is not None and decode.misses_per_token is not None  # noqa: PT018
    assert decode.on_demand is not None and decode.bytes_read is not None  # noqa: PT018
    return {
        "calls": decode.calls,
        "active experts a layer and call": round(decode.active_per_call / layers, 3),
        "active experts a layer and token": round(
            decode.active_per_call * decode.calls / decode.tokens / layers, 4
        ),
        "misses a token": round(decode.misses_per_token, 3),
        "on-demand loads a token": round(decode.on_demand / decode.tokens, 3),
        "bytes a token": round(decode.bytes_read / decode.tokens),
        "regroupings": run.regroupings,
        "rounds": run.rounds,
        "moved": run.moved,
        "schedule ms a round": round(1e3 * run.schedule_seconds / run.rounds, 3),
        "gather ms a round": round(1e3 * run.gather_seconds / run.rounds, 3),
        "decode ms a round": round(1e3 * run.decode.seconds / run.rounds, 3),
    }


def saved(run: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Shares of the in-order run's figures that a run saves."""
    names = {
        "active": "active experts a layer and token",
        "misses": "misses a token",
        "on-demand loads": "on-demand loads a token",
    }
    return {short: round(1 - run[name] / base[name], 4) for short, name in names.items()}


def counts(setting: Setting, kept: dict[str, Any], only: str | None) -> dict[str, Any]:
    """Active experts, misses and bytes by batch size, window, method and predictor.

    They do not depend on the clock, so rows `kept` from an earlier run stand beside those of the
    predictor called `only`.
    """
    layers = len(setting.grid.layers)
    result: dict[str, Any] = kept if only else {}
    for batch_size in (4, 8, 16):
        rows: dict[str, Any] = result.setdefault(str(batch_size), {})
        base = setting.reference
        if not only:
            base = setting.run(batch_size=batch_size, schedule="order")
            assert base.outputs == setting.reference.outputs
            rows["in order"] = figures(base, layers)
            twice = setting.run(batch_size=batch_size, schedule="order", window=2)
            rows["in order, 2 batches in turn"] = figures(twice, layers)
        for window in (2, 4, "all"):
            for name, predictor in setting.predictors().items():
                if only not in {None, name}:
                    continue
                if window == "all" and name in {"token table", "previous token"}:
                    continue
                both = window != "all" and name in {"oracle", "decayed path"}
                for method in METHODS if both else METHODS[:1]:
                    run = setting.run(
                        batch_size=batch_size, schedule=method, window=window, predictor=predictor
                    )
                    assert run.outputs == base.outputs
                    assert not run.fallback
                    row = figures(run, layers)
                    row["saved"] = saved(row, rows["in order"])
                    rows[f"{method}, {name}, window {window}"] = row
                    SAY.print(batch_size, method, name, window, row["saved"])
    return result


def timing(setting: Setting, repeats: int) -> dict[str, Any]:
    """Tokens a second, paired: in each repeat every schedule runs once, in an order of its own."""
    choices: dict[str, dict[str, Any]] = {
        "in order": {"schedule": "order"},
        "union, window 2": {"schedule": "union", "window": 2},
        "union, window 4": {"schedule": "union", "window": 4},
        "union, window all": {"schedule": "union", "window": "all"},
        "k-medoids, window 4": {"schedule": "k-medoids", "window": 4},
    }
    rng = random.Random(SEED)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in choices}
    setting.run(batch_size=8, schedule="order")  # warm-up
    for repeat in range(repeats):
        names = list(choices)
        rng.shuffle(names)
        for name in names:
            run = setting.run(batch_size=8, **choices[name])
            assert run.decode_tokens_per_second is not None
            assert run.tokens_per_second is not None
            rates[name].append((run.decode_tokens_per_second, run.tokens_per_second))
        SAY.print("repeat", repeat, {name: [round(x) for x in rates[name][-1]] for name in names})
    base = np.array(rates["in order"])
    result: dict[str, Any] = {"batch size": 8, "repeats": repeats}
    for name, pairs in rates.items():
        ratios = np.array(pairs) / base
        result[name] = {
            "decode tokens/s": spread([pair[0] for pair in pairs]),
            "tokens/s with prefill": spread([pair[1] for pair in pairs]),
            "decode, over in order of the same repeat": spread(ratios[:, 0].tolist()),
            "with prefill, over in order of the same repeat": spread(ratios[:, 1].tolist()),
        }
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 3),
        "lowest": round(min(values), 3),
        "highest": round(max(values), 3),
    }


def cost() -> list[dict[str, Any]]:
    """Milliseconds of processor time of one grouping of random sequences of three topics."""
    rows = []
    for layers, experts, top_k in ((6, 32, 4), (24, 60, 4), (24, 60, 8)):
        for sequences, batch_size in ((16, 8), (32, 16), (32, 8), (32, 4), (64, 8)):
            paths = topical_paths(layers, experts, top_k, sequences)
            row: dict[str, Any] = {
                "layers": layers,
                "experts": experts,
                "top-k": top_k,
                "sequences": sequences,
                "batch size": batch_size,
            }
            plain = active_experts(paths, in_order(sequences, batch_size)).sum()
            for method in METHODS:
                for form, given in (("exact", paths), ("probable", 0.02 + 0.7 * paths)):
                    seconds = []
                    for _ in range(9):
                        began = time.thread_time()
                        groups = group_sequences(given, batch_size, method=method)
                        seconds.append(time.thread_time() - began)
                    saved_share = 1 - active_experts(paths, groups).sum() / plain
                    row[f"{method}, {form} paths"] = {
                        "ms": spread([1e3 * value for value in seconds]),
                        "saved": round(float(saved_share), 4),
                    }
            rows.append(row)
    return rows


def topical_paths(layers: int, experts: int, top_k: int, sequences: int) -> FloatArray:
    """Paths of sequences of three topics, each with its own popular experts; 0 and 1."""
    rng = np.random.default_rng(SEED)
    topics = rng.random((3, layers, experts)) ** 4
    paths = np.zeros((sequences, layers, experts))
    for sequence in range(sequences):
        topic = topics[rng.integers(3)]
        for layer in range(layers):
            weights = topic[layer] / topic[layer].sum()
            chosen = rng.choice(experts, top_k, replace=False, p=weights)
            paths[sequence, layer, chosen] = 1.0
    return paths.reshape(sequences, -1)


def switch(setting: Setting) -> dict[str, Any]:
    """A top-1 shape, replayed: the first choice of each layer of the recorded tokens, 32 experts.

    No computing: paths in lockstep, grouped by the path before (decayed) and by the coming one.
    The figure of merit is ExpertFlow (He)'s: experts beyond the slots of a layer.
    """
    oracle = setting.oracle
    sequences: dict[int, list[int]] = {}
    for (sequence, _), row in sorted(oracle._row.items()):
        sequences.setdefault(sequence, []).append(row)
    steps = NEW_TOKENS // 2
    long = [rows[-steps:] for rows in sequences.values() if len(rows) >= steps + 4]
    size, layers = setting.grid.experts[0], len(setting.grid.layers)
    first = np.zeros((len(long), steps, layers, size))
    for at, rows in enumerate(long):
        for step, row in enumerate(rows):
            first[at, step, np.arange(layers), oracle._chosen[row, :, 0]] = 1.0
    paths = first.reshape(len(long), steps, -1)
    offsets = [size * layer for layer in range(layers)]
    result: dict[str, Any] = {"sequences": len(long), "steps": steps}
    for batch_size in (4, 8, 16):
        for window in (2, 4):
            totals: dict[str, IntArray | FloatArray] = {}
            for start in range(0, len(long) - window * batch_size + 1, window * batch_size):
                some = paths[start : start + window * batch_size]
                recent = some[:, 0]
                for step in range(1, steps):
                    groupings = {"in order": in_order(len(some), batch_size)}
                    for method in METHODS:
                        for name, known in (("oracle", some[:, step]), ("decayed path", recent)):
                            groupings[f"{method}, {name}"] = group_sequences(
                                known, batch_size, method=method
                            )
                    for name, groups in groupings.items():
                        active = active_experts(some[:, step], groups, offsets)
                        loads = [np.maximum(active - slots, 0).sum() for slots in (4, 8, 16)]
                        both = np.array([active.sum(), *loads])
                        totals[name] = totals.get(name, 0) + both
                    recent = 0.5 * recent + 0.5 * some[:, step]
            base = totals["in order"]
            result[f"batch size {batch_size}, window {window}"] = {
                name: {
                    "active, share saved": round(float(1 - total[0] / base[0]), 4),
                    "on-demand loads, share saved, at 4, 8, 16 slots a layer": [
                        round(float(1 - x / y), 4) if y else None
                        for x, y in zip(total[1:], base[1:], strict=True)
                    ],
                }
                for name, total in totals.items()
                if name != "in order"
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+")
    parser.add_argument("--predictor", help="counts of this one only; the others are kept")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {}
    if given.out.exists():
        result = json.loads(given.out.read_text(encoding="utf-8"))
    wanted = given.only or list(PARTS)
    setting = Setting(given.prompts) if set(wanted) - {"cost"} else None
    result["versions"] = {
        "moe_runtime": __version__,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result["settings"] = {
        "seed": SEED,
        "threads": given.threads,
        "dtype": "float32",
        "expert budget": BUDGET,
        "policy": "lru",
        "prompts": given.prompts,
        "prompt tokens": list(PROMPT_TOKENS),
        "new tokens at most": NEW_TOKENS,
    }
    for part in wanted:
        machine = describe_machine()
        if part == "cost":
            found: Any = cost()
        else:
            assert setting is not None
            result["settings"]["tokens that the table was fitted to"] = setting.fit_tokens
            result["settings"]["slots"] = moe_runtime.runtime_of(setting.model).budget.slots
            if part == "counts":
                kept = result.get("counts", {}).get("result", {})
                found = counts(setting, kept, given.predictor)
            elif part == "timing":
                found = timing(setting, given.repeats)
            else:
                found = switch(setting)
        result[part] = {"machine": machine, "result": found}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

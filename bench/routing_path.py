"""The routing-path predictor on held-out text: recall and precision, cost, ablation, other domains.

Needs the recordings of `routing_data.py` (in bench/work/routing/bundled and .../second). Documents
are held out: neither the predictor nor, where the set says held_out, the model saw them. Run:

    python bench/routing_path.py                     # to bench/results/routing_path.json
    python bench/routing_path.py --only second       # one part; the others are kept
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from moe_runtime.predictors import StepRows, load_predictor
from moe_runtime.predictors.path_config import PathConfig, preset
from moe_runtime.predictors.path_correction import corrected
from moe_runtime.predictors.path_measure import network_recall, sequence_logits, table_recall
from moe_runtime.predictors.path_recall import RecallSum, table_logits
from moe_runtime.predictors.path_sequences import sequences_of, token_counts
from moe_runtime.predictors.path_training import TrainOptions, train_path
from moe_runtime.predictors.routing_path import RoutingPathPredictor
from moe_runtime.predictors.train import shares, split_traces, train_predictor
from rich.console import Console

import moe_runtime
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "routing_path.json"
SAY = Console(stderr=True, highlight=False)
PARTS = ("bundled", "foreign", "cross", "ablation", "second")
STEPS = {"cross": 200, "ablation": 60}
MINUTES = 6.0  # of training on the second model
SEED = 0


def load(folder: Path, ending: str) -> dict[str, RoutingTrace]:
    """Traces of one split by what comes before it in their names."""
    paths = sorted(folder.glob(f"*.{ending}.trace.safetensors"))
    if not paths:
        raise SystemExit(f"{folder}: no *.{ending}.trace.safetensors; run routing_data.py first")
    return {path.name.split(".")[0]: RoutingTrace.load(path) for path in paths}


def held_out_sets(folder: Path) -> dict[str, list[RoutingTrace]]:
    """The sets that figures are of; the last is the three corpora together."""
    found: dict[str, list[RoutingTrace]] = {}
    for ending in ("corpora", "held_out", "continued"):
        for domain, trace in load(folder, ending).items():
            found[f"{domain}, {ending}"] = [trace]
    found["mix"] = [trace for name, (trace,) in found.items() if name.endswith("corpora")]
    return found


def evenness(traces: Sequence[RoutingTrace]) -> float:
    """Entropy of the load over its greatest possible value, mean over layers."""
    values = []
    for layer, count in enumerate(traces[0].experts):
        ids = np.concatenate([trace.topk_ids[:, layer].ravel() for trace in traces])
        share = np.bincount(ids[ids < count], minlength=count) / (ids < count).sum()
        values.append(-(share[share > 0] * np.log2(share[share > 0])).sum() / np.log2(count))
    return round(float(np.mean(values)), 4)


def compare(
    predictor: RoutingPathPredictor,
    train: Sequence[RoutingTrace],
    sets: Mapping[str, Sequence[RoutingTrace]],
) -> dict[str, Any]:
    """The predictor beside the token-id table of its training rows, on the same rows."""
    grid, top_k = predictor.grid, predictor.origin.top_k
    vocabulary = predictor.vocabulary
    table = table_logits(*token_counts(sequences_of(train), vocabulary, grid), grid)
    result: dict[str, Any] = {}
    for name, traces in sets.items():
        sequences = sequences_of(traces)
        where = (sequences, vocabulary, grid, top_k)
        row: dict[str, Any] = {
            "routing_path": shares(network_recall(predictor.network, *where)),
            "token_table": shares(table_recall(table, *where)),
        }
        if predictor.correction is not None:
            total = RecallSum(grid, top_k)
            for one in sequences:
                logits = sequence_logits(predictor.network, vocabulary, one)
                ids = one.topk_ids[one.cut() :]
                total.add(corrected(logits, ids, predictor.correction, grid), ids)
            row["earlier_layers_known"] = shares(total.result())
        over = row["routing_path"]["recall_2k"] - row["token_table"]["recall_2k"]
        result[name] = {
            "tokens": sum(len(one) - one.cut() for one in sequences),
            "load_evenness": evenness(traces),
            "points_over_table_at_2k": round(100 * over, 2),
            **row,
        }
        SAY.print(name, row["routing_path"], row["token_table"]["recall_2k"])
    return result


def cost(predictor: RoutingPathPredictor, trace: RoutingTrace) -> dict[str, Any]:
    """Microseconds a decoded token, all layers forecast, sequences decoding in step."""
    rows: dict[str, Any] = {}
    texts = [one for one in sequences_of([trace]) if len(one) >= 100]
    for batch in (1, 4, 16):
        times = []
        predictor.reset()
        for place in range(100):
            chosen = [texts[number % len(texts)] for number in range(batch)]
            step = StepRows(
                token_ids=np.array([one.token_ids[place] for one in chosen]),
                sequence_ids=np.arange(batch),
                positions=np.full(batch, place),
                decode=place > 0,
            )
            began = time.perf_counter()
            predictor.begin_step(step)
            for position in range(len(predictor.grid.layers)):
                predictor.predict(position)
            times.append(time.perf_counter() - began)
        kept = sorted(1e6 * one / batch for one in times[20:])
        rows[str(batch)] = {
            "median_us": round(median(kept), 1),
            "tenth_us": round(kept[len(kept) // 10], 1),
            "nine_tenths_us": round(kept[-len(kept) // 10], 1),
        }
    return rows


def bundled(folder: Path, file: Path) -> dict[str, Any]:
    """The predictor that the package holds, as it is stored."""
    predictor = load_predictor(file)
    assert isinstance(predictor, RoutingPathPredictor)
    result = {
        "file_bytes": file.stat().st_size,
        "sizes": predictor.network.config.as_dict(),
        "early_stopping_set": dict(predictor.origin.figures),
        "sets": compare(predictor, list(load(folder, "train").values()), held_out_sets(folder)),
        "cost_by_batch": cost(predictor, load(folder, "corpora")["python"]),
    }
    SAY.print(result["cost_by_batch"])
    return result


def foreign(folder: Path, file: Path) -> dict[str, Any]:
    """The bundled predictor on kinds of text that it was not trained on."""
    predictor = load_predictor(file)
    assert isinstance(predictor, RoutingPathPredictor)
    sets = {name: [trace] for name, trace in load(folder, "foreign").items()}
    return {"sets": compare(predictor, list(load(folder, "train").values()), sets)}


def cross(folder: Path) -> dict[str, Any]:
    """Networks of one domain each, on their own and on the other domains' corpora; few steps."""
    tests = {name: sequences_of([trace]) for name, trace in load(folder, "corpora").items()}
    result: dict[str, Any] = {"steps": STEPS["cross"]}
    for domain, trace in load(folder, "train").items():
        every = sequences_of([trace])
        some = every[5::100]
        known = [one for at, one in enumerate(every) if at % 100 != 5]
        trained = train_path(
            known, some, grid=trace.grid, top_k=trace.top_k,
            config=preset("compact"), options=_options(STEPS["cross"]),
        )  # fmt: skip
        where = (trained.vocabulary, trace.grid, trace.top_k)
        table = table_logits(*token_counts(known, trained.vocabulary, trace.grid), trace.grid)
        result[f"trained on {domain}"] = {
            name: {
                "routing_path": shares(network_recall(trained.network, test, *where)),
                "token_table": shares(table_recall(table, test, *where)),
            }
            for name, test in tests.items()
        }
        SAY.print(domain, result[f"trained on {domain}"])
    return result


def variants() -> dict[str, tuple[PathConfig, float]]:
    """Sizes to compare, with the learning rate of each (the paper's code has 1e-3 at most)."""
    ours = preset("compact")
    return {
        "compact": (ours, 2e-3),
        "without the table's prior": (replace(ours, prior=False), 2e-3),
        "one layer": (replace(ours, decoder_layers=1), 2e-3),
        "expertflow": (preset("expertflow"), 1e-3),
    }


def ablation(folder: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The paper's sizes and parts of ours on the same rows, for the same few steps."""
    sequences = [one for t in load(folder, "train").values() for one in sequences_of([t])]
    known, some = sequences[::8], sequences[4::300]
    first = load(folder, "corpora")["python"]
    sets = {n: sequences_of(t) for n, t in held_out_sets(folder).items() if "corpora" in n}
    result: dict[str, Any] = {"steps": STEPS["ablation"]}
    for name, (config, rate) in variants().items():
        began = time.process_time()
        trained = train_path(
            known, some, grid=first.grid, top_k=first.top_k, config=config,
            options=replace(_options(STEPS["ablation"]), peak_rate=rate),
        )  # fmt: skip
        spent = time.process_time() - began
        where = (trained.vocabulary, first.grid, first.top_k)
        result[name] = {
            "peak_rate": rate,
            "weights": trained.network.size_bytes(1),
            "processor_seconds": round(spent, 1),
            "sets": {
                n: shares(network_recall(trained.network, s, *where)) for n, s in sets.items()
            },
        }
        SAY.print(name, result[name])
        keep(result)
    return result


def second(folder: Path) -> dict[str, Any]:
    """A predictor of the second model, trained here."""
    traces = list(load(folder, "train").values())
    train, held = split_traces(traces, 0.03, SEED)
    began = time.process_time()
    options = TrainOptions(epochs=100, minutes=MINUTES, seed=SEED)
    made = train_predictor(train, held, config=preset("compact"), options=options)
    seconds = time.process_time() - began
    return {
        "layers": len(train[0].layer_ids),
        "experts": train[0].experts[0],
        "top_k": train[0].top_k[0],
        "minutes": MINUTES,
        "steps": made.trained.steps,
        "seconds": round(made.trained.seconds, 1),
        "processor_seconds": round(seconds, 1),
        "weights_bytes": made.predictor.network.size_bytes(),
        "sets": compare(made.predictor, train, held_out_sets(folder)),
        "cost_by_batch": cost(made.predictor, load(folder, "corpora")["python"]),
    }


def _options(steps: int) -> TrainOptions:
    return TrainOptions(epochs=100, steps=steps, evaluate_every=max(50, steps // 4), seed=SEED)


def keep(path: Path, part: str, found: dict[str, Any]) -> None:
    """Puts one part's figures among the others, which may be measured beside it."""
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result[part] = {
        "machine": describe_machine(),
        "threads": 1,
        "versions": {
            "moe_runtime": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": SEED,
        "options": asdict(TrainOptions()),
        **found,
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measures the parts that are asked for and keeps the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--routing", type=Path, default=HERE / "work" / "routing")
    parser.add_argument("--predictor", type=Path, help="instead of the bundled one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for part in given.only or PARTS:
        SAY.print(f"[bold]{part}[/]")
        folder = given.routing / ("second" if part == "second" else "bundled")
        file = given.predictor or Path(moe_runtime.bundled_predictor())
        if part == "bundled":
            found = bundled(folder, file)
        elif part == "foreign":
            found = foreign(folder, file)
        elif part == "ablation":
            found = ablation(folder, lambda now: keep(given.out, "ablation", now))
        else:
            found = {"cross": cross, "second": second}[part](folder)
        keep(given.out, part, found)


if __name__ == "__main__":
    main()

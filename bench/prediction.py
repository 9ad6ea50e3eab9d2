"""Routing predictors on the bundled model and on the shared traces of real models.

Every figure is of rows that no predictor was fitted to. Run:

    python bench/prediction.py --traces ../shared/traces     # to bench/results/prediction.json
    python bench/prediction.py --only bundled --predictor p.predictor.safetensors
    python bench/prediction.py --write-traces FOLDER         # what the predictors are fitted to

A predictor file is measured beside the others on all texts of the bundled model; it must not have
been fitted to these (train it on what --write-traces writes).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
from moe_runtime.predictors.base import Predictor
from moe_runtime.predictors.baselines import AsLayerBefore, AsTokenBefore
from moe_runtime.predictors.evaluate import evaluate, likeliest
from moe_runtime.predictors.evaluation import Evaluation, Settings
from moe_runtime.predictors.files import load_predictor
from moe_runtime.predictors.fitted import FittedPredictor
from moe_runtime.predictors.frequency import PopularityPredictor
from moe_runtime.predictors.gate_lookahead import GateLookaheadPredictor
from moe_runtime.predictors.hidden_states import record_hidden
from moe_runtime.predictors.origin import Origin
from moe_runtime.predictors.previous import PreviousTokenPredictor
from moe_runtime.predictors.replay import as_decode, replay
from moe_runtime.predictors.token_table import TokenTablePredictor
from moe_runtime.predictors.traces import joined
from moe_runtime.predictors.transition import (
    PairCountPredictor,
    TransitionPredictor,
    evidence_of,
    weights_of,
)
from rich.console import Console

import moe_runtime
from corpora import corpora
from moe_runtime.model_spec import read_spec
from moe_runtime.trace import DECODE, RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine
from shared_traces import load_shared_traces

RESULTS = Path(__file__).parent / "results" / "prediction.json"
SAY = Console(stderr=True, highlight=False)
SEED = 0
KINDS: tuple[type[FittedPredictor], ...] = (
    PopularityPredictor,
    PreviousTokenPredictor,
    TokenTablePredictor,
    PairCountPredictor,
    TransitionPredictor,
)
TOKENS = 256  # of a text
TRAIN_SHARE = 0.7  # of the texts
FITTED_TO = ("english", "python")
SETTINGS = Settings(lookahead=3, batch_sizes=(1, 4, 16), token_by_token=True, max_tokens=384)
AS_RUN = Settings(lookahead=1, batch_sizes=(1, 4, 16), token_by_token=False, max_tokens=1024)
PLAIN = {"pair_strength": 0.01, "pair_cap": 1e9}  # counts, and popularity where there are none
LEVELS = ("recall_k", "precision_k", "recall_2k", "precision_2k")


# -- the bundled model -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Token ids of one kind of text, those to fit to and those held out."""

    train: list[torch.Tensor]
    test: list[torch.Tensor]


def load_texts() -> dict[str, Texts]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(moe_runtime.bundled_model())
    result = {}
    for name, texts in corpora().items():
        ids = [torch.tensor(tokenizer(text[:3000])["input_ids"][:TOKENS]) for text in texts]
        ids = [one for one in ids if len(one) > 8]
        cut = int(len(ids) * TRAIN_SHARE)
        result[name] = Texts(train=ids[:cut], test=ids[cut:])
    return result


def record_texts(model: Any, texts: Sequence[torch.Tensor]) -> RoutingTrace:
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for ids in texts:
            model(ids[None])
    return recorder.trace


def record_generated(model: Any, texts: Sequence[torch.Tensor], prompt: int = 48) -> RoutingTrace:
    """Prompts and 48 tokens that the model goes on with, drawn at temperature 1."""
    torch.manual_seed(SEED)
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for ids in texts:
            model.generate(ids[None, :prompt], max_new_tokens=48, do_sample=True)
    return recorder.trace


def bundled(files: Sequence[Path], fitted_to: Sequence[str]) -> dict[str, Any]:
    texts = load_texts()
    model = moe_runtime.from_pretrained(
        moe_runtime.bundled_model(), expert_budget="100%", device="cpu"
    )
    train = {name: record_texts(model, texts[name].train) for name in fitted_to}
    held = {name: record_texts(model, one.test) for name, one in texts.items()}
    generated = record_generated(model, texts["english"].test[:16])
    moe_runtime.detach(model)
    result: dict[str, Any] = {
        "tokens": {
            **{f"{name}, fitted to": len(trace) for name, trace in train.items()},
            **{f"{name}, held out": len(trace) for name, trace in held.items()},
            "english, generated": len(generated),
        },
        "fitted to": {},
    }
    for name, trace in train.items():
        predictors: dict[str, Predictor] = {}
        seconds = {}
        for kind in KINDS:
            began = time.perf_counter()
            predictors[kind.name] = kind.fit([trace])
            seconds[kind.name] = round(time.perf_counter() - began, 1)
        for baseline in (AsTokenBefore, AsLayerBefore):
            predictors[baseline.name] = baseline(trace.grid)
        for file in files:
            predictors[file.name] = load_predictor(file, grid=trace.grid)
        domains = {n: [t] for n, t in held.items()}
        measured = evaluate(predictors, domains, SETTINGS, progress=SAY.print)
        as_run = evaluate(
            predictors, {"english, generated": [generated]}, AS_RUN, progress=SAY.print
        )
        result["fitted to"][name] = {
            "seconds to fit": seconds,
            "domains": {**shown(measured), **shown(as_run)},
            "gate lookahead": lookahead(texts[name].train, texts),
        }
    return result


def shown(result: Evaluation) -> dict[str, Any]:
    """Means over layers, layers at batch 1, and what stands beside them."""
    domains: dict[str, Any] = {}
    for domain in result.domains:
        rows: dict[str, Any] = {}
        for one in result.figures:
            if one.domain != domain.name:
                continue
            scores = {
                f"{s.phase}, batch {s.batch_size}, {s.distance} ahead": {
                    level: round(s.mean(level) or 0.0, 4) for level in LEVELS
                }
                for s in one.scores
            }
            next_layer = one.score(phase="decode", batch_size=1, distance=1)
            rows[one.predictor] = {
                "scores": scores,
                "layers, recall at 2k": next_layer.recall_2k if next_layer else None,
                "calibration error": one.calibration_error,
                "calibration error, likeliest 2k": one.calibration_error_top,
                "microseconds a token": one.microseconds,
            }
        domains[domain.name] = {
            "tokens": domain.tokens,
            "entropy": [round(value, 4) for value in domain.entropy],
            "predictors": rows,
        }
    return domains


def lookahead(train: Sequence[torch.Tensor], texts: dict[str, Texts]) -> dict[str, Any]:
    """Gate lookahead, which needs a live model; the routers as they are beside it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(moe_runtime.bundled_model()).eval()
    spec = read_spec(model)
    result: dict[str, Any] = {}
    for name, steps in (("corrected", 240), ("routers as they are", 0)):
        predictor = GateLookaheadPredictor.fit_model(model, train, steps=steps, seed=SEED)
        rows = {}
        for domain, one in texts.items():
            recording = record_hidden(model, spec, one.test, SETTINGS.max_tokens)
            rows[domain] = recalls(predictor, as_decode(recording.trace), recording.hidden)
        result[name] = rows
        SAY.print("gate lookahead", name, rows)
    return result


# -- the shared traces -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A run of a shared model, and what may be known before it: other runs, or nothing."""

    model: str
    origin: Origin
    known: RoutingTrace | None
    trace: RoutingTrace

    def made(self, kind: type[FittedPredictor], **constants: Any) -> Any:
        return kind.make(self.origin, self.known, {**kind.candidates[0], **constants})


def runs_of(folder: Path) -> list[Run]:
    result = []
    for model, traces in load_shared_traces(folder).items():
        for at, trace in enumerate(traces):
            others = [one for number, one in enumerate(traces) if number != at]
            origin = Origin.of(others) if others else Origin.empty(trace)
            known = as_decode(joined(others)) if others else None
            result.append(Run(model=model, origin=origin, known=known, trace=trace))
    return result


def recalls(
    predictor: Predictor, trace: RoutingTrace, hidden: Sequence[torch.Tensor] | None = None
) -> dict[str, dict[str, float]]:
    """Recall at k and 2k of decoded rows, by layers ahead; mean over rows, then over layers.

    Layers that stand too near the start of a call to be forecast from so far back are left out.
    """
    sums: dict[tuple[int, int], dict[int, list[float]]] = {}
    for one in replay(predictor, trace, 4, hidden):
        k = trace.top_k[one.position]
        if not one.decode or one.position < one.distance or not k:
            continue
        order = likeliest(one.probabilities, 2 * k)
        used = np.maximum((one.topk_ids >= 0).sum(axis=1), 1)
        hit = (order[:, :, None] == one.topk_ids[:, None, :]).any(axis=2)
        for times in (1, 2):
            share = hit[:, : times * k].sum(axis=1) / used
            by_layer = sums.setdefault((one.distance, times), {})
            by_layer.setdefault(one.position, []).extend(share.tolist())
    return {
        f"{distance} ahead": {
            name: round(fmean(fmean(v) for v in sums[distance, times].values()), 4)
            for times, name in ((1, "recall_k"), (2, "recall_2k"))
        }
        for distance in sorted({d for d, _ in sums})
    }


def shared(folder: Path) -> dict[str, Any]:
    """Next layers on the shared traces: set-conditioned transitions against pair counts.

    The transition predictor's weights are fitted to the other models' runs alone.
    """
    runs = runs_of(folder)
    # One model's runs are all alike to the weights; two of the six are enough, and equal in weight.
    seen: dict[str, list[Any]] = {}
    for run in runs:
        if len(seen.setdefault(run.model, [])) < 2:
            seen[run.model].append(evidence_of(run.made(TransitionPredictor), run.trace))
            SAY.print("evidence of", run.model)
    result: dict[str, Any] = {}
    for run in runs:
        weights = weights_of([e for m, es in seen.items() if m != run.model for e in es], pull=1e-2)
        tokens_known = bool((run.trace.token_ids >= 0).all())
        made: dict[str, Any] = {
            "pair counts, plain": run.made(PairCountPredictor, **PLAIN),
            "pair counts, by evidence": run.made(PairCountPredictor),
            "transition": run.made(TransitionPredictor, weights=weights.tolist()),
            "popularity": run.made(PopularityPredictor),
            "previous token": run.made(PreviousTokenPredictor),
        }
        if tokens_known:
            made["token table"] = run.made(TokenTablePredictor)
        rows: dict[str, Any] = {name: recalls(one, run.trace) for name, one in made.items()}
        ratio = {
            against: {
                ahead: {
                    level: round(rows["transition"][ahead][level] / rows[against][ahead][level], 3)
                    for level in ("recall_k", "recall_2k")
                }
                for ahead in rows["transition"]
            }
            for against in ("pair counts, plain", "pair counts, by evidence")
        }
        entry = {
            "decoded tokens": int((run.trace.phase == DECODE).sum()),
            "fitted to other runs' tokens": 0 if run.known is None else len(run.known),
            "predictors": rows,
            "transition over": ratio,
        }
        result.setdefault(run.model, []).append(entry)
        SAY.print(run.model, {n: r["1 ahead"] for n, r in rows.items()}, ratio)
    return {"runs": result, "mean": _mean(result)}


def _mean(result: dict[str, Any]) -> dict[str, Any]:
    """By model the mean over its runs, next layer; the mean of the models' ratios."""
    table: dict[str, Any] = {}
    for model, entries in result.items():
        names = entries[0]["predictors"]
        mean = {
            name: {
                level: round(fmean(e["predictors"][name]["1 ahead"][level] for e in entries), 4)
                for level in ("recall_k", "recall_2k")
            }
            for name in names
        }
        ratios = {
            f"over {against}": round(mean["transition"]["recall_k"] / mean[against]["recall_k"], 3)
            for against in ("pair counts, plain", "pair counts, by evidence")
        }
        table[model] = {**mean, **ratios}
    for against in ("pair counts, plain", "pair counts, by evidence"):
        values = [row[f"over {against}"] for row in table.values() if isinstance(row, dict)]
        table[f"mean ratio over {against}"] = round(fmean(values), 3)
    return table


def write_traces(folder: Path) -> None:
    """The traces that predictors are fitted to here, for `moe-runtime train-predictor`."""
    texts = load_texts()
    model = moe_runtime.from_pretrained(
        moe_runtime.bundled_model(), expert_budget="100%", device="cpu"
    )
    for name in FITTED_TO:
        path = folder / f"{name}.trace.safetensors"
        SAY.print(record_texts(model, texts[name].train).save(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, help="the folder of recordings of real models")
    parser.add_argument("--only", choices=("bundled", "shared"))
    parser.add_argument("--fitted-to", choices=FITTED_TO, help="the other is kept as it was")
    parser.add_argument("--predictor", type=Path, action="append", default=[])
    parser.add_argument("--write-traces", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.write_traces is not None:
        write_traces(given.write_traces)
        return
    result: dict[str, Any] = {}
    if given.out.exists():
        result = json.loads(given.out.read_text(encoding="utf-8"))
    result |= {
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": __version__,
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seed": SEED,
        "threads": 1,
    }
    for part in [given.only] if given.only else ["shared", "bundled"]:
        if part == "shared":
            if given.traces is None:
                parser.error("--traces FOLDER is needed for the shared traces")
            result["shared"] = shared(given.traces)
        else:
            found = bundled(given.predictor, [given.fitted_to] if given.fitted_to else FITTED_TO)
            before = result.get("bundled", {})
            for key in ("tokens", "fitted to"):  # one kind of text at a time is possible
                found[key] = {**before.get(key, {}), **found[key]}
            result["bundled"] = found
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

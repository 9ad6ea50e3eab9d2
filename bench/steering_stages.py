"""The stages of `steering.py` on the bundled model: what each measures and leaves for later ones.

Does not know which stages run, nor where their figures are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_runtime
from bundled_model.puzzle_tasks import CHECKER, puzzles
from bundled_model.puzzles import Puzzle
from moe_runtime.routing_counts import RoutingCounts
from moe_runtime.steering.controls import Controls
from moe_runtime.steering.cost_run import measure_cost
from moe_runtime.steering.evaluate import evaluate_steering
from moe_runtime.steering.evaluation import SteeringEvaluation, select_beta
from moe_runtime.steering.files import read_steering, write_steering
from moe_runtime.steering.identification import Identification
from moe_runtime.steering.identify import identify
from moe_runtime.steering.sampling import Request, Sampling, complete
from moe_runtime.steering.shift import routing_shift
from moe_runtime.steering.tasks import Task
from moe_runtime.steering.values import Steering
from moe_runtime.trace import RoutingTrace
from planted_control import planted_control
from steering_figures import cost_figures, evaluation_figures, identification_figures

SAY = Console(stderr=True, highlight=False)
# The model says "Alternatively" nowhere in its puzzles, so the paper's third marker has no events.
MARKERS = {"<think>": 1.0, "</think>": -1.0}
# `product` is in neither: it has seven held-out puzzles.
FOUND_ON = ("sum", "chain", "sort", "largest")
TRANSFER = ("story", "count", "evens")
BETAS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
PAPER_BETA = 64.0
SMOOTHING = 1.0  # pseudo-count; see `identify`
SEEDS = {"identify": 11, "validate": 12, "test": 13, "transfer": 14, "cost": 15}
SAMPLING = {"max_new_tokens": 96, "temperature": 1.0}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything; `problems` are of the stages validate, test and transfer."""

    name: str
    responses: int
    bootstrap: int
    problems: tuple[int, int, int]
    samples: int
    draws: int
    prompts: int
    rounds: int
    planted_samples: int
    resamples: int


FULL = Sizes(
    name="full", responses=3000, bootstrap=500, problems=(400, 600, 400), samples=4, draws=3,
    prompts=10, rounds=5, planted_samples=60, resamples=10_000,
)  # fmt: skip
QUICK = Sizes(
    name="quick", responses=200, bootstrap=50, problems=(12, 12, 12), samples=2, draws=1,
    prompts=3, rounds=1, planted_samples=4, resamples=500,
)  # fmt: skip


def progress_of(stage: str) -> Callable[[Any], None]:
    """A line every ten seconds or so."""
    told = [time.monotonic()]

    def tell(at: Any) -> None:
        if time.monotonic() - told[0] > 10:
            told[0] = time.monotonic()
            rate = at.new_tokens / at.seconds if at.seconds else 0.0
            SAY.print(f"{stage}: {at.done}/{at.total} samples, {at.arm}, {rate:,.0f} tokens/s")

    return tell


class Bench:
    """The bundled model and the folder in which stages leave what later ones need."""

    def __init__(self, sizes: Sizes, work: Path) -> None:
        self.sizes, self.work = sizes, work
        work.mkdir(parents=True, exist_ok=True)
        self.path = moe_runtime.bundled_model()
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()
        # Attached in place, routing can be recorded; plain, sampling is a little faster.
        self.recorded = moe_runtime.from_pretrained(
            self.path, expert_budget="100%", dtype="float32", device="cpu"
        )

    def file(self, name: str) -> Path:
        return self.work / name

    def puzzles(self, stage: str, count: int) -> list[Puzzle]:
        """Different puzzles of a stage. Training-side stages share no prompt."""
        families = TRANSFER if stage == "transfer" else FOUND_ON
        if stage in {"identify", "validate"}:
            found = puzzles("train", families, self.sizes.responses, seed=SEEDS["identify"])
            if stage == "identify":
                return found
            used = {one.prompt for one in found}
            return puzzles("train", families, count, seed=SEEDS[stage], leave_out=used)
        return puzzles("held_out", families, count, seed=SEEDS[stage])

    # -- stages ------------------------------------------------------------------------------------

    def responses(self) -> list[list[int]]:
        """Token ids of training-side puzzles and what the model answers to them."""
        stop = self.model.generation_config.eos_token_id
        requests = [
            Request(problem=str(n), sample=0, prompt=tuple(self.tokenizer(one.prompt)["input_ids"]))
            for n, one in enumerate(self.puzzles("identify", self.sizes.responses))
        ]
        sampling = Sampling(seed=SEEDS["identify"], **SAMPLING)
        rows, began = [], time.perf_counter()
        for part in complete(
            self.model, requests, sampling, batch_size=128, stop=frozenset([stop]), pad=0
        ):
            rows += [[*one.request.prompt, *one.tokens] + [stop] * one.ended for one in part]
        SAY.print(f"identify: {len(rows)} responses, {time.perf_counter() - began:.0f} s")
        return rows

    def identify(self) -> dict[str, Any]:
        """The paper's way: the model's own responses, read once more in one pass each."""
        trace = self.read(self.responses())
        solved = [
            self.tokenizer(one.prompt + one.solution)["input_ids"]
            for one in self.puzzles("identify", self.sizes.responses)
        ]
        options = {"tokenizer": self.tokenizer, "bootstrap": self.sizes.bootstrap}
        found = identify(trace, MARKERS, 2, seed=SEEDS["identify"], **options)
        reference = identify(self.read(solved), MARKERS, 2, seed=SEEDS["identify"], **options)
        RoutingCounts.from_trace(trace).save(self.file("uses.counts.safetensors"))
        self.keep("found", found)
        return identification_figures(found, reference)

    def smoothed(self) -> dict[str, Any]:
        """The same with pairs that never came together smoothed: other experts, tested alike."""
        found = identify(
            self.read(self.responses()), MARKERS, 2, tokenizer=self.tokenizer,
            smoothing=SMOOTHING, bootstrap=self.sizes.bootstrap, seed=SEEDS["identify"],
        )  # fmt: skip
        self.keep("smoothed", found)
        random = Controls(kinds=("random", "frequency"), draws=self.sizes.draws)
        validated = self.evaluate("validate", BETAS, Controls(), name="smoothed")
        return {
            "smoothing": SMOOTHING,
            "identify": identification_figures(found, None),
            "validate": validated,
            "beta by the rule": self.chosen("smoothed")[0],
            "test": self.evaluate("test", self.frozen("smoothed"), random, name="smoothed"),
        }

    def keep(self, name: str, found: Identification) -> None:
        write_steering(
            self.file(f"{name}.steer.json"),
            Steering(betas=dict.fromkeys(found.chosen, PAPER_BETA)),
            identification=found,
        )

    def read(self, rows: list[list[int]]) -> RoutingTrace:
        """The routing of whole texts."""
        rows = sorted(rows, key=len)
        with torch.no_grad(), moe_runtime.record(self.recorded) as recorder:
            for start in range(0, len(rows), 64):
                batch = rows[start : start + 64]
                longest = max(map(len, batch))
                self.recorded(
                    input_ids=torch.tensor([[0] * (longest - len(r)) + r for r in batch]),
                    attention_mask=torch.tensor(
                        [[0] * (longest - len(r)) + [1] * len(r) for r in batch]
                    ),
                )
        return recorder.trace

    def evaluate(
        self, stage: str, betas: tuple[float, ...], controls: Controls, *, name: str = "found"
    ) -> dict[str, Any]:
        """One evaluation of experts found, kept as a file."""
        size = self.sizes.problems[("validate", "test", "transfer").index(stage)]
        tasks = [
            Task(id=f"{one.family}-{n}", prompt=one.prompt, answer=one.answer, checker=CHECKER,
                 family=one.family)
            for n, one in enumerate(self.puzzles(stage, size))
        ]  # fmt: skip
        file = read_steering(self.file(f"{name}.steer.json"))
        kept = stage if name == "found" else f"{name}-{stage}"
        journal = self.file(f"{kept}.journal")
        found = evaluate_steering(
            self.model,
            self.tokenizer,
            tasks,
            file.steering,
            betas=betas,
            samples=self.sizes.samples,
            sampling=Sampling(seed=SEEDS[stage], **SAMPLING),
            controls=controls,
            counts=RoutingCounts.load(self.file("uses.counts.safetensors")),
            batch_size=128,
            journal=journal,
            tasks_name=stage,
            steering_name=f"{name}.steer.json",
            resamples=self.sizes.resamples,
            progress=progress_of(stage),
        )
        found.save(self.file(f"{kept}.steer-eval.json"))
        journal.unlink()
        return evaluation_figures(found)

    def validate(self) -> dict[str, Any]:
        return self.evaluate("validate", BETAS, Controls())

    def test(self) -> dict[str, Any]:
        file = read_steering(self.file("found.steer.json"))
        write_steering(
            self.file("frozen.steer.json"),
            self.steering(self.frozen()[0]),
            identification=file.identification,
        )
        return self.evaluate("test", self.frozen(), self.controls())

    def transfer(self) -> dict[str, Any]:
        return self.evaluate("transfer", self.frozen(), self.controls())

    def chosen(self, name: str = "found") -> tuple[float, float]:
        """Beta by the rule (1: do not steer), and the best one above 1 on the validation split."""
        kept = "validate" if name == "found" else f"{name}-validate"
        found = SteeringEvaluation.load(self.file(f"{kept}.steer-eval.json"))
        best = max(found.of_kind("steered"), key=lambda arm: (sum(arm.right), -arm.beta))
        return select_beta(found), best.beta

    def frozen(self, name: str = "found") -> tuple[float, ...]:
        """What is tested: the rule's beta, or the best above 1 if it says 1, and the paper's."""
        rule, best = self.chosen(name)
        return tuple(dict.fromkeys((rule if rule != 1 else best, PAPER_BETA)))

    def controls(self) -> Controls:
        return Controls(
            kinds=("random", "frequency", "prompt", "tip"),
            draws=self.sizes.draws,
            prompt_place="before-last-line",
        )

    def steering(self, beta: float) -> Steering:
        file = read_steering(self.file("found.steer.json"))
        return Steering(betas=dict.fromkeys(file.steering.betas, beta))

    def shift(self) -> dict[str, Any]:
        """Routing shift of every beta on solved held-out puzzles."""
        rows = [
            self.tokenizer(one.prompt + one.solution)["input_ids"]
            for one in self.puzzles("test", self.sizes.problems[1])
        ]
        plain, result = self.read(rows), {}
        for beta in (0.0, 0.5, *BETAS):
            with moe_runtime.steer(self.recorded, self.steering(beta)):
                found = routing_shift(plain, self.read(rows))
            result[f"{beta:g}"] = {
                "changed": [round(one.changed, 5) for one in found.layers],
                "jaccard": [round(one.jaccard, 5) for one in found.layers],
                "total_variation": [round(one.total_variation, 5) for one in found.layers],
            }
        return {"tokens": len(plain), "layers": list(plain.layer_ids), "betas": result}

    def cost(self) -> dict[str, Any]:
        """In a quarter of the experts' memory, at the first frozen beta."""
        model = moe_runtime.from_pretrained(self.path, expert_budget="25%", device="cpu")
        prompts = [
            self.tokenizer(one.prompt)["input_ids"]
            for one in self.puzzles("cost", self.sizes.prompts)
        ]
        found = measure_cost(
            model,
            self.steering(self.frozen()[0]),
            prompts,
            max_new_tokens=64,
            rounds=self.sizes.rounds,
            name="found.steer.json",
            progress=SAY.print,
        )
        found.save(self.file("found.steer-cost.json"))
        return cost_figures(found)

    def planted(self) -> dict[str, Any]:
        return planted_control(self.sizes, self.file("planted.steer-eval.json"))

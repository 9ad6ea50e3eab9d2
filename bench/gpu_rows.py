"""Owns the sides of the end-to-end GPU measurement: what each is, and how one is run and counted.

Does not know budgets of time, comparisons or files.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from moe_runtime.predictors.transition import TransitionPredictor
from transformers import DynamicCache

import moe_runtime
from gpu_model import HostModel
from moe_runtime.config import RuntimeConfig
from moe_runtime.trace import RoutingTrace
from peers.harness import spread
from replay import Oracle, Replay

__all__ = ["BUDGETS", "REFERENCE", "Row", "Session", "rows_to_run", "run_row"]

BUDGETS = (0.25, 0.125, 0.5)  # in order of what they tell; 100 % has rows of its own
REFERENCE = "100 %, runtime"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side at one budget.

    Args:
        budget: share of the experts' bytes that the device may hold.
        side: `"runtime"`, `"transformers"` (all on the device) or `"accelerate"` (experts of some
            layers on the device, the others offloaded to host memory).
        options: of `moe_runtime.attach`.
        predictor: None, `"transition"` (fitted to the tokens before those measured) or `"oracle"`.
        experts: transformers' implementation, of the sides that are not ours.
        slow: it moves whole layers: few tokens, the ones before them as one prompt.
        extra: left out but for `--full`.
    """

    name: str
    budget: float
    side: str = "runtime"
    options: dict[str, Any] = field(default_factory=dict)
    predictor: str | None = None
    experts: str = "grouped_mm"
    slow: bool = False
    extra: bool = False


def rows_to_run(*, full: bool) -> list[Row]:
    """In order of what they are worth: what is cut off for want of time is told least."""
    rows = [
        Row(name=REFERENCE, budget=1.0),
        Row(name="100 %, transformers grouped_mm", budget=1.0, side="transformers"),
        Row(
            name="100 %, transformers batched_mm", budget=1.0, side="transformers",
            experts="batched_mm",
        ),
    ]  # fmt: skip
    never: dict[str, Any] = {"host_execution": "never"}
    auto: dict[str, Any] = {"host_execution": "auto"}
    certain = {"prediction_options": {"trial": False}}
    for budget in BUDGETS:
        at = f"{100 * budget:g} %"
        rows += [
            Row(name=f"{at}, LRU", budget=budget, options=never),
            Row(name=f"{at}, LRU, host", budget=budget, options=auto),
            Row(name=f"{at}, LRU, predicted", budget=budget, options=never, predictor="transition"),
            Row(
                name=f"{at}, LRU, predicted, host", budget=budget, options=auto,
                predictor="transition",
            ),
            Row(name=f"{at}, accelerate", budget=budget, side="accelerate", slow=True),
        ]  # fmt: skip
    rows.append(Row(name="0 %, accelerate cpu_offload", budget=0.0, side="accelerate", slow=True))
    for budget in BUDGETS:
        at = f"{100 * budget:g} %"
        rows += [
            Row(
                name=f"{at}, LRU, oracle", budget=budget, options={**never, **certain},
                predictor="oracle", extra=True,
            ),
            Row(
                name=f"{at}, LRU, predicted, no trial", budget=budget,
                options={**never, **certain}, predictor="transition", extra=True,
            ),
            Row(
                name=f"{at}, LRU, host always", budget=budget,
                options={"host_execution": "always"}, extra=True,
            ),
        ]  # fmt: skip
    return [row for row in rows if full or not row.extra]


@dataclass(eq=False)
class Session:
    """What all rows share.

    Args:
        trace: the routing, one sequence; its tokens are fed whatever the model says.
        prompt, warm: tokens of the prompt, and those decoded before the clock runs.
        measured: tokens decoded under the clock.
        most_seconds: after so long a row ends, with three tokens at the least.
        hardware: path of a hardware profile, None without.
        prepare: called with each model that has been attached.
    """

    host: HostModel
    trace: RoutingTrace
    prompt: int
    warm: int
    measured: int
    most_seconds: float
    hardware: str | None = None
    prepare: Callable[[Any], None] | None = None
    fitted: Any = None

    def __post_init__(self) -> None:
        first = self.prompt + self.warm
        if len(self.trace) < first + self.measured:
            raise ValueError(
                f"a trace of {len(self.trace)} tokens, but {first + self.measured} are replayed"
            )
        vocabulary = self.host.shape.vocabulary
        ids = torch.from_numpy(self.trace.token_ids.astype(np.int64)) % vocabulary
        self.ids = ids.to(self.host.device)
        began = time.perf_counter()
        self.fitted = TransitionPredictor.fit([self.trace.select(rows=slice(0, first))])
        self.fit_seconds = time.perf_counter() - began


@dataclass(eq=False)
class Run:
    """What one row's tokens took, and the logits they ended in."""

    prefill_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


def run_row(row: Row, session: Session) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """(figures, logits of each measured token in host memory)."""
    missing = sorted(set(row.options) - {f.name for f in dataclasses.fields(RuntimeConfig)})
    if missing and row.options.get("host_execution") != "never":
        return {"skipped": f"this runtime has no option {missing[0]}"}, []
    began = time.perf_counter()
    found: dict[str, Any] = {}
    replays: list[Replay] = []
    if row.side == "runtime":
        model = _attached(row, session, missing, replays)
        found["budget"] = moe_runtime.runtime_of(model).budget.explanation
    else:
        model = _plain(row, session)
    replays.append(Replay(model, session.trace, session.host.device))
    found["build_seconds"] = round(time.perf_counter() - began, 2)
    if session.host.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = _decoded(model, replays[0], session, row, began)
    found["prefill_seconds"] = round(run.prefill_seconds, 4)
    found["step_seconds"] = spread(run.seconds)
    found["tokens"] = len(run.seconds)
    found["tokens_per_second"] = round(len(run.seconds) / sum(run.seconds), 3)
    if session.host.device.type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    if row.side == "runtime":
        found |= _counted(model, session, len(run.seconds))
    found["row_seconds"] = round(time.perf_counter() - began, 2)
    return found, run.logits


def _attached(row: Row, session: Session, missing: Sequence[str], replays: list[Replay]) -> Any:
    options = {name: value for name, value in row.options.items() if name not in missing}
    if row.predictor == "transition":
        options["predictor"] = copy.deepcopy(session.fitted)
    elif row.predictor == "oracle":
        options["predictor"] = Oracle(session.trace, replays)
    model = session.host.model()
    moe_runtime.attach(
        model, device="cuda", expert_budget=f"{100 * row.budget:g}%", policy="lru",
        hardware=session.hardware, **options,
    )  # fmt: skip
    if session.prepare is not None:
        session.prepare(model)
    return model


def _plain(row: Row, session: Session) -> Any:
    layers = session.host.shape.layers
    resident = int(row.budget * layers)
    model = session.host.model(resident_layers=resident)
    model.set_experts_implementation(row.experts)
    if row.side == "accelerate":
        from accelerate import cpu_offload  # the machine may lack it; then this row alone fails

        for layer in range(resident, layers):
            experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
            cpu_offload(experts, execution_device=session.host.device)
    return model


def _decoded(model: Any, replay: Replay, session: Session, row: Row, began: float) -> Run:
    """Feed the trace: the prompt, then token by token."""
    run, cache = Run(), DynamicCache(config=model.config)
    first = session.prompt + session.warm
    prompt = first - 1 if row.slow else session.prompt
    on_gpu = session.host.device.type == "cuda"

    def feed(rows: slice) -> tuple[float, torch.Tensor]:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        replay.rows = np.arange(rows.start, rows.stop)
        output = model(
            input_ids=session.ids[None, rows], past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        last = output.logits[0, -1]
        last.argmax().item()  # as whoever generates has to know it
        return time.perf_counter() - start, last

    run.prefill_seconds, _ = feed(slice(0, prompt))
    for at in range(prompt, first + session.measured):
        if at == first and row.side == "runtime":
            moe_runtime.runtime_of(model).reset_counters()
        seconds, logits = feed(slice(at, at + 1))
        if at >= first:
            run.seconds.append(seconds)
            run.logits.append(logits.to("cpu", copy=True))
        late = time.perf_counter() - began > session.most_seconds
        if late and len(run.seconds) >= 3:
            break
    return run


def _counted(model: Any, session: Session, tokens: int) -> dict[str, Any]:
    """What the runtime counted over the measured tokens."""
    runtime = moe_runtime.runtime_of(model)
    record = runtime.run_record(simulate=False)
    counters = record["counters"]
    asked = counters["hits"] + counters["misses"]
    found: dict[str, Any] = {
        "slots": record["budget"]["slots"],
        "hit_rate": round(counters["hits"] / asked, 4) if asked else None,
        "missed_bytes_per_token": counters["misses"] * session.host.shape.expert_bytes / tokens,
        "moved_bytes_per_token": (counters["host_bytes"] + counters["bytes_read"]) / tokens,
        "counters": counters,
    }
    if record["prediction"]:
        found["prediction"] = {k: v for k, v in record["prediction"].items() if k != "layers"}
    # Where experts were computed, if the runtime tells.
    found |= {name: value for name, value in record.items() if "host" in name or "place" in name}
    runtime.check_integrity()  # a row with a broken cache is no row
    return found

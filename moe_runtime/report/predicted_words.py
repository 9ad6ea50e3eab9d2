"""Prediction in a run, in words and rows: what was decided, what was wasted, what it cost.

Does not know pages or drawings.
"""

from __future__ import annotations

from typing import Any

from moe_runtime.report.predicted import Predicted, TrialStep
from moe_runtime.report.run import Run
from moe_runtime.report.summary import NONE, count, duration, percent, size

__all__ = [
    "FATES",
    "decision_rows",
    "fates",
    "load_rows",
    "loaded_bytes",
    "prediction_summary",
    "recall_ahead",
    "seconds_per_token",
    "verdict",
    "waste",
]

FATES = {
    "resident": "resident",
    "in_time": "ahead in time",
    "late": "ahead but late",
    "missed": "missed",
}


def _untried(found: Predicted) -> bool:
    """Whether the trial was switched off: its record then never leaves its first state."""
    return found.state == "predicting" and all(one.state == "trial" for one in found.decisions)


def verdict(found: Predicted) -> str:
    """What came of the trial of whether predicting pays, one sentence without its full stop."""
    if found.failure:
        return f"prediction failed and was given up: {found.failure}"
    start, last = 0, TrialStep(step=0, state="trial", ratio=None, error=None, why="")
    told = ""
    for decision in found.decisions:
        if decision.state == "trial":
            start = decision.step
        elif decision.ratio is not None:
            what = "kept" if decision.state == "predicting" else "given up"
            told = (
                f"prediction was tried for {count(decision.step - start)} steps and {what}: steps "
                f"with it took {decision.ratio:.2f} times as long"
            )
        last = decision
    if _untried(found):
        return "every forecast was acted on: no trial was made of whether it pays"
    if found.state != "trial":
        return told or f"prediction is off: {last.why or 'no reason was recorded'}"
    if told:
        return f"{told}; from step {count(last.step)} on it was tried again, undecided at the end"
    return "the run ended before its trial of whether prediction pays had decided"


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def loaded_bytes(run: Run, found: Predicted) -> int:
    """Bytes of experts that the run loaded, on demand and ahead, by what the experts weigh.

    A disk is read in whole blocks, so `counters.bytes_read` can be more; this is what simulated
    misses are compared with. Where the record has no expert sizes it is the bytes read.
    """
    if run.mean_expert_bytes is None:
        return run.counters.bytes_read + run.counters.host_bytes
    each, nbytes = run.section("model")["expert_bytes"], found.nbytes
    missed = sum(layer.missed * each[run.grid.position[layer.layer]] for layer in found.layers)
    pending = round(found.loads.pending * run.mean_expert_bytes)
    return int(missed) + nbytes.in_time + nbytes.late + nbytes.wasted + pending


def waste(run: Run, found: Predicted) -> str:
    """Bytes read ahead and never used, in words, with their share of all bytes loaded."""
    if not found.nbytes.wasted:
        return "no byte that was read ahead was wasted"
    part = percent(_over(found.nbytes.wasted, loaded_bytes(run, found)))
    return (
        f"{size(found.nbytes.wasted)} were read in vain, {part} of all expert bytes loaded: "
        f"{size(found.nbytes.unused)} of experts that left unused, "
        f"{size(found.nbytes.withdrawn)} of loads that were called off"
    )


def fates(found: Predicted) -> str:
    """Shares of the uses by outcome, on one line."""
    uses = found.total("uses")
    return ", ".join(
        f"{percent(_over(found.total(name), uses))} {label}" for name, label in FATES.items()
    )


def recall_ahead(found: Predicted) -> list[float | None]:
    """Mean recall over the layers for 1, 2, ... layers ahead; None where no layer has one."""
    most = max((len(layer.recall) for layer in found.layers), default=0)
    columns = [
        [
            value
            for layer in found.layers
            for value in layer.recall[at : at + 1]
            if value is not None
        ]
        for at in range(most)
    ]
    return [sum(values) / len(values) if values else None for values in columns]


def decision_rows(found: Predicted) -> list[dict[str, str]]:
    """The trial's decisions as rows of a table; none where there was no trial."""
    if _untried(found):
        return []
    return [
        {
            "step": count(one.step),
            "state": one.state,
            "ratio": NONE if one.ratio is None else f"{one.ratio:.3f}",
            "error": NONE if one.error is None else f"{one.error:.3f}",
            "why": one.why or NONE,
        }
        for one in found.decisions
    ]


def load_rows(found: Predicted) -> list[dict[str, str]]:
    """Loads ahead of need by fate: number, share, bytes.

    Withdrawn bytes are those read before the load was called off; of loads still pending the
    record has no bytes.
    """
    loads, nbytes = found.loads, found.nbytes
    rows = [
        ("in time", loads.in_time, nbytes.in_time),
        ("late", loads.late, nbytes.late),
        ("unused: left without a use", loads.unused, nbytes.unused),
        ("withdrawn: called off", loads.withdrawn, nbytes.withdrawn),
        ("still waiting for a use at the end", loads.pending, None),
    ]
    return [
        {
            "fate": name,
            "loads": count(number),
            "share": percent(_over(number, loads.ahead)),
            "bytes": size(amount),
        }
        for name, number, amount in rows
    ]


def seconds_per_token(run: Run, found: Predicted) -> str:
    """Time in the predictor for each token, and its share of the time of all steps."""
    totals = run.counters
    return (
        f"{duration(_over(found.seconds, totals.tokens))} a token in the predictor, "
        f"{percent(_over(found.seconds, totals.step_seconds))} of the step time"
    )


def prediction_summary(run: Run, found: Predicted) -> dict[str, Any]:
    """The same figures as plain data; seconds, bytes, shares 0 to 1."""
    uses = found.total("uses")
    return {
        "predictor": found.predictor,
        "verdict": verdict(found),
        "state": found.state,
        "failure": found.failure or None,
        "outcomes": {name: _over(found.total(name), uses) for name in FATES},
        "recall": recall_ahead(found),
        "loads_ahead": found.loads.ahead,
        "wasted_bytes": found.nbytes.wasted,
        "wasted_share": _over(found.nbytes.wasted, loaded_bytes(run, found)),
        "seconds_per_token": _over(found.seconds, run.counters.tokens),
    }

"""Owns running one runner in a process and a cgroup of its own, and what is made of its figures.

Does not know which runners there are.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers import cgroup
from peers.protocol import Task

BENCH = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One line of the comparison. `module` is run as `python -m peers.<module>`."""

    name: str
    module: str
    capped: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    extra_path: str = ""  # prepended to PYTHONPATH
    share: float = 1.0  # of the tokens, for runners that take seconds for each


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all runners of one comparison share. `timeout` is seconds for one runner."""

    start: int
    warmup: int
    tokens: int
    threads: int
    timeout: float


@dataclass(frozen=True, kw_only=True)
class Files:
    """What the runners read; dropped from the page cache before each of them."""

    checkpoint: Path
    gguf: Path

    def all(self) -> list[Path]:
        found = sorted(self.checkpoint.glob("*.safetensors"))
        return [*found, self.gguf] if self.gguf.is_file() else found


def expert_and_dense_bytes(checkpoint: Path) -> tuple[int, int]:
    """Bytes of expert tensors and of all the others, from the shards' headers."""
    experts = dense = 0
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with shard.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if ".mlp.experts." in name:
                    experts += end - begin
                else:
                    dense += end - begin
    return experts, dense


def run(
    runner: Runner, files: Files, conditions: Conditions, *, limit: int | None
) -> dict[str, Any]:
    """One run: the runner's own result, `group` (what its cgroup used), `failure` or None."""
    cgroup.drop_cached(files.all())
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "result.json"
        task = Task(
            checkpoint=str(files.checkpoint),
            gguf=str(files.gguf),
            start=conditions.start,
            warmup=max(1, round(conditions.warmup * runner.share)),
            tokens=max(1, round(conditions.tokens * runner.share)),
            threads=conditions.threads,
            out=str(out),
            options=dict(runner.options),
        )
        described = Path(scratch) / "task.json"
        described.write_text(json.dumps(asdict(task)))
        path = os.pathsep.join(filter(None, [str(BENCH), runner.extra_path]))
        outcome = cgroup.run(
            [runner.python, "-m", f"peers.{runner.module}", str(described)],
            limit=limit,
            timeout=conditions.timeout,
            log=Path(scratch) / "log.txt",
            cwd=BENCH,
            environment={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": str(conditions.threads),
            },
        )
        result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    group = {k: v for k, v in asdict(outcome).items() if k != "output_tail"}
    failure = outcome.failure or result.get("error")
    if failure is None and not result:
        failure = "ended without a result"
    if failure:
        result["output_tail"] = outcome.output_tail
    return {**result, "group": group, "failure": failure}


def spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "mean": statistics.fmean(ordered),
        "p10": ordered[round(last * 0.1)],
        "p90": ordered[round(last * 0.9)],
        "min": ordered[0],
        "max": ordered[-1],
    }


def agreement(steps: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> Any:
    """How one runner's logits compare with the reference's over the steps both made."""
    both = list(zip(steps, reference, strict=False))
    if not both:
        return None
    return {
        "steps": len(both),
        "equal_argmax": sum(a["argmax"] == b["argmax"] for a, b in both) / len(both),
        "mean_loss": statistics.fmean(a["loss"] for a, _ in both),
        "reference_mean_loss": statistics.fmean(b["loss"] for _, b in both),
        "largest_logit_difference_in_std": max(
            max(abs(x - y) for x, y in zip(a["sampled"], b["sampled"], strict=True)) / b["std"]
            for a, b in both
        ),
    }


def figures(runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> Any:
    """One runner's rounds, summed up. Seconds a token are pooled over the rounds that finished."""
    done = [r for r in runs if r["failure"] is None]
    failures = [str(r["failure"]) for r in runs if r["failure"] is not None]
    if not done:
        return {"failed": failures, "output_tail": runs[-1].get("output_tail", ""),
                "group": runs[-1]["group"]}  # fmt: skip
    seconds = [s for r in done for s in r["token_seconds"]]
    timing = spread(seconds)
    return {
        "rounds": len(done),
        "failed": failures,
        "tokens": len(seconds),
        "token_seconds": timing,
        "tokens_per_second": 1 / timing["median"],
        "tokens_per_second_mean": 1 / timing["mean"],
        "rounds_tokens_per_second": [1 / spread(r["token_seconds"])["median"] for r in done],
        "read_bytes_per_token": statistics.fmean(
            r["measured"]["read_bytes"] / len(r["token_seconds"]) for r in done
        ),
        "device_read_bytes": [r["group"]["device_read_bytes"] for r in done],
        "major_faults_measured": [r["measured"]["major_faults"] for r in done],
        "major_faults_load": [r["load"]["major_faults"] for r in done],
        "load_seconds": [r["load"]["seconds"] for r in done],
        "load_read_bytes": [r["load"]["read_bytes"] for r in done],
        "peak_bytes": max(r["group"]["peak_bytes"] for r in done),
        "peak_anonymous_bytes": max(r["group"]["peak_anonymous_bytes"] for r in done),
        "limit": done[0]["group"]["limit"],
        "versions": done[0]["versions"],
        "agreement_with_plain": agreement(done[0]["steps"], reference),
        "extra": done[-1].get("extra", {}),
    }

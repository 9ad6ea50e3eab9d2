"""Owns the memory measurement: loading and decoding under the cgroup limit that is promised.

Does not know the runtime's insides.

    python bench/memory.py CHECKPOINT

The limit is *set* to: peak of the imports alone + dense weights + expert budget + 250 MB. Loading
is timed beside reading as many bytes as the loaded model keeps, in alternating order.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from peers import harness
from peers.harness import Conditions, Files, Runner
from peers.machine import describe_machine, direct_read_rate
from peers.protocol import write_json

HERE = Path(__file__).resolve().parent
MARGIN = 250_000_000


def ours(options: Mapping[str, Any]) -> Runner:
    return Runner(
        name="moe-runtime",
        module="run_moe_runtime",
        capped=True,
        options=options,
        extra_path=str(HERE.parent),
    )


def faults(result: Mapping[str, Any]) -> dict[str, int]:
    phases = ("load", "warmup", "measured")
    return {phase: result[phase]["major_faults"] for phase in phases}


def limited(files: Files, conditions: Conditions, *, budget: int, limit: int) -> dict[str, Any]:
    """One run under its limit: whether it finished, its faults, peak and speed."""
    result = harness.run(ours({"expert_budget": budget}), files, conditions, limit=limit)
    row: dict[str, Any] = {
        "expert_budget": budget,
        "limit": limit,
        "failure": result["failure"],
        "group": result["group"],
    }
    if result["failure"] is None:
        row |= {
            "major_faults": faults(result),
            "read_bytes": {p: result[p]["read_bytes"] for p in ("load", "warmup", "measured")},
            "tokens_per_second": 1 / statistics.median(result["token_seconds"]),
            "runtime": result["extra"],
        }
    else:
        row["output_tail"] = result.get("output_tail", "")
    return row


def loading(
    files: Files, conditions: Conditions, *, budget: int, limit: int, preload: bool, dense: int,
    rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of `from_pretrained` and of reading what it keeps, alternating."""
    load: list[float] = []
    read: list[float] = []
    kept = dense
    for _ in range(rounds):
        runner = ours({"expert_budget": budget, "preload": preload})
        result = harness.run(runner, files, conditions, limit=limit)
        if result["failure"] is not None:
            return {"preload": preload, "failure": result["failure"],
                    "output_tail": result.get("output_tail", "")}  # fmt: skip
        load.append(result["load"]["seconds"])
        if preload:
            kept = dense + result["extra"]["budget"]["slot_bytes"]
        reader = Runner(name="read", module="run_read_kept", options={"bytes": kept})
        read.append(harness.run(reader, files, conditions, limit=limit)["seconds"])
    return {
        "preload": preload,
        "failure": None,
        "kept_bytes": kept,
        "load_seconds": load,
        "read_seconds": read,
        "load_over_read": statistics.median(load) / statistics.median(read),
        "load_minus_read_seconds": statistics.median(load) - statistics.median(read),
    }


def main(
    checkpoint: Path,
    shares: Annotated[str, typer.Option(help="expert budgets, shares of all experts")] = (
        "0.1,0.25,0.5"
    ),
    tokens: int = 48,
    warmup: int = 16,
    rounds: Annotated[int, typer.Option(help="loads and reads, alternating")] = 5,
    threads: int = 2,
    out: Path = HERE / "results" / "memory_cpu.json",
) -> None:
    """Runs under each limit, prints the major faults, times loading, writes the result file."""
    files = Files(checkpoint=checkpoint, gguf=checkpoint / "none.gguf")
    experts, dense = harness.expert_and_dense_bytes(checkpoint)
    conditions = Conditions(start=0, warmup=warmup, tokens=tokens, threads=threads, timeout=1800.0)
    machine = describe_machine()
    bare = Runner(name="imports only", module="run_import_only", extra_path=str(HERE.parent))
    import_peak = harness.run(bare, files, conditions, limit=None)["group"]["peak_bytes"]
    rows = []
    for share in shares.split(","):
        budget = int(float(share) * experts)
        limit = import_peak + dense + budget + MARGIN
        row = limited(files, conditions, budget=budget, limit=limit)
        rows.append(row)
        outcome = row["failure"] or (
            f"finished, {row['tokens_per_second']:.2f} tokens/s, major faults {row['major_faults']}"
        )
        print(f"budget {budget / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB: {outcome}", flush=True)
    brief = Conditions(**{**asdict(conditions), "warmup": 1, "tokens": 1})
    budget = int(0.5 * experts)
    limit = import_peak + dense + budget + MARGIN
    loads = [
        loading(files, brief, budget=budget, limit=limit, preload=preload, dense=dense,
                rounds=rounds)
        for preload in (False, True)
    ]  # fmt: skip
    for load in loads:
        filled = "slots filled" if load["preload"] else "slots empty"
        outcome = load["failure"] or f"{load['load_over_read']:.2f} times reading what is kept"
        print(f"loading, {filled}: {outcome}")
    write_json(out, {
        "what": "loading and decoding under a cgroup limit of imports + dense + budget + margin",
        "machine": machine,
        "disk_direct_read_gb_per_s": direct_read_rate(files.all()[0]),
        "settings": {**asdict(conditions), "margin": MARGIN, "import_only_peak": import_peak,
                     "dense_bytes": dense, "expert_bytes": experts},
        "limited": rows,
        "loading": loads,
    })  # fmt: skip
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)

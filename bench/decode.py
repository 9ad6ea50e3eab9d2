"""Owns the batch-1 decode comparison on CPU: every runner in one go, one result file.

Does not know how any runner works; `peers/` holds them.

    python bench/decode.py CHECKPOINT GGUF --llama-python VENV/bin/python --neurostream FOLDER

Run as root (memory cgroups), with nothing else running. All runners are fed the same ids from the
same position. Under the cap, pages of the page cache count; each file is dropped from it first.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from peers import harness
from peers.harness import Conditions, Files, Runner
from peers.machine import describe_machine, direct_read_rate
from peers.protocol import IDS_FILE, write_json

RESULT = Path(__file__).resolve().parent / "results" / "decode_cpu.json"
REPOSITORY = Path(__file__).resolve().parents[1]
MARGIN = 250_000_000  # what ours may use beyond libraries, dense weights and expert budget
REFERENCE = "transformers grouped_mm"
OURS = "moe-runtime, capped"


def runners(
    *, llama_python: Path, neurostream: Path, offload: Path, expert_budget: int, policy: str
) -> list[Runner]:
    ours = {"module": "run_moe_runtime", "extra_path": str(REPOSITORY)}
    llama = {"module": "run_llama_cpp", "python": str(llama_python)}
    streamed = {"module": "run_neurostream", "extra_path": str(neurostream), "capped": True}
    buffers = {"mem_budget": "256MB", "workers": 4}
    return [
        Runner(name=REFERENCE, module="run_transformers", options={"experts": "grouped_mm"}),
        Runner(name="transformers eager", module="run_transformers", options={"experts": "eager"}),
        Runner(name="llama.cpp", **llama),  # type: ignore[arg-type]
        Runner(name="moe-runtime", options={"expert_budget": "100%"}, **ours),  # type: ignore[arg-type]
        Runner(name=OURS, capped=True,
               options={"expert_budget": expert_budget, "policy": policy}, **ours),  # type: ignore[arg-type]
        Runner(
            name="accelerate, experts on disk, capped", module="run_accelerate", capped=True,
            options={"experts": "grouped_mm", "offload_folder": str(offload)}, share=0.25,
        ),
        Runner(name="llama.cpp mmap, capped", capped=True, **llama),  # type: ignore[arg-type]
        Runner(name="neurostream 1.5GB resident, capped",
               options={**buffers, "ram_budget": "1.5GB"}, **streamed),  # type: ignore[arg-type]
        Runner(name="neurostream 0.25GB resident, capped",
               options={**buffers, "ram_budget": "0.25GB"}, **streamed),  # type: ignore[arg-type]
        Runner(name="transformers grouped_mm, capped", module="run_transformers", capped=True,
               options={"experts": "grouped_mm"}),
    ]  # fmt: skip


def describe_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The seed of the weights, the text, and how the checkpoint was found to route."""
    stored = json.loads((checkpoint / IDS_FILE).read_text())
    routing = checkpoint / "routing.json"
    return {
        "weights_seed": stored["weights_seed"],
        "text": stored["source"],
        "routing": json.loads(routing.read_text()) if routing.is_file() else None,
    }


def ratios(table: dict[str, Any]) -> dict[str, Any]:
    """Our speed and bytes over each capped peer's; a peer that failed has its reason instead."""
    ours = table.get(OURS, {})
    if "tokens_per_second" not in ours:
        return {"missing": f"{OURS}: {ours.get('failed', 'not run')}"}
    found: dict[str, Any] = {}
    for name, row in table.items():
        if not name.endswith(", capped") or name == OURS:
            continue
        if "tokens_per_second" not in row:
            found[name] = {"failed": row["failed"]}
            continue
        found[name] = {
            "speed": ours["tokens_per_second"] / row["tokens_per_second"],
            "speed_mean": ours["tokens_per_second_mean"] / row["tokens_per_second_mean"],
            "bytes": ours["read_bytes_per_token"] / max(1.0, row["read_bytes_per_token"]),
        }
    return found


def show(table: dict[str, Any]) -> None:
    for name, row in table.items():
        if "tokens_per_second" not in row:
            print(f"{name:40} failed: {row['failed'][0]}")
            continue
        agreed = row["agreement_with_plain"] or {"equal_argmax": float("nan")}
        print(
            f"{name:40} {row['tokens_per_second']:7.2f} tokens/s "
            f"(p10-p90 {row['token_seconds']['p10'] * 1e3:.0f}-"
            f"{row['token_seconds']['p90'] * 1e3:.0f} ms)  "
            f"{row['read_bytes_per_token'] / 1e6:8.1f} MB/token  "
            f"peak {row['peak_bytes'] / 1e9:.2f} GB  argmax {agreed['equal_argmax']:.2f}",
            flush=True,
        )


def main(
    checkpoint: Path,
    gguf: Path,
    llama_python: Annotated[Path, typer.Option(help="python with llama-cpp-python")],
    neurostream: Annotated[Path, typer.Option(help="folder with neurostream installed")],
    cap: Annotated[float, typer.Option(help="bytes, for the capped runners")] = 2.2e9,
    expert_budget: Annotated[int, typer.Option(help="bytes; 0: what the cap leaves")] = 0,
    policy: Annotated[str, typer.Option(help="of ours under the cap")] = "lru",
    warmup: int = 32,
    tokens: int = 64,
    start: Annotated[int, typer.Option(help="first teacher-forced id")] = 0,
    rounds: Annotated[int, typer.Option(help="passes over all runners, in alternating order")] = 2,
    threads: int = 2,
    only: Annotated[str, typer.Option(help="run runners whose name contains this")] = "",
    timeout: float = 1800.0,
    out: Path = RESULT,
) -> None:
    """Runs the comparison, prints the table and writes the result file."""
    files = Files(checkpoint=checkpoint, gguf=gguf)
    expert_bytes, dense = harness.expert_and_dense_bytes(checkpoint)
    conditions = Conditions(
        start=start, warmup=warmup, tokens=tokens, threads=threads, timeout=timeout
    )
    bare = Runner(name="imports only", module="run_import_only")
    import_peak = harness.run(bare, files, conditions, limit=None)["group"]["peak_bytes"]
    budget = expert_budget or int(cap) - import_peak - dense - MARGIN
    machine = describe_machine()
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    disk = [direct_read_rate(shard)]
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as offload:
        chosen = [
            r
            for r in runners(llama_python=llama_python, neurostream=neurostream,
                             offload=Path(offload), expert_budget=budget, policy=policy)
            if only in r.name
        ]  # fmt: skip
        for round_ in range(rounds):
            for runner in chosen if round_ % 2 == 0 else reversed(chosen):
                print(f"round {round_ + 1}: {runner.name}, load {os.getloadavg()[0]:.1f}",
                      flush=True)  # fmt: skip
                limit = int(cap) if runner.capped else None
                result = harness.run(runner, files, conditions, limit=limit)
                runs.setdefault(runner.name, []).append(result)
            disk.append(direct_read_rate(shard))
    reference: list[Any] = next(
        (r["steps"] for r in runs.get(REFERENCE, []) if r["failure"] is None), []
    )
    table = {r.name: harness.figures(runs[r.name], reference) for r in chosen}
    show(table)
    write_json(out, {
        "what": "batch-1 decode on CPU, teacher-forced, seconds per token after warm-up",
        "machine": machine,
        "disk_direct_read_gb_per_s": disk,
        "checkpoint": describe_checkpoint(checkpoint),
        "settings": {**asdict(conditions), "rounds": rounds, "cap": int(cap),
                     "expert_budget": budget, "policy": policy,
                     "checkpoint_expert_bytes": expert_bytes, "checkpoint_dense_bytes": dense,
                     "import_only_peak": import_peak, "ids": IDS_FILE},
        "runners": table,
        "ours_over_capped_peers": ratios(table),
    })  # fmt: skip
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)

"""Expert parallelism on gloo ranks of one machine: the tokens of one process, and exact bytes.

Bytes and collectives are counts and do not depend on the machine; no times are claimed here (ranks
share the cores). Plans are made from the routing of texts that the measured prompts are not of.
Run:

    OMP_NUM_THREADS=1 python bench/expert_parallel.py     # to bench/results/expert_parallel.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from moe_runtime.placement.methods import SolveOptions
from moe_runtime.placement.plan import Plan
from moe_runtime.placement.problem import Problem
from moe_runtime.placement.solve import make_plan
from moe_runtime.placement.topology import Topology
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_runtime
from corpora import corpora
from moe_runtime.parallel import ParallelRun, contiguous_plan, generate
from moe_runtime.parallel.homes import settled
from moe_runtime.parallel.launch import process_group
from moe_runtime.parallel.shards import open_source
from moe_runtime.trace import RoutingTrace
from moe_runtime.version import __version__
from peers.machine import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "expert_parallel.json"
SAY = Console(stderr=True, highlight=False)
RANKS = (2, 4, 8)
SEED = 3
ARCHITECTURES = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM",
)
TRAINED, HELD_OUT, PROMPT, NEW = 40, 8, 24, 32  # texts of a kind; tokens
DEALS = 1000  # of prompts to ranks at random
# Layers with experts, hidden width, numbers of a token's keys and values in one layer; bf16. From
# the models' published configurations.
REAL = {
    "Mixtral-8x7B": {"layers": 32, "hidden": 4096, "kv": 2 * 8 * 128},
    "Qwen3-30B-A3B": {"layers": 48, "hidden": 2048, "kv": 2 * 4 * 128},
}


# -- ranks -----------------------------------------------------------------------------------------


def one_rank(rank: int, size: int, port: int, jobs: list[dict[str, Any]], out: str) -> None:
    """All jobs on one rank; rank 0 writes what came of them."""
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    results = []
    with process_group(timeout=600.0) as link:
        for job in jobs:
            plan = None if job["plan"] is None else Plan.load(job["plan"])
            run = generate(
                job["model"],
                job["prompts"],
                plan=plan,
                mode=job["mode"],
                homes=job.get("homes") or "order",
                max_new_tokens=job["new"],
                stop_tokens=(),
                check="stop",
                link=link,
                loading={"dtype": torch.float32},
                keep_routing=job.get("homes") == "order",
            )
            chance = {}
            if plan is not None and run.routing is not None:
                chance = {"homes": other_homes(plan, run.routing)}
            results.append(run.to_dict() | {"shown": shown(run)} | chance)
            if rank == 0:
                SAY.print(size, Path(job["model"]).name, job["name"], results[-1]["shown"])
    if rank == 0:
        Path(out).write_text(json.dumps(results), encoding="utf-8")


def run_jobs(size: int, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The jobs on so many ranks, forked from one server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_runtime.parallel.launch", "moe_runtime.parallel"])
    out = str(folder / f"{size}.json")
    processes = [
        context.Process(target=one_rank, args=(rank, size, port, jobs, out)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    if failed:
        raise SystemExit(f"ranks {failed} failed; see above")
    return json.loads(Path(out).read_text(encoding="utf-8"))


def shown(run: ParallelRun) -> dict[str, Any]:
    """Counts of the decode steps in short."""
    kinds: dict[str, dict[str, int]] = {}
    for one in run.decode_traffic:
        entry = kinds.setdefault(one.kind, {"bytes": 0, "frame_bytes": 0, "calls": 0, "rows": 0})
        entry["bytes"] += one.bytes
        entry["frame_bytes"] += one.frame_bytes
        entry["calls"] += one.calls
        entry["rows"] += one.rows
    return {
        "cross_bytes": run.cross_bytes,
        "routing_bytes": run.routing_bytes,
        "keys_values_bytes": run.keys_values_bytes,
        "prefill_keys_values_bytes": sum(
            one.bytes for one in run.traffic if one.kind == "prefill.keys_values"
        ),
        "all_to_alls_a_layer_and_step": calls_a_layer(run),
        "stayed_share": run.stayed_share,
        "kinds": kinds,
    }


def other_homes(plan: Plan, routing: RoutingTrace) -> dict[str, Any]:
    """Rows that vanilla decode steps send to other ranks: as prompts live, were they dealt out at
    random, and at best, each rank keeping its number of prompts.
    """
    decode, held = routing.decode(), plan.matrices()
    prompts = int(routing.sequence_ids.max()) + 1
    uses = np.zeros((prompts, plan.devices), dtype=np.int64)
    for at, layer in enumerate(held):
        needed = layer[decode.topk_ids[:, at].astype(np.int64)].any(1)
        np.add.at(uses, decode.sequence_ids, needed)
    homes = np.arange(prompts) * plan.devices // prompts

    def sent(where: Any) -> int:
        return int(uses.sum() - uses[np.arange(prompts), where].sum())

    rng = np.random.default_rng(SEED)
    dealt = [sent(rng.permutation(homes)) for _ in range(DEALS)]
    return {
        "rows_and_layers": len(decode) * len(held),
        "sent": sent(homes),
        "dealt_mean": round(float(np.mean(dealt)), 1),
        "dealt_deviation": round(float(np.std(dealt)), 1),
        "dealt_range": [min(dealt), max(dealt)],
        "ranks_renamed": [sent((homes + by) % plan.devices) for by in range(plan.devices)],
        "best": sent(settled(uses, homes.tolist(), plan.devices)),
    }


def calls_a_layer(run: ParallelRun) -> float:
    """Collectives of routing for each MoE layer of a decode step."""
    routed = [one for one in run.decode_traffic if one.layer is not None]
    layers = len({one.layer for one in routed})
    return sum(one.calls for one in routed) / layers / run.steps


# -- identical tokens ------------------------------------------------------------------------------


def alone(path: str, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[Any]]:
    """Greedy tokens of each prompt by plain transformers, and the top two's margin at each step,
    relative to the step's largest logit.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens, margins = [], []
    for prompt in prompts:
        fed, past, mine, gaps = torch.tensor([prompt]), None, [], []
        for _ in range(steps):
            with torch.no_grad():
                output = model(input_ids=fed, past_key_values=past, use_cache=True)
            past = output.past_key_values
            row = output.logits[0, -1]
            first, second = row.topk(2).values.tolist()
            gaps.append((first - second) / float(row.abs().max()))
            mine.append(int(row.argmax()))
            fed = torch.tensor([mine[-1:]])
        tokens.append(mine)
        margins.append(gaps)
    return tokens, margins


def compared(found: list[list[int]], want: list[list[int]], margins: Any) -> dict[str, int]:
    """Tokens alike up to each prompt's first difference, and whether that was at a near tie."""
    tied = different = alike = 0
    for mine, theirs, gaps in zip(found, want, margins, strict=True):
        at = next(
            (n for n, pair in enumerate(zip(mine, theirs, strict=True)) if len(set(pair)) > 1), None
        )
        alike += len(theirs) if at is None else at
        tied += at is not None and gaps[at] <= 1e-5
        different += at is not None and gaps[at] > 1e-5
    return {"tokens_alike": alike, "prompts_off_at_a_near_tie": tied, "prompts_off": different}


def tiny_models(folder: Path) -> dict[str, str]:
    """Tiny random models of the six architectures as checkpoints."""
    sys.path.insert(0, str(ROOT / "tests"))
    import architectures

    paths = {}
    for case in architectures.cases():
        if case.name in ARCHITECTURES:
            path = folder / case.name
            architectures.build(case, torch.float32).save_pretrained(path)
            paths[case.name] = str(path)
    return paths


# -- bytes -----------------------------------------------------------------------------------------


def with_top_k(path: str, top_k: int, folder: Path) -> str:
    """A copy of a checkpoint whose tokens have so many experts."""
    copy = folder / f"bundled-top-{top_k}"
    shutil.copytree(path, copy)
    config = json.loads((copy / "config.json").read_text())
    config["num_experts_per_tok"] = top_k
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def recorded(path: str, texts: list[str]) -> RoutingTrace:
    model = moe_runtime.from_pretrained(
        path, expert_budget="100%", device="cpu", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad(), moe_runtime.record(model) as recorder:
        for text in texts:
            model(tokenizer(text[:4000], return_tensors="pt")["input_ids"][:, :400])
    return recorder.trace


def plans(path: str, trace: RoutingTrace, folder: Path) -> dict[int, dict[str, str]]:
    """Contiguous blocks and the solver's plan for each number of ranks."""
    spec = open_source(path).spec
    found: dict[int, dict[str, str]] = {}
    for size in RANKS:
        plan = make_plan(
            Problem(layer_ids=trace.layer_ids, experts=trace.experts, topology=Topology.of(size)),
            trace,
            options=SolveOptions(seed=SEED, time_limit=15.0),
        )
        places = {"plan": plan, "contiguous": contiguous_plan(spec.grid, size)}
        for name, one in places.items():
            one.save(folder / f"{Path(path).name}-{size}-{name}.plan.json")
        found[size] = {
            name: str(folder / f"{Path(path).name}-{size}-{name}.plan.json") for name in places
        }
    return found


def real_shapes(rows: dict[str, dict[str, Any]], hidden: int, layers: int) -> dict[str, Any]:
    """Bytes of a decode run with the widths of real models, by the engine's own row formats.

    Routing is the bundled model's, layer for layer as often; only widths and numbers of layers are
    the real model's. Of each kind the bytes of a row beside the hidden state (ids, weights, places)
    are kept as counted.
    """
    result: dict[str, Any] = {}
    for name, shape in REAL.items():
        totals = {}
        for case, run in rows.items():
            total = 0.0
            for kind, one in run["kinds"].items():
                if kind == "tokens" or not one["rows"]:
                    total += one["bytes"] + one["frame_bytes"]
                    continue
                if kind == "keys_values":
                    # A row is one layer's keys and values of one token, and its names.
                    names = one["bytes"] - one["rows"] * run["kv_row_bytes"] // layers
                    wide = one["rows"] * shape["kv"] * 2 + names
                    total += wide * shape["layers"] / layers + one["frame_bytes"]
                    continue
                beside = one["bytes"] - one["rows"] * hidden * 4
                wide = one["rows"] * shape["hidden"] * 2 + beside
                total += (wide + one["frame_bytes"]) * shape["layers"] / layers
            totals[case] = round(total)
        base = totals["vanilla-contiguous"]
        result[name] = {
            "computed": "bundled model's routing, this model's widths, bfloat16",
            "cross_bytes": totals,
            "fewer_than_vanilla_contiguous": {
                case: round(1 - total / base, 4) for case, total in totals.items()
            },
        }
    return result


def measured_bytes(
    paths: dict[str, str], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Jobs by number of ranks and what names them."""
    texts = corpora()
    train = [text for kind in texts.values() for text in kind[:TRAINED]]
    test = [text for kind in texts.values() for text in kind[TRAINED : TRAINED + HELD_OUT]]
    jobs, known = [], {}
    for name, path in paths.items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        prompts = [tokenizer(text[:2000])["input_ids"][:PROMPT] for text in test]
        by_size = plans(path, recorded(path, train), folder)
        known[name] = {"prompts": prompts, "alone": alone(path, prompts, NEW)}
        for size, places in by_size.items():
            jobs += [
                {
                    "size": size,
                    "group": name,
                    "name": f"{mode}-{place}" + "-settled" * (homes == "prefill"),
                    "model": path,
                    "mode": mode,
                    "homes": homes,
                    "plan": plan,
                    "prompts": prompts,
                    "new": NEW,
                }
                for mode, homes in (
                    ("vanilla", "order"), ("vanilla", "prefill"), ("coherent", None)
                )
                for place, plan in places.items()
            ]  # fmt: skip
    return jobs, known


def identity_jobs(paths: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    generator = torch.Generator().manual_seed(SEED)
    prompts = [
        torch.randint(3, 64, (length,), generator=generator).tolist()
        for length in (5, 9, 3, 7, 12, 7)
    ]
    known = {
        name: {"prompts": prompts, "alone": alone(path, prompts, 8)} for name, path in paths.items()
    }
    jobs = [
        {
            "size": size,
            "group": name,
            "name": mode,
            "model": path,
            "mode": mode,
            "plan": None,
            "prompts": prompts,
            "new": 8,
        }
        for size in RANKS
        for name, path in paths.items()
        for mode in ("vanilla", "coherent")
    ]
    return jobs, known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny, tiny_known = identity_jobs(tiny_models(folder))
        bundled = moe_runtime.bundled_model()
        wide, wide_known = measured_bytes(
            {"bundled top-4": bundled, "bundled top-1": with_top_k(bundled, 1, folder)}, folder
        )
        known = tiny_known | wide_known
        tokens: dict[str, dict[str, Any]] = {}
        counted: dict[str, dict[str, dict[str, Any]]] = {}
        for size in RANKS:
            jobs = [job for job in (*tiny, *wide) if job["size"] == size]
            for job, run in zip(jobs, run_jobs(size, jobs, folder), strict=True):
                same = compared(run["outputs"], *known[job["group"]]["alone"])
                tokens.setdefault(job["group"], {})[f"{size} ranks, {job['name']}"] = same
                if job["group"] in wide_known:
                    row = run["shown"] | {
                        "kv_row_bytes": run["kv_row_bytes"],
                        "cache_bytes": run["cache_bytes"],
                        "sent_by_rank": run["sent"],
                    }
                    if "homes" in run:
                        row["homes"] = run["homes"]
                    counted.setdefault(job["group"], {}).setdefault(str(size), {})[job["name"]] = (
                        row
                    )
    config = transformers.AutoConfig.from_pretrained(bundled)
    for by_size in counted.values():
        for rows in by_size.values():
            base = rows["vanilla-contiguous"]
            for row in rows.values():
                for what in ("cross_bytes", "routing_bytes"):
                    row[f"fewer_{what}"] = round(1 - row[what] / base[what], 4)
    result = {
        "machine": describe_machine(),
        "versions": {
            "moe_runtime": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": {
            "seed": SEED,
            "ranks": list(RANKS),
            "backend": "gloo",
            "dtype": "float32",
            "training_texts_of_a_kind": TRAINED,
            "held_out_texts_of_a_kind": HELD_OUT,
            "prompt_tokens": PROMPT,
            "new_tokens": NEW,
            "goal": "67 % fewer cross_bytes for coherent-plan than vanilla-contiguous",
        },
        "tokens": tokens,
        "bytes": counted,
        "real_shapes": {
            name: {
                size: real_shapes(rows, config.hidden_size, config.num_hidden_layers)
                for size, rows in by_size.items()
            }
            for name, by_size in counted.items()
        },
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Switch Transformers in half and in a quarter of its experts' memory, under a memory cgroup.

A checkpoint of the shape of switch-base-32 (12 + 12 layers, every other one sparse, 32 experts of
768 x 3072) with random weights whose routers read mostly the token's embedding, so that routing
follows the text. Batches of prompts are encoded and then decoded teacher-forced by plain
transformers, by accelerate's disk offload (every expert on demand) and by this project with LRU and
with its other policy. Page cache counts against the limit. Run as root:

    python bench/switch.py            # to bench/results/switch.json; writes bench/work/switch
    python bench/switch.py --layers 4 --checkpoint bench/work/switch-4 --batches 3 --target 8 \
        --rounds 1 --threads 1        # scaled down to 4 + 4 layers, 1.3 GB

Hit rates and peaks do not depend on what else the machine does; speeds do: see `load_average`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import moe_runtime
from moe_runtime.model_spec import MoESpec
from moe_runtime.trace import UNUSED, RoutingTrace
from moe_runtime.version import __version__
from peers import cgroup
from peers.machine import describe_machine, direct_read_rate
from peers.protocol import write_json

HERE = Path(__file__).resolve().parent
WORK = HERE / "work" / "switch"
RESULTS = HERE / "results" / "switch.json"
SHARD_BYTES = 1_000_000_000
MARGIN = 250_000_000
LOGIT_STD = 1.6
SEED = 20261124
IDS = "ids.json"


def config(layers: int) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        architectures=["SwitchTransformersForConditionalGeneration"],
        vocab_size=4096,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_heads=12,
        num_layers=layers,
        num_decoder_layers=layers,
        num_sparse_encoder_layers=layers // 2,
        num_sparse_decoder_layers=layers // 2,
        num_experts=32,
        expert_capacity=64,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
        dtype="bfloat16",
    )


def drawn(name: str, shape: torch.Size, random: torch.Generator) -> torch.Tensor:
    """One tensor: attention and experts write little beside the embedding, so routers see it."""
    part = name.split(".")[-2]
    if len(shape) == 1:
        return torch.ones(shape)
    width = math.sqrt(shape[-1])
    std = {
        "shared": 1.0,
        "classifier": LOGIT_STD / width,
        "q": 1.0 / math.sqrt(768 * 64),
        "o": 0.5 / width,
        "relative_attention_bias": 1.0,
        "wi": 0.64 / width,
        "wo": 0.64 / width,
    }.get(part, 1.0 / width)
    return torch.empty(shape).normal_(0.0, std, generator=random)


def write_checkpoint(folder: Path, layers: int) -> None:
    """bfloat16 shards with their index, and the ids that are fed."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(SEED)
    settings = config(layers)
    settings.save_pretrained(folder)
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(settings)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    tied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    pending: dict[str, torch.Tensor] = {}
    where: dict[str, int] = {}
    held = shards = 0
    for name, shape in [*((n, s) for n, s in shapes.items() if n not in tied), ("", None)]:
        if shape is None or held > SHARD_BYTES:
            save_file(pending, folder / f"shard-{shards}.safetensors", metadata={"format": "pt"})
            pending, held, shards = {}, 0, shards + 1
        if shape is not None:
            pending[name] = drawn(name, shape, random).to(torch.bfloat16)
            held += pending[name].nbytes
            where[name] = shards
    names = {name: f"shard-{shard}.safetensors" for name, shard in where.items()}
    index = {"metadata": {}, "weight_map": names}
    tokenizer = Tokenizer.from_file(str(Path(moe_runtime.bundled_model()) / "tokenizer.json"))
    text = "\n".join(pydoc_data.topics.topics.values())
    (folder / IDS).write_text(json.dumps({"ids": tokenizer.encode(text).ids}))
    write_json(folder / "model.safetensors.index.json", index)


def run(task: dict[str, Any], *, limit: int | None, timeout: float = 900.0) -> dict[str, Any]:
    """One run in a process and a cgroup of its own."""
    folder = Path(task["checkpoint"])
    cgroup.drop_cached(sorted(folder.glob("*.safetensors")))
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out, described = Path(scratch) / "out.json", Path(scratch) / "task.json"
        if task["way"] == "accelerate":
            task = {**task, "options": {"offload_folder": scratch}}
        described.write_text(json.dumps({**task, "out": str(out)}))
        outcome = cgroup.run(
            [sys.executable, "-m", "peers.run_switch", str(described)],
            limit=limit,
            timeout=timeout,
            log=Path(scratch) / "log.txt",
            cwd=HERE,
            environment={
                **os.environ,
                "PYTHONPATH": str(HERE),
                "OMP_NUM_THREADS": str(task["threads"]),
            },
        )
        result = json.loads(out.read_text()) if out.exists() else {}
    if outcome.failure:
        print(outcome.output_tail, file=sys.stderr)
    return {
        **result,
        "failure": outcome.failure,
        "limit": limit,
        "peak_bytes": outcome.peak_bytes,
        "peak_anonymous_bytes": outcome.peak_anonymous_bytes,
        "load_average_before": round(load, 2),
    }


def figures(runs: list[dict[str, Any]], batch: int, reference: list[Any]) -> dict[str, Any]:
    """One way's rounds, summed up; the first batch of each run is left out."""
    done = [one for one in runs if one["failure"] is None]
    if not done:
        return {"failed": [one["failure"] for one in runs], "limit": runs[-1]["limit"]}
    steps = [s for one in done for b in one["batches"][1:] for s in b["step_seconds"]]
    rounds = [
        batch / statistics.fmean(s for b in one["batches"][1:] for s in b["step_seconds"])
        for one in done
    ]
    same = [
        given["argmax"] == wanted["argmax"]
        for one in done
        for given, wanted in zip(one["batches"], reference, strict=False)
    ]
    encode = [b["encode_seconds"] for one in done for b in one["batches"][1:]]
    row: dict[str, Any] = {
        "rounds": len(done),
        "tokens_per_second": batch / statistics.fmean(steps),
        "tokens_per_second_by_round": rounds,
        "step_seconds_p10_p50_p90": np.quantile(steps, (0.1, 0.5, 0.9)).tolist(),
        "encode_seconds_mean": statistics.fmean(encode),
        "peak_bytes": max(one["peak_bytes"] for one in done),
        "peak_anonymous_bytes": max(one["peak_anonymous_bytes"] for one in done),
        "limit": done[0]["limit"],
        "read_bytes_measured": [one["measured"]["read_bytes"] for one in done],
        "load_average_before": [one["load_average_before"] for one in done],
        "batches_with_the_plain_models_argmax": f"{sum(same)} of {len(same)}",
    }
    if "decode" in done[0]:
        for part in ("decode", "all"):
            found = done[0][part]
            uses = found["hits"] + found["misses"]
            row[f"hit_rate_{part}"] = found["hits"] / uses
            row[f"uses_{part}"] = uses
            row[f"expert_bytes_read_{part}"] = found["bytes_read"]
        row["same_counts_in_every_round"] = len({json.dumps(one["decode"]) for one in done}) == 1
    return row


def routing(trace: RoutingTrace) -> dict[str, Any]:
    """How the checkpoint routes: decode rows, decoder layers."""
    rows = trace.decode()
    layers = [p for p, layer in enumerate(trace.layer_ids) if layer >= 1000]
    ids = rows.topk_ids[:, layers, 0]
    overlap, used, entropy = [], [], []
    for at in range(len(layers)):
        same = [
            float(np.mean(one[1:] == one[:-1]))
            for sequence in np.unique(rows.sequence_ids)
            for one in [ids[rows.sequence_ids == sequence, at]]
        ]
        overlap.append(round(float(np.mean(same)), 4))
        counts = np.unique(ids[:, at][ids[:, at] != UNUSED], return_counts=True)[1]
        share = counts / counts.sum()
        used.append(len(counts))
        entropy.append(round(float(-(share * np.log2(share)).sum()), 3))
    return {
        "rows": len(rows),
        "same_expert_as_the_token_before": overlap,
        "experts_used": used,
        "entropy_bits_of_5": entropy,
    }


def main() -> None:
    """Writes the checkpoint if it is not there, runs every way, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of each stack; 12 is switch-base")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batches", type=int, default=4, help="the first one warms up")
    parser.add_argument("--source", type=int, default=32)
    parser.add_argument("--target", type=int, default=24)
    parser.add_argument("--policies", nargs="+", default=["lru", "echo"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.checkpoint = given.checkpoint.resolve()
    if not (given.checkpoint / "model.safetensors.index.json").exists():
        write_checkpoint(given.checkpoint, given.layers)
    spec, _ = moe_runtime.inspect_checkpoint(given.checkpoint)
    task = {
        "checkpoint": str(given.checkpoint),
        "ids": str(given.checkpoint / IDS),
        "batches": given.batches,
        "source": given.source,
        "target": given.target,
        "threads": given.threads,
        "record": "",
        "options": {},
    }
    machine = describe_machine()
    disk = direct_read_rate(given.checkpoint / "shard-0.safetensors")
    nothing = run({**task, "way": "nothing", "batch": 1}, limit=None)
    assert nothing["failure"] is None, nothing["failure"]
    imports = nothing["peak_bytes"]
    result: dict[str, Any] = {}
    for batch in given.batch:
        one = {**task, "batch": batch}
        plain = run({**one, "way": "plain"}, limit=None)
        assert plain["failure"] is None, plain["failure"]
        ways: dict[str, tuple[dict[str, Any], int | None]] = {}
        for share in (0.5, 0.25):
            budget = int(share * spec.total_expert_bytes)
            limit = imports + spec.dense_bytes + budget + MARGIN
            if share == 0.25:
                ways["accelerate, experts on disk"] = (
                    {**one, "way": "accelerate", "batches": 2},
                    limit,
                )
            for policy in given.policies:
                options = {"expert_budget": budget, "policy": policy}
                ways[f"moe-runtime {policy}, {share:.0%}"] = (
                    {**one, "way": "ours", "options": options},
                    limit,
                )
        runs: dict[str, list[dict[str, Any]]] = {}
        for round_ in range(given.rounds):
            names = list(ways) if round_ % 2 == 0 else list(ways)[::-1]
            for name in names:
                print(f"batch {batch}, round {round_ + 1}: {name}", file=sys.stderr, flush=True)
                runs.setdefault(name, []).append(run(ways[name][0], limit=ways[name][1]))
        table = {"plain transformers, no limit": figures([plain], batch, plain["batches"])}
        table |= {name: figures(runs[name], batch, plain["batches"]) for name in ways}
        with tempfile.TemporaryDirectory(dir=given.checkpoint) as scratch:
            path = Path(scratch) / "routing.trace.safetensors"
            recorded = {**one, "way": "ours", "options": {"expert_budget": "100%"}}
            run({**recorded, "record": str(path)}, limit=None)
            table["routing"] = routing(RoutingTrace.load(path))
        result[f"batch {batch}"] = table
        show(result[f"batch {batch}"], batch)
        write(given, spec, imports, machine, disk, result)  # after each: a run takes long


def write(
    given: argparse.Namespace,
    spec: MoESpec,
    imports: int,
    machine: dict[str, Any],
    disk: float,
    result: dict[str, Any],
) -> None:
    write_json(
        given.out,
        {
            "what": "Switch-base-32 shape, random weights, teacher-forced decode in batches, CPU",
            "machine": machine,
            "disk_direct_read_gb_per_s": [
                disk,
                direct_read_rate(given.checkpoint / "shard-0.safetensors"),
            ],
            "version": __version__,
            "seed": SEED,
            "settings": {
                **{k: v for k, v in vars(given).items() if k not in ("checkpoint", "out")},
                "expert_bytes": spec.total_expert_bytes,
                "bytes_of_an_expert": spec.layers[0].expert_bytes,
                "experts": spec.grid.size,
                "dense_bytes": spec.dense_bytes,
                "import_only_peak": imports,
                "margin": MARGIN,
                "logit_std": LOGIT_STD,
            },
            "results": result,
        },
    )


def show(table: dict[str, Any], batch: int) -> None:
    print(f"batch {batch}: {table['routing']}")
    for name, row in table.items():
        if "tokens_per_second" in row:
            print(
                f"  {name:32} {row['tokens_per_second']:7.2f} tokens/s, peak "
                f"{row['peak_bytes'] / 1e9:.2f} GB, hit rate in decode "
                f"{row.get('hit_rate_decode', float('nan')):.4f}, "
                f"{row['batches_with_the_plain_models_argmax']}",
                flush=True,
            )
        elif "failed" in row:
            print(f"  {name:32} failed: {row['failed']}")


if __name__ == "__main__":
    main()

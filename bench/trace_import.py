"""Importing a recording of a million tokens: seconds and peak memory of the command, form by form.

Synthetic routing (26 MoE layers of 64 experts, top-6, behind one dense layer) is written in each
engine's form and imported by `moe-runtime trace import` in a process of its own. Run:

    python bench/trace_import.py                  # to bench/results/trace_import.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_runtime.version import __version__

sys.path.insert(0, str(Path(__file__).parent))
from peers.machine import describe_machine

LAYERS, DENSE, EXPERTS, TOP_K = 27, 1, 64, 6
FILES = 10
PROMPT_CALL, DECODE_CALL = 4096, 128  # tokens of a forward call
SEED = 0
RESULTS = Path(__file__).parent / "results" / "trace_import.json"


def routed(rows: int, random: np.random.Generator) -> np.ndarray:
    """uint8 `[rows, hidden layers, k]`: distinct experts, the dense layer zero."""
    # Steps from one expert to the next of at least 1 keep them distinct; a shift mixes them.
    steps = random.integers(1, 11, (rows, LAYERS, TOP_K), dtype=np.uint8)
    ids = (np.cumsum(steps, axis=2, dtype=np.uint8) - 1) % EXPERTS
    ids[:, :DENSE] = 0
    return ids.astype(np.uint8)


def write_npy(folder: Path, tokens: int) -> list[Path]:
    """Arrays as vLLM gives them, a long one a file."""
    random = np.random.default_rng(SEED)
    paths = []
    for number in range(FILES):
        paths.append(folder / f"request-{number}.npy")
        np.save(paths[-1], routed(tokens // FILES, random))
    return paths


def write_per_token(folder: Path, tokens: int) -> list[Path]:
    """SGLang's recorder, four ranks: half of the tokens in prefill calls, half in decode calls."""
    random = np.random.default_rng(SEED)
    table = torch.stack([torch.randperm(EXPERTS) for _ in range(LAYERS)])
    paths = []
    for rank in range(4):
        records: list[dict[str, Any]] = []
        left = tokens // 4
        while left > 0:
            decode = left <= tokens // 8
            rows = min(left, DECODE_CALL if decode else PROMPT_CALL)
            ids = torch.full((LAYERS, rows, 8), -1, dtype=torch.int32)
            chosen = np.ascontiguousarray(routed(rows, random)[:, DENSE:].transpose(1, 0, 2))
            ids[DENSE:, :, :TOP_K] = torch.from_numpy(chosen.astype(np.int32))
            position = 4096 + len(records) if decode else 0
            records.append(
                {
                    "forward_pass_id": len(records),
                    "rank": rank,
                    "gatherer_key": "primary",
                    "input_ids": random.integers(0, 100_000, rows).tolist(),
                    "positions": [position] * rows if decode else list(range(rows)),
                    "extend_seq_lens": None if decode else [rows],
                    "forward_mode": 2 if decode else 1,
                    "topk_ids_of_layer": ids,
                    "misc_objects": [],
                }
            )
            left -= rows
        paths.append(folder / f"expert_distribution_recorder_1_{rank}.pt")
        torch.save({"records": records, "last_physical_to_logical_map": table}, paths[-1])
    return paths


def measure(paths: list[Path], out: Path, form: str) -> dict[str, Any]:
    """Wall seconds and peak resident set of the command, from start to end of its process."""
    command = [
        *(sys.executable, "-m", "moe_runtime", "trace", "import", *map(str, paths)),
        *("--from", form, "--experts", str(EXPERTS), "-o", str(out), "--json"),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answer = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {answer}")
    data = json.loads(answer)
    return {
        "files": len(paths),
        "input_bytes": sum(path.stat().st_size for path in paths),
        "output_bytes": Path(data["file"]).stat().st_size,
        "tokens": data["tokens"],
        "seconds_of_import": data["seconds"],
        "seconds_of_process": round(seconds, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "what": "moe-runtime trace import of a synthetic recording; 26 MoE layers of 64 experts, "
        "top-6. The peak counts mapped input pages, which the system can drop; the process loads "
        "torch and transformers too",
        "machine": describe_machine(),
        "moe_runtime": __version__,
        "forms": {},
    }
    for name, form, write in (
        ("vllm .npy", "vllm", write_npy),
        ("sglang per_token", "sglang", write_per_token),
    ):
        with tempfile.TemporaryDirectory() as folder:
            paths = write(Path(folder), options.tokens)
            result["forms"][name] = measure(paths, Path(folder) / "out", form)
        print(name, json.dumps(result["forms"][name]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(options.output)


if __name__ == "__main__":
    main()

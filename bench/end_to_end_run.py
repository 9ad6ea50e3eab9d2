"""One process of `bench/end_to_end.py`: a model with random weights, a real trace's routing.

    python end_to_end_run.py TASK.json

Reads the task, writes its result file. Does not know the comparison.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moe_runtime.predictors.files import load_predictor

import moe_runtime
from moe_runtime.store import DiskStore
from moe_runtime.trace import DECODE, RoutingTrace
from replay import Oracle, Replay
from shared_traces import load_shared_traces


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    runs = load_shared_traces(Path(task["traces"]))[task["model"]]
    chosen = [runs[at] for at in task["runs"]]
    whole = RoutingTrace.concat(chosen) if len(chosen) > 1 else chosen[0]
    vocabulary = {int(token): at for at, token in enumerate(np.unique(whole.token_ids))}
    starts = np.cumsum([0, *(len(run) for run in chosen[:-1])])
    if task["latency"]:
        add_latency(task["latency"])
    replays: list[Replay] = []
    options: dict[str, Any] = dict(task["options"])
    if options.get("predictor") == "oracle":
        options["predictor"] = Oracle(whole, replays)
    elif options.get("predictor"):
        options["predictor"] = load_predictor(options["predictor"])
    model = moe_runtime.from_pretrained(task["checkpoint"], device="cpu", **options)
    replays.append(Replay(model, whole))
    ids = [vocabulary[int(token)] % model.config.vocab_size for token in whole.token_ids]
    seconds: list[float] = []
    prefill: list[float] = []
    began = time.perf_counter()
    with torch.no_grad():
        for group in batches(task["batch"], len(chosen)):
            run_group(model, replays[0], chosen, starts, group, ids, task, seconds, prefill)
    record = moe_runtime.runtime_of(model).run_record(simulate=False)
    result = {
        "decode_seconds": seconds,
        "prefill_seconds": prefill,
        "seconds": time.perf_counter() - began,
        "counters": record["counters"],
        "prediction": record["prediction"],
        "slots": record["budget"]["slots"],
        "link_bytes_per_second": moe_runtime.runtime_of(model).executor.fetcher.rate,
    }
    Path(task["out"]).write_text(json.dumps(result))


def batches(batch: int, runs: int) -> list[list[int]]:
    return [list(range(at, min(at + batch, runs))) for at in range(0, runs, batch)]


def run_group(
    model: Any, replay: Replay, runs: list[RoutingTrace], starts: Any, group: list[int],
    ids: list[int], task: dict[str, Any], seconds: list[float], prefill: list[float],
) -> None:  # fmt: skip
    """Decode the runs of a group together; a single one has its prompt read first."""
    first = [int(np.flatnonzero(runs[at].phase == DECODE)[0]) for at in group]
    cache = None
    if len(group) == 1 and first[0]:
        rows = np.arange(first[0]) + starts[group[0]]
        cache = step(model, replay, rows.reshape(1, -1), ids, cache, prefill)
    for token in range(task["tokens"]):
        rows = np.array([[starts[at] + first[n] + token] for n, at in enumerate(group)])
        if any(first[n] + token >= len(runs[at]) for n, at in enumerate(group)):
            break
        cache = step(model, replay, rows, ids, cache, seconds)


def step(
    model: Any, replay: Replay, rows: Any, ids: list[int], cache: Any, seconds: list[float]
) -> Any:
    replay.rows = rows.reshape(-1)
    fed = torch.tensor([[ids[row] for row in line] for line in rows.tolist()])
    began = time.perf_counter()
    output = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds.append(time.perf_counter() - began)
    return output.past_key_values


def add_latency(delay: float) -> None:
    """Every read waits so long first: a link with latency (a network disk), as a stated sleep."""
    read = DiskStore.read

    def later(self: DiskStore, *args: Any) -> int:
        time.sleep(delay)
        return read(self, *args)

    DiskStore.read = later  # type: ignore[method-assign]


if __name__ == "__main__":
    main()

"""Runner: batches of prompts through an encoder-decoder checkpoint, teacher-forced, in one of three
ways: plain transformers, accelerate's disk offload of the experts, or this project.

Does not know the harness. The first argument names a JSON file: `checkpoint`, `ids` (a file of
token ids), `way` (`plain`, `accelerate`, `ours`), `options` of the way, `batch`, `batches`,
`source` and `target` (tokens of each), `threads`, `record` (a trace to write), `out`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import SwitchTransformersForConditionalGeneration

from peers.protocol import Counters, abandoned_with, versions, write_json


def load(task: dict[str, Any]) -> Any:
    cls = SwitchTransformersForConditionalGeneration
    if task["way"] == "ours":
        import moe_runtime

        return moe_runtime.from_pretrained(task["checkpoint"], device="cpu", **task["options"])
    if task["way"] == "plain":
        return cls.from_pretrained(task["checkpoint"], dtype=torch.bfloat16).eval()
    with torch.device("meta"):
        structure = cls(cls.config_class.from_pretrained(task["checkpoint"]))
    placed = {
        name: "disk" if ".experts." in name else "cpu"
        for name, module in structure.named_modules()
        if name and next(module.parameters(recurse=False), None) is not None
    }
    return cls.from_pretrained(
        task["checkpoint"], dtype=torch.bfloat16, device_map=placed, **task["options"]
    ).eval()


def prompts(task: dict[str, Any], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[B, source]` and the ids `[B, target]` that are fed to the decoder."""
    ids = json.loads(Path(task["ids"]).read_text())["ids"]
    width = task["source"] + task["target"]
    first = number * task["batch"] * width
    rows = torch.tensor(ids[first : first + task["batch"] * width]).view(task["batch"], width)
    return rows[:, : task["source"]], rows[:, task["source"] :]


@torch.no_grad()
def run_batch(model: Any, source: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
    began = time.perf_counter()
    encoded = model.get_encoder()(input_ids=source)
    encoded_at = time.perf_counter()
    past, seconds, tokens = None, [], []
    for place in range(target.shape[1]):
        step = time.perf_counter()
        output = model(
            encoder_outputs=encoded,
            decoder_input_ids=target[:, place : place + 1],
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        tokens.append(output.logits[:, -1].argmax(-1).tolist())
        seconds.append(time.perf_counter() - step)
    return {"encode_seconds": encoded_at - began, "step_seconds": seconds, "argmax": tokens}


def counters(model: Any, *, decode: bool) -> dict[str, int]:
    """Uses of experts and those served, in decode steps or in all."""
    import moe_runtime

    steps = moe_runtime.runtime_of(model).profiler.steps
    chosen = [step for step in steps if step.decode or not decode]
    return {
        "hits": sum(step.hits for step in chosen),
        "misses": sum(step.misses for step in chosen),
        "bytes_read": sum(step.nbytes for step in chosen),
    }


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    if task["way"] == "nothing":  # what any limit must leave for the libraries
        import moe_runtime

        write_json(Path(task["out"]), {"versions": versions((moe_runtime.__name__,))})
        return
    before = Counters.now()
    model = load(task)
    result: dict[str, Any] = {"load": Counters.now().since(before), "batches": []}
    recording: Any = nullcontext()
    if task["record"]:
        import moe_runtime

        recording = moe_runtime.record(model, path=task["record"])
    with recording:
        for number in range(task["batches"]):
            if number == 1:  # the first batch warms up
                before = Counters.now()
                if task["way"] == "ours":
                    moe_runtime = sys.modules["moe_runtime"]
                    moe_runtime.runtime_of(model).reset_counters()
            result["batches"].append(run_batch(model, *prompts(task, number)))
    result["measured"] = Counters.now().since(before)
    if task["way"] == "ours":
        result["decode"] = counters(model, decode=True)
        result["all"] = counters(model, decode=False)
        result["budget"] = sys.modules["moe_runtime"].runtime_of(model).budget.explanation
    result["versions"] = versions(("torch", "transformers", "accelerate"))
    write_json(Path(task["out"]), result)


if __name__ == "__main__":
    with abandoned_with(os.getppid()):
        main()

"""Files in other engines' forms, written from a known trace.

Does not know the importers: the forms are written as `docs/formats.md` and the engines say.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from moe_runtime.trace import RoutingTrace

LAYERS, DENSE, EXPERTS, TOP_K = 5, 1, 12, 3  # five hidden layers, the first one dense
PROMPT, DECODED = 6, 4

Array = NDArray[Any]


def known_trace(sequences: int = 2, seed: int = 0) -> RoutingTrace:
    """Sequences of a prompt of 6 and 4 decoded tokens; layers 1 to 4 of 12 experts, top-3."""
    random = np.random.default_rng(seed)
    length = PROMPT + DECODED
    rows, layers = sequences * length, LAYERS - DENSE
    ids = random.random((rows, layers, EXPERTS)).argsort(axis=2)[:, :, :TOP_K].astype(np.uint16)
    calls = np.array([0] * PROMPT + list(range(1, DECODED + 1)))
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=random.random(ids.shape).astype(np.float16),
        token_ids=random.integers(0, 1000, rows).astype(np.int32),
        sequence_ids=np.arange(sequences).repeat(length).astype(np.int32),
        positions=np.tile(np.arange(length), sequences).astype(np.int32),
        phase=np.tile(np.arange(length) >= PROMPT, sequences).astype(np.uint8),
        step_ids=np.concatenate([calls + s * (DECODED + 1) for s in range(sequences)]).astype(
            np.int32
        ),
        layer_ids=tuple(range(DENSE, LAYERS)),
        experts=(EXPERTS,) * layers,
        top_k=(TOP_K,) * layers,
        model_id="some/model",
    )


def hidden_layers(ids: Array, fill: int = 0) -> Array:
    """`[N, L, K]` of MoE layers as `[N, hidden layers, K]`; dense ones hold `fill`."""
    wide = np.full((len(ids), LAYERS, ids.shape[2]), fill, ids.dtype)
    wide[:, DENSE:] = ids
    return wide


def npy_bytes(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def write_npy(folder: Path, trace: RoutingTrace) -> list[Path]:
    """One `.npy` for each sequence."""
    paths = []
    for sequence in np.unique(trace.sequence_ids).tolist():
        path = folder / f"request-{sequence}.npy"
        one = trace.select(sequences=[sequence])
        path.write_bytes(npy_bytes(hidden_layers(one.topk_ids.astype(np.uint8))))
        paths.append(path)
    return paths


def vllm_response(trace: RoutingTrace) -> dict[str, Any]:
    """The HTTP response of a trace of one sequence."""
    array = hidden_layers(trace.topk_ids.astype(np.uint8))
    tokens = [*trace.token_ids.tolist(), 7]  # the last token came out and was not fed
    return {
        "id": "cmpl-1",
        "choices": [
            {
                "index": 0,
                "text": "...",
                "routed_experts": base64.b64encode(npy_bytes(array)).decode(),
                "prompt_token_ids": tokens[:PROMPT],
                "token_ids": tokens[PROMPT:],
            }
        ],
        "usage": {"prompt_tokens": PROMPT, "completion_tokens": len(tokens) - PROMPT},
    }


def write_vllm(folder: Path, trace: RoutingTrace) -> list[Path]:
    """One JSON lines file, a response a line."""
    path = folder / "responses.jsonl"
    numbers = np.unique(trace.sequence_ids).tolist()
    lines = [json.dumps(vllm_response(trace.select(sequences=[number]))) for number in numbers]
    path.write_text("\n".join(lines) + "\n")
    return [path]


def raw_base64(trace: RoutingTrace) -> str:
    array = hidden_layers(trace.topk_ids.astype(np.int32))
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def write_sglang_responses(folder: Path, trace: RoutingTrace) -> list[Path]:
    """One JSON file with a list of responses of `/generate`."""
    path = folder / "responses.json"
    responses = [
        {
            "text": "...",
            "meta_info": {
                "prompt_tokens": PROMPT,
                "completion_tokens": DECODED + 1,
                "routed_experts": raw_base64(trace.select(sequences=[number])),
            },
        }
        for number in np.unique(trace.sequence_ids).tolist()
    ]
    path.write_text(json.dumps(responses))
    return [path]


def physical_map(redundant: int = 4, seed: int = 3) -> Array:
    """int64 `[hidden layers, 12 + redundant]`: experts in a mixed order, some twice."""
    random = np.random.default_rng(seed)
    rows = [
        random.permutation([*range(EXPERTS), *random.choice(EXPERTS, redundant, replace=False)])
        for _ in range(LAYERS)
    ]
    return np.array(rows, np.int64)


def to_physical(ids: Array, table: Array, seed: int = 4) -> Array:
    """Logical `[N, L, K]` as physical `[hidden layers, N, 8]`; -1 where there is nothing."""
    random = np.random.default_rng(seed)
    result = np.full((LAYERS, len(ids), 8), -1, np.int32)
    for row in range(len(ids)):
        for at in range(ids.shape[1]):
            for slot, expert in enumerate(ids[row, at].tolist()):
                places = np.flatnonzero(table[DENSE + at] == expert)
                result[DENSE + at, row, slot] = random.choice(places)
    return result


def per_token_records(trace: RoutingTrace, rank: int = 0) -> dict[str, Any]:
    """A `per_token` dump: the prompts together, then each step of decoding together."""
    table = physical_map()
    records: list[dict[str, Any]] = []
    groups = [trace.prefill()] + [
        trace.select(rows=trace.positions == place) for place in range(PROMPT, PROMPT + DECODED)
    ]
    for number, rows in enumerate(groups):
        physical = to_physical(rows.topk_ids, table)
        lengths = np.unique(rows.sequence_ids, return_counts=True)[1].tolist()
        counts = np.stack(
            [np.bincount(layer[layer >= 0], minlength=table.shape[1]) for layer in physical]
        )
        records.append(
            {
                "forward_pass_id": number,
                "rank": rank,
                "gatherer_key": "primary",
                "input_ids": rows.token_ids.tolist(),
                "positions": rows.positions.tolist(),
                "extend_seq_lens": lengths if number == 0 else None,
                "forward_mode": 1 if number == 0 else 2,
                "topk_ids_of_layer": torch.from_numpy(physical),
                "misc_objects": [],
                "global_physical_count": torch.from_numpy(counts.astype(np.int32)),
            }
        )
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(table)}


def write_per_token(folder: Path, trace: RoutingTrace) -> list[Path]:
    path = folder / "expert_distribution_recorder_1_0.pt"
    torch.save(per_token_records(trace), path)
    return [path]


def write_per_pass(folder: Path, trace: RoutingTrace) -> list[Path]:
    dump = per_token_records(trace)
    kept = {"forward_pass_id", "rank", "gatherer_key", "global_physical_count"}
    dump["records"] = [{k: v for k, v in r.items() if k in kept} for r in dump["records"]]
    path = folder / "expert_distribution_recorder_2_0.pt"
    torch.save(dump, path)
    return [path]


def logical_counts(trace: RoutingTrace) -> Array:
    """int64 `[hidden layers, E]`."""
    rows = [np.bincount(trace.topk_ids[:, at].ravel(), minlength=EXPERTS) for at in range(4)]
    return np.stack([np.zeros(EXPERTS, np.int64), *rows])


def write_stat(folder: Path, trace: RoutingTrace) -> list[Path]:
    """A dump with a buffer of steps, most of them unused."""
    half = len(trace) // 2
    buffer = np.zeros((6, LAYERS, EXPERTS), np.int32)
    buffer[0], buffer[1] = logical_counts(trace[:half]), logical_counts(trace[half:])
    path = folder / "expert_distribution_recorder_3.pt"
    torch.save(
        {
            "rank": 0,
            "logical_count": torch.from_numpy(buffer),
            "average_utilization_rate_over_window": None,
        },
        path,
    )
    return [path]


def write_trtllm(folder: Path, trace: RoutingTrace) -> list[Path]:
    """Two ranks with half of the tokens each, two iterations."""
    place = folder / "statistics"
    place.mkdir()
    (place / "meta_info.json").write_text(
        json.dumps({"num_experts": EXPERTS, "num_experts_per_token": TOP_K})
    )
    quarter = len(trace) // 4
    for rank in range(2):
        tensors = {
            f"{step}_{DENSE + at}": logical_counts(
                trace[(2 * rank + step) * quarter : (2 * rank + step + 1) * quarter]
            )[DENSE + at].astype(np.int32)
            for step in range(2)
            for at in range(4)
        }
        save_file(tensors, place / f"rank{rank}.safetensors")
    save_file({"0_raw": np.zeros(3)}, place / "rank0_raw.safetensors")
    return [place]


def write_ocs_json(folder: Path, trace: RoutingTrace) -> list[Path]:
    paths = []
    for number in np.unique(trace.sequence_ids).tolist():
        rows = trace.select(sequences=[number])
        routes = [
            {
                "token_pos": int(rows.positions[row]),
                "token_id": int(rows.token_ids[row]),
                "phase": "decode" if rows.phase[row] else "prefill",
                "layers": {
                    str(layer): {
                        "experts": rows.topk_ids[row, at].tolist(),
                        "weights": rows.topk_weights[row, at].tolist(),
                    }
                    for at, layer in enumerate(rows.layer_ids)
                },
            }
            for row in range(len(rows))
        ]
        meta = {"model_id": trace.model_id, "num_experts": EXPERTS, "top_k": TOP_K}
        path = folder / f"run-{number}.json"
        path.write_text(json.dumps({"meta": meta, "routes": routes}))
        paths.append(path)
    return paths


def write_route_csv(folder: Path, trace: RoutingTrace) -> list[Path]:
    paths = []
    for number in np.unique(trace.sequence_ids).tolist():
        rows = trace.select(sequences=[number])
        shape = f"n_layer={LAYERS} n_expert={EXPERTS} n_expert_used={TOP_K}"
        lines = [
            "# route_trace v1",
            f"# model={trace.model_id} arch=x {shape}",
            "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
        ]
        for row in range(len(rows)):
            for at, layer in enumerate(rows.layer_ids):
                lines += [
                    f"0,{rows.phase[row]},{rows.positions[row]},{layer},{slot},"
                    f"{rows.topk_ids[row, at, slot]},{rows.topk_weights[row, at, slot]:.6f},0,0"
                    for slot in range(TOP_K)
                ]
        path = folder / f"route-{number}.csv"
        path.write_text("\n".join(lines) + "\n")
        paths.append(path)
    return paths


WRITERS = {  # name -> (form, writer, what the files do not say)
    "vllm npy": ("vllm", write_npy),
    "vllm responses": ("vllm", write_vllm),
    "sglang responses": ("sglang", write_sglang_responses),
    "sglang per_token": ("sglang", write_per_token),
    "sglang per_pass": ("sglang", write_per_pass),
    "sglang stat": ("sglang", write_stat),
    "trtllm": ("trtllm", write_trtllm),
    "moe-ocs-json": ("moe-ocs-json", write_ocs_json),
    "route-csv": ("route-csv", write_route_csv),
}
COUNTED = {"sglang per_pass", "sglang stat", "trtllm"}

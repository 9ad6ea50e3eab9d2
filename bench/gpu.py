"""Owns the GPU measurements: the kernels over slots against the copy ceiling and transformers' own.

Does not know the runtime: it times functions on tensors.

    python bench/gpu.py                 # on a CUDA device, a few minutes; bench/results/gpu.json
    python bench/gpu.py --dry-run       # anywhere: tiny shapes, Triton's interpreter, no file

Decode is timed over many layers' worth of experts, so that none is found in the cache, as one CUDA
graph (what a GPU does) and as plain calls (what Python can launch). All sides of a row take turns
within one run. Every result is compared with the specification before it is timed. The end-to-end
part (a Qwen3-30B-A3B-shaped model under budgets) is to become a stage in `STAGES`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before PyTorch is imported, which imports Triton

import torch
import transformers
from moe_runtime.kernels import ExpertForm, Gate, combine, dispatch, slot_experts, slot_mlp
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from moe_runtime.version import __version__
from peers.harness import spread
from peers.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SEED = 6
Timed = Callable[[int], torch.Tensor]  # layer -> its output


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Layers of experts of one size.

    Args:
        layers: sets of experts that are used in turn, more than the device's cache holds.
        prefill: numbers of tokens beside decode's.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    decode: tuple[int, ...]
    prefill: tuple[int, ...]

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * 2


# 9.4 MB an expert, as in Qwen3-30B-A3B; 8 layers of 128 are 9.7 GB.
FULL = Shape(
    name="Qwen3-30B-A3B", layers=8, experts=128, top_k=8, hidden=2048, width=768,
    decode=(1, 2, 4, 8, 16, 32), prefill=(128, 512, 2048, 8192),
)  # fmt: skip
DRY = Shape(
    name="dry run", layers=1, experts=4, top_k=2, hidden=16, width=16, decode=(1, 2), prefill=(33,)
)


class Bench:
    """Weights, routing and the clocks of one device."""

    def __init__(self, shape: Shape, device: str, repeats: int) -> None:
        self.shape, self.device, self.repeats = shape, torch.device(device), repeats
        self.generator = torch.Generator(device).manual_seed(SEED)
        gate = Gate()
        self.form = ExpertForm(
            up=0, down=1, up_bias=None, down_bias=None, transposed=False, activation=gate, gate=gate
        )
        # One pool over all layers, as a runtime's; a layer's experts lie in slots of their own.
        count = shape.layers * shape.experts
        self.pool = (
            self._normal(count, 2 * shape.width, shape.hidden, scale=shape.hidden**-0.5),
            self._normal(count, shape.hidden, shape.width, scale=shape.width**-0.5),
        )
        self.modules = [self._module(layer) for layer in range(shape.layers)]

    def _normal(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        made = torch.empty(*sizes, dtype=torch.bfloat16, device=self.device)
        return made.normal_(0, scale, generator=self.generator)

    def _module(self, layer: int) -> Any:
        """What transformers' functions read off an experts module, over the same weights."""
        first, experts = layer * self.shape.experts, self.shape.experts
        return SimpleNamespace(
            gate_up_proj=self.pool[0][first : first + experts],
            down_proj=self.pool[1][first : first + experts],
            num_experts=experts, has_gate=True, has_bias=False, is_transposed=False,
            is_concatenated=True, has_post_expert_norm=False, _is_expert_parallel=False,
            _apply_gate=Gate(),
        )  # fmt: skip

    def sides(self, tokens: int) -> dict[str, Timed]:
        """Each way to compute a layer of so many tokens. Routing differs from layer to layer."""
        shape = self.shape
        hidden = self._normal(tokens, shape.hidden)
        noise = torch.rand(
            shape.layers, tokens, shape.experts, generator=self.generator, device=self.device
        )
        weights, chosen = noise.topk(shape.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
        slots = [chosen[layer] + layer * shape.experts for layer in range(shape.layers)]

        def ours(layer: int, kernel: str = "triton") -> torch.Tensor:
            return slot_experts(
                hidden, slots[layer], weights[layer], self.pool, self.form,
                distinct=shape.experts, kernel=kernel,
            )  # fmt: skip

        def theirs(function: Any) -> Timed:
            return lambda layer: function(
                self.modules[layer], hidden, chosen[layer], weights[layer]
            )

        # The first layer's slots are the first of the pool.
        exact = tuple(stack[: shape.experts].float() for stack in self.pool)
        wanted = combine(
            slot_mlp(hidden.float(), slots[0], exact, self.form),
            weights[0].float(),
            torch.float32,
        )
        sides: dict[str, Timed] = {"triton": ours, "grouped_mm": theirs(grouped_mm_experts_forward)}
        if tokens <= 64:  # it gathers the weights of every pair
            sides["batched_mm"] = theirs(batched_mm_experts_forward)
        for name, side in sides.items():
            error = (side(0).float() - wanted).norm() / wanted.norm()
            if not error < 0.02:
                raise RuntimeError(f"{name} at {tokens} tokens is off by {error:.3f}")
        if dispatch._failures:
            raise RuntimeError(f"Triton cannot run here: {dispatch._failures[0]}")
        return sides

    def seconds(self, run: Callable[[], object]) -> float:
        """One run, by the device's clock where it has one."""
        if self.device.type == "cpu":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same as one CUDA graph, without what launching costs Python; as it is on a CPU."""
        if self.device.type == "cpu":
            return run
        for _ in range(2):  # whatever is tuned or compiled is so before the capture
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def turns(self, runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each, taking turns; on a GPU the first two rounds are warm-up."""
        warm = 0 if self.device.type == "cpu" else 2
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(self.repeats + warm):
            for name, run in runs.items():
                seconds = self.seconds(run)
                if turn >= warm:
                    taken[name].append(seconds)
        return taken


def copy_ceiling(bench: Bench) -> dict[str, Any]:
    """Bytes per second that a copy on the device reads and writes together."""
    size = 1 << 30 if bench.device.type == "cuda" else 1 << 20
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    taken = bench.turns({"copy": lambda: target.copy_(source)})["copy"]
    return {"bytes": 2 * size, "bytes_per_second": spread([2 * size / one for one in taken])}


def every_layer(side: Timed, layers: int) -> Callable[[], None]:
    def run() -> None:
        for layer in range(layers):
            side(layer)

    return run


def decode_stage(bench: Bench) -> list[dict[str, Any]]:
    """Seconds a layer for few tokens, as a graph and as plain calls."""
    rows = []
    shape = bench.shape
    for tokens in shape.decode:
        sides = bench.sides(tokens)
        layers = {name: every_layer(side, shape.layers) for name, side in sides.items()}
        graphs: dict[str, Callable[[], object]] = {}
        refused: dict[str, str] = {}
        for name, run in layers.items():
            try:
                graphs[name] = bench.captured(run)
            except RuntimeError as error:  # transformers' may wait for the device
                refused[name] = str(error).splitlines()[0]
        row: dict[str, Any] = {"tokens": tokens, "not_as_a_graph": refused}
        for way, runs in (("graph", graphs), ("calls", layers)):
            taken = bench.turns(runs)
            row[way] = {
                name: spread([one / shape.layers for one in values])
                for name, values in taken.items()
            }
        rows.append(row)
    return rows


def prefill_stage(bench: Bench) -> list[dict[str, Any]]:
    """Seconds a layer for many tokens, as plain calls."""
    rows = []
    shape = bench.shape
    for tokens in shape.prefill:
        runs = {n: every_layer(side, shape.layers) for n, side in bench.sides(tokens).items()}
        taken = bench.turns(runs)
        row: dict[str, Any] = {"tokens": tokens}
        row["calls"] = {
            name: spread([one / shape.layers for one in values]) for name, values in taken.items()
        }
        flops = 6 * tokens * shape.top_k * shape.hidden * shape.width
        row["triton_flops_per_second"] = flops / row["calls"]["triton"]["median"]
        rows.append(row)
    return rows


STAGES: dict[str, Callable[[Bench], Any]] = {
    "copy_ceiling": copy_ceiling,
    "decode": decode_stage,
    "prefill": prefill_stage,
    # "end_to_end": tokens per second of a whole model under budgets; issue 6, not written yet.
}


def judged(result: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The issue's targets with what was found."""
    first = result["decode"][0]
    ceiling = result["copy_ceiling"]["bytes_per_second"]["median"]
    bytes_read = shape.top_k * shape.expert_bytes
    achieved = bytes_read / first["graph"]["triton"]["median"]

    def over(rows: list[dict[str, Any]], way: str) -> dict[str, float]:
        found = {}
        for row in rows:
            others = {n: s["median"] for n, s in row[way].items() if n != "triton"}
            if others:
                ratio = min(others.values()) / row[way]["triton"]["median"]
                found[str(row["tokens"])] = round(ratio, 3)
        return found

    return {
        "bandwidth over copy ceiling, 1 token (target 0.80)": round(achieved / ceiling, 3),
        "bytes per second, 1 token": achieved,
        "faster than transformers' best, decode, by tokens, graph (target 1.3)": over(
            result["decode"], "graph"
        ),
        "the same as plain calls": over(result["decode"], "calls"),
        "faster than transformers' best, prefill, by tokens (target 1.0)": over(
            result["prefill"], "calls"
        ),
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{'stage':8} {'tokens':>6} {'way':6} {'side':11} {'us/layer':>10} {'p10':>9} {'p90':>9}"
    ]
    for stage in ("decode", "prefill"):
        for row in result[stage]:
            for way in ("graph", "calls"):
                for side, took in row.get(way, {}).items():
                    values = [f"{1e6 * took[key]:.1f}" for key in ("median", "p10", "p90")]
                    lines.append(
                        f"{stage:8} {row['tokens']:6d} {way:6} {side:11} "
                        f"{values[0]:>10} {values[1]:>9} {values[2]:>9}"
                    )
    lines += [f"{name}: {value}" for name, value in result["targets"].items()]
    return "\n".join(lines)


def measure(shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    bench = Bench(shape, device, repeats)
    result: dict[str, Any] = {
        "what": "experts of a layer, seconds a layer; every result checked against the "
        "specification first; layers in turn, so that weights are not in the cache",
        "shape": {**asdict(shape), "expert_bytes": shape.expert_bytes, "dtype": "bfloat16"},
        "seed": SEED,
        "repeats": repeats,
        "interpreter": device == "cpu",
    }
    for name, stage in STAGES.items():
        began = time.perf_counter()
        result[name] = stage(bench)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    result["targets"] = judged(result, shape)
    result["machine"] = describe_machine()
    if device == "cuda":
        result["machine"]["gpu"] = torch.cuda.get_device_name()
    import triton

    result["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton.__version__,
        "moe_runtime": __version__,
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreter, no file")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; --dry-run goes through everything without one")
    with torch.inference_mode():
        if options.dry_run:
            torch.set_num_threads(1)
            result = measure(DRY, "cpu", 1)
        else:
            result = measure(FULL, "cuda", options.repeats)
    if not options.dry_run:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(options.output)
    else:
        print("dry run through the interpreter: the figures below mean nothing")
    print(table(result))


if __name__ == "__main__":
    main()

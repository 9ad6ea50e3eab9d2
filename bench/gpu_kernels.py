"""Owns the kernel stages of `bench/gpu.py`: layers of experts over slots, timed on tensors.

Does not know the runtime. The kernels over slots stand against the copy ceiling and transformers'
own functions. Decode is timed over many layers' worth of experts, so that none is found in the
cache, as one CUDA graph (what a GPU does) and as plain calls (what Python can launch). All sides of
a row take turns within one run. Every result is compared with the specification before it is timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from moe_runtime.kernels import ExpertForm, Gate, combine, dispatch, slot_experts, slot_mlp
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from peers.harness import spread

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
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                run()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails may leave its own behind
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
    return [_guarded(_decode_row, bench, tokens) for tokens in bench.shape.decode]


def prefill_stage(bench: Bench) -> list[dict[str, Any]]:
    """Seconds a layer for many tokens, as plain calls."""
    return [_guarded(_prefill_row, bench, tokens) for tokens in bench.shape.prefill]


def _guarded(
    measured: Callable[[Bench, int], dict[str, Any]], bench: Bench, tokens: int
) -> dict[str, Any]:
    """One row, or how it failed."""
    try:
        return {"tokens": tokens, **measured(bench, tokens)}
    except Exception as error:  # noqa: BLE001  whatever it is, the other rows are wanted
        print(f"{measured.__name__} at {tokens} tokens failed: {error}", file=sys.stderr)
        return {"tokens": tokens, "failed": f"{type(error).__name__}: {error}"[:2000]}


def _decode_row(bench: Bench, tokens: int) -> dict[str, Any]:
    layers = {
        name: every_layer(side, bench.shape.layers) for name, side in bench.sides(tokens).items()
    }
    graphs: dict[str, Callable[[], object]] = {}
    refused: dict[str, str] = {}
    for name, run in layers.items():
        try:
            graphs[name] = bench.captured(run)
        except RuntimeError as error:  # transformers' may wait for the device
            refused[name] = str(error).splitlines()[0]
    row: dict[str, Any] = {"not_as_a_graph": refused}
    for way, runs in (("graph", graphs), ("calls", layers)):
        row[way] = _per_layer(bench, runs)
    return row


def _prefill_row(bench: Bench, tokens: int) -> dict[str, Any]:
    shape = bench.shape
    runs = {n: every_layer(side, shape.layers) for n, side in bench.sides(tokens).items()}
    row: dict[str, Any] = {"calls": _per_layer(bench, runs)}
    flops = 6 * tokens * shape.top_k * shape.hidden * shape.width
    row["triton_flops_per_second"] = flops / row["calls"]["triton"]["median"]
    return row


def _per_layer(bench: Bench, runs: dict[str, Callable[[], object]]) -> dict[str, Any]:
    taken = bench.turns(runs)
    return {
        name: spread([one / bench.shape.layers for one in values]) for name, values in taken.items()
    }


KERNEL_STAGES: dict[str, Callable[[Bench], Any]] = {
    "copy_ceiling": copy_ceiling,
    "decode": decode_stage,
    "prefill": prefill_stage,
}


def judged(result: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The issue's targets with what was found; None where a stage failed."""

    def over(rows: list[dict[str, Any]], way: str) -> dict[str, float]:
        found = {}
        for row in rows:
            sides = row.get(way, {})
            others = {n: s["median"] for n, s in sides.items() if n != "triton"}
            if others and "triton" in sides:
                ratio = min(others.values()) / sides["triton"]["median"]
                found[str(row["tokens"])] = round(ratio, 3)
        return found

    achieved = share = None
    first = next(iter(result["decode"]), {}).get("graph", {})
    if "triton" in first and result["copy_ceiling"]:
        ceiling = result["copy_ceiling"]["bytes_per_second"]["median"]
        achieved = shape.top_k * shape.expert_bytes / first["triton"]["median"]
        share = round(achieved / ceiling, 3)
    return {
        "bandwidth over copy ceiling, 1 token (target 0.80)": share,
        "bytes per second, 1 token": achieved,
        "faster than transformers' best, decode, by tokens, graph (target 1.3)": over(
            result["decode"], "graph"
        ),
        "the same as plain calls": over(result["decode"], "calls"),
        "faster than transformers' best, prefill, by tokens (target 1.0)": over(
            result["prefill"], "calls"
        ),
    }


def kernel_table(result: dict[str, Any]) -> str:
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
            if "failed" in row:
                lines.append(f"{stage:8} {row['tokens']:6d} failed: {row['failed'][:80]}")
    lines += [f"{name}: {value}" for name, value in result["targets"].items()]
    return "\n".join(lines)

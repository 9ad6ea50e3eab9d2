"""Owns the measurement with every expert resident on CPU: experts, whole step, prefill, hook.

Does not know the runtime's insides: it times modules from outside, the same way on both sides.

    python bench/resident.py CHECKPOINT

Two models of the same checkpoint lie in memory; they take turns, block by block, and between the
blocks it is measured how soon as many bytes as a token's active experts can be read: by one
`F.linear`, and by one sum of short rows (`embedding_bag`), the quickest read that PyTorch has here.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_runtime
from peers.harness import spread
from peers.machine import describe_machine
from peers.protocol import IDS_FILE, write_json

HERE = Path(__file__).resolve().parent
PEER = "grouped_mm"


class ExpertsClock:
    """Seconds that a model's experts modules take, through ordinary module hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        self.calls: list[float] = []
        self._began = 0.0
        modules = [m for name, m in model.named_modules() if name.endswith(".mlp.experts")]
        for module in modules:
            module.register_forward_pre_hook(self._start)
            module.register_forward_hook(self._stop)
        self.layers = len(modules)

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        taken = time.perf_counter() - self._began
        self.seconds += taken
        self.calls.append(taken)

    def take(self) -> float:
        """Seconds since the last call of this."""
        taken, self.seconds = self.seconds, 0.0
        self.calls.clear()
        return taken


class Side:
    """One model of the comparison, its clock, and what was measured of it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.clock = ExpertsClock(model)
        self.cache = DynamicCache(config=model.config)
        self.step_seconds: list[float] = []
        self.expert_seconds: list[float] = []
        self.prefill_seconds: list[float] = []
        self.prefill_expert_seconds: list[float] = []
        self.argmax: list[int] = []

    @torch.inference_mode()
    def decode(self, ids: Sequence[int], *, measured: bool) -> None:
        for token in ids:
            self.clock.take()
            began = time.perf_counter()
            out = self.model(
                input_ids=torch.tensor([[token]]), past_key_values=self.cache, use_cache=True
            )
            ended = time.perf_counter()
            self.argmax.append(int(out.logits[0, -1].argmax()))
            if measured:
                self.step_seconds.append(ended - began)
                self.expert_seconds.append(self.clock.take())

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], *, measured: bool) -> None:
        self.clock.take()
        began = time.perf_counter()
        self.model(input_ids=torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
        if measured:
            self.prefill_seconds.append(time.perf_counter() - began)
            self.prefill_expert_seconds.append(self.clock.take())

    def figures(self) -> dict[str, Any]:
        return {
            "step_seconds": spread(self.step_seconds),
            "expert_seconds": spread(self.expert_seconds),
            "other_seconds": spread(
                [a - b for a, b in zip(self.step_seconds, self.expert_seconds, strict=True)]
            ),
            "prefill_seconds": spread(self.prefill_seconds),
            "prefill_expert_seconds": spread(self.prefill_expert_seconds),
            "tokens": len(self.step_seconds),
        }


class Floor:
    """One large product of a token with `nbytes` of bf16 weights, cold each time, in two ways."""

    ROW = 128  # elements of a row that is summed

    def __init__(self, nbytes: int, width: int) -> None:
        rows = nbytes // 2 // width
        self.weight = torch.empty(rows, width, dtype=torch.bfloat16).normal_(0, 0.02)
        self.token = torch.randn(1, width).to(torch.bfloat16)
        self.seconds: list[float] = []
        self.rows_seconds: list[float] = []
        self.table = self.weight.view(-1, self.ROW)
        self.numbers = torch.arange(len(self.table), dtype=torch.int32)
        self.bounds = torch.arange(0, len(self.table), width, dtype=torch.int32)
        self.factors = torch.randn(len(self.table)).to(torch.bfloat16)

    @torch.inference_mode()
    def measure(self, times: int) -> None:
        for _ in range(times):
            began = time.perf_counter()
            functional.linear(self.token, self.weight)
            half = time.perf_counter()
            functional.embedding_bag(
                self.numbers, self.table, self.bounds, mode="sum", per_sample_weights=self.factors
            )
            self.rows_seconds.append(time.perf_counter() - half)
            self.seconds.append(half - began)

    def clear(self) -> None:
        self.seconds.clear()
        self.rows_seconds.clear()

    def figures(self) -> dict[str, Any]:
        def rate(seconds: list[float]) -> float:
            return self.weight.nbytes / statistics.median(seconds) / 1e9

        return {
            "bytes": self.weight.nbytes,
            "seconds": spread(self.seconds),
            "gb_per_s": rate(self.seconds),
            "rows_seconds": spread(self.rows_seconds),
            "rows_gb_per_s": rate(self.rows_seconds),
        }


def load_plain(checkpoint: Path, implementation: str = PEER) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, experts_implementation=implementation
    ).eval()


def load_ours(checkpoint: Path, layout: str = "native") -> Any:
    return moe_runtime.from_pretrained(
        str(checkpoint), expert_budget="100%", device="cpu", layout=layout
    )


def alternate(sides: Sequence[Side], between: Callable[[], None], turn: Callable[[Side], None],
              rounds: int) -> None:  # fmt: skip
    """A B, B A, A B, ...: drift of the machine falls on both alike."""
    for round_ in range(rounds):
        for side in sides if round_ % 2 == 0 else list(reversed(sides)):
            turn(side)
            between()


def tiny_checkpoint(folder: Path, layers: int) -> None:
    """Experts so small that computing one takes no time: top-1 of 16, 8 wide."""
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=16, num_experts_per_tok=1, norm_topk_prob=True, decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder)


@torch.inference_mode()
def microseconds_a_layer(model: Any, steps: int) -> float:
    """Median time of an experts module's forward inside the model's own decode steps."""
    clock = ExpertsClock(model)
    cache = DynamicCache(config=model.config)
    taken: list[float] = []
    for step in range(steps):
        clock.take()
        model(input_ids=torch.tensor([[step % 64]]), past_key_values=cache, use_cache=True)
        if step >= steps // 4:
            taken += clock.calls
    return statistics.median(taken) * 1e6


@torch.inference_mode()
def bare_microseconds(steps: int) -> float:
    """The same expert's arithmetic alone: three linear maps, a product, a weight."""
    token = torch.randn(1, 16).to(torch.bfloat16)
    up, down = torch.randn(16, 16).to(torch.bfloat16), torch.randn(16, 8).to(torch.bfloat16)
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    taken: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        gate, value = functional.linear(token, up).chunk(2, dim=-1)
        functional.linear(functional.silu(gate) * value, down).mul_(weight)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def hook_overhead(steps: int, layout: str) -> dict[str, float]:
    """Microseconds a layer of a one-expert step, everything resident, on each side."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_checkpoint(folder, layers=8)
        found = {
            "moe_runtime": microseconds_a_layer(load_ours(folder, layout), steps),
            PEER: microseconds_a_layer(load_plain(folder), steps),
            "eager": microseconds_a_layer(load_plain(folder, "eager"), steps),
        }
    found["arithmetic_alone"] = bare_microseconds(steps * 8)
    found["moe_runtime_over_arithmetic"] = found["moe_runtime"] - found["arithmetic_alone"]
    return found


@torch.inference_mode()
def batched(sides: Sequence[Side], ids: Sequence[int], size: int, steps: int) -> dict[str, Any]:
    """Decode steps of so many sequences, each side's in turn; seconds a step and their ratio."""
    caches = [DynamicCache(config=side.model.config) for side in sides]
    taken: list[list[float]] = [[] for _ in sides]
    for step in range(steps):
        rows = torch.tensor([[ids[(row * 97 + step) % len(ids)]] for row in range(size)])
        for side, cache, seconds in zip(sides, caches, taken, strict=True):
            began = time.perf_counter()
            side.model(input_ids=rows, past_key_values=cache, use_cache=True)
            seconds.append(time.perf_counter() - began)
    plain, ours = (spread(seconds[3:]) for seconds in taken)
    return {
        "plain_seconds": plain,
        "our_seconds": ours,
        "speedup": plain["median"] / ours["median"],
    }


def verdicts(ours: Side, plain: Side, floor: Floor) -> dict[str, float]:
    """The ratios asked for. Medians of one run; above 1 is slower for `*_over_*`."""
    median = statistics.median
    return {
        "experts_over_floor": median(ours.expert_seconds) / median(floor.seconds),
        "peer_experts_over_floor": median(plain.expert_seconds) / median(floor.seconds),
        "experts_over_rows_floor": median(ours.expert_seconds) / median(floor.rows_seconds),
        "experts_speedup": median(plain.expert_seconds) / median(ours.expert_seconds),
        "step_speedup": median(plain.step_seconds) / median(ours.step_seconds),
        "prefill_speedup": median(plain.prefill_seconds) / median(ours.prefill_seconds),
        "prefill_experts_speedup": median(plain.prefill_expert_seconds)
        / median(ours.prefill_expert_seconds),
        "equal_argmax": sum(a == b for a, b in zip(ours.argmax, plain.argmax, strict=True))
        / len(plain.argmax),
    }


def main(
    checkpoint: Path,
    rounds: Annotated[int, typer.Option(help="turns of each side")] = 8,
    block: Annotated[int, typer.Option(help="tokens decoded in a turn")] = 24,
    prefill: Annotated[int, typer.Option(help="tokens of the prefill")] = 512,
    prefill_rounds: int = 6,
    batch_steps: int = 20,
    overhead_steps: int = 400,
    threads: int = 2,
    layout: Annotated[str, typer.Option(help="of ours: native or rows")] = "rows",
    out: Path = HERE / "results" / "resident_cpu.json",
) -> None:
    """Measures both sides in alternation, prints the ratios and writes the result file."""
    torch.set_num_threads(threads)
    machine = describe_machine()
    ids = json.loads((checkpoint / IDS_FILE).read_text())["ids"]
    plain, ours = Side(load_plain(checkpoint)), Side(load_ours(checkpoint, layout))
    config = plain.model.config
    active = (config.num_hidden_layers * config.num_experts_per_tok * 3
              * config.hidden_size * config.moe_intermediate_size * 2)  # fmt: skip
    floor = Floor(active, config.hidden_size)
    floor.measure(3)
    floor.clear()
    for side in (plain, ours):
        side.decode(ids[:4], measured=False)
    blocks = {side: itertools.count(0) for side in (plain, ours)}

    def turn(side: Side) -> None:
        at = 4 + next(blocks[side]) * block
        side.decode(ids[at : at + block], measured=True)

    alternate([plain, ours], lambda: floor.measure(3), turn, rounds)
    for side in (plain, ours):
        side.prefill(ids[:prefill], measured=False)
    alternate(
        [plain, ours],
        lambda: None,
        lambda side: side.prefill(ids[:prefill], measured=True),
        prefill_rounds,
    )
    ratios = verdicts(ours, plain, floor)
    batches = {size: batched([plain, ours], ids, size, batch_steps) for size in (1, 2, 4, 8, 16)}
    overhead = hook_overhead(overhead_steps, layout)
    write_json(out, {
        "what": "every expert resident, CPU: experts, step, prefill and hook",
        "machine": machine,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                     "moe_runtime": moe_runtime.__version__},
        "settings": {"rounds": rounds, "block": block, "prefill": prefill,
                     "prefill_rounds": prefill_rounds, "threads": threads,
                     "layout": layout, "batch_steps": batch_steps},
        "floor": floor.figures(),
        "moe_runtime": ours.figures(),
        "transformers_grouped_mm": plain.figures(),
        "ratios": ratios,
        "batches": batches,
        "microseconds_a_layer": overhead,
    })  # fmt: skip
    print(
        json.dumps(
            {
                "ratios": ratios,
                "microseconds_a_layer": overhead,
                "batches": {n: round(b["speedup"], 2) for n, b in batches.items()},
            },
            indent=1,
        )
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)

"""Owns the end-to-end stage of `bench/gpu.py`: a whole model under expert budgets, side by side.

Does not know how a side is run (`gpu_rows.py`) or made (`gpu_model.py`).

A Qwen3-30B-A3B-shaped random model, experts in pinned host memory, dense weights on the device,
routing replayed from a real trace (`gpu_routing.py`), batch 1, teacher-forced. Each row is a new
model over the same memory; one that fails is told and the next goes on. The clock of a token runs
from handing in its id until the host knows the argmax.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpu_figures import agreement, figures
from gpu_model import DRY_MODEL, QWEN3_30B_A3B, HostModel, ModelShape
from gpu_routing import DEFAULT_TRACE, drawn_trace, load_mapped
from gpu_rows import REFERENCE, Row, Session, rows_to_run, run_row
from peers.harness import spread

__all__ = ["Plan", "end_to_end"]

_HUNG_SECONDS = 180


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the stage is asked to do.

    Args:
        traces: folder of the shared traces; None draws the routing (dry run).
        minutes: after which no further row is begun.
        only: rows whose name contains this; the reference runs always.
        rounds: times that the rows are gone through.
    """

    shape: ModelShape = QWEN3_30B_A3B
    traces: Path | None = None
    trace: str = DEFAULT_TRACE
    minutes: float = 5.0
    full: bool = False
    only: str = ""
    rounds: int = 1
    prompt: int = 67
    warm: int = 32
    measured: int = 64
    most_seconds: float = 20.0
    prepare: Callable[[Any], None] | None = None

    @classmethod
    def dry(cls, **changes: Any) -> Plan:
        """Every row, at a size that says nothing."""
        small = cls(shape=DRY_MODEL, full=True, prompt=3, warm=1, measured=2, most_seconds=300.0)
        return dataclasses.replace(small, **changes)


def end_to_end(
    plan: Plan, device: torch.device, bandwidth: float | None, save: Callable[[Any], None]
) -> dict[str, Any]:
    """Run the rows; the result is handed to `save` after each.

    Args:
        bandwidth: bytes a second that a copy on the device reads and writes; None measures it.
    """
    began = time.perf_counter()
    result: dict[str, Any] = {
        "what": "tokens per second of batch-1 decoding, teacher-forced, routing replayed; ratios "
        "within this run",
        "shape": {**dataclasses.asdict(plan.shape), "expert_bytes": plan.shape.expert_bytes},
        "settings": {
            "prompt": plan.prompt, "warm_up": plan.warm, "measured": plan.measured,
            "minutes": plan.minutes, "rounds": plan.rounds, "full": plan.full,
        },
        "rows": {},
    }  # fmt: skip
    session, result["routing"] = _session(plan, device, result)
    result["link"] = link_rates(session.host)
    result["bandwidth_bytes_per_second"] = bandwidth or _copy_rate(device)
    session.hardware, result["hardware_profile"] = _profile(session.host, plan)
    _free(device)
    result["setup_seconds"] = round(time.perf_counter() - began, 1)
    print(f"end to end: set up in {result['setup_seconds']} s", file=sys.stderr)
    rows = [row for row in rows_to_run(full=plan.full) if plan.only in row.name or _is_first(row)]
    reference: list[torch.Tensor] = []
    for round_ in range(plan.rounds):
        # The reference stays first; the others take the opposite order every other round.
        order = rows if round_ % 2 == 0 else [rows[0], *rows[:0:-1]]
        for row in order:
            spent = time.perf_counter() - began
            if spent > 60 * plan.minutes:
                found: dict[str, Any] = {"skipped": f"{plan.minutes:g} minutes were spent"}
            else:
                found, logits = _guarded(row, session)
                reference = reference or logits  # the first that succeeds; the table names it
                found["agreement"] = agreement(logits, reference) if logits else None
            rounds = result["rows"].setdefault(row.name, {"row": _described(row), "rounds": []})
            rounds["rounds"].append(found)
            _tell(row, found)
            result["figures"] = figures(result, plan.shape)
            save(result)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def _session(plan: Plan, device: torch.device, result: dict[str, Any]) -> tuple[Session, Any]:
    shape, tokens = plan.shape, plan.prompt + plan.warm + plan.measured
    if plan.traces is None:
        decode = tokens - plan.prompt
        trace = drawn_trace(
            shape.layers, shape.experts, shape.top_k, prompt=plan.prompt, decode=decode
        )
        told: Any = {"trace": "drawn, for a dry run"}
    else:
        trace, told = load_mapped(plan.traces, plan.trace, shape.layers, shape.experts)
    host = HostModel(shape=shape, device=device)
    result["host_model"] = host.made
    session = Session(
        host=host, trace=trace, prompt=plan.prompt, warm=plan.warm, measured=plan.measured,
        most_seconds=plan.most_seconds, prepare=plan.prepare,
    )  # fmt: skip
    told["predictor"] = f"transition counts fitted to the first {plan.prompt + plan.warm} tokens "
    told["predictor"] += f"in {session.fit_seconds:.1f} s; the {plan.measured} after are measured"
    return session, told


def _is_first(row: Row) -> bool:
    return row.name == REFERENCE


def _guarded(row: Row, session: Session) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The row, or how it failed; afterwards its device memory is free again.

    A row that hangs ends the process, with a traceback: what was written before stays.
    """
    found: dict[str, Any]
    logits: list[torch.Tensor] = []
    faulthandler.dump_traceback_later(_HUNG_SECONDS, exit=True)
    try:
        with torch.inference_mode():
            found, logits = run_row(row, session)
    except Exception as error:  # noqa: BLE001  whatever it is, the other rows are wanted
        text = f"{type(error).__name__}: {error}"
        found = {"failed": text[:2000], "where": traceback.format_exc()[-3000:]}
    finally:
        faulthandler.cancel_dump_traceback_later()
    _free(session.host.device)
    if session.host.device.type == "cuda":
        found["device_bytes_left"] = torch.cuda.memory_allocated()
    return found, logits


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _described(row: Row) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(row).items() if k not in ("name", "extra")}


def _tell(row: Row, found: dict[str, Any]) -> None:
    rate = found.get("tokens_per_second")
    text = f"{rate} tokens/s" if rate else found.get("skipped") or found.get("failed")
    print(f"{row.name}: {text} ({found.get('row_seconds', 0)} s)", file=sys.stderr, flush=True)


# -- what the machine can do -----------------------------------------------------------------------


def link_rates(host: HostModel) -> dict[str, Any]:
    """Bytes a second from pinned host memory to the device: whole layers, and expert by expert."""
    gate_up, down = host.experts[0]
    rates: dict[str, Any] = {}
    target = [torch.empty_like(one, device=host.device) for one in (gate_up, down)]
    whole = gate_up.nbytes + down.nbytes

    def by_layer() -> None:
        for to, source in zip(target, (gate_up, down), strict=True):
            to.copy_(source, non_blocking=True)

    def by_expert() -> None:
        for expert in range(host.shape.experts):
            for to, source in zip(target, (gate_up, down), strict=True):
                to[expert].copy_(source[expert], non_blocking=True)

    for name, copy in (("layer", by_layer), ("expert", by_expert)):
        taken = [_timed(copy, host.device) for _ in range(6)][1:]
        rates[name] = spread([whole / seconds for seconds in taken])
    rates["bytes_per_second"] = max(rates["layer"]["median"], rates["expert"]["median"])
    return rates


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return max(time.perf_counter() - began, 1e-9)


def _copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy on the device reads and writes together."""
    size = 1 << 30 if device.type == "cuda" else 1 << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median([_timed(lambda: target.copy_(source), device) for _ in range(12)][2:])


def _profile(host: HostModel, plan: Plan) -> tuple[str | None, Any]:
    """(path of a hardware profile measured now, what it says); None where that fails."""
    if host.device.type != "cuda":
        return None, "not measured in a dry run"
    try:
        from moe_runtime.hardware import (
            ExpertShape,
            measure_hardware,
            profile_to_dict,
            save_profile,
        )

        folder = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
        shape = ExpertShape(hidden=plan.shape.hidden, intermediate=plan.shape.width)
        profile = measure_hardware(path=folder, expert=shape, file_bytes=64 << 20)
        path = save_profile(profile, folder / "hardware.json")
        return str(path), profile_to_dict(profile)
    except Exception as error:  # noqa: BLE001  rows run without it
        print(f"hardware profile: {error}", file=sys.stderr)
        return None, f"failed: {type(error).__name__}: {error}"

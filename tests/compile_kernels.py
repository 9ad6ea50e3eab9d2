"""Builds every Triton kernel for real GPUs, without one: what the interpreter cannot notice.

Run as a program of its own, since Triton either interprets or compiles in one process:

    python tests/compile_kernels.py CAPABILITY [all]
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import triton
from moe_runtime.kernels import triton_decode, triton_parts, triton_prefill
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"hidden", "weight", "bias", "inner", "parts", "out", "weights"}
INDICES = {"slots", "order", "ranked", "starts"}
STATED = ("ROWS", "PAIRS", "DEPTH", "SHARE", "COLUMNS", "UPCAST", "GROUP", "SPLIT", "BLOCK")
SIZES = {"PAIRS": 128, "SHARE": 1024, "GROUP": 8, "SPLIT": 2, "BLOCK": 1024, "UPCAST": False}


def build(function: Callable[..., Any], capability: int, dtype: str, given: dict[str, Any]) -> int:
    """Compile to machine code; bytes of it."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(inspect.signature(function).parameters):
        if name in given or name in SIZES:
            signature[name] = "constexpr"
            constants[place,] = given.get(name, SIZES.get(name))
        elif name in POINTERS or name in INDICES:
            signature[name] = "*i64" if name in INDICES else f"*{dtype}"
            aligned[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("limit", "alpha", "shift") else "i32"
            if name in ("D", "width", "outputs", "slot_stride", "n_stride", "k_stride"):
                aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(triton.jit(function), signature, constants, aligned)
    options = {"num_warps": 4, "num_stages": 3}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return len(compiled.asm["cubin"])


def main() -> None:
    capability, everything = int(sys.argv[1]), "all" in sys.argv[2:]
    for module in (triton_decode, triton_prefill):
        module.__dict__.update(triton_parts.scope())
    gates = [("silu", True, False, "none")]
    if everything:
        gates += [("silu", True, True, "before"), ("silu", True, False, "after")]
        gates += [(name, False, False, "none") for name in ("gelu", "gelu_tanh", "relu", "relu2")]
    for dtype, (function, gated, interleaved, clamp), transposed in itertools.product(
        ("bf16", "fp16", "fp32") if everything else ("bf16",),
        gates,
        (False, True)[: 1 + everything],
    ):
        gate = {"FUNCTION": function, "GATED": gated, "INTERLEAVED": interleaved, "CLAMP": clamp}
        lies = {"n_stride" if transposed else "k_stride": 1}
        lies |= {} if transposed else {"bias": None, "bias_stride": 0}
        one = {"ROWS": 1, "DEPTH": 32 if transposed else 512, "COLUMNS": 64 if transposed else 8}
        few = {"ROWS": 16, "DEPTH": 64, "COLUMNS": 32}
        many = {"ROWS": 64, "DEPTH": 32, "COLUMNS": 32}
        for module, shape in ((triton_decode, one), (triton_decode, few), (triton_prefill, many)):
            build(module._up, capability, dtype, gate | lies | shape)
            build(module._down, capability, dtype, lies | shape)
    build(triton_parts._combine, capability, "fp32", {})
    print("built")  # what the test looks for


if __name__ == "__main__":
    main()

"""Slots whose weights lie in blocks of rows: what goes in comes out, and computes the same."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_runtime.kernels import ExpertForm, decode_bags, expert_mlp, rows_of_experts
from torch.nn import functional

from moe_runtime.model_spec import ExpertParam
from moe_runtime.slots import ALIGNMENT, RowBlocks, SlotPool, block_width, slot_bytes

SLOTS = 5


def allocate(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def gate(rows: torch.Tensor) -> torch.Tensor:
    first, second = rows.chunk(2, dim=-1)
    return functional.silu(first) * second


def filled(
    hidden: int, width: int, *, transposed: bool, bias: bool, dtype: torch.dtype
) -> tuple[SlotPool, list[tuple[torch.Tensor, ...]]]:
    """A pool with random experts in every slot, and the same experts as a model has them."""
    shapes = [(2 * width, hidden), (hidden, width)]
    shapes = [shape[::-1] for shape in shapes] if transposed else shapes
    shapes += [(2 * width,), (hidden,)] if bias else []
    params = [ExpertParam(name=f"p{i}", shape=s, dtype=dtype) for i, s in enumerate(shapes)]
    rows = RowBlocks(transposed=transposed)
    pool = SlotPool(params, SLOTS, allocate, rows=rows)
    generator = torch.Generator().manual_seed(hidden * width)
    experts = []
    for slot in range(SLOTS):
        expert = tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)
        for target, tensor in zip(pool.targets(slot), expert, strict=True):
            target.copy_(tensor.reshape(target.shape))
        experts.append(expert)
    return pool, experts


def form(*, transposed: bool, bias: bool) -> ExpertForm:
    return ExpertForm(
        up=0,
        down=1,
        up_bias=2 if bias else None,
        down_bias=3 if bias else None,
        transposed=transposed,
        activation=gate,
    )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


SIZES = st.sampled_from([(16, 8), (128, 32), (96, 40), (256, 160), (320, 192), (7, 5)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(sizes=SIZES, transposed=st.booleans(), bias=st.booleans(), dtype=DTYPES)
def test_blocks_hold_the_experts_and_every_tensor_starts_aligned(
    sizes: tuple[int, int], transposed: bool, bias: bool, dtype: torch.dtype
) -> None:
    pool, experts = filled(*sizes, transposed=transposed, bias=bias, dtype=dtype)
    for slot, expert in enumerate(experts):
        for copied, tensor in zip(pool.copies(slot), expert, strict=True):
            assert copied.is_contiguous()
            assert torch.equal(copied, tensor)
        assert all(t.data_ptr() % ALIGNMENT == 0 for t in pool.tensors(slot))
    taken = slot_bytes(pool.params, rows=pool.rows)
    assert taken * SLOTS == sum(t.stride(0) * t.element_size() * SLOTS for t in pool.stacked)
    assert pool.stacked[0].shape[1] * pool.stacked[0].shape[3] == 2 * sizes[1]


@given(
    sizes=SIZES,
    transposed=st.booleans(),
    bias=st.booleans(),
    slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True),
)
def test_sums_of_rows_are_the_experts_whatever_else_is_computed(
    sizes: tuple[int, int], transposed: bool, bias: bool, slots: list[int]
) -> None:
    pool, experts = filled(*sizes, transposed=transposed, bias=bias, dtype=torch.float32)
    tables = pool.tables()
    by_rows = form(transposed=True, bias=bias)
    hidden = torch.randn(1, sizes[0], generator=torch.Generator().manual_seed(1))
    found = decode_bags(hidden, slots, tables, pool.stacked, by_rows)
    for row, slot in zip(found, slots, strict=True):
        own = form(transposed=transposed, bias=bias)
        (wanted,) = expert_mlp(hidden, experts[slot], own)
        close(row, wanted)
        (alone,) = decode_bags(hidden, [slot], tables, pool.stacked, by_rows)
        assert torch.equal(row, alone)
    counts = [1 + (slot * 7 + len(slots)) % 4 for slot in slots]
    inputs = torch.randn(sum(counts), sizes[0], generator=torch.Generator().manual_seed(3))
    together = rows_of_experts(inputs, counts, slots, tables, pool.stacked, by_rows)
    apart = [
        rows_of_experts(part, [count], [slot], tables, pool.stacked, by_rows)
        for part, count, slot in zip(inputs.split(counts), counts, slots, strict=True)
    ]
    assert torch.equal(together, torch.cat(apart))
    wanted = [
        expert_mlp(part, experts[slot], form(transposed=transposed, bias=bias))
        for part, slot in zip(inputs.split(counts), slots, strict=True)
    ]
    close(together, torch.cat(wanted))
    many = torch.randn(6, sizes[0], generator=torch.Generator().manual_seed(2))
    close(
        expert_mlp(many, pool.tensors(slots[0]), by_rows),
        expert_mlp(many, experts[slots[0]], form(transposed=transposed, bias=bias)),
    )


@pytest.mark.parametrize(
    ("out", "width"), [(1024, 128), (2880, 160), (2816, 128), (128, 128), (64, 64), (100, 100)]
)
def test_blocks_are_about_as_wide_as_registers_hold(out: int, width: int) -> None:
    assert block_width(out) == width

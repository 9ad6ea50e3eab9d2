"""The trace reader: blocks put together are the trace, and damage is named as `load` names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from marked_traces import random_trace
from moe_runtime.errors import TraceError
from moe_runtime.trace import RoutingTrace
from moe_runtime.trace_reader import TraceReader
from moe_runtime.trace_writer import TraceWriter

SHORT = ("token_ids", "sequence_ids", "positions", "phase", "step_ids")


def rewrite(path: Path, **arrays: np.ndarray | None) -> Path:
    """The same file with other tensors; None takes one away."""
    with safe_open(path, framework="numpy") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    held = {n: a for n, a in {**held, **arrays}.items() if a is not None}
    save_file(held, path, metadata=header)
    return path


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 50), st.integers(1, 50))
def test_blocks_are_the_trace(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rows: int, part: int
) -> None:
    trace = random_trace(seed, sequences=3, length=15)
    folder = tmp_path_factory.mktemp("reader")
    with TraceWriter(folder / "a.trace", rows_per_part=part) as writer:
        for start in range(0, len(trace), 9):
            writer.append(trace[start : start + 9])
        writer.flush()
        sources = [trace, folder / "a.trace"]
        read = [list(TraceReader(source).blocks(rows)) for source in sources]
        lengths = [len(TraceReader(source)) for source in sources]
    whole = folder / "a.trace.safetensors"
    read.append(list(TraceReader(whole).blocks(rows)))
    assert lengths == [len(trace)] * 2
    for blocks in read:
        assert [start for start, _ in blocks] == list(
            np.cumsum([0, *(len(block) for _, block in blocks[:-1])])
        )
        assert all(0 < len(block) <= rows for _, block in blocks)
        joined = np.concatenate([block.topk_ids for _, block in blocks])
        np.testing.assert_array_equal(joined, trace.topk_ids)
        assert all(block.description() == trace.description() for _, block in blocks)
    for name in SHORT:
        expected = getattr(RoutingTrace.load(whole), name)
        np.testing.assert_array_equal(TraceReader(whole).column(name), expected)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return random_trace(1).save(tmp_path / "a.trace.safetensors")


def test_damage_is_named(path: Path, tmp_path: Path) -> None:
    good = path.read_bytes()
    with pytest.raises(TraceError, match="no such trace"):
        TraceReader(tmp_path / "none.trace.safetensors")
    with pytest.raises(TraceError, match="without part-"):
        TraceReader(tmp_path)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(TraceError, match="not a complete safetensors file"):
        TraceReader(path)
    path.write_bytes(good)
    with pytest.raises(TraceError, match="tensor 'phase' is missing"):
        TraceReader(rewrite(path, phase=None))
    path.write_bytes(good)
    with pytest.raises(TraceError, match="positions has 3 rows, token_ids 180"):
        TraceReader(rewrite(path, positions=np.zeros(3, np.int32)))
    path.write_bytes(good)
    with pytest.raises(TraceError, match="phase must be an array of uint8, found int64"):
        TraceReader(rewrite(path, phase=np.zeros(180, np.int64)))
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(TraceError, match="no routing trace"):
        TraceReader(path)


def test_a_damaged_block_is_named_with_its_rows(path: Path) -> None:
    ids = random_trace(1).topk_ids.copy()
    ids[130, 1, 0] = 5000
    reader = TraceReader(rewrite(path, topk_ids=ids))
    blocks = reader.blocks(50)
    assert [next(blocks)[0] for _ in range(2)] == [0, 50]
    with pytest.raises(TraceError, match=r"rows from 100: topk_ids\[30, 1, 0\] is 5000"):
        next(blocks)


def test_steps_that_decrease_are_refused(path: Path) -> None:
    steps = np.zeros(180, np.int32)
    steps[:90] = 1
    with pytest.raises(TraceError, match="step_ids decrease from row 89"):
        TraceReader(rewrite(path, step_ids=steps)).column("step_ids")


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        random_trace(1, model_id=name).save(tmp_path / f"part-{number:06d}.safetensors")
    with pytest.raises(TraceError, match="another model_id"):
        TraceReader(tmp_path)

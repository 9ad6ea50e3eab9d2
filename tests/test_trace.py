"""The routing trace: what is saved comes back, damage is named, parts survive an interruption."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moe_runtime.errors import TraceError
from moe_runtime.trace import DECODE, PREFILL, UNUSED, RoutingTrace
from moe_runtime.trace_writer import TraceWriter


def trace(rows: int = 6, seed: int = 0, **changes: Any) -> RoutingTrace:
    """Three layers of 5, 4 and 9 experts; the second chooses two, the others three; two steps."""
    random = np.random.default_rng(seed)
    ids = np.full((rows, 3, 3), UNUSED, np.uint16)
    for row in range(rows):
        for layer, (count, k) in enumerate([(5, 3), (4, 2), (9, 3)]):
            ids[row, layer, :k] = random.choice(count, k, replace=False)
    values: dict[str, Any] = {
        "topk_ids": ids,
        "topk_weights": np.where(ids == UNUSED, 0, random.random(ids.shape)).astype(np.float16),
        "token_ids": random.integers(-1, 1000, rows).astype(np.int32),
        "sequence_ids": (np.arange(rows) % 2).astype(np.int32),
        "positions": (np.arange(rows) // 2).astype(np.int32),
        "phase": (np.arange(rows) >= 4).astype(np.uint8),
        "step_ids": (np.arange(rows) >= 4).astype(np.int32),
        "layer_ids": (1, 2, 7),
        "experts": (5, 4, 9),
        "top_k": (3, 2, 3),
        "model_id": "some/model",
        "fingerprint": "abc",
        "tokenizer_id": "some/tokenizer",
    }
    return RoutingTrace(**values | changes)


def assert_equal(found: RoutingTrace, expected: RoutingTrace) -> None:
    assert found.description() == expected.description()
    for name, column in expected.columns().items():
        mine = getattr(found, name)
        assert mine.dtype == column.dtype
        np.testing.assert_array_equal(mine, column, err_msg=name)


# -- the file --------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    rows, layers, k = draw(st.integers(0, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    experts = tuple(draw(st.integers(1, 300)) for _ in range(layers))
    ids = (random.random((rows, layers, k)) * np.array(experts)[:, None]).astype(np.uint16)
    ids[random.random(ids.shape) < 0.1] = UNUSED
    text = st.text(st.characters(codec="utf-8"), max_size=20)
    return RoutingTrace(
        topk_ids=ids,
        topk_weights=random.standard_normal(ids.shape).astype(np.float16),
        token_ids=random.integers(-1, 2**31 - 1, rows).astype(np.int32),
        sequence_ids=random.integers(0, 5, rows).astype(np.int32),
        positions=random.integers(0, 2**31 - 1, rows).astype(np.int32),
        phase=random.integers(0, 2, rows).astype(np.uint8),
        step_ids=np.sort(random.integers(0, 9, rows)).astype(np.int32),
        layer_ids=tuple(random.permutation(100)[:layers].tolist()),
        experts=experts,
        top_k=tuple(draw(st.integers(0, k)) for _ in range(layers)),
        model_id=draw(text),
        fingerprint=draw(text),
        tokenizer_id=draw(text),
    )


@given(traces())
def test_what_is_saved_comes_back(
    tmp_path_factory: pytest.TempPathFactory, expected: RoutingTrace
) -> None:
    path = tmp_path_factory.mktemp("trace") / "x.trace.safetensors"
    assert expected.save(path) == path
    assert_equal(RoutingTrace.load(path), expected)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    path = trace().save(tmp_path / "new" / "x.trace.safetensors")
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + length])
    assert header["__metadata__"] == {
        "format": "moe-runtime.trace",
        "version": "1",
        "model_id": "some/model",
        "fingerprint": "abc",
        "tokenizer_id": "some/tokenizer",
        "layer_ids": "[1, 2, 7]",
        "experts": "[5, 4, 9]",
        "top_k": "[3, 2, 3]",
    }
    assert header["topk_ids"]["dtype"] == "U16"
    assert header["topk_weights"]["shape"] == [6, 3, 3]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trace(seed=1).save(tmp_path / "x.trace.safetensors")

    def full(*args: Any, **options: Any) -> None:
        save_file(*args, **options)
        raise OSError("no space left on device")

    monkeypatch.setattr("moe_runtime.trace.save_file", full)
    with pytest.raises(OSError, match="no space"):
        trace(seed=2).save(path)
    assert_equal(RoutingTrace.load(path), trace(seed=1))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = trace().save(tmp_path / "x.trace.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        TraceError, match=r"x\.trace\.safetensors: not a complete safetensors.*again"
    ):
        RoutingTrace.load(path)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_byte_is_named_or_gives_a_valid_trace(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = trace().save(tmp_path_factory.mktemp("trace") / "x.trace.safetensors")
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(TraceError):  # nothing else may come out
        assert len(RoutingTrace.load(path).token_ids) == 6


def _rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors: dict[str, Any] = load_file(path)
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(format="other"), "'format' is 'other'.*no routing trace"),
        (lambda t, h: h.clear(), "'format' is None"),
        (lambda t, h: h.update(version="2"), "'version' is '2'.*reads 1.*record it again"),
        (lambda t, h: h.pop("experts"), "'experts' is missing or damaged"),
        (lambda t, h: h.update(layer_ids="[1, 2"), "'layer_ids' is missing or damaged"),
        (lambda t, h: h.update(top_k='["a"]'), "'top_k' is missing or damaged"),
        (lambda t, h: h.pop("fingerprint"), "'fingerprint' is missing"),
        (lambda t, h: h.update(layer_ids="[1, 2]"), "layer_ids names 2 layers.*has 3"),
        (lambda t, h: h.update(layer_ids="[1, 2, 2]"), "layer_ids must be distinct"),
        (lambda t, h: h.update(experts="[5, 4, 0]"), "experts of layer 7 must be 1 to 65534"),
        (lambda t, h: h.update(top_k="[3, 2, 4]"), "top_k of layer 7 must be 0 to K = 3"),
        (lambda t, h: h.update(experts="[5, 4, 3]"), "but layer 7 has 3 experts"),
        (lambda t, h: t.pop("phase"), "tensor 'phase' is missing"),
        (lambda t, h: t.update(phase=t["phase"] + 2), "phase must be 0 or 1"),
        (lambda t, h: t.update(phase=t["phase"][:3]), r"phase must have shape \[N\] with N = 6"),
        (lambda t, h: t.update(token_ids=t["token_ids"] * 1.0), "token_ids must be.*int32"),
        (lambda t, h: t.update(topk_ids=t["topk_ids"][0]), r"topk_ids must have shape \[N, L, K\]"),
        (lambda t, h: t.update(topk_weights=t["topk_weights"][:, :2]), "shape of topk_ids"),
        (lambda t, h: t.update(step_ids=t["step_ids"][::-1].copy()), "never decrease.*row 2"),
        (lambda t, h: t.update(step_ids=t["step_ids"] - 1), "never decrease.*row 0"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], None], message: str
) -> None:
    path = _rewritten(trace().save(tmp_path / "x.trace.safetensors"), change)
    with pytest.raises(TraceError, match=message) as caught:
        RoutingTrace.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_of_something_else_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.trace\.safetensors: no such trace"):
        RoutingTrace.load(tmp_path / "none.trace.safetensors")
    with pytest.raises(TraceError, match=r"without part-\*\.safetensors"):
        RoutingTrace.load(tmp_path)


# -- parts -----------------------------------------------------------------------------------------


def test_closing_merges_the_parts(tmp_path: Path) -> None:
    whole = trace(20)
    with TraceWriter(tmp_path / "x.trace", rows_per_part=3) as writer:
        writer.append(whole.select(rows=slice(0, 4)))
        writer.append(whole.select(rows=slice(4, 4)))
        for row in range(4, 20):
            writer.append(whole[row : row + 1])
    found = RoutingTrace.load(tmp_path / "x.trace.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.trace.safetensors"]
    assert writer.close() == writer.path
    steps = np.array([0] * 4 + list(range(1, 17)), np.int32)
    assert_equal(found, replace(whole, step_ids=steps))


def test_an_interrupted_recording_is_readable(tmp_path: Path) -> None:
    whole = trace(9, phase=np.ones(9, np.uint8), step_ids=np.arange(9, dtype=np.int32))
    writer = TraceWriter(tmp_path / "x.trace", rows_per_part=4)
    for row in range(9):
        writer.append(whole[row : row + 1])
    # The process ends here: eight rows are in two parts, the ninth is lost.
    (tmp_path / "x.trace" / ".part-000002.safetensors.1.tmp").write_bytes(b"half")
    assert_equal(RoutingTrace.load(tmp_path / "x.trace"), whole[:8])
    with pytest.raises(TraceError, match="2 parts of an earlier recording"):
        TraceWriter(tmp_path / "x.trace")
    (tmp_path / "x.trace" / "part-000000.safetensors").unlink()
    with pytest.raises(TraceError, match=r"part-000000\.safetensors is missing among 1"):
        RoutingTrace.load(tmp_path / "x.trace")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.trace")
    writer.append(trace())
    writer.flush()
    writer.flush()
    part = tmp_path / "x.trace" / "part-000000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(TraceError, match=r"part-000000\.safetensors: not a complete"):
        RoutingTrace.load(tmp_path / "x.trace")


def test_an_exception_inside_the_recording_keeps_the_rows(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.trace")

    def record() -> None:
        with writer:
            writer.append(trace())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record()
    assert_equal(RoutingTrace.load(writer.path), trace())


def test_the_writer_refuses_what_does_not_belong(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.trace")
    writer.append(trace())
    writer.flush()
    with pytest.raises(TraceError, match=r"the added trace has another model_id.*'other'"):
        writer.append(trace(model_id="other"))
    writer.close()
    with pytest.raises(TraceError, match="the recording is closed"):
        writer.append(trace())
    with pytest.raises(TraceError, match="is a file"):
        TraceWriter(writer.path)
    with pytest.raises(TraceError, match="rows_per_part=0"):
        TraceWriter(tmp_path / "y.trace", rows_per_part=0)


def test_closing_an_empty_recording_leaves_nothing(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.trace") as writer:
        pass
    assert writer.close() is None
    assert list(tmp_path.iterdir()) == []


# -- parts of a trace ------------------------------------------------------------------------------


def test_select_keeps_what_fits_all_conditions() -> None:
    whole = trace(10)
    assert_equal(whole.select(), whole)
    assert whole.decode().positions.tolist() == [2, 2, 3, 3, 4, 4]
    assert whole.prefill().tokens == 4
    chosen = whole.select(phase=DECODE, sequences=[1], rows=slice(0, 8))
    assert chosen.positions.tolist() == [2, 3]
    assert set(chosen.sequence_ids.tolist()) == {1}
    assert whole.select(phase=PREFILL, rows=np.array([1, 5])).tokens == 1
    assert len(whole[3:3]) == 0


def test_accesses_are_the_steps_layer_by_layer() -> None:
    whole = trace(7)
    found = iter(whole.accesses())
    for rows in (slice(0, 4), slice(4, 7)):
        for position in range(3):
            chosen = Counter(whole.topk_ids[rows, position].ravel().tolist())
            chosen.pop(UNUSED, None)
            access = next(found)
            assert access.position == position
            assert access.experts.dtype == access.tokens.dtype == np.int64
            assert dict(zip(access.experts.tolist(), access.tokens.tolist(), strict=True)) == chosen
            assert (np.diff(access.experts) > 0).all()
    assert next(found, None) is None
    assert whole[:0].accesses() == []


def test_accesses_leave_out_a_layer_that_did_not_run() -> None:
    ids = trace().topk_ids.copy()
    ids[:, 1] = UNUSED
    assert [access.position for access in trace(topk_ids=ids).accesses()] == [0, 2, 0, 2]


def test_concat_numbers_the_steps_through() -> None:
    joined = RoutingTrace.concat([trace(), trace(seed=1)[:0], trace(seed=1)[4:], trace(seed=2)])
    assert joined.step_ids.tolist() == [0] * 4 + [1] * 2 + [2] * 2 + [3] * 4 + [4] * 2
    assert_equal(joined.select(rows=slice(0, 6)), trace())
    with pytest.raises(TraceError, match="trace 1 has another experts than the first"):
        RoutingTrace.concat([trace(), trace(experts=(5, 4, 10))])
    with pytest.raises(TraceError, match="nothing to concatenate"):
        RoutingTrace.concat([])


def test_the_grid_numbers_the_experts() -> None:
    assert trace().grid.index(7, 8) == 5 + 4 + 8
    assert trace(top_k=()).top_k == (3, 3, 3)


# -- the shared folder -----------------------------------------------------------------------------


def test_another_folder_is_not_the_shared_one(tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "bench" / "shared_traces.py"
    spec = importlib.util.spec_from_file_location("shared_traces", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(TraceError, match="no recordings"):
        module.load_shared_traces(tmp_path)

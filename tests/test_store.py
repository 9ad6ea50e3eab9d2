"""Reading experts in place: every form of a checkpoint's bytes gives the tensors that transformers'
own conversions give, bit for bit.

Does not know models beyond the last tests: the files here are written byte by byte.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Qwen3MoeForCausalLM
from transformers.core_model_loading import Concatenate, Interleave, Transpose

import moe_runtime
from moe_runtime import store
from moe_runtime.checkpoint import ExpertMap, Segment
from moe_runtime.errors import ExpertReadError
from moe_runtime.model_spec import ExpertParam, MoELayer, MoESpec
from moe_runtime.safetensors_index import open_checkpoint
from moe_runtime.slots import RowBlocks, SlotPool
from moe_runtime.store import Bounce, DiskStore, ParameterStore, Tensors
from tiny import FORMS, TinyCheckpoints

EXPERTS = 3
LAYER = 5  # absolute index of the only layer
FILE_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], *, shift: int) -> None:
    """A safetensors file whose first tensor begins at `shift` modulo 4096."""
    fields: dict[str, Any] = {}
    body = b""
    for name, tensor in tensors.items():
        blob = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        fields[name] = {
            "dtype": FILE_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(blob)],
        }
        body += blob
    header = json.dumps(fields).encode()
    header = header.ljust(len(header) + (shift - 8 - len(header)) % 4096)
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A file with one tensor of each expert in some form, and what it should be read as.

    Args:
        expected: `[EXPERTS, *shape]` in the dtype that the model computes in.
    """

    path: Path
    experts: ExpertMap
    spec: MoESpec
    expected: torch.Tensor

    def open(self, chunk: int) -> DiskStore:
        return DiskStore(self.experts, self.spec, chunk=chunk)


Pieces = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def convert(operation: Any, sources: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' own conversion."""
    (result,) = operation.convert(dict(sources), list(sources), ["target"]).values()
    assert isinstance(result, torch.Tensor)
    return result


def stored(
    path: Path,
    form: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    rows: int,
    columns: int,
    shift: int,
) -> Stored:
    """Write one of the forms; `dtypes` are those of the file and of the model."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(EXPERTS, *shape, generator=generator).to(dtypes[0])

    tensors = {"a": random(rows, columns)}
    if form == "concatenated":
        tensors["b"] = random(rows, columns)
    elif form == "vector":
        tensors = {"a": random(rows)}
    write_safetensors(path, tensors, shift=shift)
    loaded = load_file(path)
    files = open_checkpoint([str(path)])
    segments: list[list[Segment]] = [[] for _ in range(EXPERTS)]
    for number, name in enumerate(tensors):
        entry = files.tensors[name]
        each = entry.nbytes // EXPERTS
        for expert in range(EXPERTS):
            segments[expert].append(
                Segment(
                    0,
                    entry.offset + expert * each,
                    entry.dtype,
                    entry.shape[1:],
                    param=0,
                    row=number * rows,
                    transposed=form == "transposed",
                    interleaved=form == "interleaved",
                )
            )
    expected = {
        "plain": lambda: loaded["a"],
        "vector": lambda: loaded["a"],
        "concatenated": lambda: convert(Concatenate(dim=1), loaded),
        "transposed": lambda: convert(Transpose(1, 2), loaded),
        "interleaved": lambda: convert(Interleave(dim=1), loaded),
    }[form]().to(dtypes[1])
    param = ExpertParam(name="weight", shape=tuple(expected.shape[1:]), dtype=dtypes[1])
    layer = MoELayer(
        layer=LAYER,
        path="layers.5.experts",
        class_name="Experts",
        num_experts=EXPERTS,
        top_k=1,
        params=(param,),
    )
    return Stored(
        path=path,
        experts=ExpertMap(
            paths=files.paths,
            segments=(tuple(tuple(one) for one in segments),),
            keys=(files.tensors,),
        ),
        spec=MoESpec(model_class="Model", model_id="", layers=(layer,), dense_bytes=0),
        expected=expected,
    )


def read_expert(
    source: DiskStore,
    expert: int,
    params: Sequence[ExpertParam],
    position: int = 0,
    *,
    rows: RowBlocks | None = None,
) -> Tensors:
    """All pieces of one expert through one bounce buffer, into memory that held other bytes.

    Args:
        rows: the memory is in blocks of rows.
    """

    def allocate(nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    pool = SlotPool(params, 2, allocate, rows=rows)
    target = pool.targets(1)
    bounce = Bounce(source.chunk)
    for piece in source.pieces(position, expert):
        assert piece.rows > 0
        source.read(position, expert, piece, target, bounce)
    return pool.copies(1)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, BF16), (F32, F16)]


@pytest.mark.parametrize("form", ["plain", "vector", "concatenated", "transposed", "interleaved"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}")
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 20).map(lambda half: 2 * half) | st.sampled_from([96, 320]),
    columns=st.integers(1, 700) | st.sampled_from([64, 384, 512]),
    shift=st.sampled_from([0, 1, 3, 8, 511, 512, 2047, 4095]) | st.integers(0, 4095),
    share=st.floats(0, 1.2),
    rows_lie=st.sampled_from([None, RowBlocks(transposed=False), RowBlocks(transposed=True)]),
)
def test_every_form_is_read_bit_for_bit(
    tmp_path: Path,
    form: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    rows: int,
    columns: int,
    shift: int,
    share: float,
    rows_lie: RowBlocks | None,
) -> None:
    case = stored(tmp_path / "one", form, dtypes, rows=rows, columns=columns, shift=shift)
    (segment, *_) = case.experts.segments[0][0]
    row = segment.nbytes // segment.shape[0]
    # Conversions need a row (a pair of rows) whole; plain ranges can be cut anywhere.
    least = row * (2 if form == "interleaved" else 1)
    cuttable = form in ("plain", "vector", "concatenated") and dtypes[0] == dtypes[1]
    if cuttable and (form == "vector" or rows_lie is None):
        least = 1
    chunk = max(least, int(share * segment.nbytes))
    source = case.open(chunk)
    try:
        for expert in range(EXPERTS):
            params = case.spec.layers[0].params
            (found,) = read_expert(source, expert, params, rows=rows_lie)
            assert_same_bits(found, case.expected[expert])
    finally:
        source.close()


@pytest.mark.parametrize("chunk", [1, 4096, 5000, 8192, 40_000, 1 << 20])
def test_a_row_larger_than_the_chunk_goes_in_parts(tmp_path: Path, chunk: int) -> None:
    case = stored(tmp_path / "wide", "plain", (F32, F32), rows=4, columns=9001, shift=4091)
    source = case.open(chunk)
    for expert in range(EXPERTS):
        (found,) = read_expert(source, expert, case.spec.layers[0].params)
        assert_same_bits(found, case.expected[expert])


@pytest.mark.parametrize("form", ["plain", "concatenated", "transposed", "interleaved"])
@pytest.mark.parametrize("chunk", [1000, 3000, 1 << 20])
def test_pieces_cover_each_row_once_and_fit_the_chunk(
    tmp_path: Path, form: str, chunk: int
) -> None:
    case = stored(tmp_path / "one", form, (F32, F32), rows=26, columns=70, shift=0)
    source = case.open(chunk)
    for segment in case.experts.segments[0][0]:
        pieces = [piece for piece in source.pieces(0, 0) if piece.segment == segment]
        rows = [row for p in pieces for row in range(p.first, p.first + p.rows)]
        assert rows == list(range(segment.shape[0]))
        width = segment.nbytes // segment.shape[0]
        unit = 2 if form == "interleaved" else 1
        assert all(piece.rows * width <= max(chunk, unit * width) for piece in pieces)
        assert all(piece.first % unit == piece.rows % unit == 0 for piece in pieces)


# -- direct and buffered reads -------------------------------------------------------------------


@pytest.fixture
def no_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses `O_DIRECT`, as tmpfs does."""
    plain = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return plain(path, flags, *rest, **options)

    monkeypatch.setattr(store.os, "open", refuse)


def refuse_direct_preads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that opens `O_DIRECT` and then refuses the read, as some network ones do."""
    plain = os.preadv
    direct = os.O_DIRECT

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(store.os, "preadv", refuse)


@pytest.mark.parametrize("form", ["plain", "concatenated", "transposed", "interleaved"])
def test_direct_and_buffered_reads_agree(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = stored(tmp_path / "one", form, (BF16, F32), rows=64, columns=300, shift=77)
    first = case.open(5000)
    if not first.direct:
        pytest.skip("this file system refuses direct reads")
    expected = [read_expert(first, e, case.spec.layers[0].params) for e in range(EXPERTS)]
    refuse_direct_preads(monkeypatch)
    second = case.open(5000)
    assert not second.direct
    for expert in range(EXPERTS):
        (found,) = read_expert(second, expert, case.spec.layers[0].params)
        assert_same_bits(found, expected[expert][0])
        assert_same_bits(found, case.expected[expert])


@pytest.mark.usefixtures("no_direct_reads")
def test_buffered_reads_drop_what_they_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = stored(tmp_path / "one", "plain", (F32, F32), rows=64, columns=512, shift=8)
    read: set[int] = set()  # pages
    dropped: set[int] = set()

    def pages(offset: int, length: int) -> set[int]:
        return set(range(offset // mmap.PAGESIZE, -(-(offset + length) // mmap.PAGESIZE)))

    preadv, fadvise = os.preadv, os.posix_fadvise

    def note_read(fd: int, buffers: Any, offset: int) -> int:
        count = preadv(fd, buffers, offset)
        read.update(pages(offset, count))
        return count

    def note_advice(fd: int, offset: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.update(pages(offset, length))
        fadvise(fd, offset, length, advice)

    monkeypatch.setattr(store.os, "preadv", note_read)
    monkeypatch.setattr(store.os, "posix_fadvise", note_advice)
    source = case.open(1 << 16)
    assert not source.direct
    for expert in range(EXPERTS):
        (found,) = read_expert(source, expert, case.spec.layers[0].params)
        assert_same_bits(found, case.expected[expert])
    assert len(read) == len(pages(0, case.path.stat().st_size)) - 1  # all but the header's
    assert dropped == read


# -- files that end too early --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "transposed"])
@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("lost", [1, 700, 4096, 30_000])
def test_reading_past_the_end_names_expert_file_and_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, buffered: bool, lost: int
) -> None:
    case = stored(tmp_path / "short", form, (F32, F32), rows=40, columns=100, shift=9)
    if buffered:
        refuse_direct_preads(monkeypatch)
    source = case.open(1 << 20)
    size = case.path.stat().st_size
    os.truncate(case.path, size - lost)
    (last,) = case.experts.segments[0][EXPERTS - 1]
    with pytest.raises(ExpertReadError) as caught:
        read_expert(source, EXPERTS - 1, case.spec.layers[0].params)
    text = str(caught.value)
    assert f"layer {LAYER} expert {EXPERTS - 1}" in text
    assert str(case.path) in text
    assert f"at byte {last.offset}" in text
    assert f"ends at byte {size - lost}" in text
    whole = (size - lost - case.experts.segments[0][0][0].offset) // last.nbytes
    for expert in range(whole):  # what is still there is still read
        (found,) = read_expert(source, expert, case.spec.layers[0].params)
        assert_same_bits(found, case.expected[expert])


def test_an_error_of_the_device_carries_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = stored(tmp_path / "bad", "plain", (F32, F32), rows=4, columns=10, shift=0)
    source = case.open(4096)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store.os, "preadv", fail)
    with pytest.raises(ExpertReadError, match=re.escape(os.strerror(errno.EIO))) as caught:
        read_expert(source, 2, case.spec.layers[0].params)
    assert isinstance(caught.value, OSError)
    assert f"layer {LAYER} expert 2" in str(caught.value)


# -- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("chunk", [1000, 1 << 20])
def test_a_models_experts_are_those_that_transformers_loads(
    tiny_checkpoints: TinyCheckpoints, form: str, dtype: torch.dtype, chunk: int
) -> None:
    path = tiny_checkpoints.form(form)
    plain = Qwen3MoeForCausalLM.from_pretrained(path, dtype=dtype)
    spec, experts = moe_runtime.inspect_checkpoint(path, dtype=dtype)
    source = DiskStore(experts, spec, chunk=chunk)
    for position, layer in enumerate(spec.layers):
        module = plain.get_submodule(layer.path)
        for expert in range(layer.num_experts):
            found = read_expert(source, expert, layer.params, position)
            for param, tensor in zip(layer.params, found, strict=True):
                assert_same_bits(tensor, module.get_parameter(param.name)[expert])


def test_a_parameter_store_hands_out_the_parameters_themselves() -> None:
    stacked = (torch.randn(4, 6, 3), torch.randn(4, 3))
    source = ParameterStore([stacked])
    assert source.pieces(0, 2) == []
    for tensor, held in zip(stacked, source.host_tensors(0, 2), strict=True):
        assert held.data_ptr() == tensor[2].data_ptr()
        assert torch.equal(held, tensor[2])

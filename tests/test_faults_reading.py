"""Reads that fail in the middle of a run: the error names expert, file and offset, and the model is
as usable afterwards as before."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    PreTrainedModel,
)

import moe_runtime
from moe_runtime.errors import (
    CheckpointError,
    ExpertReadError,
)
from running import FailAt, assert_usable, generate, load
from tiny import (
    TinyCheckpoints,
    shards,
)


@pytest.fixture
def model(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    return load(tiny_checkpoints.per_expert)


def io_error() -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def no_permission() -> int:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def nothing_left() -> int:
    return 0


@pytest.mark.parametrize("form", ["per_expert", "fused_sharded"])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("number", [1, 3, 50, 200])
def test_an_io_error_while_generating_names_expert_file_and_offset(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
    form: str,
    threads: int,
    exact: bool,
    number: int,
) -> None:
    folder = tiny_checkpoints.form(form)
    model = load(folder, reader_threads=threads, exact=exact)
    fail_at(number, io_error)
    with pytest.raises(ExpertReadError) as caught:
        generate(model, prompt)
    text = str(caught.value)
    assert re.search(r"layer \d+ expert \d+", text)
    assert re.search(r"byte \d+", text)
    assert str(folder) in text
    assert os.strerror(errno.EIO) in text
    assert isinstance(caught.value, OSError)
    assert_usable(model, prompt, eager_tokens)


@pytest.mark.parametrize(("act", "hint"), [(no_permission, "denied"), (nothing_left, "truncated")])
def test_an_unreadable_and_a_shrunken_file_are_named(
    model: PreTrainedModel,
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
    act: Callable[[], int],
    hint: str,
) -> None:
    fail_at(20, act)
    with pytest.raises(ExpertReadError, match=hint) as caught:
        generate(model, prompt)
    assert str(tiny_checkpoints.per_expert) in str(caught.value)
    assert_usable(model, prompt, eager_tokens)


def test_a_file_truncated_after_loading_is_named(
    writable_checkpoints: TinyCheckpoints, prompt: torch.Tensor, eager_tokens: torch.Tensor
) -> None:
    # A shard of experts alone: transformers maps dense weights, and a lost mapping is a bus error.
    path = next(
        path
        for path in shards(writable_checkpoints.per_expert_sharded)
        if all(".experts." in key for key in load_file(path))
    )
    blob = path.read_bytes()
    model = load(path.parent)
    os.truncate(path, 4096)
    with pytest.raises(ExpertReadError, match=re.escape(str(path))):
        generate(model, prompt)
    path.write_bytes(blob)  # the same inode
    assert_usable(model, prompt, eager_tokens)


def test_a_shard_that_cannot_be_opened_is_named(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return plain(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*denied"):
        load(tiny_checkpoints.per_expert)


def test_many_faults_one_after_the_other_leave_the_model_usable(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
) -> None:
    for number in range(1, 60, 7):
        fail_at(number, io_error)
        with pytest.raises(ExpertReadError):
            generate(model, prompt)
        moe_runtime.runtime_of(model).check_integrity()
    assert_usable(model, prompt, eager_tokens)


def test_an_io_error_while_detaching_leaves_the_model_attached(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
) -> None:
    fail_at(30, io_error)
    with pytest.raises(ExpertReadError):
        moe_runtime.detach(model)
    assert_usable(model, prompt, eager_tokens)


def test_an_io_error_while_a_layer_is_read_whole_is_named(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    eager_tokens: torch.Tensor,
    fail_at: FailAt,
) -> None:
    fail_at(30, io_error)
    with pytest.raises(ExpertReadError, match=r"layer 2 expert \d+.*byte \d+"):
        model.model.layers[2].mlp.state_dict()
    assert_usable(model, prompt, eager_tokens)

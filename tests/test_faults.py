"""Bad input and faults in the middle of a run: each is refused by name, or the run is right; and
after a fault the model is as usable as before."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeForCausalLM,
)

import moe_runtime
from moe_runtime import store
from moe_runtime.errors import (
    AttachError,
    BudgetError,
    CheckpointError,
    ConfigError,
    ExpertReadError,
    MoERuntimeError,
    UnsupportedModelError,
)
from tiny import EXPERTS, FORMS, HIDDEN, VOCAB, WIDTH, TinyCheckpoints, tiny_model

SMALL = 100_000  # bytes: staging and six or so of the 64 experts, so that every step reads


def load(path: Path, **options: Any) -> PreTrainedModel:
    options = {"expert_budget": SMALL, "device": "cpu", **options}
    model = moe_runtime.from_pretrained(path, **options)
    assert isinstance(model, PreTrainedModel)
    return model


def generate(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    tokens = model.generate(prompt, max_new_tokens=16, do_sample=False)  # type: ignore[operator]
    assert isinstance(tokens, torch.Tensor)
    return tokens


@pytest.fixture(scope="module")
def expected(tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor) -> torch.Tensor:
    """What an undisturbed model generates; plain transformers' tokens too."""
    return generate(load(tiny_checkpoints.per_expert), prompt)


@pytest.fixture
def model(tiny_checkpoints: TinyCheckpoints) -> PreTrainedModel:
    return load(tiny_checkpoints.per_expert)


def assert_usable(model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor) -> None:
    moe_runtime.runtime_of(model).check_integrity()
    assert torch.equal(generate(model, prompt), expected)
    moe_runtime.runtime_of(model).check_integrity()


def test_without_a_fault_the_tokens_are_those_of_plain_transformers(
    expected: torch.Tensor, eager_tokens: torch.Tensor
) -> None:
    assert torch.equal(expected, eager_tokens)


# -- the checkpoint's files ----------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def expert_shard(folder: Path) -> Path:
    """The shard that holds the last expert's down projection of the last layer."""
    for path in shards(folder):
        if any(".experts." in key and "layers.3" in key for key in load_file(path)):
            return path
    raise AssertionError("no shard with experts")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of the shard with the last experts and write it again."""
    path = expert_shard(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0, 5, 0.5, -1])
def test_a_truncated_shard_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, keep: float
) -> None:
    path = expert_shard(writable_checkpoints.form(form))
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(path.parent)


def corrupt(path: Path, kind: str) -> None:
    blob = path.read_bytes()
    length = struct.unpack("<Q", blob[:8])[0]
    header, body = blob[8 : 8 + length], blob[8 + length :]
    if kind == "absurd length":
        path.write_bytes(struct.pack("<Q", 1 << 62) + blob[8:])
    elif kind == "zero bytes":
        path.write_bytes(bytes(len(blob)))
    elif kind == "no JSON":
        path.write_bytes(blob[:8] + b"x" * length + body)
    elif kind == "no text":
        path.write_bytes(blob[:8] + b"\xff" * length + body)
    elif kind == "a list":
        path.write_bytes(blob[:8] + b"[]".ljust(length) + body)
    else:
        fields = json.loads(header)
        name = next(key for key in fields if ".experts." in key)
        if kind == "beyond the end":
            fields[name]["data_offsets"] = [len(body) - 8, len(body) + 8]
        elif kind == "other shape":
            fields[name]["shape"][0] += 1
        elif kind == "negative shape":
            fields[name]["shape"] = [-dimension for dimension in fields[name]["shape"]]
        elif kind == "no dtype":
            del fields[name]["dtype"]
        elif kind == "no fields":
            fields[name] = 7
        text = json.dumps(fields).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("form", ["per_expert", "fused_sharded"])
@pytest.mark.parametrize(
    "kind",
    [
        "absurd length",
        "zero bytes",
        "no JSON",
        "no text",
        "a list",
        "beyond the end",
        "other shape",
        "negative shape",
        "no dtype",
        "no fields",
    ],
)
def test_a_corrupt_header_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, kind: str
) -> None:
    path = expert_shard(writable_checkpoints.form(form))
    corrupt(path, kind)
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(path.parent)


@pytest.mark.parametrize("form", ["per_expert_sharded", "fused_sharded"])
def test_an_index_that_names_a_missing_shard_is_refused(
    writable_checkpoints: TinyCheckpoints, form: str
) -> None:
    path = expert_shard(writable_checkpoints.form(form))
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        load(path.parent)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'],
)
def test_a_damaged_index_is_named(writable_checkpoints: TinyCheckpoints, text: str) -> None:
    folder = writable_checkpoints.per_expert_sharded
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=re.escape("model.safetensors.index.json")):
        load(folder)


def test_an_index_cannot_lead_out_of_its_folder(writable_checkpoints: TinyCheckpoints) -> None:
    folder = writable_checkpoints.per_expert_sharded
    path = expert_shard(folder)
    outside = folder.parent / "outside.safetensors"
    path.rename(outside)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(path.name, "../outside.safetensors"))
    with pytest.raises(CheckpointError, match=re.escape("outside.safetensors")):
        load(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extent", ["one tensor", "all experts of the layer"])
def test_a_missing_expert_tensor_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, extent: str
) -> None:
    gone: list[str] = []

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        gone.extend(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)
        del gone[1 if extent == "one tensor" else len(gone) :]
        for key in gone:
            del tensors[key]

    folder = writable_checkpoints.form(form)
    edit(folder, remove)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        fields = json.loads(index.read_text())
        for key in gone:
            del fields["weight_map"][key]
        index.write_text(json.dumps(fields))
    assert gone
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts"):
        load(folder)


def test_a_tensor_that_only_the_index_has_is_refused(
    writable_checkpoints: TinyCheckpoints,
) -> None:
    folder = writable_checkpoints.per_expert_sharded

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)]

    edit(folder, remove)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts"):
        load(folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["wider", "longer", "flat", "turned"])
def test_a_misshapen_expert_tensor_is_named(
    writable_checkpoints: TinyCheckpoints, form: str, how: str
) -> None:
    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)
        old = tensors[key]
        tensors[key] = {
            "wider": lambda: torch.nn.functional.pad(old, [0, 1]),
            "longer": lambda: torch.nn.functional.pad(old, [0, 0, 0, 1]),
            "flat": old.flatten,
            "turned": lambda: old.transpose(-1, -2).contiguous(),
        }[how]()

    path = edit(writable_checkpoints.form(form), reshape)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts.*shape|shape.*layers\.3"):
        load(path.parent)


def test_a_fused_tensor_with_an_expert_too_few_is_named(
    writable_checkpoints: TinyCheckpoints,
) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        key = "model.layers.3.mlp.experts.down_proj"
        tensors[key] = tensors[key][: EXPERTS - 1].clone()

    path = edit(writable_checkpoints.fused, shorten)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj"):
        load(path.parent)


@pytest.mark.parametrize("form", ["per_expert", "fused"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn], ids=str
)
def test_experts_stored_as_no_float_are_refused_by_name(
    writable_checkpoints: TinyCheckpoints, form: str, dtype: torch.dtype
) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(tensors) if "layers.3.mlp.experts" in key)
        tensors[key] = tensors[key].to(dtype)

    path = edit(writable_checkpoints.form(form), convert)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(UnsupportedModelError, match=rf"layers\.3\.mlp\.experts.*{kind}"):
        load(path.parent)


@pytest.mark.parametrize("form", ["per_expert", "fused"])
def test_experts_stored_wider_than_the_model_are_converted_on_read(
    writable_checkpoints: TinyCheckpoints, form: str, prompt: torch.Tensor, expected: torch.Tensor
) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.3.mlp.experts" in key]:
            tensors[key] = tensors[key].double()

    path = edit(writable_checkpoints.form(form), widen)
    assert torch.equal(generate(load(path.parent, dtype=torch.float32), prompt), expected)


def test_a_checkpoint_of_pickles_is_refused_and_says_what_to_do(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    torch.save(
        load_file(tiny_checkpoints.fused / "model.safetensors"), tmp_path / "pytorch_model.bin"
    )
    (tmp_path / "config.json").write_bytes((tiny_checkpoints.fused / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(
    tiny_checkpoints: TinyCheckpoints, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_checkpoints.fused / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load(tmp_path)


# -- options and models that cannot be run -------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 1, "1%", "10KB"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_budget_below_one_layers_top_k_says_the_least_that_works(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    budget: int | str,
    threads: int,
) -> None:
    path = tiny_checkpoints.per_expert
    with pytest.raises(BudgetError, match=r"least that works is \d+ bytes") as caught:
        load(path, expert_budget=budget, reader_threads=threads)
    found = re.search(r"least that works is (\d+) bytes", str(caught.value))
    assert found is not None
    least = int(found[1])
    model = load(path, expert_budget=least, reader_threads=threads)
    assert_usable(model, prompt, expected)
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        load(path, expert_budget=least - 1, reader_threads=threads)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ({"expert_budget": "lots"}, "lots"),
        ({"expert_budget": -5}, "-5"),
        ({"host_budget": "8 XB"}, "8 XB"),
        ({"policy": "fifo"}, "fifo.*lru"),
        ({"reader_threads": 0}, "reader_threads"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_a_wrong_option_is_named(
    tiny_checkpoints: TinyCheckpoints, option: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        load(tiny_checkpoints.per_expert, **option)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "mxfp4"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "something_new"},
    ],
    ids=lambda fields: fields["quant_method"],
)
def test_a_quantised_checkpoint_is_refused_by_its_method(
    writable_checkpoints: TinyCheckpoints, quantisation: dict[str, Any]
) -> None:
    path = writable_checkpoints.per_expert / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "quantization_config": quantisation}))
    with pytest.raises(UnsupportedModelError, match=quantisation["quant_method"]):
        load(path.parent)


def dense_model() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def model_outside_the_interface() -> PreTrainedModel:
    return Llama4ForCausalLM(
        Llama4TextConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            intermediate_size_mlp=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


@pytest.mark.parametrize(
    ("make", "hint"),
    [(dense_model, "no MoE layer"), (model_outside_the_interface, "Llama4TextExperts")],
)
def test_a_model_without_pageable_experts_is_refused(
    tmp_path: Path, make: Callable[[], PreTrainedModel], hint: str
) -> None:
    plain = make()
    implementation = plain.config._experts_implementation
    with pytest.raises(UnsupportedModelError, match=hint):
        moe_runtime.attach(plain)
    assert plain.config._experts_implementation == implementation
    plain.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=hint):
        load(tmp_path)


# -- faults while reading ------------------------------------------------------------------------

Reader = Callable[[int, Any, int], int]


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], int]], None]:
    """Let the n-th read from now on (and only it) do something else."""
    plain: Reader = store.read_range
    lock = threading.Lock()

    def arrange(number: int, act: Callable[[], int]) -> None:
        count = 0

        def read(fd: int, buffer: Any, offset: int) -> int:
            nonlocal count
            with lock:
                count += 1
                mine = count == number
            return act() if mine else plain(fd, buffer, offset)

        monkeypatch.setattr(store, "read_range", read)

    return arrange


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
    expected: torch.Tensor,
    fail_at: Callable[[int, Callable[[], int]], None],
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
    assert_usable(model, prompt, expected)


@pytest.mark.parametrize(("act", "hint"), [(no_permission, "denied"), (nothing_left, "truncated")])
def test_an_unreadable_and_a_shrunken_file_are_named(
    model: PreTrainedModel,
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    fail_at: Callable[[int, Callable[[], int]], None],
    act: Callable[[], int],
    hint: str,
) -> None:
    fail_at(20, act)
    with pytest.raises(ExpertReadError, match=hint) as caught:
        generate(model, prompt)
    assert str(tiny_checkpoints.per_expert) in str(caught.value)
    assert_usable(model, prompt, expected)


def test_a_file_truncated_after_loading_is_named(
    writable_checkpoints: TinyCheckpoints, prompt: torch.Tensor, expected: torch.Tensor
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
    assert_usable(model, prompt, expected)


def test_a_shard_that_cannot_be_opened_is_named(
    tiny_checkpoints: TinyCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if str(path).endswith(".safetensors"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return plain(path, *rest, **options)

    monkeypatch.setattr(store.os, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*denied"):
        load(tiny_checkpoints.per_expert)


def test_many_faults_one_after_the_other_leave_the_model_usable(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    fail_at: Callable[[int, Callable[[], int]], None],
) -> None:
    for number in range(1, 60, 7):
        fail_at(number, io_error)
        with pytest.raises(ExpertReadError):
            generate(model, prompt)
        moe_runtime.runtime_of(model).check_integrity()
    assert_usable(model, prompt, expected)


def test_an_io_error_while_detaching_leaves_the_model_attached(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    fail_at: Callable[[int, Callable[[], int]], None],
) -> None:
    fail_at(30, io_error)
    with pytest.raises(ExpertReadError):
        moe_runtime.detach(model)
    assert_usable(model, prompt, expected)


def test_an_io_error_while_a_layer_is_read_whole_is_named(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    fail_at: Callable[[int, Callable[[], int]], None],
) -> None:
    fail_at(30, io_error)
    with pytest.raises(ExpertReadError, match=r"layer 2 expert \d+.*byte \d+"):
        model.model.layers[2].mlp.state_dict()
    assert_usable(model, prompt, expected)


# -- interruption and threads --------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("number", [1, 2, 17, 90, 200])
def test_ctrl_c_in_the_middle_leaves_the_model_usable(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    exact: bool,
    number: int,
) -> None:
    model = load(tiny_checkpoints.per_expert, exact=exact)
    plain: Reader = store.read_range
    count = 0

    def read(fd: int, buffer: Any, offset: int) -> int:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGINT)  # to the main thread, as a terminal does
        return plain(fd, buffer, offset)

    monkeypatch.setattr(store, "read_range", read)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt)
    assert_usable(model, prompt, expected)


def test_an_interrupt_raised_inside_the_reader_reaches_the_caller(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    fail_at: Callable[[int, Callable[[], int]], None],
) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    fail_at(40, interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt)
    assert_usable(model, prompt, expected)


@pytest.mark.parametrize("exact", [False, True])
def test_two_threads_on_one_model_get_right_results_or_a_refusal(
    tiny_checkpoints: TinyCheckpoints, exact: bool
) -> None:
    model = load(tiny_checkpoints.per_expert, exact=exact)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB, (1, 9 + 3 * i), generator=generator) for i in range(4)]
    wanted = [generate(model, prompt) for prompt in prompts]
    outcomes: list[torch.Tensor | BaseException | None] = [None] * len(prompts)
    barrier = threading.Barrier(len(prompts))

    def work(number: int) -> None:
        barrier.wait()
        try:
            outcomes[number] = generate(model, prompts[number])
        except BaseException as error:  # noqa: BLE001 - looked at below
            outcomes[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    served = 0
    for outcome, tokens in zip(outcomes, wanted, strict=True):
        if isinstance(outcome, torch.Tensor):
            assert torch.equal(outcome, tokens)
            served += 1
        else:
            assert isinstance(outcome, MoERuntimeError), repr(outcome)
    assert served >= 1
    assert_usable(model, prompts[0], wanted[0])


# -- attach and detach at the wrong moment -------------------------------------------------------


def test_attaching_twice_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(AttachError, match="attached already"):
        moe_runtime.attach(model)
    plain = moe_runtime.attach(tiny_model(), expert_budget="50%", device="cpu")
    with pytest.raises(AttachError, match="attached already"):
        moe_runtime.attach(plain, expert_budget="25%", device="cpu")
    moe_runtime.detach(plain)
    moe_runtime.attach(plain, expert_budget="25%", device="cpu")


def test_detaching_what_is_not_attached_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(AttachError, match="no runtime"):
        moe_runtime.detach(tiny_model())
    moe_runtime.detach(model)
    with pytest.raises(AttachError, match="no runtime"):
        moe_runtime.detach(model)


@pytest.mark.parametrize("attached", [False, True])
def test_detach_inside_a_call_is_refused_and_the_call_goes_on(
    tiny_checkpoints: TinyCheckpoints,
    prompt: torch.Tensor,
    expected: torch.Tensor,
    attached: bool,
) -> None:
    if attached:
        model = moe_runtime.attach(tiny_model(), expert_budget="50%", device="cpu")
    else:
        model = load(tiny_checkpoints.per_expert)
    refusals: list[MoERuntimeError] = []

    def detach_now(*_: Any) -> None:
        with pytest.raises(AttachError, match="under way") as caught:
            moe_runtime.detach(model)
        refusals.append(caught.value)

    hook = model.model.layers[2].register_forward_pre_hook(detach_now)
    assert torch.equal(generate(model, prompt), expected)
    hook.remove()
    assert refusals
    assert_usable(model, prompt, expected)
    moe_runtime.detach(model)
    assert torch.equal(generate(model, prompt), expected)


def test_detach_from_another_thread_waits_or_is_refused(
    model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor
) -> None:
    outcomes: list[BaseException | None] = []
    threads: list[threading.Thread] = []

    def detach_now() -> None:
        try:
            moe_runtime.detach(model)
            outcomes.append(None)
        except BaseException as error:  # noqa: BLE001 - looked at below
            outcomes.append(error)

    def start(*_: Any) -> None:
        if not threads:
            threads.append(threading.Thread(target=detach_now))
            threads[0].start()

    hook = model.model.layers[2].register_forward_pre_hook(start)
    assert torch.equal(generate(model, prompt), expected)
    hook.remove()
    threads[0].join(timeout=120)
    assert not threads[0].is_alive(), "detach hangs"
    assert outcomes[0] is None or isinstance(outcomes[0], AttachError), repr(outcomes[0])
    assert torch.equal(generate(model, prompt), expected)


# -- training and shared configurations ----------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_gradients_are_right_or_refused(
    tiny_checkpoints: TinyCheckpoints, prompt: torch.Tensor, training: bool, attached: bool
) -> None:
    def embedding_gradient(model: PreTrainedModel) -> torch.Tensor:
        model.train(training)
        model(prompt, labels=prompt).loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        assert isinstance(gradient, torch.Tensor)
        return gradient

    reference = embedding_gradient(tiny_model())
    if attached:
        model = moe_runtime.attach(tiny_model(), expert_budget="50%", device="cpu")
    else:
        model = load(tiny_checkpoints.per_expert)
    try:
        gradient = embedding_gradient(model)
    except MoERuntimeError as error:
        assert re.search("gradient|train", str(error))  # noqa: PT017 - either outcome is right
    else:
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_training_mode_without_gradients_generates_as_ever(
    model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor
) -> None:
    model.train()  # no dropout in this model; generate runs without gradients
    assert_usable(model, prompt, expected)


def test_a_forward_call_with_gradients_enabled_gives_the_logits(
    model: PreTrainedModel, prompt: torch.Tensor
) -> None:
    logits = model(prompt).logits
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, logits)


def test_a_plain_model_that_shares_the_config_is_left_alone(
    model: PreTrainedModel, prompt: torch.Tensor, expected: torch.Tensor
) -> None:
    plain = tiny_model()
    twin = Qwen3MoeForCausalLM(model.config)
    twin.load_state_dict(plain.state_dict())
    twin.eval()
    with torch.no_grad():
        torch.testing.assert_close(twin(prompt).logits, plain(prompt).logits)
    assert_usable(model, prompt, expected)
    assert torch.equal(generate(twin, prompt), expected)


def test_two_attached_models_that_share_a_config_do_not_mix(
    prompt: torch.Tensor, expected: torch.Tensor
) -> None:
    first = tiny_model()
    second = Qwen3MoeForCausalLM(first.config)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second.init_weights()
    second.eval()
    before = first.config._experts_implementation
    other = generate(second, prompt)
    assert not torch.equal(other, expected)
    moe_runtime.attach(first, expert_budget="50%", device="cpu")
    assert torch.equal(generate(second, prompt), other)
    moe_runtime.attach(second, expert_budget="50%", device="cpu")
    assert_usable(first, prompt, expected)
    assert_usable(second, prompt, other)
    moe_runtime.detach(first)
    assert torch.equal(generate(first, prompt), expected)
    assert_usable(second, prompt, other)
    moe_runtime.detach(second)
    assert torch.equal(generate(second, prompt), other)
    assert torch.equal(generate(first, prompt), expected)
    assert first.config._experts_implementation == before


def test_attach_and_detach_leave_no_trace(prompt: torch.Tensor) -> None:
    model = tiny_model()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    names = set(model.__dict__)
    with torch.no_grad():
        logits = model(prompt).logits
    moe_runtime.attach(model, expert_budget="50%", device="cpu")
    generate(model, prompt)
    moe_runtime.detach(model)
    assert set(model.__dict__) == names
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in parameters.items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, logits)

"""`moe-runtime trace`: what is recorded is what runs, an interruption loses nothing, exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moe_runtime
import recordings as known
from moe_runtime import ConfigError, RoutingCounts, RoutingTrace, TraceError
from moe_runtime.cli import app
from moe_runtime.corpus import read_corpus
from moe_runtime.recorder import Recorder
from moe_runtime.trace_summary import entropy, summarize

PROMPTS = ["def read(path):", "The American people", "import os"]


def run(*arguments: object, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)], input=stdin)


@pytest.fixture(scope="module")
def model() -> str:
    return str(moe_runtime.bundled_model())


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    return path


def plainly_routed(
    model: str, text: str, new_tokens: int
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Tokens that went in and their experts `[N, L, K]`, from hooks on a plain model."""
    plain = AutoModelForCausalLM.from_pretrained(model, experts_implementation="eager").eval()
    inputs = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt")
    seen: list[list[torch.Tensor]] = []
    plain.register_forward_pre_hook(lambda *_: seen.append([]))
    for layer in plain.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, arguments: seen[-1].append(arguments[1].clone())
        )
    output = plain.generate(
        input_ids=inputs["input_ids"], max_new_tokens=max(new_tokens, 1), do_sample=False
    )
    routed = torch.cat([torch.stack(call, dim=1) for call in seen])
    return output[0, : len(routed)].tolist(), routed.numpy()


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_record_sees_what_hooks_see(
    model: str, prompts: Path, tmp_path: Path, new_tokens: int
) -> None:
    out = tmp_path / "x.trace.safetensors"
    result = run(model, "--data", prompts, "-n", new_tokens, "-o", out, "--json", "--exact")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    trace = RoutingTrace.load(out)
    assert data["tokens"] == len(trace)
    assert (data["prompts"], data["interrupted"]) == (3, False)
    assert [path.name for path in tmp_path.iterdir() if path != prompts] == [out.name]
    assert trace.tokenizer_id == model
    assert trace.fingerprint == moe_runtime.inspect_checkpoint(model)[0].fingerprint
    assert sorted(set(trace.sequence_ids.tolist())) == [0, 1, 2]
    for number, text in enumerate(PROMPTS):
        rows = trace.select(sequences=[number])
        tokens, routed = plainly_routed(model, text, new_tokens)
        assert rows.token_ids.tolist() == tokens
        assert rows.positions.tolist() == list(range(len(tokens)))
        assert rows.decode().tokens == max(new_tokens - 1, 0)
        np.testing.assert_array_equal(np.sort(rows.topk_ids, -1), np.sort(routed, -1))


def test_a_batch_has_the_rows_of_its_prompts_alone(
    model: str, prompts: Path, tmp_path: Path
) -> None:
    alone, together = tmp_path / "1.trace.safetensors", tmp_path / "3.trace.safetensors"
    for out, size in ((alone, 1), (together, 3)):
        result = run(
            *(model, "--data", "-", "-n", 4, "--batch-size", size, "-o", out),
            stdin=prompts.read_text(),
        )
        assert result.exit_code == 0, result.stderr
    one, three = RoutingTrace.load(alone), RoutingTrace.load(together)
    assert len(one) == len(three)
    assert len(np.unique(three.step_ids)) == 4
    for number in range(3):
        mine, theirs = (t.select(sequences=[number]) for t in (one, three))
        assert mine.positions.tolist() == theirs.positions.tolist()
        # The first decoded token follows from the prompt; later ones from each other, so that one
        # token decided otherwise by another sum would change what comes after it.
        shared = int((mine.token_ids == theirs.token_ids).cumprod().sum())
        assert shared >= len(mine.prefill())
        equal = np.sort(mine.topk_ids[:shared], -1) == np.sort(theirs.topk_ids[:shared], -1)
        assert equal.mean() > 0.98


def test_an_interruption_keeps_what_ran(
    model: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moe_runtime.cli.recording as module

    ran = module._run
    calls = []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        ran(*arguments)

    monkeypatch.setattr(module, "_run", interrupted)
    out = tmp_path / "x.trace.safetensors"
    result = run(model, "--data", prompts, "-n", 3, "-o", out, "--json")
    assert result.exit_code == 130
    data = json.loads(result.stdout)
    assert (data["prompts"], data["interrupted"]) == (2, True)
    trace = RoutingTrace.load(out)
    assert data["tokens"] == len(trace) > 0
    assert sorted(set(trace.sequence_ids.tolist())) == [0, 1]
    again = run(model, "--data", prompts, "-o", out)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert len(RoutingTrace.load(out)) == len(trace)


def test_parts_of_a_killed_recording_are_kept(model: str, prompts: Path, tmp_path: Path) -> None:
    loaded = moe_runtime.from_pretrained(model, device="cpu")
    out = tmp_path / "x.trace.safetensors"
    ids = torch.arange(5)[None]
    with moe_runtime.record(loaded, path=out) as recorder:
        with torch.no_grad():
            loaded(input_ids=ids)
        with pytest.raises(TraceError, match="goes to a file"):
            _ = recorder.trace
    assert recorder.rows == len(RoutingTrace.load(out)) == 5
    folder = tmp_path / "y.trace"
    folder.mkdir()
    RoutingTrace.load(out).save(folder / "part-000000.safetensors")
    result = run(model, "--data", prompts, "-o", tmp_path / "y.trace.safetensors")
    assert result.exit_code == 2
    assert "1 parts of an earlier recording" in result.stderr
    assert len(RoutingTrace.load(folder)) == 5
    with (
        pytest.raises(TraceError, match="ends in"),
        moe_runtime.record(loaded, path=tmp_path / "x.json"),
    ):
        pass


def test_a_sequence_ends_at_a_stop_token(model: str) -> None:
    loaded = moe_runtime.from_pretrained(model, device="cpu")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with moe_runtime.record(loaded, stop_tokens=[7, 99]) as recorder, torch.no_grad():
        cache = loaded(input_ids=ids, use_cache=True).past_key_values
        for tokens in ([[11], [99]], [[12], [13]]):
            cache = loaded(
                input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True
            ).past_key_values
    trace = recorder.trace
    assert isinstance(recorder, Recorder)
    assert trace.select(sequences=[0]).token_ids.tolist() == [5, 6, 7, 11, 12]
    assert trace.select(sequences=[1]).token_ids.tolist() == [8, 9, 10]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("record", "m", "--data", "none.txt", "-o", "x.safetensors"), 1, "cannot be read"),
        (("record", "m", "--data", os.devnull, "-o", "x.safetensors"), 1, "no prompts"),
        (("m", "--data", "-", "--split", "word", "-o", "x"), 2, "--split is one of"),
        (("import", "none.npy", "-o", "x"), 2, "cannot be read"),
        (("import", "none.npy", "--from", "tutel", "-o", "x"), 2, "--from is one of"),
        (("import", "none.npy", "--moe-layers", "1-", "-o", "x"), 2, "--moe-layers is a list"),
        (("show", "none.trace.safetensors"), 2, "no such trace"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_import_and_show(tmp_path: Path) -> None:
    paths = known.write_npy(tmp_path, known.known_trace(2))
    result = run("import", *paths, "--experts", 12, "-o", tmp_path / "x", "--json", "--name", "m")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert (data["kind"], data["from"], data["tokens"]) == ("trace", "vllm", 20)
    assert data["layers"] == [1, 2, 3, 4]
    assert any("no routing weights" in note for note in data["notes"])
    shown = json.loads(run("show", data["file"], "--json").stdout)
    assert shown["model_id"] == "m"
    assert not shown["weighted"]
    text = run("show", data["file"]).stdout
    assert "20 tokens (20 prompt, 0 decoded) in 2 sequences" in text


def test_counts_say_what_they_cannot_do(tmp_path: Path) -> None:
    paths = known.write_stat(tmp_path, known.known_trace(2))
    result = run("import", *paths, "-o", tmp_path / "x")
    assert result.exit_code == 0, result.stderr
    assert "counts without tokens, 4 layers (1 to 4) of 12 experts" in result.stdout
    assert "affinity between layers" in result.stderr
    place = tmp_path / "x.counts.safetensors"
    assert RoutingCounts.load(place).uses == 240
    assert json.loads(run("show", place, "--json").stdout)["uses"] == 240
    assert "240 uses, tokens unknown" in run("show", place).stdout


def test_import_takes_its_facts_from_a_checkpoint(model: str, tmp_path: Path) -> None:
    spec, _ = moe_runtime.inspect_checkpoint(model)
    layers, k = len(spec.layers), spec.layers[0].top_k
    ids = np.arange(k, dtype=np.int32)[None, None].repeat(layers, 1).repeat(2, 0)
    (tmp_path / "x.npy").write_bytes(known.npy_bytes(ids))
    result = run("import", tmp_path / "x.npy", "--model", model, "-o", tmp_path / "x", "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["fingerprint"] == spec.fingerprint
    assert tuple(data["layers"]) == spec.grid.layers


# -- what a summary and the data are made of -------------------------------------------------------


def test_the_summary_of_a_known_trace() -> None:
    trace = known.known_trace(2)
    found = summarize(trace)
    assert (found.tokens, found.prompt_tokens, found.decoded_tokens) == (20, 12, 8)
    assert (found.sequences, found.calls, found.weighted) == (2, 10, True)
    for at in range(4):
        rows = [trace.select(sequences=[s]).topk_ids[:, at] for s in range(2)]
        shares = [
            len(set(a.tolist()) & set(b.tolist())) / 3
            for one in rows
            for a, b in zip(one[1:], one[:-1], strict=True)
        ]
        assert found.overlap[at] == pytest.approx(np.mean(shares))
        assert 0 < found.entropy[at] <= 1
    assert summarize(trace[:1]).overlap == (None,) * 4
    assert entropy(np.ones(8)) == pytest.approx(1)
    assert entropy(np.array([0.0, 5])) == 0
    assert entropy(np.zeros(3)) == 0


@pytest.mark.parametrize(
    ("name", "text", "split", "expected"),
    [
        ("a.txt", "one\n\n two \n", "auto", ["one", " two "]),
        ("a.txt", "one\ntwo\n", "whole", ["one\ntwo\n"]),
        ("a.txt", '{"prompt": "a"}\n{"text": "b"}\n', "auto", ["a", "b"]),
        ("a.txt", '{"prompt": "a"}\n', "lines", ['{"prompt": "a"}']),
        ("a.txt", '{"other": 1}\n', "auto", ['{"other": 1}']),
        ("a.jsonl", '{"text": " "}\n{"text": "b"}\n', "auto", ["b"]),
        ("a.txt", " \n", "whole", []),
    ],
)
def test_documents(tmp_path: Path, name: str, text: str, split: str, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert list(read_corpus(path, split=split)) == expected


def test_bad_documents_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl line 2: no JSON object"):
        list(read_corpus(path))
    path.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="not a UTF-8 text"):
        list(read_corpus(path))
    with pytest.raises(ConfigError, match="unknown split"):
        list(read_corpus(path, split="words"))

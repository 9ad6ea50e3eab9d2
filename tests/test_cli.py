"""The command line: its commands and options, its output, its exit codes."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from moe_runtime.placement.plan import LayerPlan, Plan
from moe_runtime.placement.topology import Topology
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import moe_runtime
from moe_runtime.cli import app
from moe_runtime.report import Report
from run_records import run_record
from tiny import ALL_EXPERT_BYTES, EXPERT_BYTES, EXPERTS, LAYERS, TOP_K, VOCAB, TinyCheckpoints

BUDGET = str(ALL_EXPERT_BYTES // 4)

# Every command with its options. Whoever changes this changes what people have in their scripts.
SURFACE = {
    "bake": {
        *("MODEL", "--plan", "--out", "--check", "--expert-budget", "--revision", "--subfolder"),
        *("--variant", "--local-files-only"),
    },
    "demo": {"--budget", "--out-dir", "--new-tokens", "--policy", "--plan"},
    "export": {
        *("PLAN", "--to", "--out", "--check", "--num-hidden-layers", "--model", "--counts"),
    },
    "generate": {
        *("MODEL", "--prompt", "--prompt-file", "--max-new-tokens", "--temperature", "--seed"),
        *("--chat", "--expert-budget", "--host-budget", "--device", "--policy", "--exact"),
        *("--host-execution",),
        *("--plan", "--reader-threads", "--dtype", "--revision", "--subfolder", "--variant"),
        *("--local-files-only", "--run", "--prompts", "--batch-size", "--schedule", "--window"),
        *("--every", "--predictor", "--compare", "--verify", "--out", "--max-batch"),
        *("--max-length", "--expert-parallel", "--timeout", "--link", "--report"),
    },
    "hardware": {"--path", "--expert-shape", "--dtype", "--refresh", "--cache-dir"},
    "inspect": {
        *("MODEL", "--expert-budget", "--reader-threads", "--dtype", "--revision", "--subfolder"),
        *("--variant", "--local-files-only", "--max-batch", "--max-length", "--hardware"),
    },
    "simulate": {
        *("TRACE...", "--budget", "--link-gbps", "--latency-ms", "--parallel", "--layer-ms"),
        *("--expert-ms", "--token-ms", "--call-ms", "--forecast-ms", "--expert-bytes", "--model"),
        *("--policy", "--predictor", "--fit", "--phase", "--recall", "--seed", "--trial", "--out"),
    },
    "topology": {"--out", "--hidden", "--tokens"},
    "evaluate-predictor": {
        *("[PRED...]", "--trace", "--fit", "--lookahead", "--batch-sizes", "--token-by-token"),
        *("--max-tokens", "--allow-fitted", "--out"),
    },
    "trace record": {
        *("MODEL", "--data", "--out", "--split", "--max-new-tokens", "--batch-size"),
        *("--max-tokens", "--limit", "--chat", "--expert-budget", "--host-budget", "--device"),
        *("--policy", "--exact", "--reader-threads", "--dtype", "--revision", "--subfolder"),
        *("--host-execution",),
        *("--variant", "--local-files-only", "--max-batch", "--max-length"),
    },
    "trace import": {
        *("FILES...", "--out", "--from", "--model", "--layers", "--first-dense", "--moe-layers"),
        *("--experts", "--top-k", "--name"),
    },
    "trace show": {"TRACE"},
    "plan make": {
        *("TRACE...", "--devices", "--nodes", "--topology", "--objective", "--load-cap"),
        *(
            "--redundant",
            "--counts",
            "--slack",
            "--groups",
            "--holdout",
            "--test",
            "--phase",
            "--weighted",
        ),
        *("--smoothing", "--shuffled", "--method", "--stages", "--time-limit", "--starts"),
        *("--seed", "--memory", "--host-memory", "--model", "--expert-bytes", "--out"),
        *("--mode", "--link", "--node-link", "--batch", "--widths", "--compute-ms"),
        "--prompt-tokens",
    },
    "plan show": {"PLAN", "--out"},
    "plan compare": {
        *("PLAN...", "--trace", "--link", "--node-link", "--batch", "--widths", "--compute-ms"),
        *("--model", "--prompt-tokens"),
    },
    "report": {"RUN.json", "--out", "--trace", "--with"},
    "steer cost": {
        *("MODEL", "--steer", "--prompts", "--beta", "--expert-budget", "--policy", "--limit"),
        *("--max-new-tokens", "--rounds", "--pin", "--dtype", "--revision"),
        *("--subfolder", "--variant", "--local-files-only", "--out"),
    },
    "steer eval": {
        *("MODEL", "--tasks", "--steer", "--out", "--beta", "--samples", "--controls", "--draws"),
        *("--trace", "--prompt-text", "--prompt-place", "--tip-token", "--tip-penalty"),
        *("--tip-span", "--thinking-only", "--thinking", "--max-new-tokens", "--temperature"),
        *("--top-p", "--top-k", "--seed", "--batch-size", "--chat", "--expert-budget", "--device"),
        *("--policy", "--dtype", "--revision", "--subfolder", "--variant", "--local-files-only"),
    },
    "steer find": {
        *("TRACE...", "--tokenizer", "--token", "--top", "--beta", "--prompt", "--least-joint"),
        *("--least-uses", "--smoothing", "--bootstrap", "--seed", "--picture", "--out"),
        *("--revision", "--subfolder", "--local-files-only"),
    },
    "train-predictor": {
        *("TRACE...", "--out", "--preset", "--epochs", "--minutes", "--held-out", "--seed"),
        "--resume",
    },
}
EVERYWHERE = {"--json", "--debug"}


def run(*arguments: object) -> Any:
    """The result of `moe-runtime arguments`; `stdout` and `stderr` are apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the tiny model's ids: one for each printable character."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    vocabulary = {token: at for at, token in enumerate(["<pad>", *alphabet])}
    vocabulary |= {f"<{at}>": at for at in range(len(vocabulary), VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoints: TinyCheckpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer and prompts, as the bundled model is laid out."""
    folder = tmp_path_factory.mktemp("cli") / "tiny-moe"
    shutil.copytree(tiny_checkpoints.per_expert, folder)
    tiny_tokenizer().save_pretrained(folder)
    prompts = {"english": [{"prompt": "The State"}], "code": [{"prompt": "def f"}]}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_record(steps=4, snapshots=2)))
    return path


def test_surface_is_held() -> None:
    command: Any = typer.main.get_command(app)
    found = {}
    entries = {}
    for name, entry in command.commands.items():
        inner = getattr(entry, "commands", None)
        entries |= {name: entry} if inner is None else {f"{name} {n}": e for n, e in inner.items()}
    for name, entry in entries.items():
        names = set()
        for parameter in entry.params:
            argument = parameter.param_type_name == "argument"
            names.add(
                (parameter.metavar or parameter.name.upper())
                if argument
                else next(option for option in parameter.opts if option.startswith("--"))
            )
        found[name] = names
    assert found == {name: options | EVERYWHERE for name, options in SURFACE.items()}


@pytest.mark.parametrize("command", SURFACE)
def test_help_has_an_example(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split("Example:")[1].split())
    assert re.sub(" (record|make)$", "", f"moe-runtime {command}") in shown


def test_version() -> None:
    assert run("--version").stdout.strip() == moe_runtime.__version__


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("report",),
        ("inspect", "somewhere", "--expert-budget", "25 apples"),
        ("generate", "somewhere"),
        ("generate", "somewhere", "--prompt", "a", "--prompt-file", "b"),
        ("generate", "somewhere", "--prompt", "a", "--max-new-tokens", "0"),
        ("generate", "somewhere", "--prompt", "a", "--prompts", "b"),
        ("generate", "somewhere", "--prompt", "a", "--batch-size", "4"),
        ("demo", "--budget", "much"),
        ("demo", "--bugdet", "25%"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr


def test_report_prints_text(run_file: Path) -> None:
    result = run("report", run_file)
    assert result.exit_code == 0
    assert "tokens/s decode" in result.stdout.splitlines()[0]


def test_report_writes_a_page(run_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "folder" / "report.html"
    result = run("report", run_file, "-o", page)
    assert result.exit_code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(page) in result.stdout


def test_report_json(run_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    data = json.loads(run("report", run_file, "-o", page, "--json").stdout)
    assert data["report"] == str(page)
    assert 0 < data["summary"]["hit_rate"] < 1


@pytest.mark.parametrize("flags", [(), ("--json",), ("--debug",)])
def test_an_error_is_a_message(tmp_path: Path, flags: tuple[str, ...]) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    result = run("report", broken, *flags)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert "not a run record" in result.stderr
    assert ("Traceback" in result.stderr) == ("--debug" in flags)
    if "--json" in flags:
        assert json.loads(result.stdout)["error"] == "RunError"
    else:
        assert not result.stdout


def test_a_missing_file_is_a_message(tmp_path: Path) -> None:
    result = run("report", tmp_path / "nowhere.json")
    assert result.exit_code == 1
    assert "nowhere.json" in result.stderr


def test_a_page_name_that_is_none(run_file: Path, tmp_path: Path) -> None:
    result = run("report", run_file, "-o", tmp_path / "report.pdf")
    assert result.exit_code == 1
    assert ".html or .json" in result.stderr


def test_inspect_says_what_budgets_hold(checkpoint: Path) -> None:
    data = json.loads(run("inspect", checkpoint, "--json").stdout)
    assert [layer["layer"] for layer in data["layers"]] == list(range(LAYERS))
    assert {layer["experts"] for layer in data["layers"]} == {EXPERTS}
    assert {layer["top_k"] for layer in data["layers"]} == {TOP_K}
    assert {layer["expert_bytes"] for layer in data["layers"]} == {EXPERT_BYTES}
    assert data["total_expert_bytes"] == ALL_EXPERT_BYTES
    assert data["active_expert_bytes"] == LAYERS * TOP_K * EXPERT_BYTES
    slots = {row["budget"]: row["slots"] for row in data["budgets"]}
    assert list(slots) == ["12.5%", "25%", "50%", "100%", "auto"]
    assert slots["100%"] == slots["auto"] == LAYERS * EXPERTS
    assert TOP_K <= slots["12.5%"] < slots["25%"] < slots["50%"] < slots["100%"]


def test_least_budget_works_and_less_does_not(checkpoint: Path) -> None:
    least = json.loads(run("inspect", checkpoint, "--json").stdout)["least_budget"]
    model = moe_runtime.from_pretrained(str(checkpoint), expert_budget=least)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    result = run("inspect", checkpoint, "--expert-budget", least - 1)
    assert "too small" in result.stdout
    with pytest.raises(moe_runtime.BudgetError, match=str(least)):
        moe_runtime.from_pretrained(str(checkpoint), expert_budget=least - 1)


def test_inspect_prints_a_table(checkpoint: Path) -> None:
    result = run("inspect", checkpoint)
    assert result.exit_code == 0
    assert f"{LAYERS} (layer 0 to 3), {EXPERTS} experts each, top-{TOP_K}" in result.stdout
    assert "least budget" in result.stdout


def test_no_such_model(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr


def plain_text(checkpoint: Path, prompt: str, new_tokens: int) -> str:
    """What plain transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="eager")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(
        tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


def test_generate_streams_what_the_plain_model_says(checkpoint: Path, tmp_path: Path) -> None:
    options = ("--expert-budget", BUDGET, "-n", 12, "--exact")
    record, page = tmp_path / "kept" / "run.json", tmp_path / "pages" / "run.html"
    options = (*options, "--run", record, "--report", page)
    result = run("generate", checkpoint, "-p", "if a:", *options)
    assert result.exit_code == 0, result.stderr
    expected = plain_text(checkpoint, "if a:", 12)
    assert result.stdout == f"{expected}\n"
    assert "tokens/s decode" in result.stderr
    data = json.loads(record.read_text(encoding="utf-8"))
    assert data["generated"][0]["text"] == expected
    assert data["counters"]["decode_tokens"] == 11
    assert data["counters"]["evictions"] > 0
    assert page.read_text(encoding="utf-8") == Report.load(record).to_html()


def test_generate_json(checkpoint: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("if a:")
    result = run(
        *("generate", checkpoint, "--prompt-file", prompt, "--json", "--exact", "-n", 12),
        *("--expert-budget", BUDGET),
    )
    data = json.loads(result.stdout)
    assert data["text"] == plain_text(checkpoint, "if a:", 12)
    assert data["prompt"] == "if a:"
    assert data["new_tokens"] == 12
    assert data["summary"]["budget_bytes"] == int(BUDGET)


def plan_file(checkpoint: Path, folder: Path, *, fingerprint: str = "") -> Path:
    """A plan that keeps the first three experts of every layer."""
    plan = Plan(
        topology=Topology.of(1),
        layers=tuple(
            LayerPlan(
                layer=layer,
                hosts=((0,),) * EXPERTS,
                tiers=("device",) * 3 + ("disk",) * (EXPERTS - 3),
            )
            for layer in range(LAYERS)
        ),
        fingerprint=fingerprint,
    )
    return plan.save(folder / "x.plan.json")


def test_generate_runs_a_plan(checkpoint: Path, tmp_path: Path) -> None:
    record = tmp_path / "run.json"
    result = run(
        *("generate", checkpoint, "-p", "if a:", "--exact", "-n", 12, "--expert-budget", "50%"),
        *("--plan", plan_file(checkpoint, tmp_path), "--run", record),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{plain_text(checkpoint, 'if a:', 12)}\n"
    data = json.loads(record.read_text(encoding="utf-8"))
    assert data["plan"]["pinned"] == 3 * LAYERS
    assert data["config"]["plan"] == str(tmp_path / "x.plan.json")
    assert "12 experts pinned by the plan" in data["budget"]["explanation"]


def test_a_plan_for_another_model_exits_with_2(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_file(checkpoint, tmp_path, fingerprint="0" * 16)
    record = tmp_path / "run.json"
    result = run("generate", checkpoint, "-p", "x", "--plan", plan, "--json", "--run", record)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "PlanError"
    assert "x.plan.json: the plan is for" in result.stderr
    assert not record.exists()
    assert run("demo", "--plan", tmp_path / "absent", "--out-dir", tmp_path).exit_code == 2


def test_generate_samples_the_same_for_a_seed(checkpoint: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", 2, "--seed", seed, "-n", 12, "--json")
        text = json.loads(run("generate", checkpoint, "-p", "x", *options).stdout)["text"]
        assert isinstance(text, str)
        return text

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_generate_with_too_little(checkpoint: Path) -> None:
    result = run("generate", checkpoint, "-p", "x", "--expert-budget", 1000, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "BudgetError"
    assert "the least that works is" in result.stderr


def test_generate_with_an_unknown_policy(checkpoint: Path) -> None:
    result = run("generate", checkpoint, "-p", "x", "--policy", "magic")
    assert result.exit_code == 1
    assert "magic" in result.stderr
    assert "lru" in result.stderr


def test_interrupt_exits_with_130(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Any, value: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.TextStreamer.put", interrupt)
    result = run("generate", checkpoint, "-p", "x", "--expert-budget", BUDGET)
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


@pytest.fixture
def as_bundled(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo runs the tiny model."""
    module = importlib.import_module("moe_runtime.cli.demo")
    monkeypatch.setattr(module, "bundled_model", lambda: checkpoint)
    return checkpoint


@pytest.mark.usefixtures("as_bundled")
def test_demo_compares_every_token(tmp_path: Path) -> None:
    result = run("demo", "--out-dir", tmp_path / "out", "-n", 12, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["comparison"]["tokens"] == data["comparison"]["equal_tokens"] == 24
    assert data["comparison"]["max_abs_logit_difference"] == 0
    assert data["summary"]["over_belady"] > 1
    record = json.loads(Path(data["run"]).read_text(encoding="utf-8"))
    assert record["counters"]["rereads"] > 0
    assert [sample["prompt"] for sample in record["generated"]] == ["The State", "def f"]
    assert "Held, over time" in Path(data["report"]).read_text(encoding="utf-8")


@pytest.mark.usefixtures("as_bundled")
def test_demo_prints_the_outcome_first(tmp_path: Path) -> None:
    result = run("demo", "--out-dir", tmp_path, "-n", 4)
    assert result.exit_code == 0, result.stderr
    assert "tokens/s decode" in result.stdout.splitlines()[0]
    assert "all 8 tokens equal to plain transformers" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "run.json"}


def test_demo_says_where_tokens_differ(
    as_bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("moe_runtime.cli.demo")
    right = module._plain_answers

    def wrong(*arguments: Any) -> Any:
        answers = right(*arguments)
        answers[0].tokens[2] += 1
        return answers

    monkeypatch.setattr(module, "_plain_answers", wrong)
    result = run("demo", "--out-dir", tmp_path, "-n", 4, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)["comparison"]
    assert (data["equal_tokens"], data["tokens"]) == (6, 8)
    assert "differ" in result.stderr


def test_demo_without_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("moe_runtime.cli.demo")
    monkeypatch.setattr(module, "bundled_model", lambda: tmp_path)
    result = run("demo", "--out-dir", tmp_path / "out")
    assert result.exit_code == 1
    assert "prompts.json is missing" in result.stderr

"""Reports: what is refused, what the figures are, and that every kind of run renders."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.errors import MoERuntimeError
from moe_runtime.report import Counters, Report, RunError
from run_records import EXPERT_BYTES, run_record


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return run_record()


@pytest.fixture(scope="module")
def page(record: dict[str, Any]) -> str:
    return Report.from_run(record).to_html()


class Outline(html.parser.HTMLParser):
    """Tags that do not close in order, addresses that a browser would fetch, and the headings."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})
    ADDRESSES = frozenset({"src", "href", "xlink:href", "action", "data", "poster", "srcset"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.fetched: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.faults += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in self.ADDRESSES and not (value or "").startswith(("data:", "#")):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"h1", "h2", "h3"}:
            self.headings.append(data)


def without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    """The record, less what the names lead to."""
    changed = copy.deepcopy(record)
    place = changed
    for name in names[:-1]:
        place = place[name]
    del place[names[-1]]
    return changed


def with_value(record: dict[str, Any], value: Any, *names: str | int) -> dict[str, Any]:
    """The record, with what the names lead to replaced."""
    changed = copy.deepcopy(record)
    place: Any = changed
    for name in names[:-1]:
        place = place[name]
    place[names[-1]] = value
    return changed


def test_counters_are_attributes(record: dict[str, Any]) -> None:
    counters = Report.from_run(record).counters
    assert counters.hits == record["counters"]["hits"]
    assert counters.bytes_read == counters.misses * EXPERT_BYTES
    assert counters.uses == counters.hits + counters.misses
    assert counters.hit_rate == counters.hits / counters.uses
    assert isinstance(counters.decode_tokens, int)
    with pytest.raises(AttributeError):
        counters.hits = 1  # type: ignore[misc]


def test_runs_of_before_there_was_host_execution_are_read(record: dict[str, Any]) -> None:
    for name in ("hosted", "hosted_rows", "hosted_seconds"):
        del record["counters"][name]
    assert Report.from_run(record).counters.hosted == 0
    record["counters"]["hosted"] = 7
    assert Report.from_run(record).counters.hosted == 7


def test_no_uses_have_no_hit_rate() -> None:
    names = Counters.__dataclass_fields__
    assert Counters(**dict.fromkeys(names, 0)).hit_rate is None


def test_summary_is_of_the_record(record: dict[str, Any]) -> None:
    summary = Report.from_run(record).summary
    counters, steps = record["counters"], record["steps"]
    decoded = [
        number for number, phase in zip(steps["bytes"], steps["phase"], strict=True) if phase
    ]
    assert summary.decode_tokens_per_second == pytest.approx(
        counters["decode_tokens"] / counters["decode_seconds"]
    )
    assert summary.bytes_per_decode_token == sum(decoded) / len(decoded)
    assert summary.bytes_per_token == counters["bytes_read"] / counters["tokens"]
    assert summary.stall_share == counters["stall_seconds"] / counters["step_seconds"]
    assert summary.over_belady == counters["misses"] / record["simulation"]["belady"]["misses"]
    assert json.dumps(summary.to_dict(), allow_nan=False)


def test_record_is_kept_as_given(record: dict[str, Any]) -> None:
    given = copy.deepcopy(record)
    report = Report.from_run(given)
    given["counters"]["hits"] = -1
    first = report.to_dict()
    first["model"]["name"] = "changed"
    assert report.to_dict() == record


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (("format",), "safetensors", "not a run record.*'safetensors'"),
        (("version",), 2, "version 2; this release reads version 1"),
        (("counters",), [], "'counters' must be an object, found list"),
        (("counters", "hits"), "many", "counters.hits must be a number, found 'many'"),
        (("counters", "hits"), -1, "counters.hits must be finite and not negative"),
        (("counters", "hits"), 1.5, "counters.hits must be a whole number"),
        (("counters", "step_seconds"), float("nan"), "counters.step_seconds must be finite"),
        (("counters", "misses"), True, "counters.misses must be a number"),
        (("model", "layers"), [0, 0, 1, 2], "must be distinct"),
        (("model", "experts"), [16], "4 layers, 1 counts"),
        (("model", "experts"), "16", "model.experts must be a list of whole numbers"),
        (("layers", 2, "layer"), 99, r"layers\[2\] is of layer 99"),
        (("steps", "hits"), [1, 2], "columns of steps differ in length"),
        (("steps", "hits"), None, "steps.hits must be a list"),
        (("steps", "seconds"), ["slow"], "steps.seconds must hold numbers"),
        (("residency", "bitmaps", 1), "AA==", r"bitmaps\[1\] has 1 bytes, 64 experts need 8"),
        (("residency", "bitmaps", 1), "?", r"bitmaps\[1\] is not base64"),
        (("residency", "steps"), [1], "one text for each"),
        (("simulation", "lru"), {"hits": 1}, "simulation.lru.misses is missing"),
        (("plan",), [], "plan must be an object, found list"),
        (("plan",), {"pinned": 1, "pinned_bytes": 1}, "plan.layers must be a list"),
        (("plan",), {"layers": [], "pinned": -1}, "plan.pinned must be finite and not negative"),
        (("plan",), {"layers": [3]}, r"plan.layers\[0\] must be an object, found int"),
        (("plan",), {"layers": [{"layer": 9, "pinned": 1}]}, r"plan.layers\[0\] is of layer 9"),
        (
            ("plan",),
            {"layers": [{"layer": 1, "pinned": 1, "observed_share": 1.5}]},
            r"plan.layers\[0\].observed_share must be a share of 0 to 1, found 1.5",
        ),
    ],
)
def test_damaged_records_are_refused(
    record: dict[str, Any], names: tuple[str | int, ...], value: Any, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        Report.from_run(with_value(record, value, *names))


@pytest.mark.parametrize("name", ["model", "config", "budget", "machine", "counters"])
def test_missing_sections_are_named(record: dict[str, Any], name: str) -> None:
    with pytest.raises(RunError, match=f"'{name}' must be an object, it is missing"):
        Report.from_run(without(record, name))


@pytest.mark.parametrize(
    "name",
    sorted(n for n, f in Counters.__dataclass_fields__.items() if f.default is dataclasses.MISSING),
)
def test_missing_counters_are_named(record: dict[str, Any], name: str) -> None:
    with pytest.raises(RunError, match=f"counters.{name} is missing"):
        Report.from_run(without(record, "counters", name))


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_other_data_is_no_record(data: Any) -> None:
    with pytest.raises(RunError, match="a run record is a JSON object"):
        Report.from_run(data)


def test_errors_are_ours() -> None:
    assert issubclass(RunError, MoERuntimeError)
    assert issubclass(RunError, ValueError)


def test_text_is_short_and_begins_with_the_outcome(record: dict[str, Any]) -> None:
    report = Report.from_run(record)
    lines = str(report).splitlines()
    assert 10 <= len(lines) <= 20
    assert lines[0] == report.outcome
    assert "tokens/s decode" in lines[0]
    assert f"{100 * report.counters.hits / report.counters.uses:.1f} % hits" in lines[0]
    assert "\x1b" not in str(report)
    assert any("all 40 tokens equal to plain transformers (eager)" in line for line in lines)


def test_unequal_tokens_are_said_plainly(record: dict[str, Any]) -> None:
    report = Report.from_run(with_value(record, 31, "comparison", "equal_tokens"))
    assert "only 31 of 40 tokens equal" in str(report)
    assert 'class="verdict off"' in report.to_html()


def test_page_is_whole_and_fetches_nothing(page: str) -> None:
    outline = Outline(page)
    assert not outline.faults
    assert not outline.fetched
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page


def test_page_shows_every_part(page: str) -> None:
    headings = Outline(page).headings
    for heading in (
        "tiny <moe>",
        "Misses a step",
        "Read so far",
        "Latency a step",
        "Hit rate by layer",
        "Eviction policies on this run's routing",
        "Held, by expert",
        "Held, over time",
        "Generated",
        "Configuration",
        "Machine",
    ):
        assert heading in headings
    assert page.count("<svg") == 6
    assert "Belady&#39;s optimum" in page
    assert "16 slots of 64 experts" in page


def test_page_escapes_what_the_model_wrote(page: str) -> None:
    assert "&lt;think&gt;" in page
    assert "<think>" not in page
    assert "<moe>" not in page


def test_figures_follow_the_page_into_the_dark(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for figure in figures:
        assert "var(--" in figure
        assert "#010a" not in figure
        assert "#000000" not in figure


def test_same_record_same_page(record: dict[str, Any], page: str) -> None:
    assert Report.from_run(record).to_html() == page


def test_a_miss_more_is_seen(record: dict[str, Any], page: str) -> None:
    changed = with_value(record, record["counters"]["misses"] + 1, "counters", "misses")
    assert Report.from_run(changed).to_html() != page


def with_plan(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run with a plan: nothing predicted for layer 3, which was not used."""
    layers = [
        {"layer": at, "pinned": 2 + at, "predicted_share": 0.1 * at, "observed_share": 0.125}
        for at in range(3)
    ]
    layers.append({"layer": 3, "pinned": 1, "predicted_share": None, "observed_share": None})
    plan = {
        "name": "heat <1>.plan.json",
        "pinned": 10,
        "pinned_bytes": 10 * EXPERT_BYTES,
        "predicted_share": 0.4375,
        "observed_share": 0.40625,
        "layers": layers,
    }
    return with_value(record, plan, "plan")


def test_predicted_stands_beside_observed(record: dict[str, Any], page: str) -> None:
    report = Report.from_run(with_plan(record))
    line = next(line for line in str(report).splitlines() if line.strip().startswith("plan"))
    assert "10 experts pinned (960 KiB) by heat <1>.plan.json" in line
    assert "predicted to serve 43.8 % of the uses, served 40.6 %" in line
    shown = report.to_html()
    assert not Outline(shown).faults
    assert "The plan's experts" in Outline(shown).headings
    assert shown.count("<svg") == page.count("<svg") + 1
    assert "#010a" not in shown
    assert "heat &lt;1&gt;.plan.json keeps 10 experts" in shown
    for cell in ("43.8 %", "40.6 %", "\N{MINUS SIGN}3.1", "+12.5", "\N{MINUS SIGN}7.5"):
        assert f"<td>{cell}</td>" in shown
    assert report.to_dict() == with_plan(record)


def test_a_plan_that_predicts_nothing_and_a_run_that_used_nothing_render(
    record: dict[str, Any],
) -> None:
    bare = {"name": "", "pinned": 0, "pinned_bytes": 0, "layers": []}
    report = Report.from_run(with_value(record, bare, "plan"))
    assert not Outline(report.to_html()).faults
    assert "by unnamed plan" in str(report)


ODD_RUNS = {
    "no steps": {"steps": 0, "snapshots": 1},
    "one step": {"steps": 1},
    "only prefill": {"steps": 3, "prompts": 3},
    "one layer": {"layers": 1, "experts": 4, "slots": 2},
    "one expert": {"layers": 1, "experts": 1, "top_k": 1, "slots": 1},
    "everything fits": {"slots": 64},
    "six thousand experts": {"layers": 48, "experts": 128, "top_k": 8, "slots": 1536, "steps": 6},
    "many steps": {"layers": 2, "steps": 3000},
}


@pytest.mark.parametrize("kind", ODD_RUNS)
def test_odd_runs_render(kind: str) -> None:
    report = Report.from_run(run_record(**ODD_RUNS[kind]))
    assert str(report)
    page = report.to_html()
    outline = Outline(page)
    assert not outline.faults
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", page))
    assert len(page) < 1_000_000


@pytest.mark.parametrize(
    "name", ["layers", "steps", "residency", "memory", "simulation", "comparison", "generated"]
)
def test_sections_may_be_left_out(record: dict[str, Any], name: str) -> None:
    report = Report.from_run(without(record, name))
    assert not Outline(report.to_html()).faults
    assert str(report) == str(Report.from_run(with_value(record, None, name)))


def test_bare_record_renders(record: dict[str, Any]) -> None:
    bare = {name: record[name] for name in ("format", "version", "counters")}
    bare |= {"config": {}, "budget": {}, "machine": {}, "model": {"layers": [], "experts": []}}
    report = Report.from_run(bare)
    assert str(report)
    assert "No snapshot was taken" in report.to_html()


def test_save_and_load(record: dict[str, Any], tmp_path: Path) -> None:
    report = Report.from_run(record)
    saved = report.save(tmp_path / "run.json")
    assert Report.load(saved).to_dict() == record
    page = report.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run.json"]


def test_save_wants_a_known_name(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"saved as \.html or \.json"):
        Report.from_run(record).save(tmp_path / "report.pdf")
    assert not list(tmp_path.iterdir())


def test_failed_save_leaves_the_old_file(record: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    target.write_text("old")
    with pytest.raises(RunError, match="not plain JSON"):
        Report.from_run({**record, "extra": float("nan")}).save(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "object"), ("{}", "not a run record")]
)
def test_load_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(RunError, match=rf"broken\.json.*{message}"):
        Report.load(path)


IMPORTS = [
    "import moe_runtime; from moe_runtime.report import Report",
    "from moe_runtime.report import Report; import moe_runtime",
]


@pytest.mark.parametrize("order", IMPORTS)
def test_package_and_function_share_a_name(order: str) -> None:
    check = (
        "assert callable(moe_runtime.report), moe_runtime.report\n"
        "assert Report.__module__ == 'moe_runtime.report.report'\n"
        "from moe_runtime.report import Counters\n"
        "assert callable(moe_runtime.report)"
    )
    subprocess.run([sys.executable, "-P", "-c", f"{order}\n{check}"], check=True)

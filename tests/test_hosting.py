"""Missing experts computed on the host: the choice, the thread, the same results, the overlap."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from moe_runtime.kernels import ExpertForm, Gate, expert_mlp
from transformers import PreTrainedModel

import later_device
import moe_runtime
from later_device import LaterDevice
from moe_runtime import host_experts, slot_layers
from moe_runtime.config import RuntimeConfig
from moe_runtime.errors import ConfigError
from moe_runtime.host_experts import HostExpert, HostExperts
from moe_runtime.hosting import Hosting, Miss, make_hosting
from moe_runtime.runtime import Runtime, runtime_of
from profiles import gpu_profile, host_profile
from tiny import HIDDEN, LAYERS, VOCAB, TinyCheckpoints, tiny_model

GATE = Gate()
FORM = ExpertForm(
    up=0, down=1, up_bias=None, down_bias=None, transposed=False, activation=GATE, gate=GATE
)
MB = 1 << 20


# -- the choice ------------------------------------------------------------------------------------


def misses(*tokens: int, nbytes: int = 9 * MB) -> list[Miss]:
    return [Miss(expert=i, tokens=count, nbytes=nbytes) for i, count in enumerate(tokens)]


def test_modes() -> None:
    device = "cuda:0"
    assert make_hosting("never", gpu_profile(), device) is None
    assert make_hosting("auto", None, device) is None
    assert make_hosting("auto", host_profile(), device) is None  # it knows no link
    assert make_hosting("auto", gpu_profile(), device) == Hosting(
        device=device, profile=gpu_profile()
    )
    always = make_hosting("always", None, device)
    assert always is not None
    assert always.choose(misses(1, 500), residents=[], row_bytes=4096, link_bytes=0) == [0, 1]
    with pytest.raises(ConfigError, match="host_execution must be 'auto', 'never' or 'always'"):
        RuntimeConfig(host_execution="sometimes")


def test_the_sooner_place_is_chosen() -> None:
    """25 GB/s and 1 ms on the host: a byte-heavy expert stays there, a small one is fetched."""
    hosting = Hosting(device="cuda:0", profile=gpu_profile())
    shape = gpu_profile().expert.nbytes
    common: dict[str, Any] = {"residents": [1], "row_bytes": 4096}
    free = hosting.choose(misses(1, nbytes=shape), link_bytes=0, **common)
    assert free == []  # the link takes 9.4 MB in .4 ms, the host computes it in 1 ms
    busy = hosting.choose(misses(1, nbytes=shape), link_bytes=100 * MB, **common)
    assert busy == [0]  # behind 4 ms of copies the host is sooner
    both = hosting.choose(misses(*[1] * 6, nbytes=shape), link_bytes=0, **common)
    assert 0 < len(both) < 6  # both work
    assert hosting.choose([], link_bytes=0, **common) == []
    paged = [Miss(expert=3, tokens=1, nbytes=shape, pinned=False)]
    assert hosting.choose(paged, link_bytes=0, **common) == [3]  # 6 GB/s take 1.6 ms
    assert hosting.choose(misses(1, nbytes=shape), link_bytes=0, **common) == []


def test_what_is_fetched_stays_which_is_worth_something() -> None:
    """The link needs 1.2 ms, the host 1 ms: too little the sooner."""
    hosting = Hosting(device="cuda:0", profile=gpu_profile())
    shape = gpu_profile().expert.nbytes
    behind = 18 * MB  # on their way
    alike = hosting.choose(misses(1, nbytes=shape), residents=[], row_bytes=4096, link_bytes=behind)
    more = hosting.choose(
        misses(1, nbytes=shape), residents=[], row_bytes=4096, link_bytes=2 * behind
    )
    assert (alike, more) == ([], [0])


def test_many_misses_are_shared_out() -> None:
    """A prompt's: those of few rows stay on the host, which grows slow with their number."""
    hosting = Hosting(device="cuda:0", profile=gpu_profile())
    given = misses(*[1 + 4 * (number % 5) for number in range(100)], nbytes=9 * MB)
    chosen = hosting.choose(given, residents=[4] * 28, row_bytes=4096, link_bytes=0)
    assert 0 < len(chosen) < 100
    rows = {miss.expert: miss.tokens for miss in given}
    fetched = set(rows) - set(chosen)
    assert max(rows[e] for e in chosen) <= min(rows[e] for e in fetched)
    assert chosen == hosting.choose(given, residents=[4] * 28, row_bytes=4096, link_bytes=0)


# -- the thread ------------------------------------------------------------------------------------


def experts(count: int, rows: int) -> list[HostExpert]:
    generator = torch.Generator().manual_seed(count)
    return [
        HostExpert(
            tensors=(
                torch.randn(32, 16, generator=generator),
                torch.randn(16, 16, generator=generator),
            ),
            rows=torch.randperm(rows, generator=generator)[: 1 + number % rows],
        )
        for number in range(count)
    ]


def test_outputs_come_expert_by_expert() -> None:
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    work = experts(4, 5)
    host = HostExperts(threads=1)
    batches = [host.submit(work, FORM, lambda: hidden) for _ in range(3)]
    wanted = torch.cat([expert_mlp(hidden[one.rows], one.tensors, FORM) for one in work])
    for batch in batches:
        assert torch.equal(batch.outputs(), wanted)
        assert batch.seconds > 0
    thread = host._thread
    assert thread is not None
    assert thread.is_alive()
    host.close()
    assert not thread.is_alive()
    host.close()


def test_an_error_comes_to_whoever_wants_the_outputs_and_the_thread_goes_on() -> None:
    host = HostExperts(threads=1)
    hidden = torch.randn(5, 16)
    bad = HostExpert(tensors=(torch.randn(3, 3), torch.randn(3, 3)), rows=torch.tensor([0]))
    broken = host.submit([bad], FORM, lambda: hidden)
    good = host.submit(experts(1, 5), FORM, lambda: hidden)
    with pytest.raises(RuntimeError):
        broken.outputs()
    assert len(good.outputs()) == 1
    host.close()


def test_what_is_dropped_is_not_computed() -> None:
    host = HostExperts(threads=1)
    begun, go = threading.Event(), threading.Event()

    def slow() -> torch.Tensor:
        begun.set()
        go.wait()
        return torch.randn(5, 16)

    batch = host.submit(experts(2, 5), FORM, slow)
    begun.wait()
    batch.drop()
    go.set()
    batch.wait()
    assert batch.seconds == 0
    host.close()


# -- in the runtime --------------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LaterDevice:
    return later_device.install(monkeypatch)


def attached(
    budget: str = "30%", kernel: str = "plain", **options: Any
) -> tuple[PreTrainedModel, Runtime]:
    model = moe_runtime.attach(
        tiny_model(), expert_budget=budget, device="cuda", hardware=None, **options
    )
    runtime = runtime_of(model)
    runtime.executor.slots.kernel = kernel
    return model, runtime


def logits(model: PreTrainedModel) -> list[torch.Tensor]:
    """Of a prefill of 12 tokens, with padding, and of five decoded ones."""
    ids = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    result = model.generate(  # type: ignore[operator]
        input_ids=ids * mask, attention_mask=mask, max_new_tokens=5, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return [*result.logits, result.sequences]


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@dataclass(frozen=True, kw_only=True)
class Some(Hosting):
    """Every miss of an odd number is computed on the host."""

    def choose(self, misses: Sequence[Miss], **_: Any) -> list[int]:
        return [miss.expert for miss in misses if miss.expert % 2]


ODD = Some(device="cuda:0", profile=None)


@pytest.mark.parametrize("hosting", ["never", "always", "odd"])
@pytest.mark.parametrize("budget", ["25%", "60%"])
def test_results_do_not_depend_on_the_place(device: LaterDevice, hosting: str, budget: str) -> None:
    expected = logits(tiny_model())
    found = []
    for _ in range(2):
        model, runtime = attached(budget, host_execution="never" if hosting == "odd" else hosting)
        if hosting == "odd":
            runtime.executor.slots.hosting = ODD
        found.append(logits(model))
        runtime.check_integrity()
    assert same(*found)  # the same decisions, the same bits
    for one, other in zip(found[0], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    assert device.faults == []
    counters = moe_runtime.report(model).counters
    assert counters.misses > 0
    assert counters.hosted_rows >= counters.hosted
    assert (counters.hosted == 0) == (hosting == "never")
    if hosting == "always":
        assert counters.hosted == counters.misses
        assert counters.hosted_seconds > 0
    assert (
        sum(layer["hosted"] for layer in moe_runtime.report(model).to_dict()["layers"])
        == counters.hosted
    )


def test_what_is_often_computed_on_the_host_becomes_resident(device: LaterDevice) -> None:
    model, runtime = attached("25%", host_execution="always")
    before = set(runtime.cache.residents().tolist())
    logits(model)
    after = set(runtime.cache.residents().tolist())
    assert after - before
    assert moe_runtime.report(model).counters.host_bytes > 0
    assert moe_runtime.report(model).counters.hits > 0


def test_what_the_policy_would_have_leave_first_is_not_brought_in(device: LaterDevice) -> None:
    counts = [1 if expert < 4 else 0 for expert in range(16)] * LAYERS
    model, runtime = attached(
        "25%", host_execution="always", policy="static", policy_options={"counts": counts}
    )
    with torch.no_grad():
        runtime.executor.preload([[0, 1, 2, 3]] * LAYERS)
    logits(model)
    assert runtime.cache.residents().tolist() == [
        16 * layer + expert for layer in range(LAYERS) for expert in range(4)
    ]
    assert moe_runtime.report(model).counters.hosted > 0


def test_nothing_comes_behind_where_something_was_fetched(
    device: LaterDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runtime = attached("25%", host_execution="never")
    loader = runtime.executor.loader
    alone: list[bool] = []
    behind: list[int] = []

    def choose(misses: Sequence[Miss], **named: Any) -> list[int]:
        chosen = ODD.choose(misses, **named)
        if chosen:
            alone.append(len(chosen) == len(misses))
        return chosen

    bring = loader.bring_behind
    monkeypatch.setattr(
        loader, "bring_behind", lambda *where: behind.append(len(alone)) or bring(*where)
    )
    runtime.executor.slots.hosting = Asked(device="cuda:0", profile=None, ask=choose)
    logits(model)
    assert set(alone) == {True, False}
    assert behind == [at for at, one in enumerate(alone, 1) if one]


@dataclass(frozen=True, kw_only=True)
class Asked(Hosting):
    """A function decides."""

    ask: Any

    def choose(self, misses: Sequence[Miss], **named: Any) -> list[int]:
        chosen: list[int] = self.ask(misses, **named)
        return chosen


@dataclass(frozen=True, kw_only=True)
class Watching(Hosting):
    """All misses go to the host; it notes what it is told of the link."""

    told: list[int] = field(default_factory=list)

    def choose(self, misses: Sequence[Miss], *, link_bytes: int, **_: Any) -> list[int]:
        self.told.append(link_bytes)
        return [miss.expert for miss in misses]


def test_copies_that_the_device_has_not_done_count_as_business_of_the_link(
    device: LaterDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(_: LaterDevice, token: Any) -> bool:
        token.asked += 1
        return bool(token.asked > 5)

    monkeypatch.setattr(LaterDevice, "done", slow)
    model, runtime = attached("25%", host_execution="always")
    watching = Watching(device="cuda:0", profile=None)
    runtime.executor.slots.hosting = watching
    logits(model)
    each = runtime.spec.layers[0].expert_bytes
    assert set(watching.told) == {0, each}  # one at a time is brought in behind
    assert device.faults == []


def test_what_is_on_disk_only_is_fetched(
    tiny_checkpoints: TinyCheckpoints, device: LaterDevice
) -> None:
    model = moe_runtime.from_pretrained(
        tiny_checkpoints.per_expert, expert_budget="25%", host_budget="70%", device="cuda",
        host_execution="always", hardware=None,
    )  # fmt: skip
    runtime = runtime_of(model)
    runtime.executor.slots.kernel = "plain"
    expected = logits(tiny_model())
    for one, other in zip(logits(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    counters = moe_runtime.report(model).counters
    assert 0 < counters.hosted < counters.misses
    assert counters.bytes_read > 0
    assert device.faults == []
    runtime.check_integrity()


def test_exact_keeps_every_expert_on_the_device(device: LaterDevice) -> None:
    model, runtime = attached(host_execution="always", exact=True)
    logits(model)
    assert runtime.executor.slots.hosting is None
    assert moe_runtime.report(model).counters.hosted == 0


def test_the_host_waits_for_the_device_once_a_layer_and_never_where_all_is_resident(
    device: LaterDevice,
) -> None:
    ids = torch.randint(1, VOCAB, (1, 3), generator=torch.Generator().manual_seed(4))
    for budget, waits in (("40%", LAYERS), ("100%", 0)):
        model, _ = attached(budget, host_execution="never")
        with torch.no_grad():
            model(ids)
            device.finishes = 0
            model(ids)
        assert device.finishes == waits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda", "exact": True}, "exact=True computes every expert on the device"),
        ({"device": "cpu"}, "computes on the host anyway"),
    ],
)
def test_an_option_that_changes_nothing_is_said(
    device: LaterDevice, caplog: pytest.LogCaptureFixture, options: dict[str, Any], said: str
) -> None:
    if options["device"] == "cpu":
        device.is_cpu = True
    moe_runtime.attach(tiny_model(), expert_budget="50%", host_execution="always", **options)
    assert caplog.text.count(said) == 1


class BrokenError(RuntimeError):
    pass


@pytest.mark.parametrize("error", [BrokenError("no memory"), KeyboardInterrupt()])
def test_a_failure_on_the_host_leaves_the_cache_whole(
    device: LaterDevice, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model, runtime = attached(host_execution="always")
    wanted = logits(model)
    calls = itertools.count()

    def failing(*arguments: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise error
        return expert_mlp(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(host_experts, "expert_mlp", failing)
        with pytest.raises(type(error)):
            logits(model)
    runtime.check_integrity()
    for one, other in zip(logits(model), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    runtime.check_integrity()


def test_a_failure_while_the_host_computes_waits_for_it(
    device: LaterDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runtime = attached(host_execution="always")
    ended: list[int] = []
    run = host_experts.HostBatch.run

    def counted(batch: Any) -> None:
        run(batch)
        ended.append(1)

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise BrokenError("no more memory on the device")

    with monkeypatch.context() as patched:
        patched.setattr(host_experts.HostBatch, "run", counted)
        patched.setattr(slot_layers.SlotLayers, "_merged", broken)
        with pytest.raises(BrokenError):
            logits(model)
    assert ended
    runtime.check_integrity()


# -- overlap ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Timeline:
    """A device, a link and a host whose work takes stated seconds, in times that are reckoned.

    Each works on one thing after another; what waits for what moves the times on, as streams and
    events would. `now` is the time of the program on the host, which moves on where it waits.
    """

    torch_device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_cpu: bool = False
    link_rate: float = 25e9
    way_back: float = 20e-6
    an_expert: float = 100e-6  # on the device
    a_host_expert: float = 400e-6
    now: float = 0.0
    stream: float = 0.0
    link: float = 0.0
    host: float = 0.0
    work: dict[str, float] = field(
        default_factory=lambda: {"link": 0.0, "device": 0.0, "host": 0.0}
    )
    nbytes: int = 0  # of an expert, as the link sees it

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(max(nbytes, 1), dtype=torch.uint8)

    allocate_host = allocate

    def fence(self) -> float:
        return self.stream

    def copy(self, pairs: Any, after: float, *, ahead: bool = False) -> float:
        for target, source in pairs:
            target.copy_(source)
        taken = self.nbytes / self.link_rate
        # Its slot is read by what runs on the device until `after`.
        self.link = max(self.link, self.now, after) + taken
        self.work["link"] += 0.0 if ahead else taken
        return self.link

    def to_host(self, tensor: torch.Tensor, after: float) -> tuple[torch.Tensor, float]:
        return tensor.clone(), max(self.now, after) + self.way_back

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def done(self, token: float | None) -> bool:
        return token is None or token <= self.now

    def wait(self, token: float | None) -> None:
        self.stream = max(self.stream, token or 0.0)

    def finish(self, token: float | None) -> None:
        self.now = max(self.now, token or 0.0)

    def compute(self, slots: torch.Tensor) -> None:
        count = len(set(slots[slots >= 0].tolist()))
        self.stream = max(self.stream, self.now) + count * self.an_expert
        self.work["device"] += count * self.an_expert


class ReckonedHost:
    """`HostExperts` on a timeline: computed at once, taking its time there."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline

    def submit(self, work: Sequence[HostExpert], form: ExpertForm, hidden: Any) -> Any:
        timeline, program = self.timeline, self.timeline.now
        rows = hidden()  # the thread waits for them, the program does not
        begins, timeline.now = timeline.now, program
        batch = host_experts.HostBatch(work, form, lambda: rows)
        batch.run()
        taken = len(work) * timeline.a_host_expert
        timeline.host = max(timeline.host, begins) + taken
        timeline.work["host"] += taken
        end, outputs = timeline.host, batch.outputs

        def waited() -> torch.Tensor:
            timeline.now = max(timeline.now, end)
            timeline.stream = max(timeline.stream, timeline.now)
            return outputs()

        batch.outputs = waited  # type: ignore[method-assign]
        return batch

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class FirstOnes(Hosting):
    """So many of the misses go to the host."""

    count: int = 0

    def choose(self, misses: Sequence[Miss], **_: Any) -> list[int]:
        return [miss.expert for miss in misses[: self.count]]


@pytest.mark.parametrize("longest", ["link", "device", "host"])
def test_link_host_and_device_work_at_once(monkeypatch: pytest.MonkeyPatch, longest: str) -> None:
    timeline = Timeline()
    monkeypatch.setattr("moe_runtime.lifecycle.open_device", lambda name: timeline)
    model, runtime = attached("20%")  # 12 slots
    slots = runtime.executor.slots
    contributions = slot_layers.contributions

    def timed(hidden: Any, given: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        timeline.compute(given)
        return contributions(hidden, given, *arguments, **named)

    monkeypatch.setattr(slot_layers, "contributions", timed)
    slots._host = ReckonedHost(timeline)  # type: ignore[assignment]
    # Each step asks for 10 of 16 experts; two of the misses go to the host.
    timeline.nbytes = {"link": 20, "device": 8, "host": 4}[longest] * MB
    timeline.an_expert = {"link": 20e-6, "device": 2e-3, "host": 20e-6}[longest]
    timeline.a_host_expert = {"link": 200e-6, "device": 1e-3, "host": 4e-3}[longest]
    slots.hosting = FirstOnes(device="cuda:0", profile=None, count=2)
    hidden = torch.randn(24, HIDDEN, generator=torch.Generator().manual_seed(8))
    module = model.get_submodule("model.layers.1.mlp.experts")
    total = 0.0
    timeline.work.update(link=0.0, device=0.0, host=0.0)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        some = torch.randperm(16, generator=generator)[:10]
        ids = torch.stack([some[torch.randperm(10, generator=generator)[:4]] for _ in range(24)])
        weights = torch.rand(24, 4, generator=generator)
        # What the layer before had: all idle.
        start = max(timeline.now, timeline.stream, timeline.link, timeline.host)
        timeline.now = timeline.stream = timeline.link = timeline.host = start
        with torch.no_grad():
            module(hidden, ids, weights)
        total += max(timeline.now, timeline.stream) - start
    work = timeline.work
    assert max(work, key=work.__getitem__) == longest
    assert min(work.values()) > 0.02 * work[longest]  # the others had something to do
    assert total <= 1.1 * work[longest]

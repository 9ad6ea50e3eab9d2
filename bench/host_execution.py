"""Where missing experts are computed, on the shared traces in modelled time: what each rule gives.

Nothing is computed or moved: the runtime's own cache, policy and `choose_place` run on a clock. The
times of link, host and device are stated below, not measured. Decode only, cold cache, one pool of
slots over all layers, every expert taken to be as large as Qwen3-30B-A3B's. Run:

    python bench/host_execution.py                # to bench/results/host_execution.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console

from moe_runtime.access import Access
from moe_runtime.cache import ExpertCache
from moe_runtime.core import ExpertGrid
from moe_runtime.eviction import make_policy
from moe_runtime.places import Busy, MissCost, choose_place
from moe_runtime.version import __version__
from peers.machine import describe_machine
from policies import recordings
from shared_traces import TRACE_NAMES

RESULTS = Path(__file__).parent / "results" / "host_execution.json"
SHARES = (0.125, 0.25, 0.5)
SAY = Console(stderr=True, highlight=False)
Choice = Callable[[int, Busy, MissCost], int]  # misses, busy, cost of each -> so many on the host


@dataclass(frozen=True, kw_only=True)
class Times:
    """Stated speeds: bytes a second and seconds.

    Args:
        link, host, device: at which an expert's weights are copied, or streamed by a product.
        latency: of one copy; rows to the host and back take two.
        dense: of a layer beside its experts, in which the link is free for what is behind.
    """

    expert_bytes: int = 3 * 2048 * 768 * 2
    link: float = 25e9
    host: float = 40e9
    device: float = 1e12
    latency: float = 10e-6
    dense: float = 100e-6

    @property
    def miss(self) -> MissCost:
        return MissCost(
            fetch=self.latency + self.expert_bytes / self.link,
            device=self.expert_bytes / self.device,
            host=2 * self.latency + self.expert_bytes / self.host,
        )


CASES = {"host 40 GB/s": Times(), "host 15 GB/s": Times(host=15e9)}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How misses are placed.

    Args:
        choose: so many of them go to the host.
        behind: of those, so many at most are brought in after the layer.
        idle: only after a layer for which nothing was fetched.
    """

    choose: Choice
    behind: int
    idle: bool = False


def none(*_: Any) -> int:
    return 0


def every(count: int, *_: Any) -> int:
    return count


def sooner(count: int, busy: Busy, cost: MissCost) -> int:
    return len(choose_place([cost] * count, busy).host)


def worth(factor: float) -> Choice:
    """Fetching is worth more than its time: the host's seconds count so many times."""

    def choose(count: int, busy: Busy, cost: MissCost) -> int:
        dearer = MissCost(fetch=cost.fetch, device=cost.device, host=factor * cost.host)
        return len(choose_place([dearer] * count, busy).host)

    return choose


RUNTIME = "choose_place, host 1.25 times as dear, one behind if none was fetched"
RULES = {
    "fetch all": Rule(choose=none, behind=0),
    "choose_place": Rule(choose=sooner, behind=0),
    "choose_place, one behind": Rule(choose=sooner, behind=1),
    "choose_place, all behind": Rule(choose=sooner, behind=1 << 30),
    "choose_place, one behind if none was fetched": Rule(choose=sooner, behind=1, idle=True),
    "choose_place, host 1.25 times as dear": Rule(choose=worth(1.25), behind=0),
    "choose_place, host twice as dear": Rule(choose=worth(2.0), behind=0),
    RUNTIME: Rule(choose=worth(1.25), behind=1, idle=True),
    "host all, one behind": Rule(choose=every, behind=1),
}


@dataclass(eq=False)
class Clocked:
    """A run in modelled time."""

    grid: ExpertGrid
    slots: int
    rule: Rule
    times: Times
    now: float = 0.0
    link_free: float = 0.0
    steps: int = 0
    hosted: int = 0
    fetched: int = 0
    behind: int = 0
    coming: dict[tuple[int, int], float] = field(default_factory=dict)  # behind -> when it is there

    def __post_init__(self) -> None:
        self.cache = ExpertCache(
            self.grid, [0] * len(self.grid.layers), [self.slots], make_policy("lru", self.grid)
        )

    def layer(self, access: Access) -> None:
        """One layer step, as `SlotLayers.arriving` runs it."""
        cache, cost, position = self.cache, self.times.miss, access.position
        self.now += self.times.dense
        for (at, expert), end in list(self.coming.items()):
            if end <= self.now:
                cache.settle_ahead(at, expert)
                del self.coming[at, expert]
        hits, late, misses = cache.request(access)
        free = max(self.link_free, self.now)
        busy = Busy(link=free - self.now, device=len(hits) * cost.device)
        count = self.rule.choose(len(misses), busy, cost) if misses else 0
        hosted, fetched = misses[:count], misses[count:]
        device = self.now + busy.device
        for expert in late:
            device = max(device, self.coming.pop((position, expert))) + cost.device
            cache.commit(position, expert)
        granted = cache.grant(position, fetched)
        assert granted == fetched, "there is a slot for every expert of one token"
        for expert in fetched:
            free += cost.fetch
            device = max(device, free) + cost.device
            cache.commit(position, expert)
        self.now = max(device, self.now + len(hosted) * cost.host)
        if fetched:
            self.link_free = free
        cache.release(position, [*hits, *late, *fetched])
        if not (self.rule.idle and fetched):
            self._bring_behind(position, hosted)
        self.steps += 1
        self.hosted += len(hosted)
        self.fetched += len(fetched)

    def _bring_behind(self, position: int, hosted: list[int]) -> None:
        if self.coming:  # the link is not idle
            return
        for expert in hosted[: self.rule.behind]:
            if not self.cache.load_ahead(position, expert):
                return
            # Its slot may be read until the layer ends.
            self.link_free = max(self.link_free, self.now) + self.times.miss.fetch
            self.coming[position, expert] = self.link_free
            self.behind += 1


def measured(share: float, rule: Rule, times: Times, runs: list[Any]) -> dict[str, Any]:
    """Milliseconds a layer and what became of the misses, over the runs of a model."""
    totals = dict.fromkeys(("seconds", "steps", "misses", "hosted", "fetched", "behind"), 0.0)
    uses = 0
    for run in runs:
        clocked = Clocked(run.grid, run.slots(share), rule, times)
        for access in run.decoded:
            clocked.layer(access)
            uses += len(access.experts)
        clocked.cache.check_integrity()
        totals["seconds"] += clocked.now
        totals["misses"] += int(clocked.cache.counters.misses.sum())
        for name in ("steps", "hosted", "fetched", "behind"):
            totals[name] += getattr(clocked, name)
    return {
        "modelled_ms_per_layer": round(1e3 * totals["seconds"] / totals["steps"], 4),
        "hit_rate": round(1 - totals["misses"] / uses, 4),
        **{name: round(totals[name] / uses, 4) for name in ("hosted", "fetched", "behind")},
    }


def decision_cost(*, thorough: bool) -> dict[str, float]:
    """Measured, not modelled: microseconds that `choose_place` takes here, median of calls."""
    cost, found = Times().miss, {}
    for count in (1, 2, 4, 8, 9, 16, 32, 64, 128):
        # Prefill has experts with many and with few rows.
        mixed = [MissCost(fetch=cost.fetch, device=cost.device, host=cost.host * (1 + i % 7))
                 for i in range(count)]  # fmt: skip
        taken = []
        for _ in range(15):
            begin = time.perf_counter()
            choose_place(mixed, Busy(device=1e-4), thorough=thorough)
            taken.append(time.perf_counter() - begin)
        found[str(count)] = round(1e6 * float(np.median(taken)), 1)
    return found


def modelled(folder: Path, layer_steps: int) -> dict[str, Any]:
    """Each case's rules at each share, with the mean over models of the speed over fetching all."""
    data = recordings(folder)
    for runs in data.values():
        for run in runs:
            del run.decoded[layer_steps:]
    table: dict[str, Any] = {}
    for case, times in CASES.items():
        table[case] = {"times": asdict(times), "costs": asdict(times.miss), "shares": {}}
        for share in SHARES:
            rows = table[case]["shares"][str(share)] = {}
            for label, rule in RULES.items():
                each = {name: measured(share, rule, times, data[name]) for name in TRACE_NAMES}
                base = rows.get("fetch all", {}).get("traces", each)
                name = "modelled_ms_per_layer"
                speeds = [base[model][name] / each[model][name] for model in each]
                rows[label] = {
                    "mean_speed_over_fetch_all": round(fmean(speeds), 4),
                    "least_speed_over_fetch_all": round(min(speeds), 4),
                    "traces": each,
                }
                SAY.print(case, share, label, rows[label]["mean_speed_over_fetch_all"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, default=Path("/work/shared/traces"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--layer-steps", type=int, default=20_000, help="of each run, at most")
    parser.add_argument("--cost-only", action="store_true", help="choose_place only")
    options = parser.parse_args()
    if options.cost_only:
        result = json.loads(options.out.read_text())
    else:
        result = {
            "what": "modelled: routing is real, seconds follow from the stated times, deciding "
            "takes none; no GPU was used",
            "cases": modelled(options.traces, options.layer_steps),
            "layer_steps_of_each_run_at_most": options.layer_steps,
            "policy": "lru",
            "runtime": RUNTIME,
        }
    result |= {
        "choose_place_microseconds_measured_here": {
            "thorough": decision_cost(thorough=True),
            "as the runtime asks": decision_cost(thorough=False),
        },
        "machine": describe_machine(),
        "version": __version__,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

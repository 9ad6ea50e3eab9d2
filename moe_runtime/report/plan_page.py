"""A plan as one HTML page: what the template is given.

Does not know how figures are drawn nor how numbers were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_runtime.core import FloatArray
from moe_runtime.placement.plan import Plan
from moe_runtime.report import plan_facts as facts
from moe_runtime.report import plan_figures as figures
from moe_runtime.report.layout import Figure, Tile, present, template
from moe_runtime.report.summary import NONE, count, duration, percent, size

__all__ = ["render_plan"]


def render_plan(plan: Plan, transitions: Sequence[FloatArray] = ()) -> str:
    """The whole page."""
    load_map, most_load = figures.loads(plan)
    blocks = facts.section(plan.metrics, "blocks")
    measured = "held-out" if blocks.get("measured_on") == "held_out" else "training"
    replicas = " A replicated expert shows all of its devices." * plan.has_replicas
    spilled = any(tier != "device" for layer in plan.layers for tier in layer.tiers)
    return template("plan.html.j2").render(
        kind="placement plan",
        title=plan.model_id or "unnamed model",
        outcome=facts.headline(plan),
        warnings=facts.warnings_of(plan),
        tiles=_tiles(plan),
        certificate=facts.certificate_line(plan),
        residency=facts.residency_line(plan),
        rivals=_only(
            title="Against other placements",
            note="lower is better",
            svg=figures.rivals(plan) if plan.devices > 1 else "",
        ),
        rows=_rows(plan) if plan.devices > 1 else [],
        held=bool(facts.section(plan.metrics, "held_out")),
        measures=list(facts.MEASURES.values()),
        placement=_only(
            title="Which device holds which expert",
            note=f"a row is a layer, a cell an expert.{replicas}"
            + " Pale: kept in host memory or on disk." * spilled,
            svg=figures.picture(plan),
        ),
        loads=_only(
            title="Load of each device",
            note=f"over the layer's mean, {measured} tokens",
            svg=load_map,
            full=f"{most_load:.2f}",
        ),
        flows=_only(
            title="From device to device",
            note=f"of the expert pairs that leave a device's experts, {measured} tokens; "
            "the diagonal stays",
            svg=figures.flow_maps(plan),
            full="100 %",
        ),
        affinity=_only(
            title="Affinity by layer pair",
            note="share of an expert's next experts; above in the model's order, below grouped by "
            "device (colour by its square root)",
            svg=figures.affinity_maps(plan, transitions),
            full="most",
        ),
        layers=_layers(plan),
        tables=_tables(plan),
    )


def _only(**parts: str) -> list[Figure]:
    return present(Figure(**parts))


def _tiles(plan: Plan) -> list[Tile]:
    which, mine, theirs = facts.best_known(plan)
    tiles = []
    for field, label, write in (
        ("crossing", "Pairs crossing devices", percent),
        ("distinct_devices", "Devices a token", _two),
        ("load", "Highest load", _two),
        ("hop_cost", "Hop cost a token", _two),
    ):
        ours = facts.value_of(mine, field)
        if ours is not None and plan.devices > 1:
            other = write(facts.value_of(theirs, field))
            tiles.append(
                Tile(label=label, value=write(ours), note=f"contiguous {other}; {which} tokens")
            )
    proof = facts.certificate_of(plan)
    if proof is not None:
        proved = proof.status == "optimal"
        tiles.append(
            Tile(
                label="Gap to the bound",
                value=percent(proof.gap),
                note="proved optimal" if proved else proof.bound_method,
            )
        )
    share = facts.value_of(facts.section(plan.metrics, "residency"), "predicted_share")
    if share is not None:
        tiles.append(
            Tile(label="Served by residents", value=percent(share), note="of all uses, predicted")
        )
    sizes = {len(group) for at in range(len(plan.layers)) for group in plan.device_experts(at)}
    span = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
    nodes = plan.topology.node_count
    tiles.append(
        Tile(
            label="Devices",
            value=f"{plan.devices}" + f" in {nodes} nodes" * (nodes > 1),
            note=f"{span} experts of a layer on each",
        )
    )
    return tiles[:6]


def _rows(plan: Plan) -> list[dict[str, Any]]:
    """The bar chart in numbers."""
    rows = []
    for name, measured in facts.comparison(plan):
        train, held = (facts.section(measured, kind) for kind in ("train", "held_out"))
        rows.append(
            {
                "name": name,
                "cells": [
                    (_three(facts.value_of(train, field)), _three(facts.value_of(held, field)))
                    for field in facts.MEASURES
                ],
            }
        )
    return rows


def _layers(plan: Plan) -> list[dict[str, str]]:
    return [
        {
            "layer": str(row["layer"]),
            "experts": count(row["experts"]),
            "top_k": str(row["top_k"] or NONE),
            "slots": count(row["slots"]),
            "each": str(row["most"])
            if row["fewest"] == row["most"]
            else f"{row['fewest']} to {row['most']}",
            "resident": count(row["resident"]),
            "load": _three(row["load"]),
        }
        for row in facts.layer_rows(plan)
    ]


def _tables(plan: Plan) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sections that are lists of names and values."""
    proof, topology = facts.certificate_of(plan), plan.topology
    support = facts.section(plan.metrics, "support")
    memory = sorted({value for value in topology.memory if value})
    devices = [
        ("Devices", count(topology.devices)),
        ("Nodes", count(topology.node_count)),
        ("Memory for experts", ", ".join(map(size, memory)) or "not limited"),
        ("Costs in", topology.unit),
        ("Model's fingerprint", plan.fingerprint or NONE),
    ]
    proved = []
    if proof is not None:
        proved = [
            ("Objective", proof.objective),
            ("Value", f"{proof.value:.5f}"),
            ("Bound", f"{proof.bound:.5f}"),
            ("Bound from", proof.bound_method),
            ("Status", proof.status),
            ("Method", proof.method),
            ("Time", duration(proof.seconds)),
            ("Seed", str(proof.seed)),
        ]
    carried = []
    if support:
        interval = facts.interval_of(support)
        carried = [
            ("Tokens", count(facts.value_of(support, "tokens"))),
            ("Sequences", count(facts.value_of(support, "sequences"))),
            ("Expert pairs a cell", _two(facts.value_of(support, "pairs_a_cell"))),
            ("Affinity beyond popularity", _three(facts.value_of(support, "excess"))),
            ("95 % interval", f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else NONE),
            ("Shuffled control", _three(facts.value_of(support, "excess_shuffled"))),
        ]
    settings = [(str(name), _plain(value)) for name, value in plan.settings.items()]
    return [
        ("Certificate", proved),
        ("Support of the counts", carried),
        ("Devices", devices),
        ("Settings", settings),
    ]


def _plain(value: Any) -> str:
    if value is None or value == []:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(dict.fromkeys(_plain(item) for item in value))
    return str(value)


def _two(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _three(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"

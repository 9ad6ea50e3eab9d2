"""`Program`: an instance as ExFlow's integer program in PuLP (arXiv 2401.08383), and the way back.

On aggregated counts: its size does not grow with the trace. Does not know solvers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from moe_runtime.placement.instance import Assignment, Instance

from moe_runtime.core import FloatArray, IntArray

__all__ = ["Program", "keeps_limits"]

_EPSILON = 1e-9
_LARGEST_RATIO = 1e6  # of the objective's coefficients that solvers tell apart


def keeps_limits(
    instance: Instance, assignment: Assignment, most_copies: IntArray | None = None
) -> bool:
    """Whether counts and load caps are kept and no device holds too many of an expert's slots.

    Args:
        most_copies: int64 `[G]`, how many it may hold; 1 unless given.
    """
    most = np.ones(instance.devices, dtype=np.int64) if most_copies is None else most_copies
    for slots, device in zip(instance.slots, assignment, strict=True):
        counts = np.bincount(device, minlength=instance.devices)
        limits = slots.limits
        if (counts < limits.least).any() or (counts > limits.most).any():
            return False
        if (slots.loads(device) > limits.load + _slack(limits.load)).any():
            return False
        copies = np.zeros((int(slots.owner[-1]) + 1, instance.devices), dtype=np.int64)
        np.add.at(copies, (slots.owner, device), 1)
        if (copies > most).any():
            return False
    return True


def _slack(load: FloatArray) -> FloatArray:
    """What a load may exceed its cap by: rounding of sums, no more."""
    slack: FloatArray = _EPSILON * (1.0 + np.where(np.isfinite(load), np.abs(load), 0.0))
    return slack


class Program:
    """The PuLP problem of an instance.

    x[layer, slot, device] is whole; a continuous cost variable a pair of slots follows from them.
    Minimises the weighted pairs that do not stay. Coefficients are scaled so that the lightest is
    one, since solvers stop at absolute tolerances; `least_cost` is one that nothing undercuts.

    Args:
        given: for each layer float64 `[S, G]`, what a slot is worth on a device besides its pairs.
        most_copies: int64 `[G]`, how many slots of one expert a device may hold; 1 unless given.
    """

    def __init__(
        self,
        instance: Instance,
        given: Sequence[FloatArray] | None,
        most_copies: IntArray | None,
    ) -> None:
        import pulp

        self._instance = instance
        self._most_copies = most_copies
        self.problem: Any = pulp.LpProblem("placement", pulp.LpMinimize)
        self._rows = 0
        self._terms: list[tuple[Any, float]] = []
        # Where nothing but pairs tells the devices apart, they are numbered as they come up.
        self._symmetric = given is None and most_copies is None and instance.renamable()
        self._x = [
            [
                [
                    self._variable(
                        f"x_{layer}_{slot}_{device}",
                        whole=True,
                        highest=int(not (self._symmetric and layer == 0 and device > slot)),
                    )
                    for device in range(instance.devices)
                ]
                for slot in range(len(slots.owner))
            ]
            for layer, slots in enumerate(instance.slots)
        ]
        self._cross: list[tuple[Any, tuple[int, int], tuple[int, int]]] = []
        self._places: list[tuple[list[list[Any]], tuple[int, int], tuple[int, int]]] = []
        for layer in range(instance.layers):
            self._limits(layer)
        kept = self._pairs()
        lowest = 0.0
        if given is not None:
            lowest = self._given(given)
        self._scale = _scale([weight for _, weight in self._terms])
        self._offset = instance.total - kept
        self.least_cost = self._offset + lowest
        self.problem.setObjective(
            pulp.LpAffineExpression([(v, weight * self._scale) for v, weight in self._terms])
        )

    def cost_of(self, objective: float) -> float:
        """The cost that an objective (or a bound of it) of the scaled program stands for."""
        return self._offset + objective / self._scale

    def _variable(self, name: str, *, whole: bool = False, highest: int = 1) -> Any:
        import pulp

        return self.problem.add_variable(
            name, 0, highest, "Integer" if whole else pulp.LpContinuous
        )

    def _row(self, terms: list[tuple[Any, float]], sense: int, right: float) -> None:
        """Add `sum of terms (sense) right`; sense -1 is at most, 0 equal, 1 at least."""
        import pulp

        self._rows += 1
        expression = pulp.LpAffineExpression(terms)
        self.problem.addConstraint(
            pulp.LpConstraint(expression, sense, f"r{self._rows}", float(right))
        )

    def _limits(self, layer: int) -> None:
        slots, x = self._instance.slots[layer], self._x[layer]
        limits = slots.limits
        for row in x:
            self._row([(v, 1.0) for v in row], 0, 1.0)
        for device in range(self._instance.devices):
            column = [(row[device], 1.0) for row in x]
            least, most = int(limits.least[device]), int(limits.most[device])
            if least == most:
                self._row(column, 0, most)
            else:
                self._row(column, -1, most)
                if least > 0:
                    self._row(column, 1, least)
            if np.isfinite(limits.load[device]) and slots.load.max() > 0:
                unit = float(slots.load.max())  # solvers hold rows to an absolute tolerance
                self._row(
                    [(row[device], load / unit) for row, load in zip(x, slots.load, strict=True)],
                    -1,
                    float((limits.load + _slack(limits.load))[device]) / unit,
                )
        for expert in np.flatnonzero(np.bincount(slots.owner) > 1):
            for device in range(self._instance.devices):
                most = 1 if self._most_copies is None else int(self._most_copies[device])
                mine = np.flatnonzero(slots.owner == expert)
                self._row([(x[slot][device], 1.0) for slot in mine], -1, most)

    def _pairs(self) -> float:
        """Costs of all pairs; returns their worth if all stay."""
        instance = self._instance
        elsewhere = instance.elsewhere
        kept = 0.0
        for a, b, matrix in instance.pairs:
            kept += float(matrix.sum())
            for i, j in np.argwhere(matrix > 0).tolist():
                if elsewhere is not None:
                    lost = float(matrix[i, j] * (1.0 - elsewhere))
                    self._crosses((a, i), (b, j), lost)
                else:
                    self._placed((a, i), (b, j), float(matrix[i, j]))
        for layer, matrix in enumerate(instance.together):
            upper = np.triu(matrix, 1)
            kept += float(upper.sum())
            for i, j in np.argwhere(upper > 0).tolist():
                self._crosses((layer, i), (layer, j), float(matrix[i, j]))
        return kept

    def _crosses(self, first: tuple[int, int], second: tuple[int, int], lost: float) -> None:
        """A variable that is 1 where two slots are on different devices (ExFlow's form)."""
        cost = self._variable(f"c_{first[0]}_{first[1]}_{second[0]}_{second[1]}")
        ours, theirs = self._x[first[0]][first[1]], self._x[second[0]][second[1]]
        for x, y in zip(ours, theirs, strict=True):
            self._row([(cost, 1.0), (x, -1.0), (y, 1.0)], 1, 0.0)
        self._terms.append((cost, lost))
        self._cross.append((cost, first, second))

    def _placed(self, first: tuple[int, int], second: tuple[int, int], weight: float) -> None:
        """A variable for each two devices that two slots are on: where devices differ in cost."""
        name = f"z_{first[0]}_{first[1]}_{second[0]}_{second[1]}"
        ours, theirs = self._x[first[0]][first[1]], self._x[second[0]][second[1]]
        size = len(ours)
        z = [[self._variable(f"{name}_{c}_{d}") for d in range(size)] for c in range(size)]
        for device in range(size):
            self._row([(v, 1.0) for v in z[device]] + [(ours[device], -1.0)], 0, 0.0)
            column = [(row[device], 1.0) for row in z]
            self._row([*column, (theirs[device], -1.0)], 0, 0.0)
        lost = weight * (1.0 - self._instance.near)
        self._terms += [(z[c][d], float(lost[c, d])) for c, d in np.argwhere(lost != 0)]
        self._places.append((z, first, second))

    def _given(self, given: Sequence[FloatArray]) -> float:
        """What slots are worth by themselves; returns the least that this can come to."""
        lowest = 0.0
        for x, worth in zip(self._x, given, strict=True):
            self._terms += [
                (x[slot][device], -float(worth[slot, device]))
                for slot, device in np.argwhere(worth != 0)
            ]
            lowest -= float(worth.max(1).sum())
        return lowest

    def start(self, assignment: Assignment) -> dict[Any, float]:
        """The value of every variable at an assignment."""
        if self._symmetric:
            assignment = _named_as_they_come(assignment, self._instance.devices)
        values: dict[Any, float] = {}
        for x, devices in zip(self._x, assignment, strict=True):
            for row, device in zip(x, devices.tolist(), strict=True):
                values.update({v: float(at == device) for at, v in enumerate(row)})
        for cost, (a, i), (b, j) in self._cross:
            values[cost] = float(assignment[a][i] != assignment[b][j])
        for z, (a, i), (b, j) in self._places:
            at = (int(assignment[a][i]), int(assignment[b][j]))
            values.update(
                {v: float((c, d) == at) for c, row in enumerate(z) for d, v in enumerate(row)}
            )
        return values

    def read(self) -> Assignment | None:
        """The assignment of the variables' values; None if it breaks the limits."""
        found = [
            np.array([[v.varValue or 0.0 for v in row] for row in x]).argmax(1).astype(np.int64)
            for x in self._x
        ]
        return found if keeps_limits(self._instance, found, self._most_copies) else None


def _scale(weights: Sequence[float]) -> float:
    sizes = np.abs(np.asarray([weight for weight in weights if weight]))
    if not sizes.size:
        return 1.0
    return float(1.0 / max(sizes.min(), sizes.max() / _LARGEST_RATIO))


def _named_as_they_come(assignment: Assignment, devices: int) -> Assignment:
    """The same with devices numbered in the order in which the first layer's slots use them."""
    order = list(dict.fromkeys(assignment[0].tolist()))
    order += [device for device in range(devices) if device not in order]
    names = np.empty(devices, dtype=np.int64)
    names[order] = np.arange(devices)
    return [names[device] for device in assignment]

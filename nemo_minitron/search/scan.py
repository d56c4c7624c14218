"""One walk through a space: the best shapes that a budget allows, a sample of them, and the Pareto fronts.

Only what the search needs is kept of a block, so that memory does not grow with the space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nemo_minitron.config.schema import SearchConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.search.space import Budget, Shapes, Space, describe, show, sizes_of

TIGHT = 0.9
"""Share of some budget that a shape must use: one that needs less of every budget is not what they were for."""


@dataclass
class Rows:
    """Shapes with what is known of them: ``sizes [n, 5]``, predicted ``loss [n]``, and each cost ``[n]``."""

    sizes: np.ndarray
    loss: np.ndarray
    costs: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, at: np.ndarray) -> Rows:
        return Rows(self.sizes[at], self.loss[at], {name: cost[at] for name, cost in self.costs.items()})

    def with_others(self, others: Rows) -> Rows:
        costs = {name: np.concatenate((cost, others.costs[name])) for name, cost in self.costs.items()}
        return Rows(np.concatenate((self.sizes, others.sizes)), np.concatenate((self.loss, others.loss)), costs)

    def order(self) -> np.ndarray:
        """Best first: by loss, then by parameters, then by sizes, so that no order depends on the enumeration."""
        return np.lexsort((*(-self.sizes.T), self.costs["num_parameters"], self.loss))

    def front(self, cost: str) -> np.ndarray:
        """The Pareto front of loss against a cost: cheapest first, each of lower loss than all before."""
        order = np.lexsort((self.loss, self.costs[cost]))
        before = np.minimum.accumulate(np.concatenate(([np.inf], self.loss[order][:-1])))
        return order[self.loss[order] < before]


@dataclass
class Found:
    """What one walk through the space found.

    Attributes:
        considered, feasible: numbers of shapes; ``alone``: of those that keep each limit, by its name.
        best: feasible shapes of lowest predicted loss, best first. sample: feasible shapes that use the budget, drawn
            at random. fronts: Pareto front of all shapes by cost, the budget aside.
        better: of every followed shape, how many feasible ones are predicted better.
        nearest: the shape that exceeds the limits least, and by how much: 1.0 is at the limit.
        left_out: shapes that an engine would refuse, of which nothing else here tells, and ``refused``, how many of
            them for each reason, by its name.
    """

    considered: int = 0
    feasible: int = 0
    alone: dict[str, int] = field(default_factory=dict)
    best: Rows | None = None
    sample: Rows | None = None
    fronts: dict[str, Rows] = field(default_factory=dict)
    better: list[int] = field(default_factory=list)
    nearest: Rows | None = None
    excess: float = np.inf
    left_out: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def served(self, rows: Rows, refused: Mapping[str, np.ndarray]) -> Rows:
        """The rows that no reason refuses; the others are counted."""
        out = np.zeros(len(rows), dtype=bool)
        for name, some in refused.items():
            self.refused[name] = self.refused.get(name, 0) + int(some.sum())
            out |= some
        self.left_out += int(out.sum())
        return rows.take(np.flatnonzero(~out)) if out.any() else rows


def scan(
    space: Space,
    budget: Budget,
    predict: Callable[[ModelShape], np.ndarray],
    *,
    keep: int = 50_000,
    sample: int = 2_000,
    seed: int = SearchConfig.seed,
    follow: Sequence[ModelShape] = (),
    refuse: Callable[[ModelShape], Mapping[str, np.ndarray]] = lambda shapes: {},
) -> Found:
    """Walk through the space once.

    Args:
        refuse: by reasons, which shapes of a block are to be left out (:func:`nemo_minitron.model.serving.refusals`).
        predict: loss of every shape of a block, ``[n]``, lower is better.
        keep, sample: how many rows of ``best`` and ``sample`` to keep. follow: shapes to rank.

    Raises:
        MinitronError: no limit is given; nothing is feasible (see :func:`infeasible`).
    """
    limits = budget.limits()
    found = Found(alone=dict.fromkeys(limits, 0), better=[0] * len(follow))
    marks = [float(predict(Shapes.of(space.source, sizes_of(shape)[None]))[0]) for shape in follow]
    best, some = _Best(keep), _Drawn(sample, seed)
    for shapes in space.blocks():
        rows = Rows(shapes.sizes, predict(shapes), budget.costs(shapes))
        found.considered += len(rows)
        rows = found.served(rows, refuse(shapes))
        if not len(rows):
            continue
        for cost in rows.costs:
            found.fronts[cost] = merged_front(found.fronts.get(cost), rows, cost)
        use = np.stack([rows.costs[name] / limit for name, limit in limits.items()])
        for name, share in zip(limits, use, strict=True):
            found.alone[name] += int((share <= 1).sum())
        most = use.max(axis=0)
        near = int(most.argmin())
        if most[near] < found.excess:
            found.excess, found.nearest = float(most[near]), rows.take(np.array([near]))
        fits = most <= 1
        found.feasible += int(fits.sum())
        found.better = [
            before + int((rows.loss[fits] < mark).sum()) for before, mark in zip(found.better, marks, strict=True)
        ]
        best.add(rows, fits)
        some.add(rows, fits & (most >= TIGHT))
    if not found.feasible:
        raise MinitronError(infeasible(space, budget, found))
    found.best, found.sample = best.rows(), some.rows
    return found


class _Best:
    """The rows of lowest loss; most of a block is dropped by one comparison."""

    def __init__(self, keep: int) -> None:
        self._keep, self._bound = keep, np.inf
        self._rows: Rows | None = None

    def add(self, rows: Rows, wanted: np.ndarray) -> None:
        new = rows.take(np.flatnonzero(wanted & (rows.loss <= self._bound)))
        self._rows = new if self._rows is None else self._rows.with_others(new)
        if len(self._rows) > 2 * self._keep:
            self._bound = float(np.partition(self._rows.loss, self._keep - 1)[self._keep - 1])
            self._rows = self._rows.take(np.flatnonzero(self._rows.loss <= self._bound))

    def rows(self) -> Rows | None:
        return None if self._rows is None else self._rows.take(self._rows.order()[: self._keep])


class _Drawn:
    """A fixed number of rows, each as likely as any other: those of lowest random number."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._generator = count, np.random.default_rng(seed)
        self._numbers = np.empty(0)
        self.rows: Rows | None = None

    def add(self, rows: Rows, wanted: np.ndarray) -> None:
        numbers = self._generator.random(len(rows))
        bound = self._numbers[-1] if len(self._numbers) == self._count else np.inf
        at = np.flatnonzero(wanted & (numbers < bound))
        every = rows.take(at) if self.rows is None else self.rows.with_others(rows.take(at))
        numbers = np.concatenate((self._numbers, numbers[at]))
        lowest = np.argsort(numbers, kind="stable")[: self._count]
        self.rows, self._numbers = every.take(lowest), numbers[lowest]


def merged_front(before: Rows | None, rows: Rows, cost: str) -> Rows:
    """The Pareto front of loss against a cost after ``rows`` have come."""
    if before is not None:
        cheaper = np.searchsorted(before.costs[cost], rows.costs[cost], side="right")
        rival = np.concatenate(([np.inf], before.loss))[cheaper]  # the best that costs no more
        rows = before.with_others(rows.take(np.flatnonzero(rows.loss < rival)))
    return rows.take(rows.front(cost))


def infeasible(space: Space, budget: Budget, found: Found) -> str:
    """Which limit binds, and the nearest shape that there is.

    Costs grow with every size, so that a limit that some shape keeps is kept by the smallest: where nothing is
    feasible, some limit is kept by none. Where shapes are left out there may be several smallest ones.
    """
    near, left_out = found.nearest, ""
    if found.left_out:
        counts = ", ".join(f"{name} {number:,}" for name, number in found.refused.items() if number)
        left_out = f"search.serving leaves out {found.left_out:,} of {found.considered:,} shapes ({counts})"
    if near is None and left_out:
        return f"{left_out}, which is all; ask for less, or let more axes shrink (search.shrink)"
    if near is None:
        return "search: there is no shape but the source's own; let more axes shrink (search.shrink)"
    shares = {name: float(near.costs[name][0]) / getattr(budget, name) for name in budget.limits()}
    binding = max(shares, key=lambda name: shares[name])
    others = [f"budget.{name}" for name in shares if name != binding and not found.alone[name]]
    also = f" (and so {'is' if len(others) == 1 else 'are'} {', '.join(others)})" if others else ""
    together = " together with the other limits" if found.alone[binding] else ""
    smallest = describe(Shapes.of(space.source, near.sizes).shape(0))
    return (
        f"budget.{binding}: {show(binding, getattr(budget, binding))} is too little{also}: of "
        f"{found.considered - found.left_out:,} shapes none keeps it{together}. Nearest is {smallest} with "
        f"{show(binding, float(near.costs[binding][0]))}, {shares[binding]:.3g} times the budget; "
        "raise the budget, or lower search.min_fraction" + (f"; {left_out}" if left_out else "")
    )


def spread_out(rows: Rows, count: int, distance: float, taken: Sequence[ModelShape] = ()) -> list[int]:
    """The first ``count`` rows that differ from each other, and from ``taken``, by ``distance`` in some size.

    ``distance`` is a difference of natural logarithms, 0.1 being about a tenth. Where there are too few such rows it is
    halved, and at last the best rows are taken as they are.
    """
    chosen: list[int] = []
    logs = np.log(rows.sizes.astype(np.float64))
    others = [np.log(sizes_of(shape).astype(np.float64)) for shape in taken]
    while len(chosen) < min(count, len(rows)):
        free = np.ones(len(rows), dtype=bool)
        free[chosen] = False
        for row in [*others, *logs[chosen]]:
            free &= np.abs(logs - row).max(axis=1) >= max(distance, 1e-9)
        while len(chosen) < count and free.any():
            at = int(free.argmax())
            chosen.append(at)
            free &= np.abs(logs - logs[at]).max(axis=1) >= max(distance, 1e-9)
        if distance < 1e-6:
            break
        distance = distance / 2 if distance > 1e-3 else 0.0
    return sorted(chosen)

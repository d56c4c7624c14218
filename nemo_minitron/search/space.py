"""The shapes that a model can be pruned to, and which of them a budget allows; enumerated lazily, a block at a time.

A block holds all shapes of one number of layers as arrays, and is counted by :class:`ModelShape`'s own formulas. Only
what the search needs is kept of it, so that memory does not grow with the space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.plan import TARGETS
from nemo_minitron.search.latency import Rates

TIGHT = 0.9
"""Of some budget: a shape that needs less of all of them is not what the budget was for."""


class Shapes(ModelShape):
    """Many shapes at once: the five sizes of ``TARGETS`` are int64 arrays ``[n]``, the rest is the source's.

    Nothing is checked; the counts of :class:`ModelShape` are plain arithmetic and give arrays.
    """

    def __post_init__(self) -> None:
        pass

    @classmethod
    def of(cls, source: ModelShape, sizes: np.ndarray) -> Shapes:
        """``sizes [n, 5]`` in the order of ``TARGETS``."""
        values: dict[str, Any] = {one.name: getattr(source, one.name) for one in dataclasses.fields(source)}
        return cls(**(values | {name: sizes[:, at] for at, name in enumerate(TARGETS)}))

    @property
    def sizes(self) -> np.ndarray:
        """``[n, 5]`` in the order of ``TARGETS``."""
        return np.stack([np.asarray(getattr(self, name)) for name in TARGETS], axis=1)

    def shape(self, at: int) -> ModelShape:
        """One of them, checked."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(ModelShape)}
        return ModelShape(**(values | {name: int(values[name][at]) for name in TARGETS}))


@dataclass(frozen=True)
class Space:
    """Which sizes are tried.

    Attributes:
        axes: sizes of each of ``num_layers``, ``hidden_size``, ``ffn_hidden_size``, ``num_query_groups`` and
            ``heads_per_group``, ascending; the source's own is the last.
    """

    source: ModelShape
    axes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(
        cls,
        source: ModelShape,
        *,
        steps: Mapping[str, int | None] | None = None,
        shrink: Sequence[str] = TARGETS,
        min_fraction: float = 0.25,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
    ) -> Space:
        """Multiples of each step down to a share of the source's size, and that size itself.

        Args:
            steps: by the names of ``TARGETS``, heads excepted; where None, for ``hidden_size`` and
                ``ffn_hidden_size`` the largest power of two up to 128 that leaves eight sizes, and 1 for the others.
            shrink: the ``TARGETS`` that may become smaller.
            min_fraction: of the source's size, the least that is tried.
            tensor_parallel, pipeline_parallel: the grid that must hold every shape.

        Raises:
            MinitronError: an unknown name, a step that is not positive, a fraction outside of (0, 1].
        """
        if not 0 < min_fraction <= 1:
            raise MinitronError(f"search.min_fraction: expected more than 0 and at most 1, found {min_fraction}")
        for name in shrink:
            if name not in TARGETS:
                raise MinitronError(f"search.shrink: expected some of {', '.join(TARGETS)}, found '{name}'")
        source.check_parallel(tensor_parallel, pipeline_parallel)
        axes = {}
        for name in (*TARGETS, "heads_per_group"):
            if name == "num_attention_heads":
                continue
            whole, step = getattr(source, name), (steps or {}).get(name)
            step = (aligned_step(whole) if name.endswith("hidden_size") else 1) if step is None else step
            if step < 1:
                raise MinitronError(f"search: the step of {name} must be at least 1, found {step}")
            key = "num_attention_heads" if name == "heads_per_group" else name
            least = max(1, int(np.ceil(min_fraction * whole))) if key in shrink else whole
            if name == "num_layers":
                least = max(least, pipeline_parallel)
            sizes = {size for size in range(step, whole, step) if size >= least} | {whole}
            divisor = tensor_parallel if name in ("ffn_hidden_size", "num_query_groups") else 1
            axes[name] = tuple(sorted(size for size in sizes if size % divisor == 0))
        return cls(source, axes)

    def __len__(self) -> int:
        """Shapes, the source's own included."""
        return int(np.prod([len(sizes) for sizes in self.axes.values()]))

    def blocks(self) -> Iterator[Shapes]:
        """All shapes but the source's own, those of one number of layers at a time, the deepest first."""
        names = ("hidden_size", "ffn_hidden_size", "num_query_groups", "heads_per_group")
        grid = np.meshgrid(*(np.array(self.axes[name][::-1], dtype=np.int64) for name in names), indexing="ij")
        rest = dict(zip(names, (axis.ravel() for axis in grid), strict=True))
        rest["num_attention_heads"] = rest["num_query_groups"] * rest["heads_per_group"]
        for layers in self.axes["num_layers"][::-1]:
            sizes = np.stack(
                [np.full_like(rest["hidden_size"], layers) if name == "num_layers" else rest[name] for name in TARGETS],
                axis=1,
            )
            yield Shapes.of(self.source, sizes[1:] if layers == self.source.num_layers else sizes)

    def nearest(self, **wanted: float) -> ModelShape:
        """The shape whose sizes are nearest to those wanted (names of ``axes``), the others being the source's."""
        sizes = {name: choices[-1] for name, choices in self.axes.items()}
        for name, value in wanted.items():
            sizes[name] = min(self.axes[name], key=lambda size, value=value: (abs(size - value), size))  # type: ignore[misc]
        heads = sizes.pop("heads_per_group") * sizes["num_query_groups"]
        return self.source.replace(**sizes, num_attention_heads=heads)


def aligned_step(size: int) -> int:
    """The largest power of two up to 128 of which ``size`` holds at least eight: 128 for 4096, 64 for 576."""
    step = 1
    while step < 128 and size >= 16 * step:
        step *= 2
    return step


@dataclass(frozen=True)
class Budget:
    """What a student may cost; every limit that is given must hold.

    Attributes:
        num_parameters: nominal: may be exceeded by ``tolerance`` (4.51B is a 4.5B model).
        memory_gib: weights, padded vocabulary included, and KV cache of ``batch_size`` sequences of ``seq_length``.
        latency_ms: of one decoding step of ``batch_size`` sequences at ``seq_length``, by ``rates``.
        bytes_per_value: of weights and cache.
    """

    num_parameters: float | None = None
    memory_gib: float | None = None
    latency_ms: float | None = None
    batch_size: int = 1
    seq_length: int = 2048
    bytes_per_value: int = 2
    tolerance: float = 0.005
    rates: Rates | None = None

    def limits(self) -> dict[str, float]:
        """The limits given, as they are compared.

        Raises:
            MinitronError: none given, or not positive.
        """
        given = {name: getattr(self, name) for name in ("num_parameters", "memory_gib", "latency_ms")}
        given = {name: float(value) for name, value in given.items() if value is not None}
        if not given:
            raise MinitronError(
                "budget: expected at least one of budget.num_parameters, budget.memory_gib, budget.latency_ms"
            )
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise MinitronError(f"budget.{name}: expected a positive number, found {value}")
        if "num_parameters" in given:
            given["num_parameters"] *= 1 + self.tolerance
        return given

    def costs(self, shapes: ModelShape) -> dict[str, Any]:
        """Parameters, GiB and, with ``rates``, milliseconds of one shape or of many."""
        cache = self.batch_size * self.seq_length * shapes.kv_cache_bytes_per_token(self.bytes_per_value)
        found: dict[str, Any] = {
            "num_parameters": shapes.num_parameters(),
            "memory_gib": (shapes.num_parameters(padded=True) * self.bytes_per_value + cache) / 2**30,
        }
        if self.rates is not None:
            step = self.rates.decode_seconds(shapes, self.batch_size, self.seq_length, self.bytes_per_value)
            found["latency_ms"] = 1e3 * step
        return found


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


def scan(
    space: Space,
    budget: Budget,
    predict: Callable[[ModelShape], np.ndarray],
    *,
    keep: int = 50_000,
    sample: int = 2_000,
    seed: int = 1234,
    follow: Sequence[ModelShape] = (),
) -> Found:
    """Walk through the space once.

    Args:
        predict: loss of every shape of a block, ``[n]``, lower is better.
        keep, sample: how many rows of ``best`` and ``sample`` to keep. follow: shapes to rank.

    Raises:
        MinitronError: no limit is given; nothing is feasible (see :func:`infeasible`).
    """
    limits = budget.limits()
    found = Found(alone=dict.fromkeys(limits, 0), better=[0] * len(follow))
    marks = [float(predict(Shapes.of(space.source, sizes_of(one)[None]))[0]) for one in follow]
    best, some = _Best(keep), _Drawn(sample, seed)
    for shapes in space.blocks():
        rows = Rows(shapes.sizes, predict(shapes), budget.costs(shapes))
        found.considered += len(rows)
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
    feasible, some limit is kept by none.
    """
    near = found.nearest
    if near is None:
        return "search: there is no shape but the source's own; let more axes shrink (search.shrink)"
    shares = {name: float(near.costs[name][0]) / getattr(budget, name) for name in budget.limits()}
    binding = max(shares, key=lambda name: shares[name])
    others = [f"budget.{name}" for name in shares if name != binding and not found.alone[name]]
    also = f" (and so {'is' if len(others) == 1 else 'are'} {', '.join(others)})" if others else ""
    return (
        f"budget.{binding}: {show(binding, getattr(budget, binding))} is too little{also}: of {found.considered:,} "
        f"shapes none keeps it. Nearest is {describe(Shapes.of(space.source, near.sizes).shape(0))} with "
        f"{show(binding, float(near.costs[binding][0]))}, {shares[binding]:.3g} times the budget; "
        "raise the budget, or lower search.min_fraction"
    )


def spread_out(rows: Rows, count: int, distance: float, taken: Sequence[ModelShape] = ()) -> list[int]:
    """The first ``count`` rows that differ from each other, and from ``taken``, by ``distance`` in some size.

    ``distance`` is a difference of natural logarithms, 0.1 being about a tenth. Where there are too few such rows it is
    halved, and at last the best rows are taken as they are.
    """
    chosen: list[int] = []
    logs = np.log(rows.sizes.astype(np.float64))
    others = [np.log(sizes_of(one).astype(np.float64)) for one in taken]
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


def sizes_of(shape: ModelShape) -> np.ndarray:
    """``[5]`` in the order of ``TARGETS``."""
    return np.array([getattr(shape, name) for name in TARGETS], dtype=np.int64)


def key_of(shape: ModelShape) -> str:
    """A name for files: ``l30-h512-f1280-g3-a9``."""
    return (
        f"l{shape.num_layers}-h{shape.hidden_size}-f{shape.ffn_hidden_size}"
        f"-g{shape.num_query_groups}-a{shape.num_attention_heads}"
    )


def describe(shape: ModelShape) -> str:
    """A shape in words."""
    return (
        f"{shape.num_layers} layers, hidden {shape.hidden_size}, ffn {shape.ffn_hidden_size}, "
        f"{shape.num_attention_heads} heads in {shape.num_query_groups} groups"
    )


def count(number: float) -> str:
    """``4.51B``, ``98.9M``, ``219K``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}" if unit == "B" else f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def show(cost: str, value: float) -> str:
    """A cost with its unit."""
    if cost == "num_parameters":
        return f"{count(value)} parameters"
    return f"{value:.3g} {'GiB' if cost == 'memory_gib' else 'ms'}"

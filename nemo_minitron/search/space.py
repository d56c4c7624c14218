"""The shapes that a model can be pruned to, enumerated lazily, a block at a time, and what each of them costs.

A block holds all shapes of one number of layers as arrays, and is counted by :class:`ModelShape`'s own formulas.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_minitron.config import sections
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.plan import TARGETS
from nemo_minitron.search.latency import Rates

POSITIONS = 2048
"""Length of the KV cache that is budgeted for where nothing is said, unless the model's own is shorter."""


class Shapes(ModelShape):
    """Many shapes at once: the five sizes of ``TARGETS`` are int64 arrays ``[n]``, the rest is the source's.

    Nothing is checked; the counts of :class:`ModelShape` are plain arithmetic and give arrays.
    """

    def __post_init__(self) -> None:
        pass

    @classmethod
    def of(cls, source: ModelShape, sizes: np.ndarray) -> Shapes:
        """``sizes [n, 5]`` in the order of ``TARGETS``."""
        values: dict[str, Any] = {item.name: getattr(source, item.name) for item in dataclasses.fields(source)}
        return cls(**(values | {name: sizes[:, at] for at, name in enumerate(TARGETS)}))

    @property
    def sizes(self) -> np.ndarray:
        """``[n, 5]`` in the order of ``TARGETS``."""
        return np.stack([np.asarray(getattr(self, name)) for name in TARGETS], axis=1)

    def shape(self, at: int) -> ModelShape:
        """One of them, checked."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(ModelShape)}
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
        min_fraction: float = sections.Search.min_fraction,
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
    batch_size: int = sections.Budget.batch_size
    seq_length: int = POSITIONS
    bytes_per_value: int = sections.Budget.bytes_per_value
    tolerance: float = sections.Budget.tolerance
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

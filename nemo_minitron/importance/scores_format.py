"""How scores lie in ``arrays.npz``: names and sizes of its arrays, read with every size checked before it is allocated.

Format 2 has an array for every axis of every ranking, ``rankings/NAME/AXIS``, so that a reader takes rankings that it
does not know. Where the loss was counted of some tokens alone, as of conversations, ``counted [n, s]`` int8 lies beside
``tokens``: 1 at each position whose next token counts, else 0.

Format 1, of earlier versions, had the published ranking under the names of the axes and that by reconstruction under
``AXIS_rank``; it is still read. Statistics and tokens have the same names in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.arrays import ArrayFile
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.registry import check_name

FORMAT, FORMAT_1 = "nemo_minitron.scores/2", "nemo_minitron.scores/1"
AXES = ("ffn", "heads", "groups", "hidden")
"""Kinds of unit that a ranking may rank: FFN neurons, attention heads, query groups, hidden channels."""
MOST_RANKINGS, _MOST_TOKENS = 12, 1 << 27
_FOLDER = "rankings/"

Ranking = Mapping[str, np.ndarray]
"""Worth of every unit by axis, sized as :func:`axis_sizes` says."""


def axis_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Size of a ranking's array for each of ``AXES``: ``[L, F]``, ``[L, A]``, ``[L, G]``, ``[H]``."""
    layers = shape.num_layers
    return {
        "ffn": (layers, shape.ffn_hidden_size),
        "heads": (layers, shape.num_attention_heads),
        "groups": (layers, shape.num_query_groups),
        "hidden": (shape.hidden_size,),
    }


def statistic_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Size of every statistic that :class:`nemo_minitron.importance.scores.Scores` always has."""
    layers, hidden = shape.num_layers, shape.hidden_size
    return {
        "block_influence": (layers,),
        "residual_cosine": (layers + 1, layers + 1),
        "hidden_norms": (2 * layers + 1, hidden),
        "ffn_rms": (layers, shape.ffn_hidden_size),
        "proj_rms": (layers, shape.proj_columns),
        "norm_rms": (2 * layers + 1, hidden),
        "residual_rms": (layers + 1, hidden),
    }


@dataclass(frozen=True)
class StoredArrays:
    """The arrays of a scores folder by what they mean."""

    rankings: Mapping[str, Ranking]
    statistics: Mapping[str, np.ndarray]
    stream_moment: np.ndarray | None
    tokens: np.ndarray | None
    sensitivity: np.ndarray | None
    counted: np.ndarray | None = None

    def by_name(self) -> dict[str, np.ndarray]:
        """Names and arrays of the file, in format 2."""
        found = {
            f"{_FOLDER}{name}/{axis}": array
            for name, ranking in self.rankings.items()
            for axis, array in ranking.items()
        }
        optional = {
            "stream_moment": self.stream_moment,
            "tokens": self.tokens,
            "sensitivity": self.sensitivity,
            "counted": None if self.counted is None else self.counted.astype("i1"),
        }
        return found | dict(self.statistics) | {name: array for name, array in optional.items() if array is not None}


def read_arrays(arrays: ArrayFile, shape: ModelShape, version: str) -> StoredArrays:
    """Read every array of a scores file of the format ``version``.

    Raises:
        MinitronError: another format, an array that is missing or of another size or type than ``shape`` makes it,
            a ranking without a proper name or of an axis that is none, more than ``MOST_RANKINGS`` of them or
            2^27 tokens.
    """
    readers: dict[str, Callable[[ArrayFile, ModelShape], dict[str, Ranking]]] = {
        FORMAT: _rankings_2,
        FORMAT_1: _rankings_1,
    }
    moment = (shape.hidden_size, shape.hidden_size)
    tokens = sensitivity = counted = None
    if "tokens" in arrays.names:
        size = arrays.describe("tokens")[1]
        if math.prod(size) > _MOST_TOKENS:
            raise MinitronError(f"array 'tokens' must have at most {_MOST_TOKENS} values, found {list(size)}")
        tokens = _bounded(arrays, "tokens", size)
        sensitivity = _bounded(arrays, "sensitivity", (2 * shape.num_layers, *size))
        counted = _bounded(arrays, "counted", size) if "counted" in arrays.names else None
    return StoredArrays(
        rankings=readers[version](arrays, shape),
        statistics={name: _bounded(arrays, name, size) for name, size in statistic_sizes(shape).items()},
        stream_moment=_bounded(arrays, "stream_moment", moment) if "stream_moment" in arrays.names else None,
        tokens=tokens,
        sensitivity=sensitivity,
        counted=counted,
    )


def _rankings_2(arrays: ArrayFile, shape: ModelShape) -> dict[str, Ranking]:
    sizes = axis_sizes(shape)
    found: dict[str, list[str]] = {}
    names = sorted(name for name in arrays.names if name.startswith(_FOLDER))
    for name in names:
        ranking, _, axis = name.removeprefix(_FOLDER).partition("/")
        check_ranking(ranking)
        if axis not in AXES:
            raise MinitronError(f"array '{name:.80}': expected an axis of {', '.join(AXES)}, found '{axis:.40}'")
        found.setdefault(ranking, []).append(axis)
    check_count(found)
    return {
        ranking: {axis: _bounded(arrays, f"{_FOLDER}{ranking}/{axis}", sizes[axis]) for axis in in_order(axes)}
        for ranking, axes in found.items()
    }


def _rankings_1(arrays: ArrayFile, shape: ModelShape) -> dict[str, Ranking]:
    sizes = axis_sizes(shape)
    found: dict[str, Ranking] = {"minitron": {axis: _bounded(arrays, axis, size) for axis, size in sizes.items()}}
    ranks = [*(f"{axis}_rank" for axis in AXES), "stream_moment"]
    present = [name for name in ranks if name in arrays.names]
    if present and present != ranks:
        raise MinitronError(f"scores: expected the ranks {', '.join(ranks)}, found {', '.join(present)}")
    if present:
        found["reconstruction"] = {axis: _bounded(arrays, f"{axis}_rank", size) for axis, size in sizes.items()}
    return found


def in_order(axes: Iterable[str]) -> list[str]:
    """``axes`` in the order of ``AXES``."""
    return sorted(axes, key=AXES.index)


def check_ranking(name: str) -> None:
    """Refuse what cannot name a ranking in a file."""
    check_name(name, "scores: the name of a ranking")


def check_count(rankings: Iterable[str]) -> None:
    """Refuse more rankings than a file has room for."""
    count = len(list(rankings))
    if count > MOST_RANKINGS:
        raise MinitronError(f"scores: expected at most {MOST_RANKINGS} rankings, found {count}")


def _bounded(arrays: ArrayFile, name: str, size: tuple[int, ...]) -> np.ndarray:
    """One array, its stored type and size checked before it is allocated."""
    dtype, found = arrays.describe(name)
    if found != size:
        raise MinitronError(f"array '{name}' must have size {list(size)}, found {list(found)}")
    if dtype.kind not in "fi" or dtype.itemsize > 8:
        raise MinitronError(f"array '{name}' must hold numbers of at most 8 bytes, found {dtype!s:.80}")
    return arrays.get(name)

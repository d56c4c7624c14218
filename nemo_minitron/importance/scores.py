"""Importance scores of one checkpoint: full-size, layout-free arrays that any grid fills alike.

A scores folder holds ``scores.json`` (what was measured, of which weights, on which text: readable) and
``arrays.npz`` (numpy, never pickled; :mod:`nemo_minitron.importance.scores_format`). Legend of sizes: see
:mod:`nemo_minitron.model.shape`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.arrays import ArrayFile
from nemo_minitron.files.text import one_line, read_json
from nemo_minitron.importance.scores_format import (
    AXES,
    FORMAT,
    FORMAT_1,
    Ranking,
    StoredArrays,
    axis_sizes,
    check_count,
    check_ranking,
    in_order,
    read_arrays,
    statistic_sizes,
)
from nemo_minitron.model.shape import ModelShape

JSON, NPZ = "scores.json", "arrays.npz"
_MOST_METADATA, _MOST_BYTES = 1 << 20, 64 << 30
"""Bytes of ``scores.json`` and of ``arrays.npz`` (Llama-3.1-405B on 8 million tokens: 11 GB)."""
PUBLISHED = "minitron"
"""The ranking that all scores have."""

Fact = str | int | float | bool | None


@dataclass(frozen=True)
class Worth:
    """What :mod:`nemo_minitron.prune.choose` reads: one ranking, and the statistics that layers are chosen by.

    Attributes:
        ranking: its name. ffn, heads, groups, hidden: worth by axis; None for an axis that it leaves out.
        block_influence, residual_cosine: as :class:`Scores` has them.
    """

    ranking: str
    block_influence: np.ndarray
    residual_cosine: np.ndarray
    ffn: np.ndarray | None = None
    heads: np.ndarray | None = None
    groups: np.ndarray | None = None
    hidden: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """What each unit of a model is worth; float64, unsharded, larger is worth more (except where said).

    Attributes:
        shape: shape of the scored model; ``source_fingerprint`` identifies its weights.
        data_fingerprint: identifies the calibration text; ``calibration`` holds the settings (samples, lengths, seed,
            aggregations, tokens counted) as plain JSON values.
        rankings: by the metric's name, ``{axis: worth}`` with ``ffn [L, F]``, ``heads [L, A]`` (head a belongs to group
            ``a // r``), ``groups [L, G]``, ``hidden [H]``. ``minitron``, the published metric of arXiv 2407.14679
            section 2.2, is always there and has every axis; others may leave axes out
            (:mod:`nemo_minitron.importance.metrics`).
        block_influence: ``[L]``, ``1 - E[cos(x_l, x_{l+1})]``.
        residual_cosine: ``[L+1, L+1]``, mean over tokens of the cosine between the residual streams entering layers
            i and j (index L: leaving the last layer); what contiguous-block selection reads (arXiv 2403.17887).
        hidden_norms: ``[2L+1, H]``, the published metric at the output of each norm: input and pre-MLP norm of layer 0,
            of layer 1, ..., final norm; its ranking of ``hidden`` is their sum.
        ffn_rms ``[L, F]``, proj_rms ``[L, A*d]``, norm_rms ``[2L+1, H]``, residual_rms ``[L+1, H]``: root mean
            square over tokens of the same activations (the diagonal of their uncentred second moment), for rankings
            such as rms times downstream column norm.
        stream_moment: ``[H, H]``, second moment of the residual stream, from which compensation turns it
            (:class:`nemo_minitron.importance.reconstruction.StreamMoment`); None if not measured.
        tokens: ``[n, s]`` int32, the calibration samples that gradients were taken on and compensation works with;
            sensitivity: ``[2L, n, s]`` float32, how much an error in the residual stream matters at each of them, after
            the attention and after the FFN of each layer. Both or neither.
        counted: ``[n, s]`` bool, at which positions of ``tokens`` the loss was counted of the token that follows
            (:class:`nemo_minitron.data.blocks.Drawn`); None where at all. Only beside ``tokens``.

    Raises:
        MinitronError: from the constructor, where an array has the wrong size or holds a NaN or infinity, a ranking has
            no proper name or ranks nothing that is an axis, or the published one is not whole.
    """

    shape: ModelShape
    source_fingerprint: str
    data_fingerprint: str
    rankings: Mapping[str, Ranking]
    block_influence: np.ndarray
    residual_cosine: np.ndarray
    hidden_norms: np.ndarray
    ffn_rms: np.ndarray
    proj_rms: np.ndarray
    norm_rms: np.ndarray
    residual_rms: np.ndarray
    calibration: Mapping[str, Fact] = field(default_factory=dict)
    stream_moment: np.ndarray | None = None
    tokens: np.ndarray | None = None
    sensitivity: np.ndarray | None = None
    counted: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rankings", _checked_rankings(self.shape, self.rankings))
        for name, size in statistic_sizes(self.shape).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), size))
        if self.stream_moment is not None:
            size = (self.shape.hidden_size, self.shape.hidden_size)
            object.__setattr__(self, "stream_moment", _checked("stream_moment", self.stream_moment, size))
        if self.tokens is not None:
            tokens = np.array(self.tokens, dtype=np.int32)
            if tokens.ndim != 2 or tokens.min(initial=0) < 0 or tokens.max(initial=0) >= self.shape.vocab_size:
                raise MinitronError(
                    f"scores: 'tokens' must be [n, s] ids from 0 to {self.shape.vocab_size - 1}, "
                    f"found size {list(tokens.shape)} with ids {tokens.min(initial=0)} to {tokens.max(initial=0)}"
                )
            own = self.calibration.get("own_samples", 0)
            if type(own) is not int or not 0 <= own <= len(tokens):
                raise MinitronError(f"scores: calibration.own_samples: expected 0 to {len(tokens)}, found {own!r:.80}")
            tokens.setflags(write=False)
            object.__setattr__(self, "tokens", tokens)
            size_of_weights = (2 * self.shape.num_layers, *tokens.shape)
            weights = _checked("sensitivity", self.sensitivity, size_of_weights).astype(np.float32)
            weights.setflags(write=False)
            object.__setattr__(self, "sensitivity", weights)
        if self.counted is not None:
            object.__setattr__(self, "counted", _checked_counted(self.counted, self.tokens))

    @property
    def published(self) -> Ranking:
        """The ranking ``minitron``."""
        return self.rankings[PUBLISHED]

    def ranked_by(self, ranking: str, axes: Iterable[str] = ()) -> Worth:
        """What :mod:`nemo_minitron.prune.choose` reads, worth being what ``ranking`` says of the units of ``axes``.

        Raises:
            MinitronError: a ranking that was not measured, or that leaves one of ``axes`` out; the others are named.
        """
        known = ", ".join(self.rankings)
        found = self.rankings.get(ranking)
        if found is None:
            key = (
                "calibration.reconstruction=true" if ranking == "reconstruction" else f"importance.metrics=[{ranking}]"
            )
            raise MinitronError(
                f"prune.ranking: these scores have no ranking '{ranking}', they have {known}; "
                f"run `minitron importance {key}`, or choose one of these"
            )
        for axis in in_order(axes):
            if axis not in found:
                others = [name for name, other in self.rankings.items() if axis in other]
                raise MinitronError(
                    f"prune.ranking: '{ranking}' ranks {', '.join(found)} and not '{axis}', which this target needs; "
                    f"rankings with it: {', '.join(others)}"
                )
        return Worth(ranking, self.block_influence, self.residual_cosine, **found)

    @property
    def own_samples(self) -> int:
        """How many of the last of ``tokens`` the model wrote itself; 0 in scores that do not say so."""
        return int(self.calibration.get("own_samples") or 0)

    def tokens_fingerprint(self) -> str | None:
        """SHA-256 of ``tokens``, and of ``counted`` where not all are; None without tokens."""
        if self.tokens is None:
            return None
        size = str(list(self.tokens.shape)).encode()
        digest = hashlib.sha256(size + np.ascontiguousarray(self.tokens).astype("<i4").tobytes())
        if self.counted is not None:
            digest.update(b"counted" + np.ascontiguousarray(self.counted).astype("i1").tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over arrays and metadata, independent of how they are stored.

        What format 1 could hold is named and ordered as there, so that the same scores have the same fingerprint in
        both formats, and plans and searches that refer to old ones still find them.
        """
        digest = hashlib.sha256(json.dumps(self._metadata(), sort_keys=True).encode())
        for name, array in self._digested():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array).astype("<f8").tobytes())
        if self.tokens is not None:
            digest.update(f"tokens {self.tokens_fingerprint()}".encode())
            digest.update(np.ascontiguousarray(self.sensitivity).astype("<f4").tobytes())
        return digest.hexdigest()

    def _digested(self) -> Iterable[tuple[str, np.ndarray]]:
        yield from self.published.items()
        yield from self._statistics().items()
        others = {f"{axis}_rank": array for axis, array in self.rankings.get("reconstruction", {}).items()}
        if self.stream_moment is not None:
            others["stream_moment"] = self.stream_moment
        yield from sorted(others.items())
        for ranking in sorted(self.rankings.keys() - {PUBLISHED, "reconstruction"}):
            yield from ((f"rankings/{ranking}/{axis}", array) for axis, array in self.rankings[ranking].items())

    def _statistics(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in statistic_sizes(self.shape)}

    def check_matches(self, source_fingerprint: str, shape: ModelShape) -> None:
        """Refuse scores that were measured on another checkpoint.

        Raises:
            MinitronError: naming what differs: sizes first, then weights.
        """
        self.shape.check_same(shape, "prune.scores: measured on")
        if self.source_fingerprint != source_fingerprint:
            raise MinitronError(
                f"prune.scores: measured on weights {self.source_fingerprint[:16]}, "
                f"but this checkpoint's are {source_fingerprint[:16]}; run `minitron importance` on it"
            )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files into an existing folder; the same scores give the same bytes.

        To make a whole output appear at once, write into a :class:`nemo_minitron.files.staging.Staging` folder.
        """
        folder = Path(folder)
        stored = StoredArrays(
            self.rankings, self._statistics(), self.stream_moment, self.tokens, self.sensitivity, self.counted
        ).by_name()
        np.savez(folder / NPZ, **stored)  # type: ignore[arg-type]
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint(), **self._metadata()}
        (folder / JSON).write_text(json.dumps(metadata, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], shape: ModelShape | None = None) -> Scores:
        """Read a scores folder; nothing in it is executed, and no array is read before its size is known to fit.

        Args:
            shape: of the model that is to be pruned, where that is known.

        Raises:
            MinitronError: missing, foreign, truncated or altered files, naming the file; scores of another shape.
        """
        path = Path(path)
        if not (path / JSON).is_file():
            raise MinitronError(f"prune.scores: '{path}' is not a scores folder (no {JSON} in it)")
        try:
            metadata = read_json(path / JSON, _MOST_METADATA)
            version = metadata.get("format")
            if version not in (FORMAT, FORMAT_1):
                raise MinitronError(f"'{path / JSON}': expected format '{FORMAT}'")
            found = ModelShape.from_dict(metadata["shape"])
            if shape is not None:
                found.check_same(shape, "measured on")
            with ArrayFile(path / NPZ, _MOST_BYTES) as file:
                arrays = read_arrays(file, found, version)
            scores = cls(
                shape=found,
                source_fingerprint=str(metadata["source_fingerprint"]),
                data_fingerprint=str(metadata["data_fingerprint"]),
                calibration=dict(metadata["calibration"]),
                rankings=arrays.rankings,
                stream_moment=arrays.stream_moment,
                tokens=arrays.tokens,
                sensitivity=arrays.sensitivity,
                counted=arrays.counted,
                **arrays.statistics,
            )
            fingerprint = scores.fingerprint()
        except LookupError as error:
            raise MinitronError(f"prune.scores: '{path / JSON}' lacks {error!s:.80}") from None
        except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise MinitronError(f"prune.scores: cannot read '{path}': {one_line(error)}") from None
        except MinitronError as error:
            raise MinitronError(f"prune.scores: {error}") from None
        if fingerprint != metadata.get("fingerprint"):
            raise MinitronError(f"prune.scores: '{path}' was altered or damaged (its fingerprint does not match)")
        return scores

    def _metadata(self) -> dict[str, object]:
        return {
            "source_fingerprint": self.source_fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "calibration": dict(self.calibration),
            "shape": self.shape.to_dict(),
        }


def with_tokens(scores: Scores | None, asked: str) -> Scores:
    """Scores that hold the calibration tokens on which ``asked``, a key and its value, has a loss measured.

    Raises:
        MinitronError: there are none, or they hold no tokens.
    """
    if scores is None or scores.tokens is None:
        raise MinitronError(
            f"{asked}: the scores hold no calibration tokens to measure the loss on; "
            "run `minitron importance calibration.reconstruction=true`"
        )
    return scores


def _checked_rankings(shape: ModelShape, rankings: Mapping[str, Ranking]) -> dict[str, Ranking]:
    """Copies of the rankings, the published one first, their axes in order."""
    sizes = axis_sizes(shape)
    check_count(rankings)
    for name, ranking in rankings.items():
        check_ranking(name)
        strange = [axis for axis in ranking if axis not in sizes]
        if strange or not ranking:
            raise MinitronError(
                f"scores: ranking '{name}': expected any of the axes {', '.join(sizes)}, "
                f"found {', '.join(map(str, strange)) or 'none'}"
            )
    if set(rankings.get(PUBLISHED, ())) != set(AXES):
        raise MinitronError(
            f"scores: expected the ranking '{PUBLISHED}' of {', '.join(AXES)}, found it missing or not whole"
        )
    order = sorted(rankings, key=lambda name: (name != PUBLISHED, name))
    return {
        name: {axis: _checked(f"{name}/{axis}", rankings[name][axis], sizes[axis]) for axis in in_order(rankings[name])}
        for name in order
    }


def _checked_counted(counted: np.ndarray, tokens: np.ndarray | None) -> np.ndarray | None:
    """A read-only bool copy of the size of the tokens; None where all count."""
    found, size = np.array(counted), None if tokens is None else tokens.shape
    if found.shape != size or not np.isin(found, (0, 1)).all():
        raise MinitronError(
            f"scores: 'counted' must be 0 or 1 for each of the tokens {list(size or ())}, "
            f"found size {list(found.shape)} with values up to {found.max(initial=0)}"
        )
    if not found[:, :-1].any():
        raise MinitronError("scores: 'counted': expected tokens whose loss counts, found none")
    found = found.astype(bool)
    found.setflags(write=False)
    return None if found.all() else found


def _checked(name: str, array: np.ndarray | None, size: tuple[int, ...]) -> np.ndarray:
    """A read-only float64 copy (frozen means that nobody else can write it) of the right size, finite."""
    array = np.array(array, dtype=np.float64)
    if array.shape != size:
        raise MinitronError(f"scores: '{name}' must have size {list(size)}, found {list(array.shape)}")
    if not np.isfinite(array).all():
        raise MinitronError(f"scores: '{name}' holds {int((~np.isfinite(array)).sum())} NaN or infinite values")
    array.setflags(write=False)
    return array

"""Importance scores of one checkpoint: full-size, layout-free arrays that any grid fills alike.

A scores folder holds ``scores.json`` (what was measured, of which weights, on which text: readable) and
``arrays.npz`` (numpy, never pickled). Legend of sizes: see :mod:`nemo_minitron.model.shape`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.arrays import ArrayFile
from nemo_minitron.files.text import one_line, read_json
from nemo_minitron.model.shape import ModelShape

FORMAT = "nemo_minitron.scores/1"
JSON, NPZ = "scores.json", "arrays.npz"
_MOST_TOKENS, _MOST_METADATA, _MOST_BYTES = 1 << 27, 1 << 20, 64 << 30
"""Calibration tokens; bytes of ``scores.json`` and of ``arrays.npz`` (Llama-3.1-405B on 8 million tokens: 11 GB)."""


def array_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Size of every array of :class:`Scores` for a model of this shape."""
    layers, hidden, ffn = shape.num_layers, shape.hidden_size, shape.ffn_hidden_size
    return {
        "ffn": (layers, ffn),
        "heads": (layers, shape.num_attention_heads),
        "groups": (layers, shape.num_query_groups),
        "hidden": (hidden,),
        "block_influence": (layers,),
        "residual_cosine": (layers + 1, layers + 1),
        "hidden_norms": (2 * layers + 1, hidden),
        "ffn_rms": (layers, ffn),
        "proj_rms": (layers, shape.proj_columns),
        "norm_rms": (2 * layers + 1, hidden),
        "residual_rms": (layers + 1, hidden),
    }


RANKINGS = ("minitron", "reconstruction")


def rank_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Size of every array of ``Scores.ranks``."""
    ranks = {f"{name}_rank": array_sizes(shape)[name] for name in ("ffn", "heads", "groups", "hidden")}
    return ranks | {"stream_moment": (shape.hidden_size, shape.hidden_size)}


@dataclass(frozen=True, eq=False)
class Scores:
    """What each unit of a model is worth; float64, unsharded, larger is worth more (except where said).

    Attributes:
        shape: shape of the scored model; ``source_fingerprint`` identifies its weights.
        data_fingerprint: identifies the calibration text; ``calibration`` holds the settings (samples, lengths, seed,
            aggregations, tokens counted) as plain JSON values.
        ffn: ``[L, F]``, heads: ``[L, A]`` (head a belongs to group ``a // r``), groups: ``[L, G]``, hidden: ``[H]``:
            the published metric of arXiv 2407.14679 section 2.2, ``hidden`` being the sum of ``hidden_norms``.
        block_influence: ``[L]``, ``1 - E[cos(x_l, x_{l+1})]``.
        residual_cosine: ``[L+1, L+1]``, mean over tokens of the cosine between the residual streams entering layers
            i and j (index L: leaving the last layer); what contiguous-block selection reads (arXiv 2403.17887).
        hidden_norms: ``[2L+1, H]``, the metric at the output of each norm: input and pre-MLP norm of layer 0, of
            layer 1, ..., final norm.
        ffn_rms ``[L, F]``, proj_rms ``[L, A*d]``, norm_rms ``[2L+1, H]``, residual_rms ``[L+1, H]``: root mean
            square over tokens of the same activations (the diagonal of their uncentred second moment), for rankings
            such as rms times downstream column norm.
        ranks: ``ffn_rank``, ``heads_rank``, ``groups_rank``, ``hidden_rank``, sized like their namesakes: worth once
            the others have been re-solved (:mod:`nemo_minitron.importance.reconstruction`), and ``stream_moment``
            ``[H, H]``, from which compensation turns the stream; empty if not measured.
        tokens: ``[n, s]`` int32, the calibration samples that ``ranks`` come from and compensation works with;
            sensitivity: ``[2L, n, s]`` float32, how much an error in the residual stream matters at each of them, after
            the attention and after the FFN of each layer. Both or neither.

    Raises:
        MinitronError: from the constructor, where an array has the wrong size or holds a NaN or infinity.
    """

    shape: ModelShape
    source_fingerprint: str
    data_fingerprint: str
    ffn: np.ndarray
    heads: np.ndarray
    groups: np.ndarray
    hidden: np.ndarray
    block_influence: np.ndarray
    residual_cosine: np.ndarray
    hidden_norms: np.ndarray
    ffn_rms: np.ndarray
    proj_rms: np.ndarray
    norm_rms: np.ndarray
    residual_rms: np.ndarray
    calibration: Mapping[str, Any] = field(default_factory=dict)
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict)
    tokens: np.ndarray | None = None
    sensitivity: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, size in array_sizes(self.shape).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), size))
        if self.ranks:
            sizes = rank_sizes(self.shape)
            if self.ranks.keys() != sizes.keys():
                raise MinitronError(f"scores: expected the ranks {', '.join(sizes)}, found {', '.join(self.ranks)}")
            ranks = {name: _checked(name, self.ranks[name], size) for name, size in sizes.items()}
            object.__setattr__(self, "ranks", ranks)
        if self.tokens is not None:
            tokens = np.array(self.tokens, dtype=np.int32)
            if tokens.ndim != 2 or tokens.min(initial=0) < 0 or tokens.max(initial=0) >= self.shape.vocab_size:
                raise MinitronError(
                    f"scores: 'tokens' must be [n, s] ids from 0 to {self.shape.vocab_size - 1}, "
                    f"found size {list(tokens.shape)} with ids {tokens.min(initial=0)} to {tokens.max(initial=0)}"
                )
            tokens.setflags(write=False)
            object.__setattr__(self, "tokens", tokens)
            size = (2 * self.shape.num_layers, *tokens.shape)
            weights = _checked("sensitivity", self.sensitivity, size).astype(np.float32)
            weights.setflags(write=False)
            object.__setattr__(self, "sensitivity", weights)

    def ranked_by(self, ranking: str) -> SimpleNamespace:
        """The arrays that :mod:`nemo_minitron.prune.choose` reads, worth being what ``ranking`` says.

        Raises:
            MinitronError: ``reconstruction`` where it was not measured.
        """
        names = ("ffn", "heads", "groups", "hidden", "block_influence", "residual_cosine")
        arrays = {name: getattr(self, name) for name in names}
        if ranking == "reconstruction":
            if not self.ranks:
                raise MinitronError(
                    "prune.ranking: these scores have no ranks by reconstruction; "
                    "run `minitron importance calibration.reconstruction=true`, or choose prune.ranking=minitron"
                )
            arrays |= {
                name.removesuffix("_rank"): array for name, array in self.ranks.items() if name.endswith("_rank")
            }
        return SimpleNamespace(**arrays)

    def tokens_fingerprint(self) -> str | None:
        """SHA-256 of ``tokens``; None without them."""
        if self.tokens is None:
            return None
        size = str(list(self.tokens.shape)).encode()
        return hashlib.sha256(size + np.ascontiguousarray(self.tokens).astype("<i4").tobytes()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over arrays and metadata, independent of how they are stored."""
        digest = hashlib.sha256(json.dumps(self._metadata(), sort_keys=True).encode())
        for name in array_sizes(self.shape):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(getattr(self, name)).astype("<f8").tobytes())
        for name in sorted(self.ranks):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self.ranks[name]).astype("<f8").tobytes())
        if self.tokens is not None:
            digest.update(f"tokens {self.tokens_fingerprint()}".encode())
            digest.update(np.ascontiguousarray(self.sensitivity).astype("<f4").tobytes())
        return digest.hexdigest()

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
        arrays = {name: getattr(self, name) for name in array_sizes(self.shape)} | dict(self.ranks)
        if self.tokens is not None:
            arrays |= {"tokens": self.tokens, "sensitivity": self.sensitivity}  # type: ignore[dict-item]
        np.savez(folder / NPZ, **arrays)
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
            if metadata.get("format") != FORMAT:
                raise MinitronError(f"'{path / JSON}': expected format '{FORMAT}'")
            found = ModelShape.from_dict(metadata["shape"])
            if shape is not None:
                found.check_same(shape, "measured on")
            with ArrayFile(path / NPZ, _MOST_BYTES) as arrays:
                scores = cls._from_arrays(arrays, found, metadata)
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

    @classmethod
    def _from_arrays(cls, arrays: ArrayFile, shape: ModelShape, metadata: Mapping[str, Any]) -> Scores:
        values = {name: _bounded(arrays, name, size) for name, size in array_sizes(shape).items()}
        ranks = {name: _bounded(arrays, name, size) for name, size in rank_sizes(shape).items() if name in arrays.names}
        tokens = sensitivity = None
        if "tokens" in arrays.names:
            size = arrays.describe("tokens")[1]
            if math.prod(size) > _MOST_TOKENS:
                raise MinitronError(f"array 'tokens' must have at most {_MOST_TOKENS} values, found {list(size)}")
            tokens = _bounded(arrays, "tokens", size)
            sensitivity = _bounded(arrays, "sensitivity", (2 * shape.num_layers, *size))
        return cls(
            shape=shape,
            source_fingerprint=str(metadata["source_fingerprint"]),
            data_fingerprint=str(metadata["data_fingerprint"]),
            calibration=dict(metadata["calibration"]),
            ranks=ranks,
            tokens=tokens,
            sensitivity=sensitivity,
            **values,
        )

    def _metadata(self) -> dict[str, Any]:
        return {
            "source_fingerprint": self.source_fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "calibration": dict(self.calibration),
            "shape": dataclasses.asdict(self.shape),
        }


def _checked(name: str, array: Any, size: tuple[int, ...]) -> np.ndarray:
    """A read-only float64 copy (frozen means that nobody else can write it) of the right size, finite."""
    array = np.array(array, dtype=np.float64)
    if array.shape != size:
        raise MinitronError(f"scores: '{name}' must have size {list(size)}, found {list(array.shape)}")
    if not np.isfinite(array).all():
        raise MinitronError(f"scores: '{name}' holds {int((~np.isfinite(array)).sum())} NaN or infinite values")
    array.setflags(write=False)
    return array


def _bounded(arrays: ArrayFile, name: str, size: tuple[int, ...]) -> np.ndarray:
    """One array, its stored type and size checked before it is allocated."""
    dtype, found = arrays.describe(name)
    if found != size:
        raise MinitronError(f"array '{name}' must have size {list(size)}, found {list(found)}")
    if dtype.kind not in "fi" or dtype.itemsize > 8:
        raise MinitronError(f"array '{name}' must hold numbers of at most 8 bytes, found {dtype!s:.80}")
    return arrays.get(name)

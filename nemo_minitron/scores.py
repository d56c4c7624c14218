"""Importance scores of one checkpoint: full-size, layout-free arrays that any grid fills alike.

A scores folder holds ``scores.json`` (what was measured, of which weights, on which text: readable) and
``arrays.npz`` (numpy, never pickled). Legend of sizes: see :mod:`nemo_minitron.shape`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.shape import ModelShape

FORMAT = "nemo_minitron.scores/1"
JSON, NPZ = "scores.json", "arrays.npz"


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

    def __post_init__(self) -> None:
        for name, size in array_sizes(self.shape).items():
            array = np.array(getattr(self, name), dtype=np.float64)  # a copy: frozen means nobody else can write it
            if array.shape != size:
                raise MinitronError(f"scores: '{name}' must have size {list(size)}, found {list(array.shape)}")
            if not np.isfinite(array).all():
                raise MinitronError(f"scores: '{name}' holds {int((~np.isfinite(array)).sum())} NaN or infinite values")
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def fingerprint(self) -> str:
        """SHA-256 over arrays and metadata, independent of how they are stored."""
        digest = hashlib.sha256(json.dumps(self._metadata(), sort_keys=True).encode())
        for name in array_sizes(self.shape):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(getattr(self, name)).astype("<f8").tobytes())
        return digest.hexdigest()

    def check_matches(self, source_fingerprint: str, shape: ModelShape) -> None:
        """Refuse scores that were measured on another checkpoint.

        Raises:
            MinitronError: naming what differs: sizes first, then weights.
        """
        for one in dataclasses.fields(shape):
            mine, theirs = getattr(self.shape, one.name), getattr(shape, one.name)
            if mine != theirs:
                raise MinitronError(
                    f"prune.scores: measured on a model with {one.name} {mine}, but this checkpoint has {theirs}"
                )
        if self.source_fingerprint != source_fingerprint:
            raise MinitronError(
                f"prune.scores: measured on weights {self.source_fingerprint[:16]}, "
                f"but this checkpoint's are {source_fingerprint[:16]}; run `minitron importance` on it"
            )

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the two files into an existing folder; the same scores give the same bytes.

        To make a whole output appear at once, write into a ``checkpoint.staging.Staging`` folder.
        """
        folder = Path(folder)
        np.savez(folder / NPZ, **{name: getattr(self, name) for name in array_sizes(self.shape)})
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint(), **self._metadata()}
        (folder / JSON).write_text(json.dumps(metadata, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read a scores folder; nothing in it is executed.

        Raises:
            MinitronError: missing, foreign, truncated or altered files, naming the file.
        """
        path = Path(path)
        if not (path / JSON).is_file():
            raise MinitronError(f"prune.scores: '{path}' is not a scores folder (no {JSON} in it)")
        try:
            metadata = json.loads((path / JSON).read_text())
            if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
                raise MinitronError(f"'{path / JSON}': expected format '{FORMAT}'")
            shape = ModelShape.from_dict(metadata["shape"])
            with np.load(path / NPZ, allow_pickle=False) as arrays:
                values = {name: _bounded(arrays, name, size, path) for name, size in array_sizes(shape).items()}
            scores = cls(
                shape=shape,
                source_fingerprint=str(metadata["source_fingerprint"]),
                data_fingerprint=str(metadata["data_fingerprint"]),
                calibration=metadata["calibration"],
                **values,
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise MinitronError(f"prune.scores: cannot read '{path}': {error}") from None
        if scores.fingerprint() != metadata.get("fingerprint"):
            raise MinitronError(f"prune.scores: '{path}' was altered or damaged (its fingerprint does not match)")
        return scores

    def _metadata(self) -> dict[str, Any]:
        return {
            "source_fingerprint": self.source_fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "calibration": dict(self.calibration),
            "shape": dataclasses.asdict(self.shape),
        }


def _bounded(arrays: Any, name: str, size: tuple[int, ...], path: Path) -> np.ndarray:
    """One array, its stored size checked from the zip directory before it is allocated."""
    member = f"{name}.npy"
    if member not in arrays.zip.namelist():
        raise MinitronError(f"prune.scores: '{path / NPZ}' has no array '{name}'")
    expected = 8 * int(np.prod(size))
    if arrays.zip.getinfo(member).file_size > expected + 4096:
        raise MinitronError(f"prune.scores: '{path / NPZ}': array '{name}' is larger than {list(size)} float64")
    return arrays[name]

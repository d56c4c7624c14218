"""Scores of drawn numbers, and folders of format 1 as earlier versions wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo_minitron.importance.scores import Scores
from nemo_minitron.importance.scores_format import AXES, axis_sizes, statistic_sizes
from nemo_minitron.model.shape import ModelShape

Draw = Callable[[tuple[int, ...]], np.ndarray]


def made(shape: ModelShape, draw: Draw, *, reconstruction: bool = False, **changes: Any) -> Scores:
    """Scores whose arrays are what ``draw`` gives for their sizes; ``changes`` are fields of ``Scores``."""
    names = ("minitron", "reconstruction") if reconstruction else ("minitron",)
    moment = (shape.hidden_size, shape.hidden_size)
    fields: dict[str, Any] = {
        "source_fingerprint": "f" * 64,
        "data_fingerprint": "d" * 64,
        "rankings": {name: {axis: draw(size) for axis, size in axis_sizes(shape).items()} for name in names},
        **{name: draw(size) for name, size in statistic_sizes(shape).items()},
        "stream_moment": draw(moment) if reconstruction else None,
    }
    return Scores(**{"shape": shape, **fields, **changes})


FIRST = (*AXES, "block_influence", "residual_cosine", "hidden_norms", "ffn_rms", "proj_rms", "norm_rms", "residual_rms")
"""Arrays of format 1 in the order in which its fingerprint took them."""


def write_format_1(scores: Scores, folder: Path, **changes: np.ndarray) -> str:
    """A folder as the version before wrote it, by a writer and a fingerprint of its own; returns the fingerprint.

    ``changes`` replace arrays once the fingerprint is taken.
    """
    published = scores.rankings["minitron"]
    arrays = {name: published[name] if name in AXES else getattr(scores, name) for name in FIRST}
    ranks = {}
    if "reconstruction" in scores.rankings:
        ranks = {f"{axis}_rank": array for axis, array in scores.rankings["reconstruction"].items()}
        ranks["stream_moment"] = scores.stream_moment
    metadata = {
        "source_fingerprint": scores.source_fingerprint,
        "data_fingerprint": scores.data_fingerprint,
        "calibration": dict(scores.calibration),
        "shape": scores.shape.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in (*FIRST, *sorted(ranks)):
        digest.update(name.encode() + (arrays | ranks)[name].astype("<f8").tobytes())
    arrays |= ranks
    if scores.tokens is not None:
        size = str(list(scores.tokens.shape)).encode()
        tokens = hashlib.sha256(size + scores.tokens.astype("<i4").tobytes()).hexdigest()
        digest.update(f"tokens {tokens}".encode() + scores.sensitivity.astype("<f4").tobytes())
        arrays |= {"tokens": scores.tokens, "sensitivity": scores.sensitivity}
    np.savez(folder / "arrays.npz", **arrays | changes)
    whole = {"format": "nemo_minitron.scores/1", "fingerprint": digest.hexdigest(), **metadata}
    (folder / "scores.json").write_text(json.dumps(whole, indent=2) + "\n")
    return digest.hexdigest()

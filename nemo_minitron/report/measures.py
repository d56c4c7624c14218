"""Numbers of a run that both the command line and the page show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

ROLES = ("teacher", "pruned", "distilled")
COUNTS = (
    "num_parameters",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
)
MEASURED = ("val_loss", "perplexity", "peak_memory_bytes")
_TEXT = re.compile("[0-9a-f]{12}")
"""What names the tokens that were read."""
SMALLEST, LARGEST = 1e-9, 1e18
"""Bounds of the numbers that a page takes from a file; a quotient of two of them fits a float."""


def gap_closed(metrics: Mapping[str, Mapping[str, Any]]) -> float | None:
    """(pruned − distilled) / (pruned − teacher) in val_loss; None without all three, where pruning cost nothing, or
    where they were not measured alike."""
    if not all("val_loss" in metrics.get(role, {}) for role in ROLES) or not measured_alike(metrics):
        return None
    teacher, pruned, distilled = (metrics[role]["val_loss"] for role in ROLES)
    return (pruned - distilled) / (pruned - teacher) if pruned > teacher else None


def measured_alike(metrics: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the losses of several models are of as many tokens each and of the same ones, as far as they say.

    Those of other lengths, samples or texts are no measure of what was done to a model.
    """
    return _alike(metrics, "tokens") and _alike(metrics, "text")


def _alike(metrics: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return len({found[name] for found in metrics.values() if name in found and "val_loss" in found}) <= 1


def unlike(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Words for losses that were not :func:`measured_alike`."""
    counts = ", ".join(f"{role} {found['tokens']:,.0f}" for role, found in metrics.items() if "tokens" in found)
    if _alike(metrics, "tokens"):
        return "The evaluations are of different texts: their losses cannot be compared"
    return f"The evaluations are of different numbers of tokens ({counts}): their losses cannot be compared"


def number(value: object) -> float | None:
    """A number of a file's, positive or 0 and of a size that can be; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value < LARGEST else None  # False for NaN, too


def numbers(evaluation: object) -> dict[str, float]:
    """What of an evaluation's JSON is a number that the page knows, of a size that can be; counts are whole.

    What names the text becomes a number as well.
    """
    if not isinstance(evaluation, Mapping):
        return {}
    found: dict[str, float] = {}
    for name in (*COUNTS, *MEASURED, "tokens"):
        value = number(evaluation.get(name))
        if value is None or (name in COUNTS and not isinstance(value, int)):
            continue
        if name == "val_loss" or value > SMALLEST:
            found[name] = value
    text = evaluation.get("text")
    if isinstance(text, str) and _TEXT.fullmatch(text):
        found["text"] = int(text, 16)
    if "val_loss" in found:
        found.setdefault("perplexity", math.exp(min(found["val_loss"], 40.0)))
    return found


def size(count: float) -> str:
    """A count of parameters in words: ``134.5 million``."""
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}" if unit >= 1e9 else f"{count / unit:,.1f} {name}"
    return f"{count:,.0f}"


def duration(seconds: float) -> str:
    """``27 s``, ``11 min 3 s`` or ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"

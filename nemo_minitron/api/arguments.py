"""Arguments that several calls have in common, as keys of their commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.api.results import PathLike

Config = dict[str, Any]
"""Values by their dotted keys; None leaves one to its command."""

Text = PathLike | Sequence[float | PathLike]
"""A prefix of token files, or several, each behind its weight: ``[0.7, "data/books", 0.3, "data/code"]``."""


def beside(model: PathLike, what: str, ending: str = ".nemo") -> Path:
    """Name of what is made of a model: ``NAME.WHAT`` beside it."""
    path = Path(model)
    return path.with_name(f"{path.name.removesuffix('.nemo')}.{what}{ending}")


def data(text: Text) -> Any:
    """A prefix, or a weighted list of them, as NeMo's keys take it."""
    if isinstance(text, (str, os.PathLike)):
        return os.fspath(text)
    return [item if isinstance(item, (int, float)) else os.fspath(item) for item in text]


def machine(devices: int | str | None, precision: int | str | None) -> Config:
    """Keys of the processes of a machine and of what they compute in."""
    return {"trainer.devices": devices, "trainer.precision": precision}

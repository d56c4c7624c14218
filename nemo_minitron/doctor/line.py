"""One line of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Line:
    """What was found of one thing.

    Attributes:
        level: ``problem`` stops every command, ``note`` costs something, ``ok`` costs nothing.
        name: what was looked at; ``text``: what was found, and what it costs.
    """

    level: Level
    name: str
    text: str


GIB = 2**30


def gib(size: float) -> str:
    """Bytes in GiB, for people."""
    return f"{size / GIB:,.1f} GiB"

"""What a line of progress says: its parts, which of them fit, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

NAME, COUNT, NOW, LOSS, LEFT, VALIDATION, PLACE, RATE, OTHER, WHOLE, WORK = range(11)
"""Importance of a line's parts, the first is kept longest."""

_SIZES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_LEAST_NAME = 3


@dataclass(frozen=True)
class Part:
    """A piece of a line that is shown whole or not at all.

    Attributes:
        importance: parts with a larger one are dropped before it.
        style: of rich's, on a terminal.
        after: what separates it from the next part.
    """

    text: str
    importance: int
    style: str = ""
    after: str = "  "


def fit(parts: Sequence[Part], width: int, measure: Callable[[str], int] = len) -> list[Part]:
    """Those of ``parts`` that fit into ``width`` columns, in their order; the least important are dropped first.

    The most important one is a name: where not even it fits, it is cut.

    Args:
        measure: columns that a text takes.
    """
    kept = list(parts)
    while len(kept) > 1 and measure(joined(kept)) > width:
        kept.remove(max(kept, key=lambda part: part.importance))
    if kept and measure(kept[0].text) > width:
        text = kept[0].text
        while text and measure(text) + 1 > width:
            text = text[:-1]
        kept[0] = Part(f"{text}…" if len(text) >= _LEAST_NAME else text, NAME, kept[0].style)
    return kept


def joined(parts: Sequence[Part]) -> str:
    """The line of ``parts``."""
    return "".join(part.text + part.after for part in parts[:-1]) + "".join(part.text for part in parts[-1:])


def counted(done: float, total: float, unit: str) -> str:
    """``step 12/40``; of bytes (unit ``B``) ``1.2/16.1 GB``; of a share (no unit) ``37%``."""
    if not unit:
        return f"{100 * done / total:.0f}%" if total else "100%"
    if unit == "B":
        name, size = next(((name, size) for name, size in _SIZES if total >= size), _SIZES[-1])
        return f"{done / size:.1f}/{total / size:.1f} {name}"
    return f"{unit} {done:,.0f}/{total:,.0f}"


def clock(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:02:10`` or ``2d 03:04:05``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if not hours:
        return f"{minute}:{second:02}"
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


class Pace:
    """Time per unit, from which the time that is left follows.

    The first unit is not counted once there is a second: it warms up, compiles, opens files. All that lies between
    units is, validations too.

    Args:
        now: in seconds, of any clock. done: units that were there before, which took no time.
    """

    def __init__(self, now: float, done: float) -> None:
        self.began = now
        self._from = self._first = (now, done)

    def count(self, now: float, done: float) -> None:
        """Take note of a unit."""
        if self._first is self._from and done > self._from[1]:
            self._first = (now, done)

    def left(self, now: float, done: float, total: float) -> float | None:
        """Seconds until ``total``; None before the first unit."""
        since, before = self._first if done > self._first[1] else self._from
        if done <= before:
            return None
        return (now - since) / (done - before) * max(0.0, total - done)

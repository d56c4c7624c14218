"""A bar with the remaining time on stderr: one that moves in a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Seconds between two lines of a log; what takes less writes none."""


class _Lines:
    """A log for tqdm: what it would write over its last line becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: float, description: str, unit: str, *, show: bool = True, **layout: Any) -> tqdm:
    """A tqdm bar of ``total`` units, a context; ``update`` counts.

    Args:
        show: false on processes that are not the job's first one.
        layout: further arguments of tqdm's, about how numbers are written.
    """
    options = {"total": total, "desc": description, "unit": unit, "disable": not show, **layout}
    if sys.stderr.isatty():
        return tqdm(**options)
    return tqdm(
        **options, file=_Lines(sys.stderr), mininterval=LOG_SECONDS, maxinterval=2 * LOG_SECONDS, miniters=1,
        delay=LOG_SECONDS, ascii=True, ncols=100,
    )  # fmt: skip

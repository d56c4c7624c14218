"""Whether a line on stderr can be written anew, and how one that was left there is cleared. Standard library only."""

from __future__ import annotations

import os
import sys

_CANNOT_MOVE = ("dumb", "unknown", "")


def moves() -> bool:
    """Whether stderr is a terminal whose lines can be written anew; a file, a pipe and ``TERM=dumb`` are not."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in _CANNOT_MOVE


def clear_line() -> None:
    """Clear what a process that died may have left of its line of progress, before something else is said."""
    if moves():
        sys.stderr.write("\r\x1b[2K")
        sys.stderr.flush()

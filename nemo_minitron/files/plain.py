"""Text of another's as it may be shown, in a terminal as on a page: every mark visible, of bounded length."""

from __future__ import annotations

import re

# Control characters, marks of no width, of direction, or of a line's end other than \n, halves of surrogate pairs
_UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb]"
)


def plain(text: str) -> str:
    """Every character that a reader would not see, or that has no UTF-8, is written as its escape."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def short(value: object, most: int = 200) -> str | None:
    """A text that a file gives where one is expected, on one line and cut to ``most``; None for anything else."""
    if not isinstance(value, str):
        return None
    line = " ".join(plain(value[: 4 * most]).split())
    return (line if len(line) <= most else line[: most - 1] + "…") or None

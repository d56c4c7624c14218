"""The code blocks of docs/extending.md, as its readers save them."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"


def example(section: str) -> str:
    """The first Python block below the heading ``## section``."""
    below = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"^```python\n(.*?)^```$", below, flags=re.DOTALL | re.MULTILINE)
    assert block is not None, section
    return block[1]


def lines_of_code(text: str) -> int:
    """Lines that are not empty."""
    return sum(bool(line.strip()) for line in text.splitlines())

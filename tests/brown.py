"""Files that look like the Brown corpus's, of CPython's own text."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics


def tagged_topics(folder: Path, count: int) -> Path:
    """``ca01``, ``ca02``, …: 400 tagged words each, the topics of pydoc from another place on; at most 88 files."""
    words = " ".join(topics[name] for name in sorted(topics)).split()
    folder.mkdir()
    for at in range(count):
        name = f"c{'ab'[at // 44]}{at % 44 + 1:02d}"
        (folder / name).write_text(" ".join(f"{word}/nn" for word in words[300 * at :][:400]))
    return folder

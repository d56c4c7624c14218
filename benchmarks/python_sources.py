"""Python sources that ship with CPython as a data set of two splits, for ``minitron preprocess``.

    python benchmarks/python_sources.py FOLDER

A document is a file of the standard library of the interpreter that runs this, tests left out. Validation is whole
packages that training never sees, so that no document of one split quotes a neighbour in the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from pathlib import Path

HELD_OUT = ("tomllib", "zoneinfo")
"""Packages of the validation split."""
_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "encodings")


def documents(library: Path) -> dict[str, list[str]]:
    """Texts of each split, in sorted order of their files."""
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).parts
        if any(part in _LEFT_OUT for part in parts):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            splits["validation" if parts[0] in HELD_OUT else "train"].append(text)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in documents(Path(sysconfig.get_paths()["stdlib"])).items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
        print(f"{split}: {len(texts)} files, {sum(map(len, texts)):,} characters, sha256 {digest}")


if __name__ == "__main__":
    main()

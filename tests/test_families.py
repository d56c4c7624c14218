"""The tables of model families in README.md and docs are what the families say, and what the reader does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def families():
    spec = importlib.util.spec_from_file_location("docs_families", ROOT / "docs" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(families):
    for path, table in families.TABLES.items():
        assert path.read_text(encoding="utf-8") == families.written(path, table()), "run: python docs/families.py"


def test_every_family_of_the_package_has_a_row(families):
    files = {path.stem for path in (ROOT / "nemo_minitron" / "model" / "families").glob("[!_]*.py")}
    rows = [line.split(" | ")[0].removeprefix("| ") for line in families.short_table().splitlines()[2:]]
    assert set(rows[: len(files)]) == files


def test_the_reader_is_asked(families):
    llama, mistral, qwen2 = (families.FAMILIES.get(name) for name in ("llama", "mistral", "qwen2"))
    assert families.accepts(llama) and not families.accepts(llama, sliding_window=64)
    assert families.accepts(mistral, sliding_window=64)
    assert families.accepts(qwen2, sliding_window=64) and not families.accepts(qwen2, use_sliding_window=True)
    assert families.kinds_of_rope(llama) == ["default", "llama3", "linear"]

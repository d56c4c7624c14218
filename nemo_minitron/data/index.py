"""Megatron's ``.idx``, read with every number in it checked against the sizes of ``.idx`` and ``.bin``."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nemo_minitron.errors import MinitronError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {code: np.dtype(name) for code, name in enumerate(["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"], start=1)}


class Index(NamedTuple):
    """What an ``.idx`` says of its ``.bin``.

    Attributes:
        dtype: of a token.
        lengths: int32, tokens of each sequence.
        ends: int64, one past the last token of each document.
    """

    dtype: np.dtype
    lengths: np.ndarray
    ends: np.ndarray


def read_index(data: Path, index: Path) -> Index:
    """Read an ``.idx``; what is allocated is at most a few times its size.

    Megatron's reader believes the counts and follows the pointers: here each sequence must follow the one before, and
    the last end with the ``.bin``.

    Raises:
        MinitronError: not an index, one that is truncated or too long, or that belongs to another ``.bin``.
    """
    said = f"{index}: expected a Megatron index, found "
    with index.open("rb") as file:
        head = file.read(_HEADER.size)
    total = index.stat().st_size
    if len(head) < _HEADER.size:
        raise MinitronError(f"{said}{len(head)} bytes")
    magic, version, code, sequences, marks = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1:
        raise MinitronError(f"{said}a foreign file or another version of one")
    if code not in _DTYPES or _DTYPES[code].kind == "f":
        raise MinitronError(f"{said}tokens of kind {code}, which are no whole numbers")
    expected = _HEADER.size + 12 * sequences + 8 * marks
    if total != expected:
        raise MinitronError(f"{said}{total} bytes, where its {sequences} sequences and {marks} marks take {expected}")
    if not sequences:
        raise MinitronError(f"{said}no sequence in it")
    with index.open("rb") as file:
        file.seek(_HEADER.size)
        lengths, pointers, documents = (
            np.fromfile(file, dtype, count) for dtype, count in (("<i4", sequences), ("<i8", sequences), ("<i8", marks))
        )
    if lengths.min() < 0:
        raise MinitronError(f"{said}a sequence of {lengths.min()} tokens")
    if not marks or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise MinitronError(f"{said}documents that do not follow one another up to sequence {sequences}")
    dtype = _DTYPES[code]
    begins = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    tokens = int(begins[-1]) * dtype.itemsize
    if tokens != data.stat().st_size:
        raise MinitronError(f"{data}: its index says {tokens} bytes, found {data.stat().st_size}")
    if (pointers != begins[:-1] * dtype.itemsize).any():
        raise MinitronError(f"{said}sequences that do not follow one another in {data.name}")
    return Index(dtype, lengths, begins[documents[1:]])

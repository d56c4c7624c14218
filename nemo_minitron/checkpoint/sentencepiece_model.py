"""The parts of a sentencepiece ``.model`` that its rules are made of, read as data.

The file is one protocol buffer. Its own Python module needs a newer protobuf than NeMo has, so the few fields are read
by the wire format: a number of the field and its kind, then a varint, four or eight bytes, or a length and bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

UNIGRAM, BPE = 1, 2
"""Kinds of model that make pieces of words; 3 are words, 4 characters."""
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Kinds of piece; 1 are the common ones, 5 unused, 6 bytes."""


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; the larger the score, the earlier it is merged, or the likelier it is."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencepieceModel:
    """Vocabulary and rules.

    Attributes:
        kind: one of the kinds above. ids: of ``unk``, ``bos``, ``eos`` and ``pad``, -1 for none.
        byte_fallback: whether what is in no piece becomes its bytes. suffix: whether spaces end words.
        charsmap: compiled rules for characters, empty for none. dummy_prefix: whether a space is put before a text.
        squeeze: whether spaces at the ends and repeated ones are dropped. escape: whether spaces become ``▁``.
    """

    pieces: tuple[Piece, ...]
    kind: int
    ids: dict[str, int]
    byte_fallback: bool
    suffix: bool
    charsmap: bytes
    dummy_prefix: bool
    squeeze: bool
    escape: bool


def parse(data: bytes) -> SentencepieceModel:
    """Read a serialised ModelProto; what is absent has sentencepiece's defaults.

    Raises:
        ValueError: not one.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:
            entry = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(entry.get(2, b"\0\0\0\0")))[0]
            pieces.append(Piece(_bytes(entry.get(1, b"")).decode(), score, _signed(entry.get(3, 1))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    defaults = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}
    return SentencepieceModel(
        pieces=tuple(pieces),
        kind=_signed(trainer.get(3, UNIGRAM)),
        ids={name: _signed(trainer.get(number, default)) for name, (number, default) in defaults.items()},
        byte_fallback=bool(trainer.get(35, 0)),
        suffix=bool(trainer.get(24, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        escape=bool(normalizer.get(5, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message, in the order of the file."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                length = 8
            case 2:
                length, at = _varint(data, at)
            case 5:
                length = 4
            case kind:
                raise ValueError(f"a field of kind {kind}")
        if at + length > len(data):
            raise ValueError("a field that is longer than its message")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a number that is cut short")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("a number that does not end")


def _signed(value: int | bytes) -> int:
    """An int32, which is written as 64 bits where it is negative."""
    if not isinstance(value, int):
        raise ValueError("bytes where a number is expected")
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes are expected")
    return value

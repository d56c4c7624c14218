"""Entries of a zip that stores them as they are: what ``torch.save`` and ``numpy.savez`` write (PKWARE's APPNOTE)."""

from __future__ import annotations

import struct
from collections.abc import Callable

_ENTRY_BYTES = 1 << 10
_END, _END64, _LOCATOR64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF

Read = Callable[[int, int], bytes]
"""``read(start, size)``: bytes of the file; raises what its owner likes outside of its bounds."""


class ZipError(Exception):
    """What is wrong with a zip."""


def entries_of(read: Read, length: int, limit: int) -> dict[str, tuple[int, int]]:
    """(start, size) of each entry of a zip of ``length`` bytes, which has at most ``limit`` of them.

    Raises:
        ZipError: not a zip, too many entries, one of them twice, compressed or outside of the zip.
    """
    try:
        count, size, start = _directory(read, length)
        if count > limit or size > count * _ENTRY_BYTES or start + size > length:
            raise ZipError(f"expected a zip of at most {limit} entries inside the file, found another")
        data, at = read(start, size), 0
        entries: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            name, place, at = _entry(read, length, data, at)
            if name in entries:
                raise ZipError(f"entry '{name}' must be there once, found twice")
            entries[name] = place
        return entries
    except (struct.error, UnicodeDecodeError) as error:
        raise ZipError(f"expected a zip, found damage: {error}") from None


def _directory(read: Read, length: int) -> tuple[int, int, int]:
    """Number of entries, bytes and start of the central directory."""
    tail = read(max(0, length - _END.size), min(length, _END.size))
    magic, _, _, _, count, size, start, _ = _END.unpack(tail)
    if magic != b"PK\x05\x06":
        raise ZipError("expected a zip, found no end of one")
    if count == _FULL16 or _FULL32 in (size, start):
        at = length - _END.size - _LOCATOR64.size
        magic, _, at, _ = _LOCATOR64.unpack(read(max(0, at), _LOCATOR64.size))
        if magic != b"PK\x06\x07" or at + _END64.size > length:
            raise ZipError("expected a zip, found no end of one")
        magic, _, _, _, _, _, _, count, size, start = _END64.unpack(read(at, _END64.size))
        if magic != b"PK\x06\x06":
            raise ZipError("expected a zip, found no end of one")
    return count, size, start


def _entry(read: Read, length: int, data: bytes, at: int) -> tuple[str, tuple[int, int], int]:
    """Name, (start, size) of the data, and where the next entry of the directory starts."""
    fields = _CENTRAL.unpack_from(data, at)
    magic, flags, method, packed, size, name_length, extra_length, comment_length = (
        fields[0], fields[3], fields[4], fields[8], fields[9], fields[10], fields[11], fields[12],
    )  # fmt: skip
    header = fields[16]
    at += _CENTRAL.size
    name = data[at : at + name_length].decode("utf-8")
    extra = data[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length + comment_length
    if magic != b"PK\x01\x02" or at > len(data):
        raise ZipError("expected a zip, found a damaged directory")
    size, packed, header = _wide(extra, size, packed, header)
    if method != 0 or flags & 1 or packed != size:
        raise ZipError(f"entry '{name}': it is compressed or encrypted")
    if header + _LOCAL.size > length:
        raise ZipError(f"entry '{name}': it lies outside of the file")
    local = _LOCAL.unpack(read(header, _LOCAL.size))
    start = header + _LOCAL.size + local[9] + local[10]
    if local[0] != b"PK\x03\x04" or start + size > length:
        raise ZipError(f"entry '{name}': it lies outside of the file")
    return name, (start, size), at


def _wide(extra: bytes, *values: int) -> list[int]:
    """Values of which those that are all ones stand, in order, as 8 bytes in the zip64 field of ``extra``."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        field, at = extra[at + 4 : at + 4 + length], at + 4 + length
        if kind == 1:
            wide = iter([value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])])
            return [next(wide, value) if value == _FULL32 else value for value in values]
    return list(values)

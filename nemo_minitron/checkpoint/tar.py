"""Headers of an untrusted tar: which members it has and where they lie, without extracting or trusting anything.

``tarfile`` follows what a header says (it reads a long name of any declared size into memory, recurses from header to
header, walks backwards over a negative size), so headers are walked here, with its parser for one block alone.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from nemo_minitron.errors import MinitronError

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 20_000
_MAX_EXTENSION, _MAX_RECORDS = 1 << 16, 64  # bytes of a long name or of pax records; pax records of one header
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


def read_members(path: Path, file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """(offset, size) of each plain file of a ustar, GNU or pax archive, by its name without ``./``.

    Args:
        path: of the archive, for messages. file: seekable; its position is changed.

    Raises:
        MinitronError: not a tar, truncated, or a hostile member: an absolute path, a ``..``, a link, a device, a
            sparse file, a name given twice, absurd sizes or numbers of members, text in a header that is not
            printable.
    """
    total, at = file.seek(0, io.SEEK_END), 0
    following = _Extension()
    members: dict[str, tuple[int, int]] = {}
    while at + BLOCK <= total:
        file.seek(at)
        block = file.read(BLOCK)
        if block.count(0) == BLOCK:
            return members
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise MinitronError(f"{path}: expected a .nemo (tar), found at byte {at}: {error}") from None
        at += BLOCK
        name = following.pax.get("path") or following.long_name or info.name
        size = _size(path, name, following.pax.get("size", info.size))
        for text in (info.name, info.linkname, info.uname, info.gname):  # of a header that only names another, too
            _check_text(path, name, text)
        if info.type in _EXTENSIONS:
            _check_name(path, info.name)
            if not 0 <= info.size <= min(_MAX_EXTENSION, total - at):
                raise MinitronError(
                    f"{path}: expected at most {_MAX_EXTENSION} bytes of header extension before member "
                    f"{name!r}, found {info.size}"
                )
            following.read(path, info.type, file.read(info.size))
            at += _padded(info.size)
            continue
        sparse = any(key.startswith("GNU.sparse") for key in following.pax)
        following = _Extension()
        _check_name(path, name)
        if info.isdir():
            continue
        if info.type not in _PLAIN or sparse:
            raise MinitronError(f"{path}: member '{name}' must be a plain file, found a link, device or sparse file")
        name = PurePosixPath(name).as_posix()
        if name in members:
            raise MinitronError(f"{path}: member '{name}' must be there once, found twice")
        if at + size > total:
            raise MinitronError(f"{path}: the archive is truncated inside member '{name}'")
        if len(members) >= MAX_MEMBERS:
            raise MinitronError(f"{path}: expected at most {MAX_MEMBERS} members, found more from '{name}' on")
        members[name] = (at, size)
        at += _padded(size)
    if not members:
        raise MinitronError(f"{path}: expected a .nemo (tar), found no member")
    raise MinitronError(
        f"{path}: the archive is truncated, found an unexpected end of data instead of the mark of its end"
    )


@dataclass
class _Extension:
    """What headers before a member say of it."""

    pax: dict[str, str] = field(default_factory=dict)
    long_name: str | None = None

    def read(self, path: Path, kind: bytes, data: bytes) -> None:
        """Take the content of one extension.

        Raises:
            MinitronError: a damaged one, or one that would name or resize all members to come.
        """
        if kind == tarfile.GNUTYPE_LONGNAME:
            self.long_name = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif kind == tarfile.XHDTYPE:
            self.pax = _pax_records(path, data)
        elif kind == tarfile.XGLTYPE and {"path", "linkpath", "size"} & _pax_records(path, data).keys():
            raise MinitronError(f"{path}: a global pax header must not give a path or a size")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _size(path: Path, name: str, value: int | str) -> int:
    if isinstance(value, str):
        value = int(value) if value.isdecimal() and len(value) < 20 else -1
    if value < 0:
        raise MinitronError(f"{path}: member {name!r} must have a size of 0 or more bytes, found another")
    return value


def _check_text(path: Path, name: str, text: str) -> None:
    if not text.isprintable():  # also bytes that are not UTF-8
        raise MinitronError(f"{path}: member {name!r:.200} must have a printable UTF-8 name, found {text!r:.200}")


def _check_name(path: Path, name: str) -> None:
    _check_text(path, name, name)
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise MinitronError(f"{path}: member '{name}' must be a relative path inside the archive")


def _pax_records(path: Path, data: bytes) -> dict[str, str]:
    """``LENGTH KEY=VALUE\\n`` records."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at] != 0:
        digits, _, _ = data[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or len(record) != length or not record.endswith(b"\n"):
            raise MinitronError(f"{path}: expected a .nemo (tar), found a damaged pax header")
        if len(records) >= _MAX_RECORDS:
            raise MinitronError(f"{path}: expected at most {_MAX_RECORDS} records in a pax header, found more")
        name, text = (part.decode("utf-8", "surrogateescape") for part in (key, value))
        if name in records:
            raise MinitronError(f"{path}: the pax record {name!r:.80} must be there once, found twice")
        if not (name.isprintable() and text.isprintable()):
            raise MinitronError(f"{path}: the pax record {name!r:.80} must be printable UTF-8, found {text!r:.200}")
        if name in ("path", "linkpath"):
            _check_name(path, text)
        records[name] = text
        at += length
    return records

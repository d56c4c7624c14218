"""Lines of text files, plain or compressed, with a bound on what one line may take.

Compressed text names no size: a few kilobytes can hold one line of gigabytes. No line is read beyond
:data:`MAX_RECORD`, whatever its file says.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line

MAX_RECORD = 64 << 20
"""Most bytes of one line, and characters of one document, that are read: 64 MiB."""

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_CHUNK = 1 << 16
_XZ_MEMORY = 256 << 20  # `xz -9` needs 65 MiB; a header may ask for 4 GiB
_MARKS = {  # in this order: UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Line(NamedTuple):
    """One line: its number from 1, its text with a newline ``\\n``, and the fraction of the file read with it.

    ``fault`` says what is wrong with a line that cannot be taken; its ``text`` is then empty.
    """

    number: int
    text: str
    done: float
    fault: str | None = None


def read_lines(path: Path) -> Iterator[Line]:
    """Lines of a UTF-8 file, or of a UTF-16 or UTF-32 one whose byte order mark says so; the mark is dropped.

    ``\\r\\n`` is read as ``\\n``. A line that is too long, not UTF-8 or that holds a NUL byte has a ``fault``.

    Raises:
        MinitronError: a file that is not a regular one or cannot be read, or damaged compressed data.
    """
    size, limit = regular_size(path), MAX_RECORD + 2  # a newline is up to two bytes
    number = 0
    try:
        with open(path, "rb") as raw:
            stream = io.BufferedReader(_Joined(_unmarked(_chunks(path, raw))), _CHUNK)
            while line := stream.readline(limit):
                number += 1
                open_end = len(line) == limit and not line.endswith(b"\n")
                text, fault = _decode(line)
                del line
                behind = size if raw.closed else raw.tell()  # pyarrow closes what it has read to its end
                yield Line(number, text, min(behind / max(size, 1), 1.0), fault)
                while open_end:
                    piece = stream.readline(_CHUNK)
                    open_end = len(piece) == _CHUNK and not piece.endswith(b"\n")
    except UnicodeDecodeError as error:
        raise MinitronError(
            f"{path}: expected {error.encoding.upper()} text, as its mark says: {error.reason}"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise MinitronError(f"{path}: cannot be read: {one_line(error)}") from None


def regular_size(path: Path) -> int:
    """Bytes of a regular file, links followed.

    Raises:
        MinitronError: it is something else (reading a pipe would wait for ever), or not there.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise MinitronError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise MinitronError(f"{path}: expected a regular file, found {_KINDS.get(stat.S_IFMT(found.st_mode), 'none')}")
    return found.st_size


def _decode(line: bytes) -> tuple[str, str | None]:
    if line.endswith(b"\r\n"):
        line = line[:-2] + b"\n"
    if len(line) > MAX_RECORD + line.endswith(b"\n"):
        return "", f"expected a line of at most {MAX_RECORD >> 20} MiB, found a longer one"
    if b"\0" in line:
        return "", "expected text, found a NUL byte: a binary file, or UTF-16 without a byte order mark"
    try:
        return line.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return "", f"expected UTF-8 text, found byte {line[error.start]:#x}"


def _chunks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Content, decompressed as the name's last extension says, in pieces whose size does not depend on the file."""
    kind = path.suffix.lower()
    if kind == ".xz":
        yield from _unxz(raw)
        return
    stream: BinaryIO = raw
    if kind == ".gz":
        stream = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
    elif kind == ".bz2":
        stream = bz2.BZ2File(raw)  # type: ignore[assignment]
    elif kind == ".zst":
        stream = _unzst(raw)
    while chunk := stream.read(_CHUNK):
        yield chunk


def _unxz(raw: BinaryIO) -> Iterator[bytes]:
    """Streams of an ``.xz`` one after the other; lzma.LZMAFile knows no bound on what a header may make it allocate."""
    data = raw.read(_CHUNK)
    while data:
        decoder = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        while not decoder.eof:
            if decoder.needs_input and not data and not (data := raw.read(_CHUNK)):
                raise EOFError("the compressed data ends too early")
            piece = decoder.decompress(data, _CHUNK)
            data = b""
            if piece:
                yield piece
        data = (decoder.unused_data or raw.read(_CHUNK)).lstrip(b"\0")  # streams may be padded with zeros


def _unzst(raw: BinaryIO) -> BinaryIO:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


def _unmarked(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The content as UTF-8 without a byte order mark."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 4:
            break
    mark, encoding = next(((m, e) for m, e in _MARKS.items() if head.startswith(m)), (b"", "utf-8"))
    head = head[len(mark) :]
    if encoding == "utf-8":
        yield head
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")  # half a pair is then the fault of its line
    yield decoder.decode(head).encode("utf-8", "surrogatepass")
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")


class _Joined(io.RawIOBase):
    """Pieces of bytes as a stream, for io.BufferedReader to find lines in."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

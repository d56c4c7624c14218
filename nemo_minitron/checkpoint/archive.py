"""Members of a ``.nemo``: an uncompressed tar, a gzipped tar, or a folder of the same members.

A ``.nemo`` is untrusted. Nothing is ever extracted by name into the file system from here: members are read in place,
and an archive with an absolute path, a ``..``, a link, a device or a name given twice is refused as a whole.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Protocol, cast

from nemo_minitron.checkpoint.staging import Staging
from nemo_minitron.errors import MinitronError

_BLOCK = tarfile.BLOCKSIZE
_GZIP_MAGIC = b"\x1f\x8b"


class Slice(io.RawIOBase):
    """A seekable, read-only window of ``size`` bytes at ``start`` of an open file (which it does not close)."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # a writable buffer has no name in typing
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        done = cast(io.BufferedReader, self._file).readinto(memoryview(buffer)[:count])
        self._at += done
        return done


class Archive(Protocol):
    """Read access to the members of a ``.nemo``, by name without leading ``./``."""

    def names(self) -> list[str]:
        """Names of all regular members, sorted."""

    def size(self, name: str) -> int:
        """Bytes of a member."""

    def window(self, name: str, start: int = 0, size: int | None = None) -> Slice:
        """A seekable window of a member; bounds are checked against the member."""

    def close(self) -> None:
        """Release files."""


def read_member(archive: Archive, name: str, limit: int) -> bytes:
    """The whole of a small member; more than ``limit`` bytes are refused before they are read."""
    size = archive.size(name)
    if size > limit:
        raise MinitronError(f"member '{name}': expected at most {limit} bytes, found {size}")
    return archive.window(name).read()


def open_archive(path: Path) -> Archive:
    """Open a ``.nemo`` file or folder.

    Raises:
        MinitronError: no such file, not a tar, truncated, or a hostile member.
    """
    if path.is_dir():
        return FolderArchive(path)
    if not path.is_file():
        raise MinitronError(f"{path}: expected a .nemo file or folder, found none")
    return TarArchive(path)


class FolderArchive:
    """A folder with the members of a ``.nemo``, as NeMo leaves it with ``pack_nemo_file=False``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, IO[bytes]] = {}
        self._members = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}

    def names(self) -> list[str]:
        return sorted(self._members)

    def size(self, name: str) -> int:
        return self._members[name].stat().st_size

    def window(self, name: str, start: int = 0, size: int | None = None) -> Slice:
        if name not in self._files:
            self._files[name] = self._members[name].open("rb")
        return _window(self._path, name, self._files[name], 0, self.size(name), start, size)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


class TarArchive:
    """A tar read in place; a gzipped one is first expanded into an unnamed temporary file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] = path.open("rb")
        try:
            if self._file.read(2) == _GZIP_MAGIC:
                self._file = _expand(path, self._file)
            self._members = dict(_checked_members(path, self._file))
        except BaseException:
            self._file.close()
            raise

    def names(self) -> list[str]:
        return sorted(self._members)

    def size(self, name: str) -> int:
        return self._members[name][1]

    def window(self, name: str, start: int = 0, size: int | None = None) -> Slice:
        offset, length = self._members[name]
        return _window(self._path, name, self._file, offset, length, start, size)

    def close(self) -> None:
        self._file.close()


def _window(path: Path, name: str, file: IO[bytes], offset: int, length: int, start: int, size: int | None) -> Slice:
    size = length - start if size is None else size
    if start < 0 or size < 0 or start + size > length:
        raise MinitronError(f"{path}: expected bytes {start}..{start + size} in member '{name}', which has {length}")
    return Slice(file, offset + start, size)


def _expand(path: Path, packed: IO[bytes]) -> IO[bytes]:
    """Gunzip into a temporary file, never filling the disk beyond its last gigabyte."""
    packed.seek(0)
    plain = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115  # owned by the archive, closed with it
    decoder = zlib.decompressobj(wbits=31)
    try:
        for block in iter(lambda: packed.read(1 << 20), b""):
            data = block
            while data:
                plain.write(decoder.decompress(data, 1 << 24))
                data = decoder.unconsumed_tail
                if shutil.disk_usage(tempfile.gettempdir()).free < 1 << 30:
                    raise MinitronError(
                        f"{path}: expected room to unpack this gzip in {tempfile.gettempdir()}, found less than 1 GiB "
                        "left; set TMPDIR or gunzip it"
                    )
        if not decoder.eof:
            raise MinitronError(f"{path}: expected a whole gzip, found its end missing")
    except zlib.error as error:
        plain.close()
        raise MinitronError(f"{path}: expected a gzipped tar, found damage: {error}") from None
    except MinitronError:
        plain.close()
        raise
    packed.close()
    return plain


def _checked_members(path: Path, file: IO[bytes]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, and (offset, size), of each regular member."""
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:") as tar:
            for member in tar:
                pure = PurePosixPath(member.name)
                if pure.is_absolute() or ".." in pure.parts or "\\" in member.name or "\0" in member.name:
                    raise MinitronError(f"{path}: member '{member.name}' must be a relative path inside the archive")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise MinitronError(f"{path}: member '{member.name}' must be a plain file, found a link or device")
                name = pure.as_posix()
                if name in seen:
                    raise MinitronError(f"{path}: member '{name}' must be there once, found twice")
                seen.add(name)
                if member.offset_data + member.size > total:
                    raise MinitronError(f"{path}: the archive is truncated inside member '{name}'")
                yield name, (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise MinitronError(f"{path}: expected a .nemo (tar), found: {error}") from None


class ArchiveWriter:
    """Streams members into a ``.nemo`` at ``path``: a tar if the name ends in ``.nemo`` or ``.tar``, else a folder.

    The tar has NeMo's own member names (``./name``), and no times or owners, so that equal content gives equal
    bytes. Sizes need not be known beforehand: a header is written empty and patched when its member ends (base-256
    sizes beyond 8 GiB, as GNU tar).
    """

    _PATTERNS = ("model_config.yaml", "model_weights", "minitron", "*_tokenizer.*", "*.model")

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.packed = path.suffix in (".nemo", ".tar")
        self._staging = Staging(path, folder=not self.packed, replaceable=self._PATTERNS)
        self._tar: IO[bytes] | None = self._staging.path.open("wb") if self.packed else None

    @contextmanager
    def member(self, name: str) -> Iterator[IO[bytes]]:
        """A writable file for one member; its position starts at 0 only in a folder, so count what you write."""
        if self._tar is None:
            target = self._staging.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                yield file
            return
        head = self._tar.tell()
        info = tarfile.TarInfo(f"./{name}")
        self._tar.write(_header(info))
        start = self._tar.tell()
        yield self._tar
        info.size = self._tar.tell() - start
        self._tar.write(b"\0" * (-info.size % _BLOCK))
        end = self._tar.tell()
        self._tar.seek(head)
        self._tar.write(_header(info))
        self._tar.seek(end)

    def add(self, name: str, data: bytes) -> None:
        """Write one small member."""
        with self.member(name) as file:
            file.write(data)

    def commit(self) -> None:
        """End the archive, flush it to disk and rename it into place."""
        if self._tar is not None:
            self._tar.write(b"\0" * (2 * _BLOCK))
            self._tar.write(b"\0" * (-self._tar.tell() % tarfile.RECORDSIZE))
            self._tar.flush()
            os.fsync(self._tar.fileno())
            self._tar.close()
        self._staging.commit()

    def abort(self) -> None:
        """Leave no trace."""
        if self._tar is not None:
            self._tar.close()
        self._staging.abort()


def _header(info: tarfile.TarInfo) -> bytes:
    header = info.tobuf(format=tarfile.GNU_FORMAT)
    if len(header) != _BLOCK:  # a long-name record would move when the size is patched
        raise MinitronError(f"member name '{info.name}' must have at most 100 bytes")
    return header

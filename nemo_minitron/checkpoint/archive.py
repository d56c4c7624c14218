"""Members of a ``.nemo``: an uncompressed tar, a gzipped tar, or a folder of the same members.

A ``.nemo`` is untrusted. Nothing is ever extracted by name into the file system from here: members are read in place,
and an archive with an absolute path, a ``..``, a link, a device or a name given twice is refused as a whole.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from nemo_minitron.checkpoint.buffers import Buffers
from nemo_minitron.checkpoint.tar import BLOCK, MAX_MEMBERS, read_members
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import AllOrNothing, Staging

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_RATIO, _GZIP_FLOOR, _DISK_FREE = 64, 64 << 20, 1 << 30


class Archive:
    """Read access to the members of a ``.nemo``, by name without leading ``./``; from any thread.

    Args:
        path: for messages. places: (path of the file, offset, size) of each member.
    """

    def __init__(self, path: Path, places: dict[str, tuple[Path, int, int]], file: IO[bytes] | None = None) -> None:
        self.path, self._places = path, places
        self._files: dict[Path, IO[bytes]] = {} if file is None else {path: file}
        self.buffers = Buffers()

    def names(self) -> list[str]:
        """Names of all regular members, sorted."""
        return sorted(self._places)

    def size(self, name: str) -> int:
        """Bytes of a member."""
        return self._places[name][2]

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes ``start .. start + size`` of a member, to its end by default.

        Raises:
            MinitronError: bounds outside of the member, or a file that has become shorter.
        """
        size = self.size(name) - start if size is None else size
        self._check(name, start, size)
        data = bytearray(size)
        self.read_into(name, start, memoryview(data))
        return bytes(data)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (of bytes) from ``start`` of a member; raises as :meth:`read`."""
        self._check(name, start, len(buffer))
        path, offset, _ = self._places[name]
        if path not in self._files:
            self._files[path] = path.open("rb")
        read_exactly(self._files[path], offset + start, buffer, f"{self.path}: member '{name}'")

    def _check(self, name: str, start: int, size: int) -> None:
        length = self.size(name)
        if start < 0 or size < 0 or start + size > length:
            end = start + size
            raise MinitronError(f"{self.path}: expected bytes {start}..{end} in member '{name}', which has {length}")

    def close(self) -> None:
        """Release files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def read_exactly(file: IO[bytes], start: int, buffer: memoryview, what: str) -> None:
    """Fill ``buffer`` from byte ``start`` of a file, whose position stays; ``what`` is named where it is too short."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done : done + (1 << 30)]], start + done)
        if count == 0:
            raise MinitronError(f"{what}: the file is truncated")
        done += count


def read_member(archive: Archive, name: str, limit: int) -> bytes:
    """The whole of a small member; more than ``limit`` bytes are refused before they are read."""
    size = archive.size(name)
    if size > limit:
        raise MinitronError(f"{archive.path}: member '{name}': expected at most {limit} bytes, found {size}")
    return archive.read(name)


def open_archive(path: Path) -> Archive:
    """Open a ``.nemo`` file or folder (as NeMo leaves it with ``pack_nemo_file=False``).

    A gzipped tar is first expanded into an unnamed temporary file.

    Raises:
        MinitronError: no such file, not a tar, truncated, or a hostile member.
    """
    if path.is_dir():
        return Archive(path, _folder_members(path))
    if not path.is_file():
        raise MinitronError(f"{path}: expected a .nemo file or folder, found none")
    try:
        file: IO[bytes] = path.open("rb")
    except OSError as error:
        raise MinitronError(f"{path}: expected a readable file, found: {error.strerror}") from None
    try:
        if file.read(2) == _GZIP_MAGIC:
            file = _expand(path, file)
        places = {name: (path, offset, size) for name, (offset, size) in read_members(path, file).items()}
        return Archive(path, places, file)
    except BaseException:
        file.close()
        raise


def _folder_members(path: Path) -> dict[str, tuple[Path, int, int]]:
    root, places = path.resolve(), {}
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise MinitronError(f"{path}: member '{name}' must be a plain file, found a link out of the folder")
        if file.is_file():
            places[name] = (file, 0, file.stat().st_size)
        elif not file.is_dir():
            raise MinitronError(f"{path}: member '{name}' must be a plain file, found a device or a broken link")
        if len(places) > MAX_MEMBERS:
            raise MinitronError(f"{path}: expected at most {MAX_MEMBERS} members, found more from '{name}' on")
    return places


def _expand(path: Path, packed: IO[bytes]) -> IO[bytes]:
    """Gunzip into a temporary file: at most 64 times the packed size, never the last gigabyte of the disk."""
    room = max(_GZIP_FLOOR, _GZIP_RATIO * path.stat().st_size)
    plain = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115  # owned by the archive, closed with it
    try:
        packed.seek(0)
        decoder, ended = zlib.decompressobj(wbits=31), False
        for block in iter(lambda: packed.read(1 << 16), b""):
            data = block
            while data:
                if ended:  # another gzip member may follow, as in files of several packers
                    decoder = zlib.decompressobj(wbits=31)
                plain.write(decoder.decompress(data, 1 << 24))
                ended = decoder.eof
                data = decoder.unused_data.lstrip(b"\0") if ended else decoder.unconsumed_tail
                if plain.tell() > room:
                    raise MinitronError(
                        f"{path}: expected a gzip of at most {room} bytes ({_GZIP_RATIO} times its size), "
                        "found more; gunzip it if you trust it"
                    )
                if shutil.disk_usage(tempfile.gettempdir()).free < _DISK_FREE:
                    raise MinitronError(
                        f"{path}: expected room to unpack this gzip in {tempfile.gettempdir()}, found less than 1 GiB "
                        "left; set TMPDIR or gunzip it"
                    )
        if not ended:
            raise MinitronError(f"{path}: expected a whole gzip, found its end missing")
        plain.flush()
    except (zlib.error, OSError) as error:
        plain.close()
        raise MinitronError(f"{path}: expected a gzipped tar and room to unpack it, found: {error}") from None
    except BaseException:
        plain.close()
        raise
    packed.close()
    return plain


class ArchiveWriter(AllOrNothing):
    """Streams members into an archive at ``path``: a tar if the name ends in ``.nemo`` or ``.tar``, else a folder.

    The tar has NeMo's own member names (``./name``), and no times or owners, so that equal content gives equal
    bytes. Sizes need not be known beforehand: a header is written empty and patched when its member ends (base-256
    sizes beyond 8 GiB, as GNU tar).

    Args:
        room: bytes to come, for which there must be room.
        replaceable: patterns of what an existing folder may hold, to be replaced; a ``.nemo``'s by default.
    """

    _PATTERNS = ("model_config.yaml", "model_weights", "minitron", "*_tokenizer.*", "*.model")

    def __init__(self, path: str | Path, room: int = 0, replaceable: tuple[str, ...] = _PATTERNS) -> None:
        self.destination = Path(path)
        self.packed = self.destination.suffix in (".nemo", ".tar")
        self._staging = Staging(path, folder=not self.packed, replaceable=replaceable, room=room)
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
        self._tar.write(b"\0" * (-info.size % BLOCK))
        end = self._tar.tell()
        self._tar.seek(head)
        self._tar.write(_header(info))
        self._tar.seek(end)

    def add(self, name: str, data: bytes) -> None:
        """Write one small member."""
        with self.member(name) as file:
            file.write(data)

    def end(self) -> Path:
        """End the archive; return where it stands until :meth:`commit`."""
        if self._tar is not None and not self._tar.closed:
            self._tar.write(b"\0" * (2 * BLOCK))
            self._tar.write(b"\0" * (-self._tar.tell() % tarfile.RECORDSIZE))
            self._tar.close()
        return self._staging.path

    def commit(self) -> None:
        """End the archive, flush it to disk and rename it into place."""
        self.end()
        self._staging.commit()

    def abort(self) -> None:
        """Leave no trace."""
        if self._tar is not None:
            with suppress(OSError):  # what is still to be flushed may not fit either
                self._tar.close()
        self._staging.abort()


def _header(info: tarfile.TarInfo) -> bytes:
    header = info.tobuf(format=tarfile.GNU_FORMAT)
    if len(header) != BLOCK:  # a long-name record would move when the size is patched
        raise MinitronError(f"member name '{info.name}' must have at most 100 bytes")
    return header

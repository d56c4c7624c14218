"""Outputs that appear whole or not at all: written beside their destination, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import stat
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from nemo_minitron.errors import MinitronError

if TYPE_CHECKING:
    from typing_extensions import Self

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ABANDONED_S = 24 * 3600


class AllOrNothing(ABC):
    """A context that commits an output at its end, and aborts it where that or anything before it fails.

    The one exit of all that writes: of :class:`Staging`, and of each format's writer, which writes below a staging.
    Of several that are nested, the innermost commits first.

    Attributes:
        destination: where the output appears.

    Raises:
        MinitronError: at the exit, where the disk was full or the destination could not be written.
    """

    destination: Path

    @abstractmethod
    def commit(self) -> None:
        """Complete the output and have it appear, whole."""

    @abstractmethod
    def abort(self) -> None:
        """Leave no trace; after :meth:`commit` it does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = error
        if failure is None:
            try:
                self.commit()
                return
            except BaseException as found:
                failure = found
        self.abort()
        if isinstance(failure, OSError) and (failure.errno in _DISK_FULL or error is None):
            expected = "room to write" if failure.errno in _DISK_FULL else "a writable destination"
            raise MinitronError(f"{self.destination}: expected {expected}, found: {failure}") from None
        if error is None:
            raise failure


class Staging(AllOrNothing):
    """A temporary sibling of ``destination``, for a file or (``folder=True``) for a folder.

    Creating it proves that the destination can be written, before any work: missing parents are made, and undone by
    :meth:`abort`. An existing file is replaced. An existing folder is replaced only if all that it holds matches
    ``replaceable`` (glob patterns of what the caller itself writes), so that nothing foreign is ever deleted.

    The temporary is locked while its process lives. What a killed process left for the same destination is removed by
    the next one that writes there.

    Args:
        room: bytes that are going to be written; refused now where the disk has less.

    Raises:
        MinitronError: the destination cannot be written, must not be replaced, or has too little room.
    """

    def __init__(
        self, destination: str | Path, *, folder: bool = False, replaceable: tuple[str, ...] = (), room: int = 0
    ) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.folder = folder
        self._made: list[Path] = []
        try:
            remove_leftovers(self.destination)
            self._check_existing(replaceable)
            self._make_parents()
            self._check_room(room)
            self.path, self._lock = self._create()
        except OSError as error:
            self._remove_parents()
            raise MinitronError(f"{self.destination}: expected a writable destination, found: {error}") from None
        except MinitronError:
            self._remove_parents()
            raise

    def _check_existing(self, replaceable: tuple[str, ...]) -> None:
        if not self.destination.exists():
            return
        if not self.folder:
            if self.destination.is_dir():
                raise MinitronError(f"{self.destination}: expected a file to write, found a folder")
            return
        if not self.destination.is_dir():
            raise MinitronError(f"{self.destination}: expected a folder to write, found a file")
        foreign = [p.name for p in self.destination.iterdir() if not any(p.match(glob) for glob in replaceable)]
        if foreign:
            raise MinitronError(
                f"{self.destination}: expected an empty folder or an earlier output to replace, "
                f"found also '{sorted(foreign)[0]}'"
            )

    def _make_parents(self) -> None:
        missing = []
        parent = self.destination.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _remove_parents(self) -> None:
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # someone else put something there meanwhile
                return

    def _check_room(self, room: int) -> None:
        free = shutil.disk_usage(self.destination.parent).free
        if free < room:
            raise MinitronError(f"{self.destination}: expected room for {room:,} bytes, found {free:,} free")

    def _create(self) -> tuple[Path, int]:
        """The temporary and a descriptor that holds its lock."""
        while True:
            path = self.destination.with_name(f".{self.destination.name}.{_kernel()}-{uuid.uuid4().hex[:8]}.tmp")
            if self.folder:
                path.mkdir()
            else:
                path.touch(exist_ok=False)
            lock = _open(path)
            # Between these steps another process may have taken it for a leftover: then it is gone, or its lock is.
            if _is_free(lock, unknown=True) and path.exists() and os.stat(path).st_ino == os.fstat(lock).st_ino:
                return path, lock
            os.close(lock)

    def commit(self) -> None:
        """Flush to disk and rename into place; an earlier folder is exchanged in one step and deleted after it.

        Everything inside, the name at the destination and the parents that were made for it are on the disk then.
        """
        for path in (*(self.path.rglob("*") if self.folder else ()), self.path):
            if path.is_file() or path.is_dir():
                _sync(path)
        if self.folder and self.destination.exists():
            _exchange(self.path, self.destination)
            _remove(self.path)
        else:
            os.replace(self.path, self.destination)
        for made in (self.destination, *self._made):
            _sync(made.parent)
        self._release()

    def abort(self) -> None:
        """Remove the temporary and the parents that were made for it."""
        _remove(self.path)
        self._release()
        self._remove_parents()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


def write_file(destination: str | Path, content: str | bytes) -> None:
    """Write a file that fits into memory as :class:`Staging` does: whole, flushed, renamed; text as UTF-8.

    Raises:
        MinitronError: it cannot be written.
    """
    with Staging(destination) as staging:
        staging.path.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(destination: Path) -> None:
    """Remove what processes that are gone left of their work on ``destination``.

    A temporary is a leftover if nobody holds its lock. Locks of another machine on a shared disk may not be seen here:
    what another kernel made must also have been untouched for a day.
    """
    name = re.compile(rf"\.{re.escape(destination.name)}\.([0-9a-f]{{8}})-[0-9a-f]{{8}}\.(tmp|old)")
    if not destination.parent.is_dir():
        return
    for path in list(destination.parent.iterdir()):
        match = name.fullmatch(path.name)
        try:
            if not match or not (stat.S_ISREG(path.lstat().st_mode) or stat.S_ISDIR(path.lstat().st_mode)):
                continue  # opening a pipe would wait for its other end
            lock = _open(path)
        except OSError:  # another's, or gone by now
            continue
        try:
            old_enough = match[1] == _kernel() or time.time() - _last_change(path) > _ABANDONED_S
            if old_enough and _is_free(lock, unknown=False):
                if match[2] == "old" and not destination.exists():
                    path.rename(destination)  # its successor never arrived
                else:
                    _remove(path)
        finally:
            os.close(lock)


def has_locks(folder: str | Path) -> bool:
    """Whether a file that one process holds in ``folder`` is seen as held by another.

    Raises:
        OSError: no file can be made there.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".minitron-lock-") as file:
        held, other = _open(Path(file.name)), _open(Path(file.name))
        try:
            return _is_free(held, unknown=False) and not _is_free(other, unknown=True)
        finally:
            os.close(held)
            os.close(other)


@functools.cache
def _kernel() -> str:
    """Names the running kernel, whose processes see each other's locks, containers included."""
    try:
        running = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        running = platform.node().encode()
    return hashlib.sha256(running).hexdigest()[:8]


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_free(descriptor: int, unknown: bool) -> bool:
    """Take the lock of a file or folder; ``unknown`` is the answer where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return unknown
    return True


def _last_change(path: Path) -> float:
    try:
        return max(p.stat().st_mtime for p in (path, *path.rglob("*")))
    except OSError:  # it is changing now
        return time.time()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = _open(path)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two paths, in one step where the system has one (Linux ``renameat2``)."""
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_suffix(".old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    os.rename(aside, new)

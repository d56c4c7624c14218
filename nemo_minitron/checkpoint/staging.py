"""Outputs that appear whole or not at all: written beside their destination, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

from nemo_minitron.errors import MinitronError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """A temporary sibling of ``destination``, for a file or (``folder=True``) for a folder.

    Creating it proves that the destination can be written, before any work: missing parents are made, and undone by
    :meth:`abort`. An existing file is replaced. An existing folder is replaced only if all that it holds matches
    ``replaceable`` (glob patterns of what the caller itself writes), so that nothing foreign is ever deleted.

    Raises:
        MinitronError: the destination cannot be written or must not be replaced.
    """

    def __init__(self, destination: str | Path, *, folder: bool = False, replaceable: tuple[str, ...] = ()) -> None:
        self.destination = Path(os.path.abspath(destination))
        self.folder = folder
        self._made: list[Path] = []
        self._check_existing(replaceable)
        self.path = self.destination.with_name(f".{self.destination.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            self._make_parents()
            if folder:
                self.path.mkdir()
            else:
                self.path.touch(exist_ok=False)
        except OSError as error:
            self._remove_parents()
            raise MinitronError(f"{self.destination}: expected a writable destination, found: {error}") from None

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

    def commit(self) -> None:
        """Rename into place; an earlier output is swapped out first and deleted last."""
        if not self.folder or not self.destination.exists():
            os.replace(self.path, self.destination)
            return
        old = self.path.with_suffix(".old")
        os.rename(self.destination, old)
        try:
            os.rename(self.path, self.destination)
        except OSError:
            os.rename(old, self.destination)
            raise
        shutil.rmtree(old)

    def abort(self) -> None:
        """Remove the temporary and the parents that were made for it."""
        if self.folder:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.path.unlink(missing_ok=True)
        self._remove_parents()

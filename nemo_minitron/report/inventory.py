"""What lies in a folder of another's: its plain files, found without following or opening anything else.

A link may point anywhere, opening a pipe waits for ever, and a device may do anything: none of them is touched.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from nemo_minitron.errors import MinitronError

MOST_ENTRIES, MOST_DEPTH, MOST_BYTES = 100_000, 32, 128 << 20
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Inventory:
    """Plain files below ``folder``, which itself may be a link: it was named by the user.

    Attributes:
        files: {path, beginning with ``folder``: seconds of its last change}, in the order of names.
        others: {path: what it is}, of what is not looked at.

    Raises:
        MinitronError: more than 100,000 entries, or a folder that cannot be listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, float] = {}
        self.others: dict[Path, str] = {}
        self._count, self._left = 0, MOST_BYTES
        try:
            self._list(folder, 1)
        except OSError as error:
            raise MinitronError(f"'{folder}' cannot be read: {error.strerror}") from None

    def _list(self, folder: Path, depth: int) -> None:
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                self._count += 1
                if self._count > MOST_ENTRIES:
                    raise MinitronError(f"'{self.folder}': expected at most {MOST_ENTRIES:,} files, found more")
                names.append(entry.name)
        for name in sorted(names):
            path = folder / name
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                self.files[path] = found.st_mtime
            elif not stat.S_ISDIR(found.st_mode):
                self.others[path] = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
            elif depth == MOST_DEPTH:
                self.others[path] = f"{MOST_DEPTH} folders deep"
            else:
                try:
                    self._list(path, depth + 1)
                except OSError as error:
                    self.others[path] = f"not readable: {error.strerror}"

    def read(self, path: Path, most: int, cut: bool = False) -> bytes:
        """A file's bytes, of which there may be ``most``; with ``cut``, the first ``most`` of them.

        Raises:
            MinitronError: no plain file, one that is too large, one that cannot be read, or more than 128 MiB in all.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as stream:
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise MinitronError(f"'{path}': expected a plain file")
                if found.st_size > most and not cut:
                    raise MinitronError(f"'{path}': expected at most {most:,} bytes, found {found.st_size:,}")
                data = stream.read(most)
        except OSError as error:
            raise MinitronError(f"'{path}' cannot be read: {error.strerror}") from None
        self._left -= len(data)
        if self._left < 0:
            raise MinitronError(f"'{path}': expected at most {MOST_BYTES:,} bytes to read in a folder, found more")
        return data

    def note(self) -> str | None:
        """What is not looked at, in one sentence; None where there is nothing of the kind."""
        if not self.others:
            return None
        named = [f"'{path.relative_to(self.folder)}' ({what})" for path, what in list(self.others.items())[:5]]
        more = len(self.others) - len(named)
        return f"Not looked at: {', '.join(named)}{f' and {more:,} more' if more else ''}."

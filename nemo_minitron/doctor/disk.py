"""Room on the disks that commands write to, and whether files can be locked there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from nemo_minitron.doctor.line import GIB, Line, gib
from nemo_minitron.files.staging import has_locks

SHARED = Path("/dev/shm")
LEAST = GIB


def disk() -> Iterator[Line]:
    """Lines on the current folder, that of temporary files, and shared memory. Folders are named by what they are."""
    yield _folder("current folder", Path.cwd, "give outputs a path elsewhere")
    yield _folder("TMPDIR", lambda: Path(tempfile.gettempdir()), "set TMPDIR to another folder")
    yield _folder("/dev/shm", lambda: SHARED, "workers of data loaders and NCCL use it; in Docker set --shm-size")


def _folder(name: str, find: Callable[[], Path], advice: str) -> Line:
    try:
        folder = find()
        free = shutil.disk_usage(folder).free
        locks = has_locks(folder)
    except OSError as error:
        return Line("note", name, f"cannot be written ({error.strerror or 'no folder can'}): {advice}")
    said = f"{gib(free)} free"
    if free < LEAST:
        return Line("note", name, f"{said}: {advice}")
    if not locks:
        return Line("note", name, f"{said}; files cannot be locked: what a killed command leaves there stays")
    return Line("ok", name, f"{said}, files can be locked")

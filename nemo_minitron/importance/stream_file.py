"""Residual streams of all depths, in a file: what passes through every layer at once has no room in memory."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import torch


class StreamFile:
    """A float32 tensor of any size in a file that is mapped into memory.

    Pages that were touched count as this process's memory until :meth:`release`; the system writes them to the disk
    when it needs the room.
    """

    def __init__(self, path: Path, size: tuple[int, ...]) -> None:
        length = 4 * prod(size)
        with path.open("w+b") as file:
            file.truncate(length)
            self._map = mmap.mmap(file.fileno(), length)
        self.tensor = torch.frombuffer(self._map, dtype=torch.float32).view(size)

    def release(self) -> None:
        """Hand the pages back to the system's cache; their content stays, and comes back when it is read."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on every system; without it they are only counted as ours
            self._map.madvise(mmap.MADV_DONTNEED)

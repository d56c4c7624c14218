"""Memory for tensors that are read one after the other, used again once nobody holds them.

A new page costs as much time as filling it: of a checkpoint that is streamed, half of the reading was that.
"""

from __future__ import annotations

import sys
from threading import Lock

import numpy as np
import torch

_KEPT = 512 << 20
"""Bytes that are kept for use again. A vocabulary table of a large model has its own memory, and gives it back."""
_SMALL = 1 << 20
_UNHELD = 3
"""References to an array that none but the list, a loop variable and the call itself holds."""


class Buffers:
    """Hands out memory, to any thread; what any tensor still refers to is never handed out again."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = Lock()

    def take(self, count: int) -> torch.Tensor:
        """``[count]`` uint8 with any values, contiguous, aligned as torch aligns."""
        if count < _SMALL or count > _KEPT // 2:
            return torch.empty(count, dtype=torch.uint8)
        with self._lock:
            return self._take(count)

    def _take(self, count: int) -> torch.Tensor:
        for array in self._arrays:
            if count <= array.size <= 2 * count and sys.getrefcount(array) <= _UNHELD:
                return torch.from_numpy(array[:count])
        self._arrays = [array for array in self._arrays if sys.getrefcount(array) > _UNHELD or array.size >= count]
        while self._arrays and sum(array.size for array in self._arrays) + count > _KEPT:
            del self._arrays[0]  # whoever holds it keeps it
        self._arrays.append(torch.empty(count, dtype=torch.uint8).numpy())
        return torch.from_numpy(self._arrays[-1][:count])

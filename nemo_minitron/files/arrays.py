"""Arrays of untrusted ``.npy`` and ``.npz`` files: a header is compared with the bytes that are there, then read."""

from __future__ import annotations

import ast
import itertools
import math
import os
import stat
from pathlib import Path
from types import TracebackType

import numpy as np

from nemo_minitron.errors import MinitronError
from nemo_minitron.files.stored_zip import ZipError, entries_of
from nemo_minitron.files.text import one_line

_MAX_HEADER, _MAX_ENTRIES, _MAX_DIMENSIONS = 4096, 64, 8
_UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    AttributeError,
    MemoryError,
    RecursionError,
    OverflowError,
)
"""What Python and numpy make of a header that is no literal or names no type."""


class ArrayFile:
    """One ``.npy``, or the members of an ``.npz`` (stored, never compressed or pickled); a context manager.

    Attributes:
        names: of the arrays; an ``.npy`` has the one name ``""``.

    Raises:
        MinitronError: not such a file, longer than ``limit``, or members that are damaged.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        try:
            self._file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise MinitronError(f"{path}: expected a readable file, found: {one_line(error)}") from None
        try:
            facts = os.fstat(self._file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > limit:
                raise MinitronError(f"{path}: expected a regular file of at most {limit} bytes, found another")
            self._length = facts.st_size
            self._places = self._members() if path.suffix == ".npz" else {"": (0, self._length)}
        except ZipError as error:
            self._file.close()
            raise MinitronError(f"{path}: {error}") from None
        except BaseException:
            self._file.close()
            raise
        self.names = set(self._places)

    def _members(self) -> dict[str, tuple[int, int]]:
        found = entries_of(self._read, self._length, _MAX_ENTRIES)
        places = sorted(found.values())
        if any(one[0] + one[1] > other[0] for one, other in itertools.pairwise(places)):
            raise ZipError("expected arrays one after the other, found two that overlap")
        return {name.removesuffix(".npy"): place for name, place in found.items()}

    def _read(self, start: int, size: int) -> bytes:
        if not 0 <= start <= start + size <= self._length:
            raise ZipError("expected a whole file, found its end")
        return os.pread(self._file.fileno(), size, start)

    def describe(self, name: str = "") -> tuple[np.dtype, tuple[int, ...]]:
        """Type and size of an array, which its bytes bear out.

        Raises:
            MinitronError: no such array, or a header that says something else than its bytes.
        """
        dtype, size, _, _ = self._header(name)
        return dtype, size

    def get(self, name: str = "") -> np.ndarray:
        """An array in memory of its own."""
        dtype, size, fortran, start = self._header(name)
        values = np.fromfile(self._file, dtype, math.prod(size), offset=start - self._file.seek(0))
        return values.reshape(size, order="F" if fortran else "C")

    def map(self, name: str = "") -> np.ndarray:
        """An array as it lies in the file, read where it is used."""
        dtype, size, fortran, start = self._header(name)
        if not math.prod(size):
            return np.empty(size, dtype)
        return np.memmap(self._file, dtype, "r", start, size, "F" if fortran else "C")

    def _header(self, name: str) -> tuple[np.dtype, tuple[int, ...], bool, int]:
        where = f"{self._path}: array '{name}'" if name else str(self._path)
        if name not in self._places:
            raise MinitronError(f"{self._path} has no array '{name}'")
        start, length = self._places[name]
        data = os.pread(self._file.fileno(), min(length, _MAX_HEADER), start)
        try:
            dtype, fortran, size, begin = _parse(data)
        except _UNREADABLE as error:
            raise MinitronError(f"{where}: expected a numpy array, found: {one_line(error)}") from None
        if dtype.hasobject or len(size) > _MAX_DIMENSIONS or any(not 0 <= n < 1 << 62 for n in size):
            raise MinitronError(f"{where}: expected numbers in at most {_MAX_DIMENSIONS} dimensions, found others")
        if begin + math.prod(size) * dtype.itemsize != length:
            raise MinitronError(f"{where}: expected {list(size)} values of {dtype!s:.200}, found {length} bytes")
        return dtype, size, fortran, start + begin

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(data: bytes) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """Type, order, size and start of the values; the format is numpy's NEP 1.

    numpy's own reader would send what is no literal through the tokenizer of Python 2's time, and warn.
    """
    magic, major, minor = data[:6], *data[6:8]
    if magic != b"\x93NUMPY" or (major, minor) not in ((1, 0), (2, 0)):
        raise ValueError("another magic number or version")
    begin = 8 + 2 * major
    end = begin + int.from_bytes(data[8:begin], "little")
    if end > len(data):
        raise ValueError(f"a header of {end - begin} bytes")
    header = ast.literal_eval(data[begin:end].decode("latin1").strip())
    size = header["shape"]
    if not isinstance(size, tuple) or not all(type(n) is int for n in size):
        raise ValueError("a size that is not made of whole numbers")
    return np.lib.format.descr_to_dtype(header["descr"]), bool(header["fortran_order"]), size, end

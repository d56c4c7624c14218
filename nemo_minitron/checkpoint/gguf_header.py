"""Header of an untrusted GGUF, walked before llama.cpp's reader sees it: that one believes counts and lengths."""

from __future__ import annotations

import io
import itertools
import math
import struct
from pathlib import Path
from typing import IO, Any

from nemo_minitron.errors import MinitronError

_MAX_TENSORS, _MAX_KEYS, _MAX_NAME, _MAX_TEXT, _MAX_ITEMS = 100_000, 10_000, 1 << 16, 16 << 20, 1_200_000
"""``_MAX_ITEMS`` is for all arrays together, a text counting as two numbers: llama.cpp's reader takes 1,600 bytes for
each text and 700 for each number. Llama 3's tokenizer has 945,000."""

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each kind of number
_STRING, _ARRAY = 8, 9


def check_header(path: Path) -> None:
    """Refuse a header whose counts, lengths or offsets the file does not bear out; the format is ggml's ``gguf.md``.

    Raises:
        MinitronError: naming the metadata key or tensor.
    """
    with path.open("rb") as file:
        _Walk(path, file).check()


class _Walk:
    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file, self._total = path, file, file.seek(0, io.SEEK_END)
        file.seek(0)
        self._what, self._items = "header", 0

    def _fail(self, problem: str) -> MinitronError:
        return MinitronError(f"{self._path}: expected a GGUF file, found in {self._what}: {problem}")

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise self._fail("its end")
        return data

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _text(self, limit: int) -> str:
        size = self._number("Q")
        if size > limit:
            raise self._fail(f"a text of {size} bytes, more than {limit}")
        try:
            return self._take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail("text that is not UTF-8") from None

    def _skip(self, size: int) -> None:
        if self._file.tell() + size > self._total:
            raise self._fail(f"{size} bytes beyond the file's end")
        self._file.seek(size, io.SEEK_CUR)

    def check(self) -> None:
        if self._take(4) != b"GGUF":
            raise self._fail("another magic number")
        version = self._number("I")
        if version not in (2, 3):
            raise self._fail(f"version {version}, neither 2 nor 3")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise self._fail(f"{tensors} tensors and {keys} keys, more than {_MAX_TENSORS} or {_MAX_KEYS}")
        seen: set[str] = set()
        alignment = 32
        for number in range(keys):
            self._what = f"metadata key {number}"
            name = self._text(_MAX_NAME)
            self._what = f"metadata key {name!r:.80}"
            if name in seen:
                raise self._fail("a second value")
            seen.add(name)
            kind = self._number("I")
            if name == "general.alignment" and kind == 4:
                alignment = self._number("I")
            else:
                self._value(kind)
        if alignment < 1 or alignment & (alignment - 1):
            raise self._fail(f"an alignment of {alignment}, no power of two")
        self._tensors(tensors, alignment)

    def _value(self, kind: int) -> None:
        if kind in _WIDTHS:
            self._skip(_WIDTHS[kind])
        elif kind == _STRING:
            self._text(_MAX_TEXT)
        elif kind == _ARRAY:
            item, count = self._number("I"), self._number("Q")
            self._items += count * (2 if item == _STRING else 1)
            if self._items > _MAX_ITEMS:
                raise self._fail(f"{count} values, with which all arrays have more than {_MAX_ITEMS}")
            if item in _WIDTHS:
                self._skip(count * _WIDTHS[item])
            elif item == _STRING:
                for _ in range(count):
                    self._text(_MAX_TEXT)
            else:
                raise self._fail(f"an array of kind {item}")
        else:
            raise self._fail(f"a value of kind {kind}")

    def _tensors(self, count: int, alignment: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        found: dict[str, tuple[int, int]] = {}
        for number in range(count):
            self._what = f"tensor {number}"
            name = self._text(_MAX_NAME)
            self._what = f"tensor {name!r:.80}"
            dimensions = self._number("I")
            if dimensions > 4:
                raise self._fail(f"{dimensions} dimensions, more than 4")
            size = [self._number("Q") for _ in range(dimensions)]
            kind, offset = self._number("I"), self._number("Q")
            values = math.prod(size)
            if name in found:
                raise self._fail("a second tensor of the name")
            try:
                per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (KeyError, ValueError):
                raise self._fail(f"values of kind {kind}") from None
            if size and size[0] % per_block:
                raise self._fail(f"rows of {size[0]} values, no multiple of {per_block}")
            found[name] = (offset, values // per_block * block_bytes)
        start = -(-self._file.tell() // alignment) * alignment
        for name, (offset, length) in found.items():
            self._what = f"tensor {name!r:.80}"
            if start + offset + length > self._total:
                raise self._fail(f"{length} bytes at {offset} beyond the file's end")
            if offset % alignment:
                raise self._fail(f"an offset of {offset}, no multiple of the alignment {alignment}")
        places = sorted((offset, offset + length, name) for name, (offset, length) in found.items())
        for (_, end, first), (begin, _, second) in itertools.pairwise(places):
            if begin < end:
                self._what = f"tensor {second!r:.80}"
                raise self._fail(f"values that overlap those of {first!r:.80}")

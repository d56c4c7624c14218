"""A HF folder's safetensors files, whose headers are checked before a value is read."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint.hf_folder import HfFolder, shards
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import JSON_LIMIT, parse_json

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
"""Name of each storage dtype in a header."""
_HEADER_LIMIT = JSON_LIMIT


class SafetensorsFolder(HfFolder):
    """``config.json`` and one or several safetensors files of a HF folder.

    Raises:
        MinitronError: files that are missing, damaged, or that say something else than their index.
    """

    NAMES = ("model", "safetensors")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            for file, names in shards(path, *self.NAMES):
                self._read_header(file, names)
        except BaseException:
            self.close()
            raise

    def _read_header(self, file: str, names: set[str] | None) -> None:
        """Check and note where each tensor lies; the format is 8 bytes of length, JSON, then raw values."""
        path = self._path / file
        stream, size = self._open(file, "safetensors")
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise MinitronError(f"{path}: expected a safetensors header, found a truncated or foreign file")
        if length > _HEADER_LIMIT:
            raise MinitronError(
                f"{path}: expected a safetensors header of at most {_HEADER_LIMIT} bytes, found {length}"
            )
        header = parse_json(stream.read(length), f"{path}: safetensors header")
        header.pop("__metadata__", None)
        for name in sorted(names - set(header)) if names is not None else ():
            raise MinitronError(f"{path}: expected the tensor '{name}' that the index promises, found none")
        ranges = []
        for name, entry in header.items():
            code, shape, begin, end = _header_entry(entry, f"{path}: tensor '{name}'")
            if end - begin != math.prod(shape) * _DTYPES[code].itemsize:
                raise MinitronError(
                    f"{path}: tensor '{name}' must have {math.prod(shape)} values, found {end - begin} bytes"
                )
            if 8 + length + end > size:
                raise MinitronError(f"{path}: the file is truncated inside tensor '{name}'")
            ranges.append((begin, end, name))
            self._note(name, (file, 8 + length + begin, end - begin), shape, _DTYPES[code])
        for (_, end, first), (begin, _, second) in itertools.pairwise(sorted(ranges)):
            if begin < end:
                raise MinitronError(f"{path}: tensors '{first}' and '{second}' must not overlap")


def _header_entry(entry: Any, what: str) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype code, size, begin and end of one tensor in a safetensors header."""
    entry = entry if isinstance(entry, dict) else {}
    code, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or code not in _DTYPES:
        raise MinitronError(f"{what} must be one of {', '.join(_DTYPES)}, found {code!r:.40}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(shape) > 8 or len(offsets) != 2:
        raise MinitronError(f"{what} must have a size of at most 8 dimensions and two offsets, found others")
    for number in (*shape, *offsets):
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise MinitronError(f"{what} must have sizes and offsets from 0 on, found {number!r:.40}")
    return code, tuple(shape), offsets[0], offsets[1]

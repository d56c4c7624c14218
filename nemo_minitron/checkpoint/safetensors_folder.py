"""A HF folder's ``config.json`` and safetensors files, whose headers are checked before a value is read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from nemo_minitron.checkpoint import tokenizer_files
from nemo_minitron.checkpoint.archive import read_exactly
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import JSON_LIMIT, parse_json

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in _DTYPES.items()}
"""Name of each storage dtype in a header."""
_HEADER_LIMIT = JSON_LIMIT
_BLOCK = 16 << 20  # bytes of two tensors that are compared


class SafetensorsFolder:
    """``config.json`` and one or several safetensors files of a HF folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else None
        self._files: dict[str, IO[bytes]] = {}
        self._where: dict[str, tuple[str, int, int]] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        try:
            for file, names in self._shards():
                self._read_header(file, names)
        except BaseException:
            self.close()
            raise

    def _shards(self) -> Iterator[tuple[str, set[str] | None]]:
        """File names, with the tensors that the index promises in each (None without an index)."""
        index = self._path / "model.safetensors.index.json"
        if (self._path / "model.safetensors").is_file():
            yield "model.safetensors", None
            return
        if not index.is_file():
            pickled = sorted(p.name for p in self._path.glob("pytorch_model*.bin"))
            found = f"{pickled[0]}" if pickled else "neither"
            if pickled:  # it is a pickle, which could run code when it is read
                found += ", which is not read; save the model again with save_pretrained(..., safe_serialization=True)"
            raise MinitronError(f"{self._path}: expected model.safetensors or {index.name}, found {found}")
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise MinitronError(f"{index}: expected a weight_map, found none")
        for file in sorted(set(map(str, weights.values()))):
            if Path(file).name != file or file == ".." or not file.isprintable():
                raise MinitronError(f"{index}: expected plain file names in weight_map, found {file!r}")
            yield file, {name for name, place in weights.items() if place == file}

    def _read_header(self, file: str, names: set[str] | None) -> None:
        """Check and note where each tensor lies; the format is 8 bytes of length, JSON, then raw values."""
        path = self._path / file
        if not path.is_file():
            raise MinitronError(f"{path}: expected a safetensors file, found none")
        self._files[file] = stream = path.open("rb")
        size = path.stat().st_size
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
            if name in self._where:
                raise MinitronError(f"{path}: tensor '{name}' must be there once, found also in {self._where[name][0]}")
            ranges.append((begin, end, name))
            self._where[name] = (file, 8 + length + begin, end - begin)
            self.sizes[name], self.dtypes[name] = shape, _DTYPES[code]
        for (_, end, first), (begin, _, second) in itertools.pairwise(sorted(ranges)):
            if begin < end:
                raise MinitronError(f"{path}: tensors '{first}' and '{second}' must not overlap")

    def get(self, name: str) -> torch.Tensor:
        file, start, count = self._where[name]
        values = torch.empty(count, dtype=torch.uint8)
        read_exactly(self._files[file], start, values.numpy().data, f"{self._path / file}: tensor '{name}'")
        return values.view(self.dtypes[name]).reshape(self.sizes[name])

    def equal(self, first: str, second: str) -> bool:
        if (self.sizes[first], self.dtypes[first]) != (self.sizes[second], self.dtypes[second]):
            return False
        (file, start, count), (other, other_start, _) = self._where[first], self._where[second]
        for at in range(0, count, _BLOCK):
            blocks = [bytearray(min(_BLOCK, count - at)) for _ in range(2)]
            read_exactly(self._files[file], start + at, memoryview(blocks[0]), f"{self._path / file}: '{first}'")
            read_exactly(
                self._files[other], other_start + at, memoryview(blocks[1]), f"{self._path / other}: '{second}'"
            )
            if blocks[0] != blocks[1]:
                return False
        return True

    def tokenizer_folder(self) -> Path | None:
        return self._path if tokenizer_files.tokenizer_files(self._path) else None

    def save_tokenizer(self, folder: Path) -> None:
        tokenizer_files.copy_tokenizer(self._path, folder)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise MinitronError(f"{path}: expected at most {JSON_LIMIT} bytes of JSON, found {path.stat().st_size}")
        data = path.read_bytes()
    except OSError as error:
        raise MinitronError(f"{path}: expected a JSON file, found: {error.strerror}") from None
    return parse_json(data, str(path))

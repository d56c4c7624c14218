"""What every HF folder has, however its weights are stored: configs, a tokenizer, and names of the files of weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch

from nemo_minitron.checkpoint import tokenizer_files
from nemo_minitron.checkpoint.archive import read_exactly
from nemo_minitron.checkpoint.buffers import Buffers
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import read_json

_BLOCK = 16 << 20  # bytes of two tensors that are compared


class HfFolder:
    """A HF folder whose tensors a subclass finds; implements ``hf.TensorSource``.

    Attributes:
        sizes, dtypes: of each tensor, by HF's name.
        _where: file, first byte and number of bytes of each; _files: the open files, by name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else None
        self._files: dict[str, IO[bytes]] = {}
        self._where: dict[str, tuple[str, int, int]] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._buffers = Buffers()

    def _open(self, file: str, kind: str) -> tuple[IO[bytes], int]:
        """A file of the folder and its length."""
        path = self._path / file
        if not path.is_file():
            raise MinitronError(f"{path}: expected a {kind} file, found none")
        try:
            self._files[file] = stream = path.open("rb")
        except OSError as error:
            raise MinitronError(f"{path}: expected a readable file, found: {error.strerror}") from None
        return stream, path.stat().st_size

    def _note(self, name: str, place: tuple[str, int, int], size: tuple[int, ...], dtype: torch.dtype) -> None:
        if name in self._where:
            where = self._path / place[0]
            raise MinitronError(f"{where}: tensor '{name}' must be there once, found also in {self._where[name][0]}")
        self._where[name], self.sizes[name], self.dtypes[name] = place, size, dtype

    def get(self, name: str) -> torch.Tensor:
        """One tensor, as its file has it."""
        values = self._buffers.take(self._where[name][2])
        self._read(name, 0, values)
        return values.view(self.dtypes[name]).reshape(self.sizes[name])

    def joined(
        self, names: Sequence[str], pieces: Iterable[tuple[int, slice, slice]], size: Sequence[int]
    ) -> torch.Tensor | None:
        """Rows of several tensors read into one of ``size``, as :func:`nemo_minitron.checkpoint.fuse.pieces` says.

        None where they have several dtypes or do not lie in their files as they are.
        """
        dtype = self.dtypes[names[0]]
        if any(self.dtypes[name] != dtype or not self._lies_whole(name) for name in names):
            return None
        values = self._buffers.take(math.prod(size) * dtype.itemsize).view(size[0], -1)
        for part, rows, canonical in pieces:
            self._read(names[part], rows.start * values.shape[1], values[canonical].view(-1))
        return values.view(-1).view(dtype).reshape(tuple(size))

    def _lies_whole(self, name: str) -> bool:
        """Whether a tensor's values lie in its file in order, without gaps."""
        return True

    def _read(self, name: str, start: int, values: torch.Tensor) -> None:
        """Fill ``values``, uint8, from byte ``start`` of a tensor."""
        file, begin, _ = self._where[name]
        read_exactly(self._files[file], begin + start, values.numpy().data, f"{self._path / file}: tensor '{name}'")

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same, bit by bit; a block of each is in memory."""
        if (self.sizes[first], self.dtypes[first]) != (self.sizes[second], self.dtypes[second]):
            return False
        if self._where[first] == self._where[second]:
            return True
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

    def rounded(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Values in the dtype of the tensor of that name."""
        return tensor.to(self.dtypes[name])

    def tokenizer_folder(self) -> Path | None:
        """The folder itself, where it has a tokenizer."""
        return self._path if tokenizer_files.tokenizer_files(self._path) else None

    def save_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files."""
        tokenizer_files.copy_tokenizer(self._path, folder)

    def close(self) -> None:
        """Release the files."""
        for file in self._files.values():
            file.close()


def shards(folder: Path, stem: str, suffix: str) -> Iterator[tuple[str, set[str] | None]]:
    """Names of a folder's files of weights, with the tensors that an index promises in each (None without an index).

    These are ``STEM.SUFFIX``, else those of ``STEM.SUFFIX.index.json``, else a complete set
    ``STEM-0000i-of-0000n.SUFFIX``; nothing where the folder has none of them. Other files are not guessed at.

    Raises:
        MinitronError: an index that names files elsewhere, a set with a file missing, or two sets.
    """
    index = folder / f"{stem}.{suffix}.index.json"
    if (folder / f"{stem}.{suffix}").is_file():
        yield f"{stem}.{suffix}", None
    elif index.is_file():
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise MinitronError(f"{index}: expected a weight_map, found none")
        for file in sorted(set(map(str, weights.values()))):
            if Path(file).name != file or file == ".." or not file.isprintable():
                raise MinitronError(f"{index}: expected plain file names in weight_map, found {file!r:.80}")
            yield file, {name for name, place in weights.items() if place == file}
    else:
        yield from ((file, None) for file in _complete_set(folder, stem, suffix))


def _complete_set(folder: Path, stem: str, suffix: str) -> list[str]:
    """Names of the files of a numbered set, of which none is missing; an empty list without any."""
    form = re.compile(rf"{stem}-(\d{{5}})-of-(\d{{5}})\.{suffix}")
    found = [match for path in folder.iterdir() if (match := form.fullmatch(path.name))]
    totals = sorted({match[2] for match in found})
    if len(totals) > 1:
        both = " and ".join(f"{stem}-…-of-{total}.{suffix}" for total in totals[:2])
        raise MinitronError(f"{folder}: expected one set of shards without an index, found {both}")
    for total in totals:
        expected = [f"{stem}-{number:05d}-of-{total}.{suffix}" for number in range(1, int(total) + 1)]
        names = sorted(match[0] for match in found)
        missing = next((name for name in expected if name not in names), None)
        if missing is not None or len(names) != len(expected):
            odd = f"no {missing}" if missing else f"{names[0]}"
            raise MinitronError(f"{folder}: expected the shards 1 to {int(total)} of {int(total)}, found {odd}")
        return expected
    return []

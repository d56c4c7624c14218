"""A HF folder's ``pytorch_model.bin`` files: pickles, read without unpickling them.

What ``torch.save`` writes is a zip whose pickle says where in which storage each tensor lies. :mod:`record` reads that
with stand-ins for the parts of a tensor, and refuses every other name; no code of the file can run. A tensor is read
from its place when it is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nemo_minitron.checkpoint.archive import read_exactly
from nemo_minitron.checkpoint.hf_folder import HfFolder, shards
from nemo_minitron.checkpoint.record import RecordError, View, describe_dict
from nemo_minitron.errors import MinitronError

_AGAIN = "load it with transformers where you trust it, and save it again with save_pretrained"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PytorchBinFolder(HfFolder):
    """``config.json`` and ``pytorch_model.bin``, or its shards, of a HF folder.

    Tensors that share their values (tied ones) are views of the same bytes, and equal without being read.

    Raises:
        MinitronError: files that are missing, older than torch 1.6, damaged, of anything but a dict of tensors, or that
            lack what their index promises.
    """

    NAMES = ("pytorch_model", "bin")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._views: dict[str, View] = {}
        try:
            for file, names in shards(path, *self.NAMES):
                self._describe(file, names)
        except BaseException:
            self.close()
            raise

    def _describe(self, file: str, names: set[str] | None) -> None:
        path = self._path / file
        stream, length = self._open(file, "pytorch_model.bin")

        def read(start: int, size: int) -> bytes:
            if not 0 <= start <= start + size <= length:
                raise RecordError("expected a whole zip, found its end")
            return os.pread(stream.fileno(), size, start)

        if length >= 4 and read(0, 4) != b"PK\x03\x04":
            raise MinitronError(f"{path}: expected a zip as torch has written since 1.6, found another file; {_AGAIN}")
        try:
            views = describe_dict(read, length)
        except RecordError as error:
            raise MinitronError(f"{path}: expected the tensors of a model: {error}") from None
        for name in sorted(names - set(views)) if names is not None else ():
            raise MinitronError(f"{path}: expected the tensor '{name}' that the index promises, found none")
        for name, view in views.items():
            if view.dtype not in _DTYPES:
                found = str(view.dtype).removeprefix("torch.")
                raise MinitronError(f"{path}: tensor '{name}' must be float32, bfloat16 or float16, found {found}")
            self._note(name, (file, view.start, view.span * view.dtype.itemsize), view.size, view.dtype)
        self._views |= views

    def _lies_whole(self, name: str) -> bool:
        return self._views[name].is_contiguous

    def get(self, name: str) -> torch.Tensor:
        """One tensor in a memory of its own, contiguous."""
        view = self._views[name]
        if view.is_contiguous:
            return super().get(name)
        file, start, count = self._where[name]
        values = torch.empty(count, dtype=torch.uint8)
        read_exactly(self._files[file], start, values.numpy().data, f"{self._path / file}: tensor '{name}'")
        return values.view(view.dtype).as_strided(view.size, view.stride).contiguous()

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same, bit by bit."""
        one, other = self._views[first], self._views[second]
        if one.is_contiguous and other.is_contiguous:
            return super().equal(first, second)
        if (one.size, one.dtype) != (other.size, other.dtype):
            return False
        return torch.equal(*(self.get(name).view(torch.uint8) for name in (first, second)))

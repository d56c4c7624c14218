"""Records of ``torch.save``, of a tensor or of a dict of them, read in place without ``torch.load``.

A record is a zip of stored (never compressed) entries: ``NAME/data.pkl``, a pickle that describes the tensors, and
``NAME/data/0`` and its like, their values. What the pickle claims is checked before anything is allocated for it.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_minitron.checkpoint.pickles import InertUnpickler, NameCollector
from nemo_minitron.files.stored_zip import Read, ZipError, entries_of

_MAX_ENTRIES, _MAX_PICKLE = 64, 1 << 16
_MAX_FOREIGN_ENTRIES = 20_000
_MAX_TENSORS, _MAX_DICT_PICKLE = 100_000, 32 << 20
_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
_OTHER_STORAGES = {  # of buffers, which a caller refuses by their names where they have no place
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class RecordError(Exception):
    """What is wrong with a record."""


@dataclass(frozen=True)
class View:
    """A tensor as a record describes it: ``size`` and ``stride`` in values from byte ``start`` of the record."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def span(self) -> int:
        """Values from the first to the last."""
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    @property
    def is_contiguous(self) -> bool:
        """Whether the values lie in order, without gaps."""
        expected = 1
        for n, step in zip(reversed(self.size), reversed(self.stride), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True


def describe(read: Read, length: int) -> View:
    """Where the values of a record of ``length`` bytes lie.

    Raises:
        RecordError: not such a zip, compressed or overlong entries, a pickle that is damaged or that names anything
            but the parts of a tensor, values outside of their storage.
    """
    entries = _entries(read, length, _MAX_ENTRIES)
    prefix, described = _pickled(entries, read)
    tensor = _unpickled(described, _STORAGES)
    if not isinstance(tensor, _Tensor):
        raise RecordError(f"expected a tensor, found {type(tensor).__name__}")
    _check_byte_order(entries, prefix, read)
    return _view(tensor, entries, prefix)


def describe_dict(read: Read, length: int) -> dict[str, View]:
    """Where the values of each tensor lie in a file of ``length`` bytes that holds a dict of them by name, as a state
    dict is saved. Tensors may share their values.

    Raises:
        RecordError: as :func:`describe`; no such dict, or values of different storages that overlap in the file.
    """
    entries = _entries(read, length, _MAX_TENSORS)
    for (start, size), (following, _) in itertools.pairwise(sorted(entries.values())):
        if start + size > following:
            raise RecordError("expected entries one after the other, found two that overlap")
    prefix, described = _pickled(entries, read, _MAX_DICT_PICKLE)
    found = _unpickled(described, _STORAGES | _OTHER_STORAGES)
    if not isinstance(found, dict):
        raise RecordError(f"expected a dict of tensors by name, found {_kind(found)}")
    _check_byte_order(entries, prefix, read)
    views = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise RecordError(f"expected a dict of tensors by name, found {_kind(tensor)} at {name!r:.80}")
        try:
            views[name] = _view(tensor, entries, prefix)
        except RecordError as error:
            raise RecordError(f"tensor {name!r:.200}: {error}") from None
    return views


def _kind(found: object) -> str:
    return "a tensor" if isinstance(found, _Tensor) else type(found).__name__


def _check_byte_order(entries: dict[str, tuple[int, int]], prefix: str, read: Read) -> None:
    start, size = entries.get(f"{prefix}/byteorder", (0, 0))
    if size and read(start, min(size, 16)) != b"little":
        raise RecordError("expected little-endian values")


def _view(tensor: _Tensor, entries: dict[str, tuple[int, int]], prefix: str) -> View:
    """The tensor's place, once all of its numbers are borne out by its storage's entry."""
    for item in (*tensor.size, *tensor.stride, tensor.offset, tensor.storage.numel):
        if type(item) is not int or not 0 <= item < 1 << 62:
            raise RecordError(f"sizes, strides and offsets must be positive numbers, found {item!r:.40}")
    if len(tensor.size) != len(tensor.stride) or len(tensor.size) > 8:
        raise RecordError(f"expected as many strides as sizes, at most 8, found {len(tensor.size)}")
    place = entries.get(f"{prefix}/data/{tensor.storage.key}")
    if place is None:
        raise RecordError("expected its values, found none")
    dtype = tensor.storage.dtype
    view = View(dtype, tensor.size, tensor.stride, place[0] + tensor.offset * dtype.itemsize)
    if (tensor.offset + view.span) * dtype.itemsize > place[1] or math.prod(view.size) * dtype.itemsize > place[1]:
        raise RecordError(f"expected {math.prod(view.size)} values in its storage, found {place[1]} bytes")
    return view


def names_in(read: Read, length: int, limit: int) -> set[str]:
    """``module.name`` of everything that ``torch.load`` would import to read this record or file.

    Raises:
        RecordError: neither a zip of ``torch.save`` nor a bare pickle, or a pickle of more than ``limit`` bytes.
    """
    try:
        collector = NameCollector(pickled(read, length, limit))
        collector.read_all()
        return collector.names
    except pickle.UnpicklingError as error:
        raise RecordError(f"its pickle is refused: {error}") from None


def pickled(read: Read, length: int, limit: int) -> bytes:
    """The pickle of a file or record of ``torch.save``, or of a bare one.

    Raises:
        RecordError: neither a zip of ``torch.save`` nor a bare pickle, or a pickle of more than ``limit`` bytes.
    """
    if read(0, min(length, 4)) != b"PK\x03\x04":
        if length > limit:
            raise RecordError(f"expected a pickle of at most {limit} bytes, found {length}")
        return read(0, length)
    return _pickled(_entries(read, length, _MAX_FOREIGN_ENTRIES), read, limit)[1]


# ------------------------------------------------------------------------------------------------------- the pickle


class _Sealed:
    """What a pickle may make, and not change afterwards."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state of a tensor has no place in it")


@dataclass(frozen=True)
class _Storage(_Sealed):
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor(_Sealed):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without storage has no place in it")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *rest: Any) -> Any:
    return data


class _OrderedDict(dict[Any, Any]):
    """Takes the attributes of a state dict (versions of its modules), and does nothing with them."""

    def __setstate__(self, state: Any) -> None: ...


class _RecordUnpickler(InertUnpickler):
    def __init__(self, data: bytes, storages: Mapping[str, torch.dtype]) -> None:
        super().__init__(data)
        self._storages = storages

    def stand_in(self, module: str, name: str) -> Any:
        if module == "torch" and name in self._storages:
            return self._storages[name]
        return {
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "collections.OrderedDict": _OrderedDict,
            "torch.Size": tuple,
        }.get(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)):
            raise pickle.UnpicklingError("a reference to anything but values has no place in it")
        return _Storage(pid[1], str(pid[2]), pid[4])


def _pickled(entries: dict[str, tuple[int, int]], read: Read, limit: int = _MAX_PICKLE) -> tuple[str, bytes]:
    """Prefix of the entries' names, and the pickle."""
    found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise RecordError(f"expected one data.pkl, found {len(found)}")
    start, size = entries[found[0]]
    if size > limit:
        raise RecordError(f"expected a pickle of at most {limit} bytes, found {size}")
    return found[0].partition("/")[0], read(start, size)


def _unpickled(data: bytes, storages: Mapping[str, torch.dtype]) -> Any:
    try:
        return _RecordUnpickler(data, storages).read_all()
    except pickle.UnpicklingError as error:
        raise RecordError(f"its pickle is refused: {error}") from None


def _entries(read: Read, length: int, limit: int) -> dict[str, tuple[int, int]]:
    try:
        return entries_of(read, length, limit)
    except ZipError as error:
        raise RecordError(str(error)) from None

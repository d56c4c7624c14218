"""Megatron-Core's ``torch_dist`` distributed checkpoint inside a ``.nemo``, read and written without a process group.

On disk (Megatron-Core 0.13, ``dist_checkpointing`` format torch_dist 1): ``.metadata`` is a pickle of
``torch.distributed.checkpoint.metadata.Metadata``; each ``__R_N.distcp`` is a concatenation of ``torch.save`` records,
found by offset and length; ``common.pt`` holds what is not sharded; ``metadata.json`` names the backends. Layers are
stacked as ``[L, ...]`` under one key, one or more chunks per layer, depending on the grid that wrote it.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import torch

from nemo_minitron.checkpoint.archive import Archive, ArchiveWriter, read_member
from nemo_minitron.errors import MinitronError

WEIGHTS = "model_weights/"
_METADATA_LIMIT = 1 << 30
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Chunk:
    """One saved piece of a tensor: where it lies in the tensor, and where its record lies on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    member: str
    start: int
    length: int


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


# ---------------------------------------------------------------------------------------------------------- reading


class _Inert:
    """Stands for every class of a pickled ``Metadata``: it keeps what it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


_INERT_MODULES = (
    "torch.distributed.checkpoint.",
    "torch.distributed._shard.",
    "megatron.core.dist_checkpointing.",
)


class _MetadataUnpickler(pickle.Unpickler):
    """Never imports or calls what a pickle names: metadata classes become :class:`_Inert`, the rest is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_INERT_MODULES) and "." not in name:
            return _Inert
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) in (("torch.serialization", "_get_layout"), ("torch", "device")):
            return str
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath", "Path"):
            return _Inert
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"'{module}.{name}' has no place in checkpoint metadata")


def read_index(archive: Archive, where: str) -> dict[str, Stored]:
    """Every tensor of the checkpoint by its full key, from ``.metadata`` alone.

    Raises:
        MinitronError: another format (zarr, legacy ``model_weights.ckpt``), or metadata that is damaged or that
            names anything but metadata classes.
    """
    names = set(archive.names())
    _check_format(archive, names, where)
    blob = read_member(archive, f"{WEIGHTS}.metadata", _METADATA_LIMIT)
    try:
        metadata = _MetadataUnpickler(io.BytesIO(blob)).load()
        return _index(metadata, names)
    except pickle.UnpicklingError as error:
        raise MinitronError(f"{where}: {WEIGHTS}.metadata is refused: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, EOFError) as error:
        raise MinitronError(
            f"{where}: expected checkpoint metadata in {WEIGHTS}.metadata, found damage: {error}"
        ) from None


def _check_format(archive: Archive, names: set[str], where: str) -> None:
    if any(name.endswith("model_weights.ckpt") for name in names):
        raise MinitronError(
            f"{where}: expected a Megatron-Core distributed checkpoint (torch_dist), found legacy model_weights.ckpt; "
            "save it once with mcore_gpt and dist_ckpt_format=torch_dist"
        )
    if not any(name.startswith(WEIGHTS) for name in names):
        raise MinitronError(f"{where}: expected the member {WEIGHTS}, found none")
    backend = "torch_dist" if f"{WEIGHTS}.metadata" in names else "zarr"
    if f"{WEIGHTS}metadata.json" in names:
        try:
            described = json.loads(read_member(archive, f"{WEIGHTS}metadata.json", 1 << 20))
            backend = described.get("sharded_backend", backend)
        except (ValueError, AttributeError):
            raise MinitronError(f"{where}: expected JSON in {WEIGHTS}metadata.json, found something else") from None
    if backend != "torch_dist":
        raise MinitronError(
            f"{where}: expected dist_ckpt_format torch_dist, found {backend}; NeMo converts it when it loads and saves "
            "the model with model.dist_ckpt_format=torch_dist"
        )
    if f"{WEIGHTS}.metadata" not in names:
        raise MinitronError(f"{where}: expected the member {WEIGHTS}.metadata, found none")


def _index(metadata: Any, names: set[str]) -> dict[str, Stored]:
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, info in metadata.storage_data.items():
        if getattr(index, "offset", None) is not None:  # absent for objects
            place = (f"{WEIGHTS}{info.relative_path}", int(info.offset), int(info.length))
            places[index.fqn, tuple(index.offset)] = place
    tensors = {}
    for key, stored in metadata.state_dict_metadata.items():
        if not hasattr(stored, "chunks"):
            continue
        chunks = []
        for chunk in stored.chunks:
            offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
            member, start, length = places[key, offsets]
            if member not in names:
                raise ValueError(f"no member '{member}' for {key}")
            chunks.append(Chunk(offsets, sizes, member, start, length))
        properties = stored.properties
        dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
        tensors[key] = Stored(tuple(map(int, stored.size)), dtype, tuple(chunks))
    return tensors


def read_tensor(archive: Archive, key: str, stored: Stored, window: tuple[slice, ...]) -> torch.Tensor:
    """Assemble ``window`` (start:stop per dimension) of a tensor from the chunks that overlap it.

    Raises:
        MinitronError: a record that is damaged or of another size or dtype than promised, or a hole between chunks.
    """
    if stored.dtype not in _DTYPES:
        raise MinitronError(f"tensor '{key}': expected float32, bfloat16 or float16, found {stored.dtype}")
    shape = [w.stop - w.start for w in window]
    whole = [c for c in stored.chunks if all(o == w.start and s == w.stop - w.start for o, s, w in _zip(c, window))]
    if whole:
        return _record(archive, key, stored, whole[0])
    out, filled = torch.empty(shape, dtype=stored.dtype), 0
    for chunk in stored.chunks:
        low = [max(o, w.start) for o, _, w in _zip(chunk, window)]
        high = [min(o + s, w.stop) for o, s, w in _zip(chunk, window)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        record = _record(archive, key, stored, chunk)
        source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
        target = tuple(slice(a - w.start, b - w.start) for a, b, w in zip(low, high, window, strict=True))
        out[target] = record[source]
        filled += math.prod(b - a for a, b in zip(low, high, strict=True))
    if filled != out.numel():
        raise MinitronError(f"tensor '{key}': expected {out.numel()} values in its chunks, found {filled}")
    return out


def _zip(chunk: Chunk, window: tuple[slice, ...]) -> Iterator[tuple[int, int, slice]]:
    return zip(chunk.offsets, chunk.sizes, window, strict=True)


def _record(archive: Archive, key: str, stored: Stored, chunk: Chunk) -> torch.Tensor:
    """One ``torch.save`` record, read without unpickling code; sizes are checked before and after."""
    needed = math.prod(chunk.sizes) * stored.dtype.itemsize
    if chunk.length < needed:
        raise MinitronError(f"tensor '{key}': expected {needed} bytes in its record, found {chunk.length}")
    window = archive.window(chunk.member, chunk.start, chunk.length)
    try:
        with zipfile.ZipFile(io.BufferedReader(window)) as entries:  # a compressed entry could expand without bound
            if sum(entry.file_size for entry in entries.infolist()) > chunk.length:
                raise zipfile.BadZipFile("it is compressed")
        window = archive.window(chunk.member, chunk.start, chunk.length)
        record = torch.load(io.BufferedReader(window), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MinitronError(f"tensor '{key}': its record in {chunk.member} is damaged: {reason}") from None
    if not isinstance(record, torch.Tensor) or tuple(record.shape) != chunk.sizes or record.dtype != stored.dtype:
        found = f"{tuple(record.shape)} {record.dtype}" if isinstance(record, torch.Tensor) else type(record).__name__
        raise MinitronError(f"tensor '{key}': expected a record of {chunk.sizes} {stored.dtype}, found {found}")
    return record.detach()


# ---------------------------------------------------------------------------------------------------------- writing


class _Counter(io.RawIOBase):
    """What ``torch.save`` needs of a file, with the bytes counted from where it was made."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count = file, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        done = self._file.write(data)
        self.count += done
        return done


class DistcpWriter:
    """Streams tensors into ``model_weights/`` as one rank of Megatron-Core would save them.

    Tensors go to ``__0_0.distcp`` in the order of the calls; ``close`` writes the metadata, so a load by Megatron-Core
    at any TP x PP finds every key that its local layer spec asks for, and none more.
    """

    def __init__(self, archive: ArchiveWriter) -> None:
        self._archive = archive
        self._stack = ExitStack()
        self._out = _Counter(self._stack.enter_context(archive.member(f"{WEIGHTS}__0_0.distcp")))
        self._tensors: dict[
            str, tuple[tuple[int, ...], torch.dtype, list[tuple[tuple[int, ...], tuple[int, ...]]]]
        ] = {}
        self._objects: list[str] = []
        self._places: list[tuple[str, tuple[int, ...] | None, int, int]] = []

    def add(self, key: str, tensor: torch.Tensor, size: tuple[int, ...], offsets: tuple[int, ...]) -> None:
        """Write one chunk of ``key``, whose whole size is ``size``, at ``offsets``."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # torch.save writes a view's whole storage
        self._places.append((key, offsets, *self._write(lambda out: torch.save(tensor, out))))
        self._tensors.setdefault(key, (size, tensor.dtype, []))[2].append((offsets, tuple(tensor.shape)))

    def add_empty_state(self, key: str, layer: int, num_layers: int) -> None:
        """The empty ``_extra_state`` that Megatron-Core's local linear layers save, as a sharded object."""
        key = f"{key}._extra_state/shard_{layer}_{num_layers}"
        self._places.append((key, None, *self._write(lambda out: torch.save([None], out))))
        self._objects.append(key)

    def _write(self, save: Callable[[Any], None]) -> tuple[int, int]:
        start = self._out.count
        save(self._out)
        return start, self._out.count - start

    def close(self) -> None:
        """Write ``.metadata``, ``common.pt`` and ``metadata.json``."""
        self._stack.close()
        self._archive.add(f"{WEIGHTS}.metadata", self._metadata())
        common = io.BytesIO()
        torch.save({}, common)
        self._archive.add(f"{WEIGHTS}common.pt", common.getvalue())
        described = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        self._archive.add(f"{WEIGHTS}metadata.json", json.dumps(described).encode())

    def _metadata(self) -> bytes:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        state: dict[str, Any] = {
            key: TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype),
                size=torch.Size(size),
                chunks=[ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in sorted(chunks)],
            )
            for key, (size, dtype, chunks) in self._tensors.items()
        }
        state |= {key: BytesStorageMetadata() for key in self._objects}
        storage = {
            MetadataIndex(key, None if offsets is None else torch.Size(offsets)): _StorageInfo(
                "__0_0.distcp", start, length
            )
            for key, offsets, start, length in self._places
        }
        metadata = Metadata(state_dict_metadata=state, planner_data=None, storage_data=storage)
        metadata.mcore_data = {key: {} for key in self._tensors}  # type: ignore[attr-defined]  # Megatron-Core's own
        return pickle.dumps(metadata)


def stored_bytes(index: Mapping[str, Stored]) -> int:
    """Bytes of all tensors, for progress bars and free-space checks."""
    return sum(math.prod(s.size) * s.dtype.itemsize for s in index.values())

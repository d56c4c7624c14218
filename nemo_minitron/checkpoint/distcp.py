"""Megatron-Core's ``torch_dist`` distributed checkpoint, read and written without a process group.

On disk (Megatron-Core 0.13 to 0.19, ``dist_checkpointing`` format torch_dist 1): ``.metadata`` is a pickle of
``torch.distributed.checkpoint.metadata.Metadata``; each ``__R_N.distcp`` is a concatenation of ``torch.save`` records,
found by offset and length; ``common.pt`` holds what is not sharded (from 0.19 on, a record of a ``.distcp`` does);
``metadata.json`` names the backends. Layers are stacked as ``[L, ...]`` under one key, one or more chunks per layer,
depending on the grid that wrote it. In a ``.nemo`` all of it lies in ``model_weights/``.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, Any

import torch

from nemo_minitron.checkpoint.allowed import check_names
from nemo_minitron.checkpoint.archive import Archive, ArchiveWriter, read_member
from nemo_minitron.checkpoint.pickles import DTYPES, Inert, InertUnpickler
from nemo_minitron.checkpoint.record import Read, RecordError, describe
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line, parse_json

WEIGHTS = "model_weights/"
# What Transformer Engine keeps for FP8, the angles of RoPE, and a training's state: none of it is the model's
_NEUTRAL = re.compile(r".*\._extra_state(/.*)?|.*rotary_pos_emb\.inv_freq|(chained_\d+\.)?optimizer[._].*|rng_state.*")
METADATA_LIMIT = 64 << 20
_MAX_CHUNKS, _MAX_DIMENSIONS, _MAX_OVERLAPPING = 1_000_000, 8, 4096
STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Chunk:
    """One saved piece of a tensor: where it lies in the tensor, and where its record lies on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    member: str
    start: int
    length: int


Place = tuple[str, int, int]
"""Member, first byte and length of one record."""


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint."""

    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


# ---------------------------------------------------------------------------------------------------------- reading


_INERT_MODULES = (
    "torch.distributed.checkpoint.",
    "torch.distributed._shard.",
    "megatron.core.dist_checkpointing.",
)
_STAND_INS = {
    "torch.Size": tuple,
    "collections.OrderedDict": dict,
    "torch.serialization._get_layout": str,
    "torch.device": str,
} | dict.fromkeys(
    (f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath", "Path")),
    Inert,
)


class MetadataUnpickler(InertUnpickler):
    """Metadata classes become inert, the rest is refused."""

    def stand_in(self, module: str, name: str) -> Any:
        if module.startswith(_INERT_MODULES) and "." not in name:
            return Inert
        return DTYPES.get(name) if module == "torch" and name in DTYPES else _STAND_INS.get(f"{module}.{name}")


def read_index(archive: Archive, where: str) -> dict[str, Stored]:
    """Every tensor of a ``.nemo``'s model by its full key, from ``.metadata`` alone.

    Raises:
        MinitronError: another format (zarr, legacy ``model_weights.ckpt``); what :func:`read_metadata` refuses.
    """
    _check_format(archive, set(archive.names()), where)
    return read_metadata(archive, where, WEIGHTS)[0]


def read_metadata(archive: Archive, where: str, folder: str) -> tuple[dict[str, Stored], dict[str, Place]]:
    """Every tensor of the model by its full key, and the places of the objects beside them, from ``.metadata`` alone.

    Args:
        folder: beginning of the members' names, ``model_weights/`` or nothing.

    Raises:
        MinitronError: metadata that are damaged, name other classes, or have chunks that do not fit members and
            tensors; code in a member that only Megatron or NeMo would read (``common.pt``, ``_extra_state``).
    """
    blob = read_member(archive, f"{folder}.metadata", METADATA_LIMIT)
    try:
        metadata = MetadataUnpickler(blob).read_all()
        tensors, objects = _index(metadata, archive, folder)
    except pickle.UnpicklingError as error:
        raise MinitronError(f"{where}: {folder}.metadata is refused: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise MinitronError(
            f"{where}: expected checkpoint metadata in {folder}.metadata, found damage: {one_line(error)}"
        ) from None
    _check_unread(archive, objects, where, folder)
    return tensors, objects


def _check_unread(archive: Archive, objects: Mapping[str, Place], where: str, folder: str) -> None:
    """Refuse code in what is not read here, but would be by Megatron and NeMo."""
    for name in archive.names():
        if name.startswith(folder) and name.endswith(".pt"):
            check_names(part(archive, name, 0, archive.size(name)), archive.size(name), f"{where}: member '{name}'")
    for key, (name, offset, length) in objects.items():
        check_names(part(archive, name, offset, length), length, f"{where}: member '{name}' with '{key}'")


def part(archive: Archive, member: str, offset: int, length: int) -> Read:
    """Bytes of one record of a member."""

    def read(start: int, size: int) -> bytes:
        if not 0 <= start <= start + size <= length:
            raise RecordError(f"expected bytes {start}..{start + size} in it, found {length}")
        return archive.read(member, offset + start, size)

    return read


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
        described = parse_json(
            read_member(archive, f"{WEIGHTS}metadata.json", 1 << 20), f"{where}: {WEIGHTS}metadata.json"
        )
        backend = str(described.get("sharded_backend", backend))
    if backend != "torch_dist":
        raise MinitronError(
            f"{where}: expected dist_ckpt_format torch_dist, found {backend}; NeMo converts it when it loads and saves "
            "the model with model.dist_ckpt_format=torch_dist"
        )
    if f"{WEIGHTS}.metadata" not in names:
        raise MinitronError(f"{where}: expected the member {WEIGHTS}.metadata, found none")


def _index(metadata: Any, archive: Archive, folder: str) -> tuple[dict[str, Stored], dict[str, Place]]:
    """Tensors, and the places of objects, by key; raises what a malformed object makes Python raise."""
    names = set(archive.names())
    places: dict[tuple[str, tuple[int, ...]], Place] = {}
    objects: dict[str, Place] = {}
    for index, info in metadata.storage_data.items():
        member, start, length = f"{folder}{info.relative_path}", int(info.offset), int(info.length)
        if member not in names:
            raise ValueError(f"no member '{member}' for {index.fqn}")
        size = archive.size(member)
        if start < 0 or length < 0 or start + length > size:
            raise ValueError(f"bytes {start}..{start + length} of member '{member}', which has {size}, for {index.fqn}")
        if getattr(index, "offset", None) is not None:  # absent for objects
            places[str(index.fqn), _numbers(index.offset)] = (member, start, length)
        else:
            objects[str(index.fqn)] = (member, start, length)
    tensors: dict[str, Stored] = {}
    total = 0
    for key, stored in metadata.state_dict_metadata.items():
        if not hasattr(stored, "chunks") or _NEUTRAL.fullmatch(str(key)):
            continue
        total += len(stored.chunks)
        if total > _MAX_CHUNKS:
            raise ValueError(f"more than {_MAX_CHUNKS} chunks")
        properties = stored.properties
        dtype = properties.state[0] if hasattr(properties, "state") else properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no dtype for {key}")
        tensors[str(key)] = _stored(str(key), _numbers(stored.size), dtype, stored.chunks, places)
    return tensors, objects


def _stored(key: str, size: tuple[int, ...], dtype: torch.dtype, found: Any, places: Mapping[Any, Any]) -> Stored:
    chunks, volume = [], 0
    for chunk in found:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        member, start, length = places[key, offsets]
        if len(offsets) != len(size) or any(o + s > n for o, s, n in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a chunk of {sizes} at {offsets} in {key} of {size}")
        if length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(f"{length} bytes in member '{member}' for a chunk of {sizes} in {key}")
        volume += math.prod(sizes)
        chunks.append(Chunk(offsets, sizes, member, start, length))
    if volume != math.prod(size):
        raise ValueError(f"chunks of {volume} values together in {key} of {size}")
    return Stored(size, dtype, tuple(chunks))


def _numbers(values: Any) -> tuple[int, ...]:
    """Sizes or offsets: a few numbers that are not negative."""
    if not isinstance(values, (tuple, list)) or len(values) > _MAX_DIMENSIONS:
        raise ValueError(f"no sizes or offsets of at most {_MAX_DIMENSIONS} dimensions")
    if any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise ValueError(f"sizes or offsets that are not numbers from 0 on: {values!r:.80}")
    return tuple(values)


def read_tensor(archive: Archive, key: str, stored: Stored, window: tuple[slice, ...]) -> torch.Tensor:
    """Assemble ``window`` (start:stop per dimension) of a tensor from the chunks that overlap it.

    Raises:
        MinitronError: a record that is damaged or of another size or dtype than promised, or a hole between chunks.
    """
    whole = [c for c in stored.chunks if all(o == w.start and s == w.stop - w.start for o, s, w in _zip(c, window))]
    if whole:
        return _record(archive, key, stored, whole[0])
    out, filled = torch.empty([w.stop - w.start for w in window], dtype=stored.dtype), 0
    boxes: list[tuple[slice, ...]] = []
    for chunk in stored.chunks:
        low = [max(o, w.start) for o, _, w in _zip(chunk, window)]
        high = [min(o + s, w.stop) for o, s, w in _zip(chunk, window)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, chunk.offsets, strict=True))
        target = tuple(slice(a - w.start, b - w.start) for a, b, w in zip(low, high, window, strict=True))
        if any(_overlap(target, box) for box in boxes) or len(boxes) > _MAX_OVERLAPPING:
            raise MinitronError(f"tensor '{key}': its chunks in {chunk.member} overlap, or there are too many")
        boxes.append(target)
        out[target] = _record(archive, key, stored, chunk)[source]
        filled += math.prod(b - a for a, b in zip(low, high, strict=True))
    if filled != out.numel():
        raise MinitronError(f"tensor '{key}': expected {out.numel()} values in its chunks, found {filled}")
    return out


def _overlap(a: tuple[slice, ...], b: tuple[slice, ...]) -> bool:
    return all(x.start < y.stop and y.start < x.stop for x, y in zip(a, b, strict=True))


def _zip(chunk: Chunk, window: tuple[slice, ...]) -> Iterator[tuple[int, int, slice]]:
    return zip(chunk.offsets, chunk.sizes, window, strict=True)


def _record(archive: Archive, key: str, stored: Stored, chunk: Chunk) -> torch.Tensor:
    """One ``torch.save`` record, its sizes checked before anything is allocated."""

    try:
        view = describe(part(archive, chunk.member, chunk.start, chunk.length), chunk.length)
        if (view.size, view.dtype) != (chunk.sizes, stored.dtype):
            raise RecordError(f"expected {chunk.sizes} {stored.dtype}, found {view.size} {view.dtype}")
    except RecordError as error:
        raise MinitronError(f"tensor '{key}': its record in {chunk.member} is damaged: {error}") from None
    memory = archive.buffers.take(view.span * view.dtype.itemsize)
    archive.read_into(chunk.member, chunk.start + view.start, memory.numpy().data)
    values = memory.view(view.dtype)
    if view.is_contiguous:
        return values.view(view.size)
    return values.as_strided(view.size, view.stride).contiguous()


# ---------------------------------------------------------------------------------------------------------- writing


class _Counter(io.RawIOBase):
    """What ``torch.save`` needs of a file, with the bytes counted from where it was made."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.count = file, 0
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            done = self._file.write(data)
        except OSError as error:
            self.failure = error  # torch.save makes a RuntimeError of its own of it
            raise
        self.count += done
        return done


class DistcpWriter:
    """Streams tensors into a folder of an archive as one rank of Megatron-Core would save them.

    Tensors go to ``__0_0.distcp`` in the order of the calls; ``close`` writes the metadata, so a load by Megatron-Core
    at any TP x PP finds every key that its local layer spec asks for, and none more.

    Args:
        folder: of the weights in the archive, ending in ``/``.
        common: what is not sharded, for ``common.pt``.
    """

    def __init__(self, archive: ArchiveWriter, folder: str = WEIGHTS, common: Mapping[str, Any] | None = None) -> None:
        self._archive, self._folder, self._common = archive, folder, dict(common or {})
        self._stack = ExitStack()
        self._out = _Counter(self._stack.enter_context(archive.member(f"{folder}__0_0.distcp")))
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
        try:
            save(self._out)
        except RuntimeError:
            if self._out.failure is not None:
                raise self._out.failure from None
            raise
        return start, self._out.count - start

    def abort(self) -> None:
        """Release the file that was being written, which may not even take its end any more."""
        with suppress(OSError):
            self._stack.close()

    def close(self) -> None:
        """Write ``.metadata``, ``common.pt`` and ``metadata.json``."""
        self._stack.close()
        self._archive.add(f"{self._folder}.metadata", self._metadata())
        common = io.BytesIO()
        torch.save(self._common, common)
        self._archive.add(f"{self._folder}common.pt", common.getvalue())
        described = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        self._archive.add(f"{self._folder}metadata.json", json.dumps(described).encode())

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

"""Canonical tensors one by one: their order in files, names, digests, and the cast with which they are written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import EMBEDDING, VOCAB, Parameter, layer_parameters, parameters
from nemo_minitron.model.shape import ModelShape


def each_tensor(shape: ModelShape) -> Iterator[tuple[Parameter, int | None]]:
    """Yield the slots of ``layout.slots`` layer by layer: embedding, all rows of layer 0, …, final norm, output.

    Files are written in this order, so that one layer lies together.
    """
    yield EMBEDDING, None
    for layer in range(shape.num_layers):
        for row in layer_parameters(shape):
            yield row, layer
    for parameter in parameters(shape):
        if not parameter.per_layer and parameter != EMBEDDING:
            yield parameter, None


def tensor_name(parameter: Parameter, layer: int | None) -> str:
    """Name of one canonical tensor in messages, checksums and fingerprints: ``decoder.layers.3.….weight``."""
    return parameter.memory_name(layer, local=False)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor as bytes, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 over dtype, size and little-endian bytes."""
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def fingerprint(reader: Any, known: Mapping[str, str] | None = None) -> str:
    """sha256 of a model's canonical tensors, for any reader with ``shape`` and ``tensor``; see NemoReader.

    Args:
        known: digests of tensors that need not be read, by name; tables are read in any case, without their padding.
    """
    digest = hashlib.sha256()
    for parameter, layer in each_tensor(reader.shape):
        name, table = tensor_name(parameter, layer), parameter.axes[0] == VOCAB
        found = None if table or known is None else known.get(name)
        if found is None:
            rows = slice(0, reader.shape.vocab_size) if table else None
            found = tensor_digest(reader.tensor(parameter, layer, rows))
        digest.update(f"{name} ".encode())
        digest.update(found.encode())
    return digest.hexdigest()


def check_digest(
    path: str | Path, expected: Mapping[str, str], parameter: Parameter, layer: int | None, tensor: torch.Tensor
) -> None:
    """Compare one tensor with what its file's sidecar says of it."""
    name, found = tensor_name(parameter, layer), tensor_digest(tensor)
    if expected.get(name) != found:
        raise MinitronError(f"{path}: tensor '{name}' must have sha256 {expected.get(name)}, found {found}")


def checked_cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """``tensor`` in ``dtype`` on the CPU; NaN and infinity, also when the cast makes them, stop with its name."""
    cast = tensor.detach().to("cpu", dtype)
    low, high = torch.aminmax(cast)  # one pass, and NaN shows in both; isfinite().all() takes ten times as long
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(cast)).sum())
        raise MinitronError(f"tensor '{name}' must be finite in {str(dtype)[6:]}, found {bad} NaN or infinite values")
    return cast


class Taken:
    """Which canonical tensors a writer has taken: each once, of its size, and in the end every one.

    Args:
        shape: the model's; a table of the vocabulary may come with V or with Vp rows.
        destination: what is written, in messages.
    """

    def __init__(self, shape: ModelShape, destination: Path) -> None:
        self._shape, self._destination = shape, destination
        self._names: set[str] = set()

    def check(self, parameter: Parameter, tensor: torch.Tensor, layer: int | None) -> str:
        """Name of a tensor that may be taken; :meth:`add` it once it is written.

        Raises:
            MinitronError: it has another size, or was taken before.
        """
        name, size = tensor_name(parameter, layer), parameter.size(self._shape)
        if name in self._names:
            raise MinitronError(f"{self._destination}: tensor '{name}' must be written once, found a second write")
        unpadded = (self._shape.vocab_size, *size[1:])
        found = tuple(tensor.shape)
        if found not in ((size, unpadded) if parameter.axes[0] == VOCAB else (size,)):
            raise MinitronError(f"{self._destination}: tensor '{name}' must have the size {size}, found {found}")
        return name

    def add(self, name: str) -> None:
        """Note a tensor that is written."""
        self._names.add(name)

    def check_all(self) -> None:
        """Refuse to end without every tensor of the model.

        Raises:
            MinitronError: naming the first that is missing.
        """
        names = [tensor_name(parameter, layer) for parameter, layer in each_tensor(self._shape)]
        missing = [name for name in names if name not in self._names]
        if missing:
            raise MinitronError(
                f"{self._destination}: expected every tensor, found none for '{missing[0]}' (of {len(missing)})"
            )

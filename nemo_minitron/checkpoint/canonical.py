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


def fingerprint(reader: Any) -> str:
    """sha256 of a model's canonical tensors, for any reader with ``shape`` and ``tensor``; see NemoReader."""
    digest = hashlib.sha256()
    for parameter, layer in each_tensor(reader.shape):
        rows = slice(0, reader.shape.vocab_size) if parameter.axes[0] == VOCAB else None
        digest.update(f"{tensor_name(parameter, layer)} ".encode())
        digest.update(tensor_digest(reader.tensor(parameter, layer, rows)).encode())
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

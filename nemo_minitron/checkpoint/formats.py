"""Formats of checkpoints: how each is recognised and opened, a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_minitron.checkpoint import gguf_parts
from nemo_minitron.checkpoint.kinds import refuse_other_kinds
from nemo_minitron.checkpoint.megatron_place import BRIDGE, MEGATRON, NEMO2, dress_of
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.parameter import Parameter
from nemo_minitron.model.shape import ModelShape


class Reader(Protocol):
    """A checkpoint as canonical tensors, opened lazily; a context manager.

    Attributes:
        path: what was opened.
        shape: the architecture; Vp is the rows of the stored table.
        dtype: the widest storage dtype among the model's tensors.
        hf_config, generation_config: ``config.json`` and ``generation_config.json`` that the checkpoint carries, or
            that its model came from; None where it has none.
    """

    path: Path
    shape: ModelShape
    dtype: torch.dtype

    @property
    def hf_config(self) -> Mapping[str, Any] | None: ...
    @property
    def generation_config(self) -> Mapping[str, Any] | None: ...

    def num_bytes(self) -> int:
        """Bytes of the model's tensors in :attr:`dtype`."""

    def tensor(self, parameter: Parameter, layer: int | None = None, rows: slice | None = None) -> torch.Tensor:
        """One canonical tensor in its storage dtype, or the ``rows`` of its first dimension."""

    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that the checkpoint carries; None without one."""

    def save_tokenizer(self, folder: Path) -> bool:
        """Write a tokenizer that lies in no files of its own as an HF folder; False where there is none such."""

    def close(self) -> None:
        """Release the files."""

    def __enter__(self) -> Reader: ...
    def __exit__(self, *exc: object) -> None: ...


class Writer(Protocol):
    """Takes canonical tensors, each once; its exit is that of :class:`nemo_minitron.files.staging.AllOrNothing`."""

    destination: Path

    def write(self, parameter: Parameter, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Write one canonical tensor, cast to the writer's dtype."""

    def __enter__(self) -> Writer: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: as ``convert.format`` has it.
        what: words for it, in messages.
        recognised: whether a path that exists is one.
        open: its reader.
        open_as: its reader, told NeMo's keys of the shape; None where a checkpoint always says its own.
    """

    name: str
    what: str
    recognised: Callable[[Path], bool]
    open: Callable[[Path], Reader]
    open_as: Callable[[Path, Mapping[str, Any]], Reader] | None = None


def _nemo(path: Path) -> Reader:
    from nemo_minitron.checkpoint.nemo_file import NemoReader

    return NemoReader(path)


def _hf(path: Path) -> Reader:
    from nemo_minitron.checkpoint.hf import HfReader

    return HfReader(path)


def _megatron(path: Path, model: Mapping[str, Any] | None = None) -> Reader:
    from nemo_minitron.checkpoint.megatron_folder import MegatronReader

    return MegatronReader(path, model)


def _is_gguf(path: Path) -> bool:
    return bool(gguf_parts.inside(path)) if path.is_dir() else gguf_parts.is_gguf(path)


FORMATS: tuple[Format, ...] = (
    Format("nemo", "a .nemo", lambda p: p.suffix == ".nemo" or (p / "model_config.yaml").is_file(), _nemo),
    Format("hf", "a HF folder with config.json", lambda p: (p / "config.json").is_file(), _hf),
    Format("gguf", "a .gguf file", _is_gguf, _hf),
    Format("nemo2", "a folder of NeMo 2", lambda p: dress_of(p) == NEMO2, _megatron, _megatron),
    Format("bridge", "a folder of Megatron-Bridge", lambda p: dress_of(p) == BRIDGE, _megatron, _megatron),
    Format("megatron", "a folder of Megatron-LM", lambda p: dress_of(p) == MEGATRON, _megatron, _megatron),
)
"""Every format that is read, in the order in which they are asked whether a path is theirs."""


def format_of(path: Path) -> Format:
    """The format of a checkpoint that exists.

    Raises:
        MinitronError: nothing there, or nothing that is read here; it says what lies there where that is known.
    """
    wanted = ", ".join(entry.what for entry in FORMATS[:-1]) + f" or {FORMATS[-1].what}"
    if not path.exists():
        raise MinitronError(f"{path}: expected {wanted}, found nothing")
    for entry in FORMATS:
        if entry.recognised(path):
            return entry
    refuse_other_kinds(path, wanted)
    raise MinitronError(f"{path}: expected {wanted}, found neither")


def named(name: str) -> Format:
    """The format of this name, for a path that does not have its own name yet."""
    return next(entry for entry in FORMATS if entry.name == name)


def open_checkpoint(path: str | Path) -> Reader:
    """Open a checkpoint of whatever format it is.

    Raises:
        MinitronError: as :func:`format_of`, and as the format's reader.
    """
    return format_of(Path(path)).open(Path(path))

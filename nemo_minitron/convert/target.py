"""What a conversion is asked for, and the formats that can be written: a row for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint.formats import Reader, Writer
from nemo_minitron.config.schema import CONVERT_FORMATS, ConvertConfig
from nemo_minitron.errors import MinitronError


@dataclass(frozen=True)
class Request:
    """What a writer is made from, beside the source.

    Attributes:
        path: the destination.
        dtype: storage dtype of the output.
        make_vocab_size_divisible_by: as NeMo and Megatron have it; None for the format's own rule.
        max_shard_size: of HF's safetensors files.
        tokenizer: section with ``type`` or ``model`` that names one for a source that carries none.
        quantization: of a GGUF's matrices, in place of ``dtype``.
        check: called with the path of the finished output before it appears at its place.
        format: a key of the table of what is written.
        transformer_engine: whether Megatron's formats get the empty states of its modules as well.
        temporary: whether the output is removed again, and nothing is to be said of its architecture.
    """

    path: Path
    dtype: torch.dtype
    make_vocab_size_divisible_by: int | None = None
    max_shard_size: int | str = ConvertConfig.max_shard_size
    tokenizer: Mapping[str, Any] | None = None
    quantization: str | None = None
    check: Callable[[Path], None] | None = None
    format: str = "hf"
    transformer_engine: bool = False
    temporary: bool = False


_MEGATRON = ("bridge", "megatron", "nemo2")
_MODULES = {"nemo": "to_nemo", "hf": "to_hf", "gguf": "to_gguf"} | dict.fromkeys(_MEGATRON, "to_megatron")
"""Module of each format that is written; its ``writer`` takes the reader, the request and a stack that outlives it."""
_PADDED = ("nemo", *_MEGATRON)
"""Formats whose vocabulary tables may have rows of padding."""


def format_for(path: Path, asked: str | None, source: str) -> str:
    """Format of the output: the one that is asked for, else by the name, else the other of ``.nemo`` and HF.

    Args:
        source: format of the input.

    Raises:
        MinitronError: a format that is not written.
    """
    name = asked
    if name is None:
        by_suffix = {".nemo": "nemo", ".gguf": "gguf"}.get(path.suffix.lower())
        name = by_suffix or ("hf" if source == "nemo" else "nemo")
    if name not in _MODULES:
        raise MinitronError(f"format must be one of {', '.join(CONVERT_FORMATS)}, found '{name}'")
    return name


def open_writer(name: str, reader: Reader, request: Request, stack: ExitStack) -> Writer:
    """A writer of the format ``name``.

    Raises:
        MinitronError: a key of the request that means nothing in this format; whatever the writer finds wrong.
    """
    if request.make_vocab_size_divisible_by is not None and name not in _PADDED:
        raise MinitronError(f"make_vocab_size_divisible_by must be absent towards {name}, whose tables have no padding")
    if request.transformer_engine and name not in _MEGATRON:
        raise MinitronError(f"transformer_engine must be false towards {name}; it is for {', '.join(_MEGATRON)}")
    if request.quantization is not None and name != "gguf":
        raise MinitronError(f"quantization must be absent towards {name}, found '{request.quantization}'")
    if request.max_shard_size != ConvertConfig.max_shard_size and name != "hf":
        raise MinitronError(
            f"max_shard_size must be absent towards {name}, found '{request.max_shard_size}'; it is of the safetensors "
            "files of a HF folder"
        )
    writer: Writer = import_module(f"nemo_minitron.convert.{_MODULES[name]}").writer(reader, request, stack)
    return writer

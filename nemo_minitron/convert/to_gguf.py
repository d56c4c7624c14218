"""Towards one GGUF, for llama.cpp and what is built on it."""

from __future__ import annotations

from contextlib import ExitStack

from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.gguf_write import GgufWriter
from nemo_minitron.convert.target import Request
from nemo_minitron.convert.tokenizer import for_export


def writer(reader: Reader, request: Request, stack: ExitStack) -> GgufWriter:
    """A writer of ``request.path``."""
    tokenizer, ids, _ = for_export(reader, request.tokenizer, stack)
    return GgufWriter(
        request.path,
        reader.shape,
        request.dtype,
        quantization=request.quantization,
        tokenizer=tokenizer,
        token_ids={**(reader.hf_config or {}), **ids},
        check=request.check,
    )
